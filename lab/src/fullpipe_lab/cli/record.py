"""`fullpipe-lab record`: the target's own tokens on many prompts, for replays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.options import Only
from fullpipe.prompts import choose
from fullpipe.request import SamplingParams
from fullpipe_lab.cli import options


def record(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recording; gone on with if it is "
                                      "there.")],
    model: options.Target,
    sampling: Annotated[SamplingParams, Only("max_tokens", "temperature", "seed")] = options.SEED_7,
    prompts: options.Prompts = None,
    limit: options.Limit = None,
    turns: options.Turns = None,
    threads: options.Threads = None,
) -> None:
    """Record what the model says to each prompt. Benchmarks replay it with every method, without the model."""
    from fullpipe_lab.record import fill

    chosen = choose(prompts, limit)
    if not out.exists():
        fetch_all(model, "pp")
    with console.StepBar("recording") as bar:
        found = fill({sampling.temperature: out}, model.model, chosen, turns, sampling, model.dtype, threads,
                     progress=bar, say=console.print_note)
    typer.echo(f"{out}: {len(found[sampling.temperature].answers)} answers")
