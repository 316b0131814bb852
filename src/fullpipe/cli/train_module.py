"""`fullpipe train spd` and `fullpipe train exit` train draft modules."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe import hub
from fullpipe.cli import console
from fullpipe.cli.options import Only, Without
from fullpipe.options import ModelOptions
from fullpipe.training.plan import Plan, RunOptions

if TYPE_CHECKING:
    from fullpipe.training.trainer import Material

Data = Annotated[list[Path], typer.Option("--data", metavar="FILE", help="Training text: plain text, JSON lines of "
                                          "messages or conversations, or a folder of such; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the module goes. If a run was begun "
                                   "there, the same command goes on with it.")]
Target = Annotated[ModelOptions, Only("model")]


def spd(data: Data, out: Out, model: Target, plan: Plan, run: RunOptions) -> None:
    """Train a pipeline draft module: it reads hidden states of every stage while they compute."""
    _train(plan, run, model.model, data, out)


def exit_head(data: Data, out: Out, model: Target, run: RunOptions,
              plan: Annotated[Plan, Without("power", "refreshed", "ahead")]
              = Plan(kind="exit", refreshed=0.0, ahead=0.0)) -> None:
    """Train an early-exit head (PPSD): it guesses from what the first stage knows.

    It has one tap, after the first stage unless --taps names another, and no fillings to vary.
    """
    _train(plan, run, model.model, data, out)


def _train(plan: Plan, run: RunOptions, model: str, data: list[Path], out: Path) -> None:
    import torch

    from fullpipe.training.run import train

    if run.threads is not None:
        torch.set_num_threads(run.threads)
    talks = int(os.environ.get("RANK", "0")) == 0  # under torchrun or accelerate, one process does
    material = _gather(plan, run, model, data, talks)
    with console.ShareBar("training") as progress:
        summary = train(plan, material, out, progress if talks else (lambda *_: None),
                        save_every_s=60 * run.save_minutes, features=run.features,
                        feature_taps=run.feature_taps or ())
    if talks:
        _print(summary)
        typer.echo(f"{out}: {summary['steps']} steps in {summary['seconds']:.0f} s; "
                   f"use it with --draft {plan.kind}:{out}")


def _gather(plan: Plan, run: RunOptions, model: str, data: list[Path], talks: bool) -> Material:
    from fullpipe.training.run import gather

    with console.TransferBar() as bar:
        path = hub.resolve(model, progress=bar)
    return gather(plan, path, model, data, vocab=run.vocab, vocab_size=run.vocab_size,
                  say=console.print_note if talks else (lambda line: None))


def _print(summary: dict[str, Any]) -> None:
    console.print_table(("stages", "in flight", "depth", "right first", "among 4"), [
        [str(row["stages"]), str(row["fill"]), str(row["depth"]), f"{row['top1']:.1%}", f"{row['top4']:.1%}"]
        for row in summary["acceptance"]])
