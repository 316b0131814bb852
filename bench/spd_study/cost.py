"""What taps and the draft module cost, measured in seconds on this machine."""

from __future__ import annotations

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

REPEATS = 4  # of every prompt, by either pipeline
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
    """Two pipelines of processes side by side, one with a draft station that is sent taps; `pp` on both in turns, so
    nothing is drafted. Seconds between tokens of every answer, in pairs that ran back to back; taps, their bytes, and
    the rows that they are of."""
    common: dict[str, Any] = {"stages": stages, "method": "pp", "dtype": DTYPE, "pipeline": "distributed", "threads": 1}
    pairs = []
    with LLM(model, draft="none", **common) as plain, LLM(model, draft=draft, **common) as tapped:
        for llm in (plain, tapped):
            rows = sum(llm.chat(asked(prompts[0]), params).usage.values()) - 1  # the last token is not computed
        for turn in range(REPEATS):
            for index, prompt in enumerate(prompts):
                order = (plain, tapped) if (turn + index) % 2 else (tapped, plain)
                said = {id(llm): llm.chat(asked(prompt), params) for llm in order}
                assert said[id(plain)].token_ids == said[id(tapped)].token_ids
                pairs.append([said[id(llm)].timing["tbt_s"] for llm in (plain, tapped)])
                rows += sum(said[id(tapped)].usage.values()) - 1
        tapped.use("spd")  # the draft's answer tells how much has come until then
        rows += sum(tapped.chat(asked(prompts[0]), replace(params, max_tokens=2)).usage.values())
        count, size = taps_of(tapped)
    ratios = [with_taps / without for without, with_taps in pairs]
    print(f"n = {stages}: taps add {statistics.median(ratios) - 1:.1%}", file=sys.stderr, flush=True)
    return {"pairs_s": pairs, "taps": count, "bytes": size, "rows": rows}


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
