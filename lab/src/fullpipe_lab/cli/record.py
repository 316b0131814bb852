"""`fullpipe-lab record`: the target's own tokens on many prompts, for replays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from fullpipe.cli.fetch import fetch_all

from fullpipe.cli import console
from fullpipe.options import ModelOptions
from fullpipe.prompts import choose
from fullpipe.request import SamplingParams
from fullpipe_lab.cli import options


def record(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recording; gone on with if it is "
                                      "there.")],
    model: options.Model = options.DEFAULT_MODEL,
    prompts: options.Prompts = None,
    limit: options.Limit = None,
    turns: options.Turns = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 7,
    dtype: options.DtypeOption = "auto",
    threads: options.Threads = None,
) -> None:
    """Record what the model says to each prompt. Benchmarks replay it with every method, without the model."""
    from fullpipe_lab.record import fill

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    chosen = choose(prompts, limit)
    if not out.exists():
        fetch_all(ModelOptions(model=model, draft="none"))
    with console.StepBar("recording") as bar:
        found = fill({temperature: out}, model, chosen, turns, params, dtype, threads, progress=bar,
                     say=console.print_note)
    typer.echo(f"{out}: {len(found[temperature].answers)} answers")
