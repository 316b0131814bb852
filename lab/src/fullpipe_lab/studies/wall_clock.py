"""What link latency does to `pp`, and what filling the pipeline does about it: real processes, the wall clock.

    python bench/wall_clock.py [--stages 4 8] [--links 5 20 50] [--drafts ngram 0.6 0.8 0.95] [--tokens 48]
                               [--repeats 3] [--quick] [--write]

SmolLM2-135M in float32 over stage processes with emulated links (`fullpipe.pipeline.links`), one compute thread
each; engine and draft sit with stage 0. Per cell, `pp` and `fullpipe` alternate on the same running pipeline,
prompt by prompt; a pair that is compared ran back to back.

Drafts: `ngram`, on prompts that ask to edit a given text (bench/edit_prompts.jsonl); or a number: a scripted draft
that makes one guess per token and is right so often, on the same prompts' recorded tokens. A scripted draft costs
nothing, so that what the pipeline adds is seen apart from what a draft is worth.

The width is the best of --widths on the first prompt, tried in the same pipeline before anything is counted. Stages
compete for this machine's cores when several have work: that is in the wall-clock figures. Beside them stands what
the virtual clock predicts for machines that do not compete: the same engine and draft, with stage times by number
of rows measured here one stage at a time, and the same width.

Ends with 1 when a text differs from the recorded one. The last line printed is the receipt, JSON; `--write` puts it,
raw samples included, into bench/receipts/wall_clock.json.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count, product
from typing import Any

from _receipt import ROOT, finish, receipt

from fullpipe.assembly import Target, stage_ends, stage_specs
from fullpipe.engine.loop import Engine
from fullpipe.hub import resolve
from fullpipe.messages import Emitted, Flight, Opening, Part
from fullpipe.methods import make_policy
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.pipeline.pace import Pace
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.prompts import read_prompts
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.scripted import ScriptedStage
from fullpipe.stations.spec import StationSpec
from fullpipe.threads import share_the_machine

MODEL, DTYPE = "smollm2-135m", "float32"
PROMPTS = ROOT / "bench" / "edit_prompts.jsonl"
SLOTS = 1024  # for speculation: 8 stages with links of 50 ms have some hundred rows under way
ROWS, REPEATS = (1, 2, 4, 8), 9  # of the measurement of stage times


@dataclass(frozen=True)
class Text:
    """A prompt, and what the model says to it."""

    id: str
    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Run:
    """One answer. tbt_s: seconds between tokens, of the pipeline's clock."""

    text: str
    method: str
    width: int
    tbt_s: float
    hits: int
    misses: int
    steps_per_token: float
    identical: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--links", type=float, nargs="+", default=[5.0, 20.0, 50.0], help="latencies in ms")
    parser.add_argument("--drafts", nargs="+", default=["ngram", "0.6", "0.8", "0.95"], help="ngram, or an accuracy")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 stages, 20 ms, n-gram and 0.8, one prompt, once")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.stages, arguments.links, arguments.drafts = [4], [20.0], ["ngram", "0.8"]
        arguments.prompts, arguments.repeats = 1, 1
    share_the_machine()
    import torch

    torch.set_num_threads(1)
    bench = Bench(arguments.prompts, arguments.tokens)
    cells: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for stages, ms, draft in product(arguments.stages, arguments.links, arguments.drafts):
            cells.append(bench.cell(stages, ms, draft, arguments.widths, arguments.repeats))
    except KeyboardInterrupt:
        say("interrupted; what is done is kept")
    print_table(cells)
    samples = [cell.pop("samples") for cell in cells]
    finish(receipt("wall_clock", {"model": MODEL, "dtype": DTYPE, "threads_per_stage": 1, "tokens": arguments.tokens,
                                  "repeats": arguments.repeats, "cells": cells}, samples), write=arguments.write)
    if not all(cell["identical"] for cell in cells):
        sys.exit("a text differs from the recorded one")


class Bench:
    """The model, the recorded texts, and the stage times once they are measured."""

    def __init__(self, prompts: int, tokens: int) -> None:
        from fullpipe.models.tokenizer import Tokenizer
        from fullpipe.models.weights import open_model

        self.path = resolve(MODEL)
        self.config = open_model(self.path).config
        self.tokenizer = tokenizer = Tokenizer.load(self.path)
        self.vocab, self.eos, self.max_tokens = max(tokenizer.tokens) + 1, tokenizer.eos_ids, tokens
        self._requests = count()
        asked = [(one.id, tokenizer.chat([{"role": "user", "content": one.text}]))
                 for one in read_prompts(PROMPTS, prompts)]
        self.texts = self._record(asked)
        self._paces: dict[int, dict[str, Pace]] = {}

    def specs(self, stages: int) -> list[StationSpec]:
        return stage_specs(Target(self.path, self.config, self.tokenizer, DTYPE, self.vocab,
                                  stage_ends(self.config, stages)), margins=False)

    def _record(self, asked: list[tuple[str, list[int]]]) -> list[Text]:
        """The model's own tokens, by `pp`."""
        texts = []
        with InProcessPipeline([spec.build() for spec in self.specs(1)]) as pipeline:  # type: ignore[misc]
            engine = Engine(pipeline, make_policy("pp"))
            for name, prompt in asked:
                said, _ = answer(engine, Request(next(self._requests), tuple(prompt), self._params(), self.eos))
                texts.append(Text(name, prompt, said))
                say(f"recorded {name}: {len(prompt)} tokens of prompt, {len(said)} of answer")
        return texts

    def _params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens)

    # ---- a cell ------------------------------------------------------------------------------------------

    def cell(self, stages: int, link_ms: float, draft: str, widths: list[int], repeats: int) -> dict[str, Any]:
        """`pp` against `fullpipe` on one set-up. Times in milliseconds; the speedup is the median over pairs."""
        name, links = f"{stages} stages, {link_ms:g} ms, {draft}", Links.even(stages, Link.of(link_ms))
        source = self.source(draft)
        with WorkersPipeline(self.specs(stages), source, links=links) as pipeline:
            run = self._runner(pipeline, draft)
            run("pp", 1, 0)  # warm: first touches of weights and caches
            tried = {width: run("fullpipe", width, 0) for width in widths}
            width = min(tried, key=lambda width: tried[width].tbt_s)
            pairs = measure(run, width, len(self.texts), repeats)
        predicted = self._predict(stages, links, draft, width)
        cell = {"stages": stages, "link_ms": link_ms, "draft": draft, "width": width,
                "tbt_ms_by_width": {width: round(1e3 * one.tbt_s, 2) for width, one in tried.items()},
                **summary(pairs), "virtual_time": {key: value for key, value in summary(predicted).items()
                                                   if key != "identical"},
                "samples": [[asdict(one) for one in pair] for pair in pairs]}
        say(f"{name}: {line(cell)}")
        return cell

    def source(self, draft: str) -> StationSpec:
        if draft == "ngram":
            return StationSpec("fullpipe.stations.drafts.ngram:build_ngram")
        truth = {"kind": "texts", "texts": [text.tokens for text in self.texts]}
        accuracy = float(draft)
        return StationSpec("fullpipe.stations.drafts.scripted:ScriptedDraft",
                           {"truth": truth, "accuracy": accuracy, "coverage": accuracy})

    def _runner(self, pipeline: Pipeline, draft: str) -> Callable[[str, int, int], Run]:
        """What answers the prompt of that index by a method and width."""
        # One guess per token: with several, being right and being covered would be two figures.
        options = {} if draft == "ngram" else {"top_k": 1}
        engine = Engine(pipeline, make_policy("pp"), spare=SLOTS, **options)
        turns = count()

        def run(method: str, width: int, index: int) -> Run:
            engine.use(make_policy(method, width=width))
            text = self.texts[index]
            number = next(turns) * len(self.texts) + index  # so the scripted truth knows which text is asked for
            said, stats = answer(engine, Request(number, tuple(text.prompt), self._params(), self.eos))
            return Run(text.id, method, width, stats.tbt_s, stats.hits, stats.misses, round(stats.steps_per_token, 3),
                       said == text.tokens)

        return run

    # ---- the virtual clock -------------------------------------------------------------------------------

    def _predict(self, stages: int, links: Links, draft: str, width: int) -> list[tuple[Run, Run]]:
        """The same requests in virtual time, every stage a machine like this one to itself."""
        if stages not in self._paces:
            self._paces[stages] = self._measure_stages(stages)
        paces = self._paces[stages]
        truth = {"kind": "texts", "texts": [text.tokens for text in self.texts]}

        def costs(station: str, rows: int, measured: float, context: int) -> float:
            return measured if station == "draft" else paces[station].seconds(rows)

        with InProcessPipeline([ScriptedStage(index, stages, truth) for index in range(stages)],
                               self.source(draft).build(), costs=costs, links=links) as pipeline:  # type: ignore
            return measure(self._runner(pipeline, draft), width, len(self.texts), repeats=1)

    def _measure_stages(self, stages: int) -> dict[str, Pace]:
        """What each stage takes by number of rows, after the first prompt, with the machine to itself."""
        built = [spec.build() for spec in self.specs(stages)]
        prompt = self.texts[0].prompt
        opening = Flight(0, [_rows(prompt, 0)], [Opening(0, len(prompt) + max(ROWS), len(prompt), self._params())])
        _through(built, opening)
        seconds: dict[int, list[list[float]]] = {
            rows: [_through(built, Flight(1, [_rows([7] * rows, len(prompt))])) for _ in range(REPEATS)]
            for rows in ROWS}
        return {f"stage {index}": Pace({rows: statistics.median(times[index] for times in seconds[rows])
                                        for rows in ROWS}) for index in range(stages)}


def answer(engine: Engine, request: Request) -> tuple[list[int], Any]:
    """The tokens of one request, and its statistics."""
    track, said = engine.submit(request), []
    while engine.busy:
        said += [event.token for event in engine.step() if isinstance(event, Emitted)]
    engine.drain()
    return said, track.stats


def measure(run: Callable[[str, int, int], Run], width: int, prompts: int, repeats: int) -> list[tuple[Run, Run]]:
    """Pairs (pp, fullpipe) that ran back to back; every other pair begins with fullpipe."""
    pairs = []
    for turn in range(repeats):
        for index in range(prompts):
            if (turn + index) % 2:
                ours = run("fullpipe", width, index)
                pairs.append((run("pp", 1, index), ours))
            else:
                pairs.append((run("pp", 1, index), run("fullpipe", width, index)))
    return pairs


def summary(pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    hits, misses = sum(ours.hits for _, ours in pairs), sum(ours.misses for _, ours in pairs)
    speedups = [plain.tbt_s / ours.tbt_s for plain, ours in pairs]
    return {"tbt_pp_ms": round(1e3 * statistics.median(plain.tbt_s for plain, _ in pairs), 2),
            "tbt_fullpipe_ms": round(1e3 * statistics.median(ours.tbt_s for _, ours in pairs), 2),
            "speedup": round(statistics.median(speedups), 3),
            "speedup_range": [round(min(speedups), 3), round(max(speedups), 3)],
            "hit_rate": round(hits / (hits + misses), 4) if hits + misses else 0.0,
            "identical": all(one.identical for pair in pairs for one in pair)}


def _rows(tokens: list[int], start: int) -> Part:
    """A prompt from position `start` on; past the prompt, guesses that share a parent."""
    slots = [start + k for k in range(len(tokens))]
    if start == 0:
        return Part(0, slots, [-1] * len(tokens), tokens, slots, slots, [[] for _ in tokens], [False] * len(tokens))
    return Part(0, [], slots, tokens, [start] * len(tokens), slots, [[slot] for slot in slots], [True] * len(tokens))


def _through(stages: list[Any], flight: Flight) -> list[float]:
    """Send a flight through all stages; seconds at each."""
    seconds, hidden = [], None
    for stage in stages:
        begun = time.perf_counter()
        hidden = stage.run(flight, hidden)
        seconds.append(time.perf_counter() - begun)
    return seconds


def line(cell: dict[str, Any]) -> str:
    virtual = cell["virtual_time"]
    return (f"TBT pp {cell['tbt_pp_ms']:.1f} ms, fullpipe {cell['tbt_fullpipe_ms']:.1f} ms (w = {cell['width']}), "
            f"speedup {cell['speedup']:.2f}, hit rate {cell['hit_rate']:.1%}; virtual time: {virtual['tbt_pp_ms']:.1f} "
            f"and {virtual['tbt_fullpipe_ms']:.1f} ms, {virtual['speedup']:.2f}; texts "
            f"{'identical' if cell['identical'] else 'DIFFERENT'}")


def print_table(cells: list[dict[str, Any]]) -> None:
    print("| stages | links | draft | w | TBT pp | TBT fullpipe | speedup | hit rate | virtual time: pp, fullpipe, "
          "speedup | text |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for cell in cells:
        virtual = cell["virtual_time"]
        print(f"| {cell['stages']} | {cell['link_ms']:g} ms | {cell['draft']} | {cell['width']} | "
              f"{cell['tbt_pp_ms']:.1f} ms | {cell['tbt_fullpipe_ms']:.1f} ms | {cell['speedup']:.2f} | "
              f"{cell['hit_rate']:.1%} | {virtual['tbt_pp_ms']:.1f} ms, {virtual['tbt_fullpipe_ms']:.1f} ms, "
              f"{virtual['speedup']:.2f} | {'identical' if cell['identical'] else 'DIFFERENT'} |")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
