"""The verbs print with these functions. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fullpipe.errors import spelled

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.progress import Progress

_QUARTERS = 4


def megabytes(size: float) -> str:
    """A size in bytes as people read it: "98.4 MB", "1,117 MB"."""
    mega = size / 1e6
    return f"{mega:,.0f} MB" if mega >= 1000 else f"{mega:.1f} MB"


def print_json(value: Any) -> None:
    """One object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_error(message: str, hint: str | None = None) -> None:
    """A red line, and under it what to do."""
    from rich.text import Text

    console = error_console()
    console.print(Text.assemble(("error: ", "bold red"), (_as_typed(message), "red")), soft_wrap=True)
    if hint:
        console.print(Text(_as_typed(hint)), soft_wrap=True)


def print_note(message: str) -> None:
    """A plain line on standard error."""
    sys.stderr.write(_as_typed(message) + "\n")


def _as_typed(text: str) -> str:
    """The text with its options as the verb that runs has them (`errors.spelled`)."""
    return spelled(text, _flag)


_verb: typer.Context | None = None


def speak_for(verb: typer.Context) -> None:
    """From now on options are spelled as this verb has them."""
    global _verb
    _verb = verb


def was_given(option: str) -> bool:
    """Whether an option of the verb that runs was given, and has not its default."""
    source = _verb.get_parameter_source(option) if _verb else None
    return source is not None and source.name != "DEFAULT"


def _flag(name: str, value: str | None) -> str | None:
    """An option of the verb as it is typed; None for what is none."""
    for one in _verb.command.params if _verb else ():
        flags = [flag for flag in one.opts if flag.startswith("--")]
        if one.name != name or not (flags or one.secondary_opts):
            continue
        if value == "False":
            return (*one.secondary_opts, f"no {flags[-1] if flags else name}")[0]
        if not flags or value == "True":
            return flags[-1] if flags else None
        return f"{flags[-1]} {value}" if value else flags[-1]
    return None


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns wide enough for what they hold; those whose cells end in a number or unit are aligned right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        numeric = all(row[index][:1].isdigit() and row[index][-1:] in "0123456789B%" for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # In a pipe there is no window to fit into, so no cell is cut.
    output_console(None if sys.stdout.isatty() else 10_000).print(table)


def output_console(width: int | None = None) -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def error_console() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, markup=False)


class _Bar:
    """Draws progress when there is some, and is gone when its `with` ends."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._said: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class TransferBar(_Bar):
    """Shows a download, as a `fullpipe.hub.Progress`: a bar on a terminal, a line per quarter elsewhere. Use it in a
    `with`."""

    def __call__(self, what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._draw(what, done, total)
        else:
            self._tell(what, done, total)

    def _draw(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = _new_bar(total)
        self._bar.update(self._bar.task_ids[0], description=what, completed=done, total=total)

    def _tell(self, what: str, done: int, total: int) -> None:
        subject = what.partition(" (")[0]
        now = subject, _QUARTERS * done // max(total, 1)
        if now != self._said:
            self._said = now
            print_note(f"{subject}: {megabytes(done)} of {megabytes(total)}")


def _new_bar(total: int) -> Progress:
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
        console=error_console(), transient=True,
    )
    bar.add_task("", total=total)
    bar.start()
    return bar


class StepBar(_Bar):
    """Shows progress by steps: a bar on a terminal, a line per eighth elsewhere. Use it in a `with`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def __call__(self, done: int, total: int, subject: str) -> None:
        if sys.stderr.isatty():
            self._draw(done, total, subject)
        elif (now := (f"of {total}", 8 * done // max(total, 1))) != self._said:
            self._said = now
            print_note(f"{self._what}: {done} of {total} ({subject})")

    def _draw(self, done: int, total: int, subject: str) -> None:
        from rich import progress

        if self._bar is None:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), console=error_console(), transient=True,
            )
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=f"{self._what} ({subject})", completed=done, total=total)


class ShareBar(_Bar):
    """Shows progress by shares of the whole, with figures: a bar with the time that is left on a terminal, a line every
    half minute elsewhere. Use it in a `with`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        self._begun = self._told = time.monotonic()
        self._first: float | None = None

    def __call__(self, step: int, share: float, figures: str) -> None:
        if self._first is None:  # a run that goes on does not begin at 0
            self._first, self._begun = share, time.monotonic()
        if sys.stderr.isatty():
            self._draw(step, share, figures)
        elif time.monotonic() - self._told > 30:
            self._told = time.monotonic()
            print_note(f"{self._what}: step {step}, {share:.1%}, {figures}{self._left(share)}")

    def _left(self, share: float) -> str:
        done = share - (self._first or 0.0)
        return f", {(time.monotonic() - self._begun) * (1 - share) / done / 60:.0f} min left" if done > 0 else ""

    def _draw(self, step: int, share: float, figures: str) -> None:
        from rich import progress

        if self._bar is None:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
                progress.TimeRemainingColumn(), console=error_console(), transient=True)
            self._bar.add_task("", total=1.0)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=f"{self._what}: step {step}, {figures}", completed=share)
