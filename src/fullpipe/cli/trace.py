"""`fullpipe trace` draws a recorded run, and `fullpipe generate --trace` draws with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from fullpipe.cli import console
from fullpipe.cli.options import one_of
from fullpipe.errors import FullpipeError, MissingExtra, UsageError
from fullpipe.messages import Event, Ready

if TYPE_CHECKING:
    from fullpipe.models.tokens.tokenizer import Tokenizer
    from fullpipe.trace.picture import Clock
    from fullpipe.trace.recorder import JsonlRecorder

PICTURES = (".png", ".svg")
_SUFFIXES = (".json", *PICTURES, ".html", ".jsonl")
_CLOCKS: dict[str, Clock] = {"virtual": "virtual time", "wall": "wall-clock time"}
if TYPE_CHECKING:
    _ClockName = str
else:
    _ClockName = one_of(*_CLOCKS)


def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Events, as fullpipe generate --events records them.")],
    chrome: Annotated[Path | None, typer.Option("--chrome", metavar="OUT.json", help="Write a Chrome trace, to open "
                                                "in Perfetto.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="OUT.png|.svg", help="Draw the pipeline over "
                                                 "time.")] = None,
    page: Annotated[Path | None, typer.Option("--page", metavar="OUT.html", help="Write a page that shows the run step "
                                              "by step.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="MODEL", help="Show the page's tokens as this "
                                                  "model spells them, not as numbers.")] = None,
    start: Annotated[float | None, typer.Option("--start", metavar="SECONDS", help="Where the picture begins, counted "
                                                "from the beginning of the run.")] = None,
    end: Annotated[float | None, typer.Option("--end", metavar="SECONDS", help="Where the picture ends. Default: where "
                                              "boxes become too small to read.")] = None,
    clock: Annotated[_ClockName | None, typer.Option("--clock", help="Whose time the file is in. Default: virtual "
                                                        "if it begins at 0, else left open.")] = None,
) -> None:
    """Turn a recorded run into a Chrome trace, a picture and a page.

    Without --chrome, --picture and --page all three are written, beside FILE.
    """
    outputs = [path for path in (chrome, picture, page) if path is not None] or _beside(file)
    for path, kinds in ((chrome, (".json",)), (picture, PICTURES), (page, (".html",))):
        if path is not None:
            _check_suffix(path, kinds)
    for path in outputs:
        check_output(path)
        if path.resolve() == file.resolve():
            raise UsageError(f"{path} is the recorded run itself", hint="Name another file to write.")
    from fullpipe.trace.recorder import read_events

    events = list(read_events(file))
    texts = None if tokenizer is None else token_texts(tokenizer_of(tokenizer), events)
    for path in outputs:
        write(events, path, title=file.stem, clock=_clock(clock, events), texts=texts, start=start, end=end)
        typer.echo(path)


def _beside(file: Path) -> list[Path]:
    """The picture only where it can be drawn."""
    base = file.with_suffix("") if file.suffix == ".jsonl" else file
    outputs = [base.with_name(base.name + suffix) for suffix in (".trace.json", ".svg", ".html")]
    try:
        check_output(outputs[1])
    except MissingExtra as error:
        console.print_note(f"no picture: {error.message} ({error.hint})")
        del outputs[1]
    return outputs


def _clock(given: str | None, events: Sequence[Event]) -> Clock:
    """Virtual time begins at 0, and no wall clock does. A file from the middle of a run says nothing."""
    if given is not None:
        return _CLOCKS[given]
    return "virtual time" if events and events[0].time == 0 else "time"


# ---- writing one of them -----------------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Refuse a name that says no known kind, or that surely cannot be written, before anybody works for it."""
    from fullpipe.trace.files import check_writable

    _check_suffix(path, _SUFFIXES)
    check_writable(path)
    if path.suffix.lower() in PICTURES:
        from fullpipe.trace.picture import check_can_draw

        check_can_draw(path)


def _check_suffix(path: Path, kinds: Sequence[str]) -> None:
    if path.suffix.lower() not in kinds:
        raise UsageError(f"{path} does not end in {' or '.join(kinds)}",
                         hint="The ending says what is written: .json a Chrome trace, .png or .svg a picture, .html a "
                              "page, .jsonl the events.")


def write(events: Sequence[Event], path: Path, *, title: str, clock: Clock, texts: dict[int, str] | None,
          start: float | None = None, end: float | None = None) -> None:
    """Write what the ending of `path` says; `start` and `end` are of pictures."""
    match path.suffix.lower():
        case ".json":
            from fullpipe.trace.chrome import write_chrome_trace

            write_chrome_trace(events, path)
        case ".html":
            from fullpipe.trace.page import write_page

            write_page(events, path, tokenizer_texts=texts, title=title, clock=clock)
        case _:
            from fullpipe.trace.picture import draw

            draw(events, path, title=title, clock=clock, start=start, end=end)


def tokenizer_of(model: str) -> Tokenizer:
    from fullpipe import hub
    from fullpipe.models.tokens.loading import load_tokenizer

    with console.TransferBar() as bar:
        return load_tokenizer(hub.resolve(model, progress=bar))


def token_texts(tokenizer: Tokenizer, events: Iterable[Event]) -> dict[int, str]:
    """What the tokens in the events read, each by itself."""
    from fullpipe.trace.history import tokens_of

    return {token: tokenizer.token_text(token) for token in tokens_of(events)}


# ---- while it runs -----------------------------------------------------------------------------------------


class Traces:
    """Listens to an engine, and writes `files` when its `with` block ends, however it ends.

    A .jsonl file is written as events come, the others at the end. No file is touched before a request is there, so
    what was refused leaves everything as it was. events: a file that gets the events whatever its ending. title: of
    pages and pictures. tokenizer: spells their tokens.

    Raises `UsageError` for files that cannot be written and `MissingExtra` without matplotlib: here, for a failure
    at the end of a long run is dear. When the block ends with an exception, what cannot be written is only reported.
    """

    def __init__(self, files: Iterable[Path], events: Path | None, *, title: str = "", clock: Clock) -> None:
        from fullpipe.trace.files import check_writable

        wanted = list(dict.fromkeys(files))
        for path in wanted:
            check_output(path)
        if events is not None:
            check_writable(events)
        self._drawn = [path for path in wanted if path.suffix.lower() != ".jsonl"]
        self._recorded = list(dict.fromkeys([path for path in wanted if path not in self._drawn]
                                            + ([events] if events is not None else [])))
        self.title, self._clock = title, clock
        self._recorders: list[JsonlRecorder] = []
        self._events: list[Event] = []
        self._early: list[Event] = []  # what idle stations said
        self._begun = False
        self.tokenizer: Tokenizer | None = None

    @property
    def wanted(self) -> bool:
        return bool(self._drawn or self._recorded)

    def __call__(self, event: Event) -> None:
        if not self._begun and isinstance(event, Ready):
            self._early.append(event)
            return
        if not self._begun:
            self._begin()
            for early in self._early:
                self._take(early)
        self._take(event)

    def _take(self, event: Event) -> None:
        for recorder in self._recorders:
            recorder(event)
        if self._drawn:
            self._events.append(event)

    def _begin(self) -> None:
        from fullpipe.trace.recorder import JsonlRecorder

        self._begun = True
        for path in self._recorded:
            _report_only(lambda path=path: self._recorders.append(JsonlRecorder(path)))  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for recorder in self._recorders:
            recorder.close()
        failures = [self._write(path) for path in self._drawn if self._events]
        for failure in filter(None, failures):
            if error is None:
                raise failure
            console.print_error(failure.message, failure.hint)

    def _write(self, path: Path) -> FullpipeError | None:
        texts = token_texts(self.tokenizer, self._events) if self.tokenizer is not None else None
        try:
            write(self._events, path, title=self.title, clock=self._clock, texts=texts)
        except FullpipeError as failure:
            return failure
        console.print_note(f"wrote {path}")
        return None


def _report_only(action: Callable[[], None]) -> None:
    """An engine's listener must not raise."""
    try:
        action()
    except FullpipeError as failure:
        console.print_error(failure.message, failure.hint)
