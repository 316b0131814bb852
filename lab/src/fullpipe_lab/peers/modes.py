"""Ours beside the better of llama.cpp's modes on each prompt: with hindsight, the best that its user can have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean, median
from typing import Any

from fullpipe_lab.peers.records import PeerResult, PeerSample

ALL = "all"
_OURS, _THEIRS = "fullpipe", "llamacpp"
Times = dict[str, float]
"""Seconds by prompt."""


def better_mode(results: Sequence[PeerResult]) -> list[dict[str, Any]]:
    """A row for each of our peers and set of prompts, over the prompts that ours and one of theirs answered.

    A set is a file of prompts; with one file, a category. Of each prompt the median over its answers counts.
    tbt_ms, theirs_tbt_ms: time between tokens, medians over the prompts. tokens_per_s, theirs_tokens_per_s: from the
    question to the last token, means over the prompts. tbt_ahead, ahead: theirs over ours in time, geometric means
    over the prompts; above 1 ours is ahead. best: on how many prompts which mode was their best between tokens.
    """
    between, whole = _measured(results, lambda one: one.tbt_s), _measured(results, _per_token)
    sets = _sets(results)
    rows = []
    for ours in (result for result in results if result.name in between and result.name.startswith(_OURS)):
        best, chosen = _best(between)
        quick, _ = _best(whole)
        for name in (*dict.fromkeys(sets.values()), ALL):
            asked = [prompt for prompt, set_ in sets.items() if name in (set_, ALL)]
            if row := _row(asked, between[ours.name], best, whole[ours.name], quick):
                modes = Counter(chosen[prompt] for prompt in asked if prompt in chosen)
                rows.append({"peer": ours.title, "set": name, **row,
                             "best": ", ".join(f"{mode} {count}" for mode, count in modes.most_common())})
    return rows


def _row(asked: Sequence[str], ours: Times, theirs: Times, ours_whole: Times, theirs_whole: Times) -> dict[str, Any]:
    """What is told of some prompts; nothing where none was answered by both."""
    both = [prompt for prompt in asked if prompt in ours and prompt in theirs]
    if not both:
        return {}
    return {"prompts": len(both),
            "tbt_ms": round(1e3 * median(ours[one] for one in both), 2),
            "theirs_tbt_ms": round(1e3 * median(theirs[one] for one in both), 2),
            "tbt_ahead": round(geometric_mean(theirs[one] / ours[one] for one in both), 3),
            "tokens_per_s": round(fmean(1 / ours_whole[one] for one in both), 2),
            "theirs_tokens_per_s": round(fmean(1 / theirs_whole[one] for one in both), 2),
            "ahead": round(geometric_mean(theirs_whole[one] / ours_whole[one] for one in both), 3)}


def _measured(results: Sequence[PeerResult], measure: Callable[[PeerSample], float | None]) -> dict[str, Times]:
    """By peer and prompt, the median of what could be measured."""
    found: dict[str, Times] = {}
    for result in results:
        values = {prompt: [value for one in samples if (value := measure(one))]
                  for prompt, samples in result.by_prompt.items()}
        if times := {prompt: median(seconds) for prompt, seconds in values.items() if seconds}:
            found[result.name] = times
    return found


def _best(times: Mapping[str, Times]) -> tuple[Times, dict[str, str]]:
    """The least of llama.cpp's times on each prompt, and which mode took it."""
    found: dict[str, tuple[float, str]] = {}
    for name, by_prompt in times.items():
        if name.startswith(_THEIRS):
            for prompt, seconds in by_prompt.items():
                found[prompt] = min(found.get(prompt, (seconds, name)), (seconds, name))
    return ({prompt: seconds for prompt, (seconds, _) in found.items()},
            {prompt: name for prompt, (_, name) in found.items()})


def _per_token(sample: PeerSample) -> float | None:
    return sample.times[-1] / len(sample.times) if len(sample.times) > 1 else None


def _sets(results: Sequence[PeerResult]) -> dict[str, str]:
    """The set of each prompt."""
    tasks = {sample.prompt: sample.task for result in results for sample in result.samples}
    files = {prompt: prompt.split("/")[0] for prompt in tasks}
    return files if len(set(files.values())) > 1 else tasks
