"""`fullpipe record`: the target's own tokens on many prompts, for replays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe.cli import console, options
from fullpipe.cli.generate import fetch_all
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.bench.recording import Recording
    from fullpipe.prompts import FilePrompt

Prompts = Annotated[list[Path] | None, typer.Option("--prompts", metavar="FILE", help="Prompts, JSON lines with turns; "
                                                    "may be repeated. Default: the bundled set.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Prompts per file at most; of the bundled set, per "
                                                 "category.")]
Turns = Annotated[int | None, typer.Option("--turns", min=1, help="Turns per prompt at most. Default: all.")]


def record(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recording; gone on with if it is "
                                      "there.")],
    model: options.Model = options.DEFAULT_MODEL,
    prompts: Prompts = None,
    limit: Limit = None,
    turns: Turns = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 7,
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
) -> None:
    """Record what the model says to each prompt. Benchmarks replay it with every method, without the model."""
    chosen = read(prompts, limit)
    params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=seed)
    found = fill({temperature: out}, model, chosen, turns, params, dtype.value, threads)
    typer.echo(f"{out}: {len(found[temperature].answers)} answers")


def read(paths: list[Path] | None, limit: int | None) -> list[FilePrompt]:
    from fullpipe.bench.datasets import bundled, read_all

    return read_all(paths, limit) if paths else _first_of_each(bundled(), limit)


def _first_of_each(prompts: list[FilePrompt], limit: int | None) -> list[FilePrompt]:
    """Of each category as many."""
    taken: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        taken[prompt.category] += 1
        if limit is None or taken[prompt.category] <= limit:
            chosen.append(prompt)
    return chosen


def fill(paths: dict[float, Path], model: str, prompts: list[FilePrompt], turns: int | None, params: SamplingParams,
         dtype: str, threads: int | None) -> dict[float, Recording]:
    """Recordings at each temperature that hold every prompt. Loads the model only if something is missing."""
    from dataclasses import replace

    from fullpipe.assembly import pick_dtype
    from fullpipe.bench.record import check_prompts, make_head, record, wanted_ids
    from fullpipe.bench.recording import Recording, make_folder

    dtype = pick_dtype(dtype)
    ready = {heat: Recording.load(path) for heat, path in paths.items() if path.exists()}
    wanted = wanted_ids(prompts, turns)
    for heat, recording in ready.items():
        check_head(recording, model, dtype, replace(params, temperature=heat))
        check_prompts(recording, prompts, turns)
    missing = [heat for heat in paths if heat not in ready or any(id not in ready[heat].answers for id in wanted)]
    if not missing:
        return ready
    for path in paths.values():
        make_folder(path.parent)  # what cannot be written had better be known before the model runs
    fetch_all(model, "none", "pp")
    from fullpipe.llm import LLM

    with LLM(model, draft="none", stages=1, method="pp", dtype=dtype, clock="wall", threads=threads, margins=True,
             max_num_seqs=8, progress=console.print_note) as llm, console.StepBar("recording") as bar:
        for heat in missing:
            head = make_head(llm, model, dtype, replace(params, temperature=heat))
            ready[heat] = Recording.open(paths[heat], head)
            record(llm, ready[heat], prompts, turns, bar)
    return ready


def check_head(recording: Recording, model: str, dtype: str, params: SamplingParams) -> None:
    """Raises UsageError when a recording was made of something else."""
    from fullpipe.errors import UsageError

    head = recording.head
    for name, theirs, ours in (("model", head.model, model), ("dtype", head.dtype, dtype),
                               ("max_new_tokens", head.max_new_tokens, params.max_tokens),
                               ("temperature", head.temperature, params.temperature),
                               ("seed", head.seed, params.seed)):
        if theirs != ours:
            raise UsageError(f"{recording.path} was recorded with {name} {theirs!r}, not {ours!r}",
                             hint="Name another file or folder, or the same settings.")
