"""Events go to a file and come back: one JSON object per line, for traces, plots and bug reports. No torch.

A line is the event's type and its fields, structs within it as objects:
`{"type": "Emitted", "time": 0.5, "request": 0, ...}`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec import MsgspecError, json

from fullpipe.errors import UsageError
from fullpipe.events import AnyEvent
from fullpipe.messages import Event

Recorder = Callable[[Event], None]
"""What the engine hands its events to. Must return at once and not raise. `list.append` is one."""

_log = logging.getLogger(__name__)
_BUFFER = 1 << 16  # bytes


class JsonlRecorder:
    """Writes the events that it is called with to `path`, replacing what was there.

    Lines are buffered; `close` (or leaving the `with` block) writes what is left, and may be called more
    than once. A disk that fails while a request runs costs the trace, not the request: the first failure
    is logged as a warning and the recorder falls silent. Raises `UsageError` when the file cannot be
    created, for then nothing runs yet.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._file = open(self._path, "wb", buffering=_BUFFER)  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"cannot write the trace {self._path}: {error.strerror}",
                             hint="Name a file in a folder that exists and is writable.") from error
        self._open = True

    def __call__(self, event: Event) -> None:
        if not self._open:
            return
        try:
            self._file.write(_ENCODER.encode(event) + b"\n")
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is buffered and close the file. Events that come later are dropped."""
        if not self._open:
            return
        self._open = False
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._open = False
        _log.warning("the trace %s is incomplete: %s", self._path, error.strerror)
        with suppress(OSError):  # the same failure again: closing flushes what could not be written
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def read_events(path: str | Path) -> Iterator[Event]:
    """The events of a file that `JsonlRecorder` wrote, equal to those recorded.

    Only inside `Finished.detail`, which may hold anything, are values what JSON makes of them. A last line
    without its end is what a killed process leaves, and is skipped. Raises `UsageError` for a file that
    cannot be read and, with its number, for any other line that is not an event.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield _event(line, f"{path}, line {number}")
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error}",
                         hint="A trace is a text file as `JsonlRecorder` writes it.") from error


def _event(line: bytes, where: str) -> Event:
    try:
        event: Event = _DECODER.decode(line)
    except (MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not an event: {line.strip()[:80].decode(errors='replace')}",
                         hint="The file is damaged, or another version of Fullpipe wrote it.") from error
    return event


def _plain(value: Any) -> Any:
    """What the encoder does not know: numbers of NumPy; whatever `Finished.detail` holds."""
    return value.item() if hasattr(value, "item") else repr(value)


_ENCODER, _DECODER = json.Encoder(enc_hook=_plain), json.Decoder(AnyEvent)
