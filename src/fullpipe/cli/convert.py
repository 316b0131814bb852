"""`fullpipe convert` makes our draft modules of those of other programs. A verb for each kind of file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe import hub
from fullpipe.cli import console
from fullpipe.cli.verb import verb
from fullpipe.errors import UsageError

if TYPE_CHECKING:
    from fullpipe.models.spd_checkpoint import ModuleConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def spd(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="The reference's speculation_head_final.pt, version "
                                         "11.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base model it was trained for: any model name; a "
                                       "folder needs config.json and tokenizer.json only.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where to write the checkpoint.")],
    stage_layers: Annotated[str | None, typer.Option("--stage-layers", metavar="N,N,...", help="Layers of each stage, "
                                                     "where the file does not say it. Default: equal stages.")] = None,
    train_span: Annotated[int, typer.Option("--train-span", min=1, help="Tokens of its training texts, which the file "
                                            "does not say.")] = 2048,
) -> None:
    """Convert a draft module of the Speculative Pipeline Decoding reference."""
    layers = None if stage_layers is None else _counts(stage_layers)
    with console.TransferBar() as bar:
        base = hub.resolve(model, progress=bar)
    from fullpipe.models.spd_convert import convert_file

    found = convert_file(file, base, out, name=_name_of(model), stage_layers=layers, train_span=train_span)
    for warning in found.warnings:
        console.print_note(f"warning: {warning}")
    console.print_note(_summary(found.config))
    typer.echo(out)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(";", ",").split(",")]
    except ValueError as error:
        raise UsageError(f"--stage-layers is {text!r}, not whole numbers",
                         hint="Write the layers of each stage, for example --stage-layers 8,8,8,8.") from error


def _name_of(model: str) -> str | None:
    """What the user calls it; a path is called by its last part instead."""
    return None if Path(model).expanduser().exists() else model


def _summary(config: ModuleConfig) -> str:
    taps = ", ".join(map(str, config.bounds))
    return (f"{config.num_layers} decoder layers for {len(config.stages[0])} stages of {config.verifier.name}, "
            f"taps {taps}, {config.draft_vocab_size:,} of {config.vocab_size:,} tokens")


app.command()(verb(spd))


@app.callback()
def _several_verbs() -> None:
    """Convert a draft module made by another program."""
