"""An error becomes one line, a hint and an exit code at the boundary around every verb."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fullpipe.cli import console
from fullpipe.cli.options import spread
from fullpipe.errors import FullpipeError

INTERRUPTED = 130
_BROKEN_PIPE = 141  # what a shell reports of a program ended by SIGPIPE
_BUG = 70  # EX_SOFTWARE of sysexits.h

DebugOption = Annotated[bool, typer.Option("--debug", help="On an error, show where in the code it arose.")]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """The function as a command for typer: with its dataclasses of options spread out (`options.spread`), with
    `--debug`, and with its errors reported.

    `FullpipeError` ends with its own exit code, Ctrl-C with 130, a reader of our output that went away with
    141 and without a word, anything else, being a bug, with 70.
    """
    function = spread(function)

    @functools.wraps(function)
    def guarded(*, context: typer.Context, debug: bool, **arguments: Any) -> None:
        console.speak_for(context)
        debug = debug or context.find_root().params["debug"]
        try:
            function(**arguments)
            sys.stdout.flush()  # a reader that went away shows only now
        except FullpipeError as error:
            _report(error.message, error.hint, debug)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.print_note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The interpreter flushes once more at exit, and must not fail at it then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_BROKEN_PIPE) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            hint = "This is a bug in Fullpipe. Please report it, with what `--debug` shows."
            _report(f"{type(error).__name__}: {error}", hint, debug)
            raise typer.Exit(_BUG) from None

    _add_parameters(guarded, function)
    return guarded


def _add_parameters(guarded: Callable[..., None], function: Callable[..., None]) -> None:
    """Typer reads options off the signature: the function's own, and the two that `guarded` takes."""
    extra = [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, annotation=DebugOption, default=False),
    ]
    own = inspect.signature(function)
    merged = own.replace(parameters=[*own.parameters.values(), *extra])
    guarded.__signature__ = merged  # type: ignore[attr-defined]
    guarded.__annotations__ = {name: p.annotation for name, p in merged.parameters.items()}


def _report(message: str, hint: str | None, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    console.print_error(message, hint)
