"""What taps and the draft module cost, measured in seconds on this machine."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
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
        for method, width in (("spd", 1), ("fullpipe", 8)):
            key = f"module/n{n}/{method}"
            if key not in journal:
                journal.add(key, {"stages": n, "method": method, "width": width, **module_cost(
                    model, modules.draft("main", n), n, method, width, prompts, params)})
                print(key, summary_of(journal.rows[key]), file=sys.stderr, flush=True)


def taps_cost(model: str, draft: str, stages: int, prompts: Sequence[FilePrompt],
              params: SamplingParams) -> dict[str, Any]:
    """Two pipelines of processes side by side, one with a draft station that is sent taps; `pp` on both in turns, so
    nothing is drafted. Seconds between tokens of every answer, in pairs that ran back to back."""
    common: dict[str, Any] = {"stages": stages, "method": "pp", "dtype": DTYPE, "pipeline": "distributed", "threads": 1}
    pairs = []
    with LLM(model, draft="none", **common) as plain, LLM(model, draft=draft, **common) as tapped:
        for llm in (plain, tapped):
            llm.chat(asked(prompts[0]), params)
        for turn in range(REPEATS):
            for index, prompt in enumerate(prompts):
                order = (plain, tapped) if (turn + index) % 2 else (tapped, plain)
                said = {id(llm): llm.chat(asked(prompt), params) for llm in order}
                assert said[id(plain)].token_ids == said[id(tapped)].token_ids
                pairs.append([said[id(llm)].timing["tbt_s"] for llm in (plain, tapped)])
        count, size = taps_of(tapped)
    ratios = [with_taps / without for without, with_taps in pairs]
    print(f"n = {stages}: taps add {statistics.median(ratios) - 1:.1%}", file=sys.stderr, flush=True)
    return {"pairs_s": pairs, "taps": count, "bytes": size, "answers": len(pairs)}


def module_cost(model: str, draft: str, stages: int, method: str, width: int, prompts: Sequence[FilePrompt],
                params: SamplingParams) -> dict[str, Any]:
    """Measured work of every station, each with this machine to itself for as long as it computes, and the bytes of
    taps by emitted token."""
    legs, emitted = Legs(), 0
    with LLM(model, draft=draft, stages=stages, method=method, width=width, dtype=DTYPE, threads=1,
             listeners=[legs]) as llm:
        llm.chat(asked(prompts[0]), params)
        legs.stays.clear()
        before = taps_of(llm)
        prompt_tokens = 0
        for prompt in prompts:
            said = llm.chat(asked(prompt), params)
            emitted += len(said.token_ids)
            prompt_tokens += said.usage["prompt_tokens"]
        after = taps_of(llm)
    return {"stays": legs.stays, "tokens": emitted, "prompt_tokens": prompt_tokens,
            "taps": after[0] - before[0], "bytes": after[1] - before[1]}


def taps_of(llm: LLM) -> tuple[int, int]:
    """Messages with hidden states that have reached the draft so far, and their bytes."""
    counter = llm._assembly.pipeline.taps  # type: ignore[attr-defined]
    return counter.count, counter.bytes


def summary_of(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds, medians: a stage (the slowest one), the draft; and what share of the stage's the draft's is."""
    medians = {name: 1e3 * statistics.median(seconds for _, seconds in stays) for name, stays in row["stays"].items()}
    draft = medians.pop("draft")
    return {"stage_ms": max(medians.values()), "draft_ms": draft, "share": draft / max(medians.values())}
