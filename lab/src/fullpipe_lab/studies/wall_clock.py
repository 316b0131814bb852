"""What link latency does to `pp`, and what speculation does about it: real processes, the wall clock.

    python -m fullpipe_lab.studies.wall_clock [--model M] [--draft D] [--stages 4] [--links 25,100]
        [--methods chain pipedec fullpipe] [--device D] [--write [NAME]]

Stage processes with emulated links, one compute thread each (or all on --device); engine and draft sit with stage 0.
In every cell all methods take turns on the same running pipeline, prompt by prompt: what is compared ran one after the
other. `fullpipe` runs as it comes. Any other method has its best of --widths (chain: of --depths) on a prompt that is
not counted, tried in the same pipeline before. Stages and draft compete for this machine's cores when several have
work: that is in the figures. Prompts: the first of each category of the set that comes with Fullpipe.

Ends with 1 when two texts differ. `--write` keeps the receipt in lab/receipts, as wall_clock.json or NAME.json.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fullpipe.cli.console import print_table
from fullpipe.cli.lists import decimals, integers
from fullpipe.methods import WITH_DEPTH
from fullpipe.options import Options
from fullpipe.prompts import choose
from fullpipe.request import SamplingParams
from fullpipe_lab.asking import Real
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt

AS_IT_COMES = ("pp", "fullpipe")
Prompt = tuple[str, list[int]]


@dataclass(frozen=True)
class Run:
    """One answer. size: width, or depth, that the method was given; None: its own. tbt_s: seconds between tokens."""

    prompt: str
    method: str
    size: int | None
    tokens: tuple[int, ...]
    tbt_s: float
    hits: int
    misses: int


def ask(on: Real, prompt: Prompt, method: str, size: int | None, tokens: int) -> Run:
    option = "depth" if method in WITH_DEPTH else "width"
    on.use(method, **({} if size is None else {option: size}))
    (said,) = on.ask([prompt[1]], SamplingParams(max_tokens=tokens))
    return Run(prompt[0], method, size, tuple(said.tokens), said.stats.tbt_s, said.stats.hits, said.stats.misses)


def best_size(on: Real, prompt: Prompt, method: str, sizes: Sequence[int], tokens: int) -> int | None:
    if method in AS_IT_COMES:
        return None
    return min(sizes, key=lambda size: ask(on, prompt, method, size, tokens).tbt_s)


def turns(on: Real, prompts: Sequence[Prompt], sizes: dict[str, int | None], repeats: int,
          tokens: int) -> list[dict[str, Run]]:
    """All methods on every prompt; who begins changes from prompt to prompt."""
    found, order = [], list(sizes)
    for _, prompt in product(range(repeats), prompts):
        found.append({method: ask(on, prompt, method, sizes[method], tokens) for method in order})
        order = order[1:] + order[:1]
    return found


def row(method: str, found: Sequence[dict[str, Run]]) -> dict[str, Any]:
    """Times in milliseconds; the speedup is the median over prompts of pp's time between tokens over the method's."""
    speedups = [runs["pp"].tbt_s / runs[method].tbt_s for runs in found]
    hits, misses = sum(runs[method].hits for runs in found), sum(runs[method].misses for runs in found)
    return {"method": method, "size": found[0][method].size,
            "tbt_ms": round(1e3 * statistics.median(runs[method].tbt_s for runs in found), 1),
            "speedup": round(statistics.median(speedups), 2),
            "speedup_range": [round(min(speedups), 2), round(max(speedups), 2)],
            "hit_rate": round(hits / max(hits + misses, 1), 3),
            "over_best_other": over_best_other(method, found),
            "identical": all(runs[method].tokens == runs["pp"].tokens for runs in found)}


def over_best_other(method: str, found: Sequence[dict[str, Run]]) -> float:
    """All time between tokens, of the fastest of the other methods over that of this one."""
    spent = {name: sum(runs[name].tbt_s * (len(runs[name].tokens) - 1) for runs in found) for name in found[0]}
    return round(min(seconds for name, seconds in spent.items() if name != method) / spent[method], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu", help="of stages and draft, such as cuda")
    parser.add_argument("--stages", default="4")
    parser.add_argument("--links", default="25,100", help="one-way latencies in ms")
    parser.add_argument("--methods", nargs="+", default=["chain", "pipedec", "fullpipe"])
    parser.add_argument("--widths", default="1,2,4,8")
    parser.add_argument("--depths", default="2,3,4,6,8")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--write", nargs="?", const="wall_clock", metavar="NAME")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    offered = integers(asked.widths, "--widths"), integers(asked.depths, "--depths")
    cells, samples = [], []
    for stages, ms in product(integers(asked.stages, "--stages"), decimals(asked.links, "--links")):
        with Real(Options.of(model=asked.model, stages=stages, link_ms=ms, draft=asked.draft, method="fullpipe",
                             dtype=asked.dtype, threads=1, device=asked.device)) as on:
            *prompts, other = [(one.id, on.encode([{"role": "user", "content": one.text}]))
                               for one in choose(None, 1)[: asked.prompts + 1]]
            ask(on, other, "pp", None, 8)  # warm: first touches of weights and caches
            sizes = {"pp": None} | {method: best_size(on, other, method, offered[method in WITH_DEPTH],
                                                      asked.tokens // 2) for method in asked.methods}
            found = turns(on, prompts, sizes, asked.repeats, asked.tokens)
        for method in sizes:
            cells.append({"stages": stages, "link_ms": ms, **row(method, found)})
            print(cells[-1], file=sys.stderr, flush=True)
        samples.append([{method: asdict(run) for method, run in runs.items()} for runs in found])
    print_table(list(cells[0]), [[str(value) for value in one.values()] for one in cells])
    if asked.write:
        settings = {name: getattr(asked, name) for name in ("model", "draft", "dtype", "device", "tokens", "repeats",
                                                           "widths", "depths")}
        save_receipt(study_receipt("wall_clock", settings | {"cells": cells}, samples), STUDIES / f"{asked.write}.json")
    if not all(one["identical"] for one in cells):
        sys.exit("two texts differ")


if __name__ == "__main__":
    main()
