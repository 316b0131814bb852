"""The `fullpipe` command begins here. A verb is a function in a file of its own; `_VERBS` is their list.

Importing this module must stay quick, so a verb imports what is heavy (torch, the engine) in its function.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fullpipe.cli import (
    convert,
    demo,
    generate,
    load,
    models,
    plan,
    profile,
    pull,
    serve,
    show,
    stopping,
    trace,
    train,
    verify,
)
from fullpipe.cli.foreign import Command
from fullpipe.cli.verb import verb
from fullpipe.threads import share_the_machine

_VERBS = (generate.generate, serve.serve, demo.demo, verify.verify, load.load, plan.plan, profile.profile, trace.trace,
          pull.pull, models.models, show.show)


def main() -> None:
    """Entry point: runs the command line in `sys.argv` and exits."""
    share_the_machine()
    stopping.run(lambda: app(prog_name="fullpipe"))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fullpipe {version('fullpipe')}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="The same as after the verb.", hidden=True)] = False,
) -> None:
    """Decode one request fast on a language model cut into pipeline stages."""


for _function in _VERBS:
    app.command(cls=Command)(verb(_function))
app.add_typer(train.app, name="train")
app.add_typer(convert.app, name="convert")
