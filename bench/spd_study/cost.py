"""What taps and the draft module cost, measured in seconds on this machine."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from spd_study.journal import Journal
from spd_study.measure import DTYPE, Modules, asked

from fullpipe import LLM, SamplingParams
from fullpipe.messages import Drafted, Event, Landed
from fullpipe.prompts import FilePrompt

REPEATS = 6  # of every prompt, by either pipeline
IN_PROCESS = (2, 4, 8, 15)


class Legs:
    """A listener: seconds of every stay at a station, and how many rows were computed; prompts left out."""

    def __init__(self) -> None:
        self.stays: dict[str, list[tuple[int, float]]] = {}

    def __call__(self, event: Event) -> None:
        legs = event.legs if isinstance(event, Landed) else [event.leg] if isinstance(event, Drafted) else []
        for leg in legs:
            if leg.nodes and min(leg.nodes) >= 0:
                self.stays.setdefault(leg.station, []).append((len(leg.nodes), leg.end - leg.start))


def run_cost(model: str, modules: Modules, prompts: Sequence[FilePrompt], tokens: int, stages: Sequence[int],
             journal: Journal) -> None:
    params = SamplingParams(max_tokens=tokens)
    for n in stages:
        if f"taps/n{n}" not in journal:
            journal.add(f"taps/n{n}", {"stages": n, **taps_cost(model, modules.draft("main", n), n, prompts, params)})
    for n in IN_PROCESS:
        for method, width, refresh in (("spd", 1, False), ("spd", 1, True), ("fullpipe", 8, True)):
            key = f"module/n{n}/{method}" + "/refresh" * refresh
            if key not in journal:
                journal.add(key, {"stages": n, "method": method, "width": width, "refresh": refresh, **module_cost(
                    model, modules.draft("main", n), n, method, width, refresh, prompts, params)})
                print(key, summary_of(journal.rows[key]), file=sys.stderr, flush=True)


def taps_cost(model: str, draft: str, stages: int, prompts: Sequence[FilePrompt],
              params: SamplingParams) -> dict[str, Any]:
    """What a draft station that is sent taps does to `pp`. pairs_s: seconds between tokens without and with it. Of two
    pipelines the one that was built later has been the faster one, whichever it was, so half of the pairs are of either
    order. control_s: the same of two pipelines without, the earlier one first: what is no larger than there is noise.
    """
    common: dict[str, Any] = {"stages": stages, "method": "pp", "dtype": DTYPE, "pipeline": "distributed", "threads": 1}
    load = os.getloadavg()[0]
    with LLM(model, draft="none", **common) as plain, LLM(model, draft=draft, **common) as tapped:
        pairs = in_turns(plain, tapped, prompts, params)
    with LLM(model, draft=draft, **common) as tapped, LLM(model, draft="none", **common) as plain:
        pairs += in_turns(plain, tapped, prompts, params)
        traffic = traffic_of(tapped, prompts, params)
    with LLM(model, draft="none", **common) as one, LLM(model, draft="none", **common) as other:
        control = in_turns(one, other, prompts, params)
    return {"pairs_s": pairs, "control_s": control, **traffic, "load": [load, os.getloadavg()[0]]}


def in_turns(one: LLM, other: LLM, prompts: Sequence[FilePrompt], params: SamplingParams) -> list[list[float]]:
    """Seconds between tokens of both, in pairs that ran back to back; each begins half of them."""
    for llm in (one, other):
        llm.chat(asked(prompts[0]), params)
    pairs = []
    for turn in range(REPEATS):
        for index, prompt in enumerate(prompts):
            order = (one, other) if (turn + index) % 2 else (other, one)
            said = {id(llm): llm.chat(asked(prompt), params) for llm in order}
            assert said[id(one)].token_ids == said[id(other)].token_ids
            pairs.append([said[id(llm)].timing["tbt_s"] for llm in (one, other)])
    return pairs


def traffic_of(tapped: LLM, prompts: Sequence[FilePrompt], params: SamplingParams) -> dict[str, int]:
    """Taps, their bytes, and the rows that they are of, of all that a pipeline on which `in_turns` ran was asked. The
    draft's answers tell how much has come, so one more answer is drafted for; a few of its rows may be cancelled."""
    once = [tapped.tokenizer.chat(asked(prompt)) for prompt in prompts]
    tapped.use("spd", refresh=False)
    told = tapped.chat(asked(prompts[0]), replace(params, max_tokens=8))
    rows = told.usage["prompt_tokens"] + told.speculation["launched_rows"]
    tapped.use("pp")
    lengths = [len(tokens) + len(tapped.generate([tokens], params)[0].token_ids) - 1 for tokens in once]
    count, size = taps_of(tapped)
    return {"taps": count, "bytes": size, "rows": rows + lengths[0] + REPEATS * sum(lengths)}


def module_cost(model: str, draft: str, stages: int, method: str, width: int, refresh: bool,
                prompts: Sequence[FilePrompt], params: SamplingParams) -> dict[str, Any]:
    """Measured work of every station, each with this machine to itself for as long as it computes, and the bytes of
    taps by emitted token."""
    legs, emitted = Legs(), 0
    with LLM(model, draft=draft, stages=stages, method=method, width=width, refresh=refresh, dtype=DTYPE,
             threads=1, listeners=[legs]) as llm:
        llm.chat(asked(prompts[0]), params)
        legs.stays.clear()
        before = taps_of(llm)
        for prompt in prompts:
            said = llm.chat(asked(prompt), params)
            emitted += len(said.token_ids)
        after = taps_of(llm)
    stays = {name: [(rows, round(seconds, 6)) for rows, seconds in found] for name, found in legs.stays.items()}
    slowest = max((name for name in stays if name != "draft"), key=lambda name: _median(stays[name]))
    return {"stays": {name: stays[name] for name in (slowest, "draft")}, "tokens": emitted,
            "median_s": {name: round(_median(found), 6) for name, found in stays.items()},
            "taps": after[0] - before[0], "bytes": after[1] - before[1]}


def _median(stays: Sequence[tuple[int, float]]) -> float:
    return statistics.median(seconds for _, seconds in stays)


def taps_of(llm: LLM) -> tuple[int, int]:
    """Messages with hidden states that have reached the draft so far, and their bytes."""
    counter = llm._assembly.pipeline.taps  # type: ignore[attr-defined]
    return counter.count, counter.bytes


def summary_of(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds, medians: a stage (the slowest one), the draft; and what share of the stage's the draft's is."""
    medians = {name: 1e3 * seconds for name, seconds in row["median_s"].items()}
    draft = medians.pop("draft")
    return {"stage_ms": max(medians.values()), "draft_ms": draft, "share": draft / max(medians.values())}
