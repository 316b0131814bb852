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
import sys
from itertools import product

from fullpipe.cli.console import print_table
from fullpipe.cli.lists import decimals, integers
from fullpipe.methods import WITH_DEPTH
from fullpipe.options import Options
from fullpipe.prompts import choose
from fullpipe_lab.asking import Real
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt
from fullpipe_lab.turns import measure


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
            prompts = [(one.id, on.encode([{"role": "user", "content": one.text}]))
                       for one in choose(None, 1)[: asked.prompts + 1]]
            rows, found = measure(on, prompts, asked.methods,
                                  {method: offered[method in WITH_DEPTH] for method in asked.methods},
                                  repeats=asked.repeats, tokens=asked.tokens)
        cells += [{"stages": stages, "link_ms": ms, **one} for one in rows]
        samples.append(found)
        for one in cells[-len(rows):]:
            print(one, file=sys.stderr, flush=True)
    print_table(list(cells[0]), [[str(value) for value in one.values()] for one in cells])
    if asked.write:
        settings = {name: getattr(asked, name) for name in ("model", "draft", "dtype", "device", "tokens", "repeats",
                                                           "widths", "depths")}
        save_receipt(study_receipt("wall_clock", settings | {"cells": cells}, samples), STUDIES / f"{asked.write}.json")
    if not all(one["identical"] for one in cells):
        sys.exit("two texts differ")


if __name__ == "__main__":
    main()
