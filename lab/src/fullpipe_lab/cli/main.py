"""The `fullpipe-lab` command. A verb is a function in a file of its own; `_VERBS` is their list."""

from __future__ import annotations

from typing import Annotated

import typer

from fullpipe.cli import stopping
from fullpipe.cli.verb import verb
from fullpipe.threads import share_the_machine
from fullpipe_lab.cli import bench, beside, record, report, simulate

_VERBS = (simulate.simulate, record.record, bench.bench, report.report, beside.peers, beside.agreement)


def main() -> None:
    """Entry point: runs the command line in `sys.argv` and exits."""
    share_the_machine()
    stopping.run(lambda: app(prog_name="fullpipe-lab"))


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="The same as after the verb.", hidden=True)] = False,
          ) -> None:
    """Measure, simulate and compare: the laboratory beside Fullpipe."""


for _function in _VERBS:
    app.command()(verb(_function))
