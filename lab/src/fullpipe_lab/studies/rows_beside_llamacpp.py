"""Steps of few rows and a prompt of 512 tokens, Fullpipe and llama.cpp taking turns on the same core.

    python -m fullpipe_lab.studies.rows_beside_llamacpp [--parts steps,prefill] [--models A,B] [--rows 1,2,4,8,16]
        [--builds llamacpp-native,llamacpp] [--threads 1] [--repeats 20] [--out lab-out/rows] [--quick] [--write]

Whole models, all layers and the head, weights as the same GGUF file stores them. A step is a chain of so many tokens
behind a context of 128, logits for each of them; before every one the cache is cut back to the 128. A prompt is 512
tokens from nothing, logits for the last; ours in chunks, as the engine cuts it. The text is that of the prompts that
come with Fullpipe, so that both can be asked whether they think the same.

Each build of llama.cpp is a process of its own that sleeps while another has its turn; all are bound to the same cores,
one for each thread. A turn begins with a step that does not count: weights have left the caches meanwhile. Who begins
changes from turn to turn. Builds: `llamacpp` is xllamacpp's wheel, `llamacpp-native` the same compiled on this machine
(`python -m fullpipe_lab.peers llamacpp-native`); what instructions each has is in the receipt. The aims of issue 14
are ratios to a native build.

A cell that is done is in --out/journal.jsonl: a run that is killed goes on where it was, with the same code. `--write`
keeps the receipt in lab/receipts/rows_beside_llamacpp.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fullpipe.cli.console import print_table
from fullpipe.cli.lists import integers
from fullpipe.cluster.provenance import commit_of, provenance
from fullpipe.errors import UsageError
from fullpipe.hub import resolve
from fullpipe.models.dtypes import native_kernels
from fullpipe.models.native.slice import NativeSlice
from fullpipe.models.step import Step
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from fullpipe.options import EngineOptions
from fullpipe.prompts import bundled
from fullpipe.threads import cores
from fullpipe_lab.ending import run
from fullpipe_lab.files import Journal
from fullpipe_lab.peers import envs
from fullpipe_lab.peers.known import STEPS_RUNNER
from fullpipe_lab.peers.process import Runner
from fullpipe_lab.receipts import HERE, STUDIES, save_receipt, study_receipt

OURS = "fullpipe"
BUILDS = ("llamacpp-native", "llamacpp")
PARTS = ("steps", "prefill")
MODELS = ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m")
ROWS = (1, 2, 4, 8, 16)
CONTEXT, PROMPT, CHUNK = 128, 512, EngineOptions().prefill_chunk
AIMS = {
    "qwen2.5-coder-1.5b": dict(zip(ROWS, (0.9, 0.55, 0.35, 0.2, 0.4))),
    "qwen2.5-coder-0.5b": dict(zip(ROWS, (0.9, 0.45, 0.35, 0.3, 0.35))),
    "smollm2-135m": dict(zip(ROWS, (0.9, 0.5, 0.35, 0.25, 0.25))),
}
"""Of issue 14: our time over llama.cpp's at most, by model and rows. A prompt is to be "not slower": 1."""
_LIMIT_S = 600.0
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Contender(Protocol):
    """A whole model with one sequence in its cache."""

    def step(self, tokens: Sequence[int], start: int, outputs: int) -> tuple[float, int]:
        """Compute a chain behind the first `start` cached tokens, logits for its last `outputs` rows: milliseconds,
        and the likeliest token after it."""


# ---- who computes ----------------------------------------------------------------------------------------------


class Ours:
    """The native kernels, in this process."""

    def __init__(self, path: Path, room: int) -> None:
        files = open_model(path)
        self._whole = NativeSlice(native_kernels(), files, 0, files.config.num_layers, has_embedding=True,
                                  has_head=True)
        self._line = np.arange(room, dtype=np.int32)

    def step(self, tokens: Sequence[int], start: int, outputs: int) -> tuple[float, int]:
        ids, begun = torch.tensor(tokens), time.perf_counter()
        for first in range(0, len(ids), CHUNK):
            hidden = self._forward(ids[first : first + CHUNK], start + first)
        logits = self._whole.logits(hidden[-outputs:])
        taken = time.perf_counter() - begun
        return taken * 1e3, int(logits[-1].argmax())

    def _forward(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        return self._whole.forward(Step.of_text(ids, self._line[: start + len(ids)], start))


class Theirs:
    """llama.cpp, in a process of its own."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def step(self, tokens: Sequence[int], start: int, outputs: int) -> tuple[float, int]:
        said = self._runner.ask({"tokens": list(tokens), "start": start, "outputs": outputs}, _LIMIT_S)
        return float(said["ms"]), int(said["top"])


@contextmanager
def contenders(model: str, builds: Sequence[str],
               threads: int) -> Iterator[tuple[dict[str, Contender], dict[str, Any]]]:
    """All of them with the model loaded, and what each build of llama.cpp says of itself."""
    path, room = resolve(model), CONTEXT + PROMPT
    threads_of_openmp = {"OMP_NUM_THREADS": str(threads)}
    with ExitStack() as running:
        said, found = {}, dict[str, Contender]()
        for build in builds:
            command = [str(envs.interpreter(build)), str(STEPS_RUNNER)]
            runner = running.enter_context(Runner(command, os.environ | threads_of_openmp))
            hello = runner.ask({"model": str(path), "threads": threads, "room": room}, _LIMIT_S)
            said[build] = {"version": hello["version"], **hello["settings"]}
            found[build] = Theirs(runner)
        yield {OURS: Ours(path, room), **found}, said


# ---- measuring -------------------------------------------------------------------------------------------------


def turns(on: Mapping[str, Contender], tokens: Sequence[int], start: int, outputs: int,
          repeats: int) -> dict[str, Any]:
    """Milliseconds of each, in the order in which they were measured; and of how many the likeliest token was ours."""
    names, taken = list(on), {name: list[float]() for name in on}
    tops: dict[str, int] = {}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            on[name].step(tokens, start, outputs)
            ms, tops[name] = on[name].step(tokens, start, outputs)
            taken[name].append(round(ms, 4))
    return {"samples_ms": taken, "same_top": all(top == tops[OURS] for top in tops.values())}


def measure(part: str, on: Mapping[str, Contender], text: Sequence[int], rows: int, repeats: int) -> dict[str, Any]:
    if part == "prefill":
        return turns(on, text[:rows], 0, 1, repeats)
    for one in on.values():
        one.step(text[:CONTEXT], 0, 1)
    return turns(on, text[CONTEXT : CONTEXT + rows], CONTEXT, rows, repeats)


def text_of(model: str) -> list[int]:
    tokens = load_tokenizer(resolve(model)).encode("\n\n".join(prompt.text for prompt in bundled()))
    return list(tokens[:PROMPT])


# ---- what is told ----------------------------------------------------------------------------------------------


def row_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Medians in milliseconds, our time over each build's, and the aim. cell: of the journal."""
    medians = {name: statistics.median(samples) for name, samples in cell["samples_ms"].items()}
    aim = 1.0 if cell["part"] == "prefill" else AIMS.get(cell["model"], {}).get(cell["rows"])
    ratios = {name: round(medians[OURS] / ms, 3) for name, ms in medians.items() if name != OURS}
    return {"part": cell["part"], "model": cell["model"], "rows": cell["rows"],
            "ms": {name: round(ms, 3) for name, ms in medians.items()}, "over": ratios, "aim": aim,
            "reached": None if aim is None else {name: ratio <= aim for name, ratio in ratios.items()},
            "same_top": cell["same_top"]}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines; of a prompt its tokens per second."""
    builds = list(dict.fromkeys(build for row in rows for build in row["over"]))
    lines = []
    for row in rows:
        prompt = row["part"] == "prefill"
        cells = [f"{1e3 * row['rows'] / ms:.1f} tokens/s" if prompt else f"{ms:.1f} ms"
                 for ms in (row["ms"].get(name) for name in (OURS, *builds)) if ms]
        ratios = [_ratio(row, build) for build in builds]
        lines.append([row["model"], f"prompt of {row['rows']}" if prompt else str(row["rows"]), *cells, *ratios,
                      "" if row["aim"] is None else f"{row['aim']:g}", "yes" if row["same_top"] else "NO"])
    return ["model", "rows", OURS, *builds, *(f"time / {build}" for build in builds), "aim", "same top"], lines


def _ratio(row: Mapping[str, Any], build: str) -> str:
    short = row["reached"] is not None and not row["reached"][build]
    return f"{row['over'][build]:.2f}" + (" (short)" if short else "")


def main() -> None:
    asked = _arguments()
    builds = [build for build in asked.builds.split(",") if envs.interpreter(build)]
    if not builds:
        raise UsageError("no build of llama.cpp is installed",
                         hint="`python -m fullpipe_lab.peers llamacpp llamacpp-native` makes them.")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.threads])
    assert cores() == asked.threads
    torch.set_num_threads(asked.threads)
    rows, parts, models = integers(asked.rows, "--rows"), asked.parts.split(","), asked.models.split(",")
    journal = Journal(asked.out / "journal.jsonl")
    journal.bind({"commit": commit_of(HERE)[0], "builds": builds, "threads": asked.threads, "context": CONTEXT,
                  "repeats": asked.repeats})
    wanted = [(part, model, size) for model in models for part in parts
              for size in (rows if part == "steps" else [PROMPT])]
    for model in models:
        _measure_missing(journal, model, [cell for cell in wanted if cell[1] == model], builds, asked)
    cells = [journal.rows[_key(*cell)] for cell in wanted]
    found = [row_of(cell) for cell in cells]
    print_table(*table(found))
    if asked.write:
        settings = journal.rows["plan"] | {"level": native_kernels().level, "chunk": CHUNK, "huge_pages": _huge_pages(),
                                           "llamacpp": journal.rows["builds"]["said"], "cells": found}
        settings.pop("key")
        save_receipt(study_receipt("rows_beside_llamacpp", settings, cells), STUDIES / "rows_beside_llamacpp.json")


def _measure_missing(journal: Journal, model: str, wanted: Sequence[tuple[str, str, int]], builds: Sequence[str],
                     asked: argparse.Namespace) -> None:
    missing = [cell for cell in wanted if _key(*cell) not in journal]
    if not missing:
        return
    text = text_of(model)
    with contenders(model, builds, asked.threads) as (on, said):
        journal.add("builds", {"said": said})
        for part, _, size in missing:
            repeats = asked.repeats if part == "steps" else max(1, asked.repeats // 4)
            found = {"part": part, "model": model, "rows": size, **measure(part, on, text, size, repeats)}
            journal.add(_key(part, model, size), found | {"date": provenance()["date"]})
            print("  ".join(" ".join(line) for line in table([row_of(found)])[1]), flush=True)


def _key(part: str, model: str, size: int) -> str:
    return f"{part}/{model}/{size}"


def _huge_pages() -> str:
    """What the system does by itself; ours are asked for, llama.cpp asks for none."""
    return _HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else "unknown"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--builds", default=",".join(BUILDS), help="those that are not installed are left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="turns of each cell; a prompt has a quarter of them")
    parser.add_argument("--out", type=Path, default=Path("lab-out/rows"))
    parser.add_argument("--quick", action="store_true", help="SmolLM2 alone, four turns")
    parser.add_argument("--write", action="store_true", help="keep the receipt in lab/receipts")
    asked = parser.parse_args()
    if asked.quick:
        asked.models, asked.repeats = "smollm2-135m", 4
    return asked


if __name__ == "__main__":
    run(main)
