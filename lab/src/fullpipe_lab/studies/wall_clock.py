"""What link latency does to `pp`, and what filling the pipeline does about it: real processes, the wall clock.

    python -m fullpipe_lab.studies.wall_clock [--stages 4,8] [--links 5,20,50] [--drafts ngram] [--write]

Stage processes with emulated links, one compute thread each; engine and draft sit with stage 0. Per cell, `pp` and
`fullpipe` alternate on the same running pipeline, prompt by prompt; a pair that is compared ran back to back. The width
is the best of --widths on the first prompt, tried in the same pipeline before anything is counted. Stages compete for
this machine's cores when several have work: that is in the figures. The prompts ask to edit a given text
(edit_prompts.jsonl), which n-gram guesses well.

Ends with 1 when two texts differ. `--write` keeps the receipt in lab/receipts/wall_clock.json.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fullpipe.cli.console import print_table
from fullpipe.cli.lists import decimals, integers
from fullpipe.options import Options
from fullpipe.prompts import read_prompts
from fullpipe.request import SamplingParams
from fullpipe_lab.asking import Real
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt

PROMPTS = Path(__file__).with_name("edit_prompts.jsonl")


@dataclass(frozen=True)
class Run:
    """One answer. tbt_s: seconds between tokens."""

    prompt: str
    method: str
    width: int | None
    tokens: tuple[int, ...]
    tbt_s: float
    hits: int
    misses: int


def ask(on: Real, prompt: tuple[str, list[int]], method: str, width: int | None, tokens: int) -> Run:
    on.use(method, width=width)
    (said,) = on.ask([prompt[1]], SamplingParams(max_tokens=tokens))
    return Run(prompt[0], method, width, tuple(said.tokens), said.stats.tbt_s, said.stats.hits, said.stats.misses)


def cell(on: Real, prompts: Sequence[tuple[str, list[int]]], widths: Sequence[int], repeats: int,
         tokens: int) -> tuple[dict[str, Any], list[tuple[Run, Run]]]:
    """`pp` against `fullpipe` on one running pipeline. Times in milliseconds; the speedup is the median over pairs."""
    ask(on, prompts[0], "pp", None, tokens)  # warm: first touches of weights and caches
    tried = {width: ask(on, prompts[0], "fullpipe", width, tokens) for width in widths}
    width = min(tried, key=lambda width: tried[width].tbt_s)
    pairs = []
    for turn, (index, prompt) in product(range(repeats), enumerate(prompts)):
        order = [("pp", None), ("fullpipe", width)]
        found = {method: ask(on, prompt, method, w, tokens)
                 for method, w in (order[::-1] if (turn + index) % 2 else order)}
        pairs.append((found["pp"], found["fullpipe"]))
    speedups = [plain.tbt_s / ours.tbt_s for plain, ours in pairs]
    hits, misses = sum(ours.hits for _, ours in pairs), sum(ours.misses for _, ours in pairs)
    return {"width": width, "tbt_pp_ms": round(1e3 * statistics.median(plain.tbt_s for plain, _ in pairs), 2),
            "tbt_fullpipe_ms": round(1e3 * statistics.median(ours.tbt_s for _, ours in pairs), 2),
            "speedup": round(statistics.median(speedups), 3),
            "speedup_range": [round(min(speedups), 3), round(max(speedups), 3)],
            "hit_rate": round(hits / max(hits + misses, 1), 4),
            "identical": all(plain.tokens == ours.tokens for plain, ours in pairs)}, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--stages", default="4,8")
    parser.add_argument("--links", default="5,20,50", help="latencies in ms")
    parser.add_argument("--drafts", nargs="+", default=["ngram"])
    parser.add_argument("--widths", default="2,4,8")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cells, samples = [], []
    for stages, ms, draft in product(integers(asked.stages, "--stages"), decimals(asked.links, "--links"),
                                     asked.drafts):
        with Real(Options.of(model=asked.model, stages=stages, link_ms=ms, draft=draft, method="fullpipe",
                             dtype=asked.dtype, threads=1)) as on:
            prompts = [(one.id, on.encode([{"role": "user", "content": one.text}]))
                       for one in read_prompts(PROMPTS, asked.prompts)]
            found, pairs = cell(on, prompts, integers(asked.widths, "--widths"), asked.repeats, asked.tokens)
        cells.append({"stages": stages, "link_ms": ms, "draft": draft, **found})
        samples.append([[asdict(one) for one in pair] for pair in pairs])
        print(cells[-1], file=sys.stderr, flush=True)
    print_table(list(cells[0]), [[str(value) for value in one.values()] for one in cells])
    if asked.write:
        settings = {name: getattr(asked, name) for name in ("model", "dtype", "tokens", "repeats")}
        save_receipt(study_receipt("wall_clock", settings | {"cells": cells}, samples), STUDIES / "wall_clock.json")
    if not all(one["identical"] for one in cells):
        sys.exit("two texts differ")


if __name__ == "__main__":
    main()
