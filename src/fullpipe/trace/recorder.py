"""Events to a file and back: one JSON object per line, for traces, plots and bug reports. No torch.

A line is the event's type and its fields, nested dataclasses as objects:
`{"type": "Emitted", "time": 0.5, "request": 0, ...}`. JSON knows no infinity: a margin without a rival is the
string "inf", and comes back as the number. (Older files have a bare `Infinity` there, which is read too.)
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args, get_origin, get_type_hints

from fullpipe import messages
from fullpipe.errors import UsageError
from fullpipe.messages import Event

Recorder = Callable[[Event], None]
"""What the engine hands its events to. Must return at once and not raise. `list.append` is one."""

_log = logging.getLogger(__name__)
_BUFFER = 1 << 16  # bytes

_TYPES: dict[str, type[Event]] = {
    name: kind for name, kind in vars(messages).items() if isinstance(kind, type) and issubclass(kind, Event)
}


class JsonlRecorder:
    """A `Recorder` that writes to `path`, replacing what was there.

    Lines are buffered; `close` (or leaving the `with` block) writes what is left, and may be called more
    than once. A disk that fails while a request runs costs the trace, not the request: the first failure
    is logged as a warning and the recorder falls silent. Raises `UsageError` when the file cannot be
    created, for then nothing runs yet.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._file = open(self._path, "w", encoding="utf-8", buffering=_BUFFER)  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"cannot write the trace {self._path}: {error.strerror}",
                             hint="Name a file in a folder that exists and is writable.") from error
        self._open = True

    def __call__(self, event: Event) -> None:
        if not self._open:
            return
        try:
            self._file.write(_line(event))
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
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n"):
                    yield _event(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the trace {path}: {error}",
                         hint="A trace is a text file as `JsonlRecorder` writes it.") from error


def _line(event: Event) -> str:
    values = _plain(event, type=type(event).__name__)
    try:
        return json.dumps(values, default=_nested, allow_nan=False) + "\n"
    except ValueError:  # a number that JSON does not know: rare, so only then everything is looked at
        return json.dumps(_spelled(values), default=_nested, allow_nan=False) + "\n"


def _spelled(value: Any) -> Any:
    """The same with "inf", "-inf" and "nan" for the numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(float(value))
    if isinstance(value, dict):
        return {name: _spelled(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    if is_dataclass(value) or hasattr(value, "item"):
        return _spelled(_nested(value))
    return value


def _plain(value: Any, **more: Any) -> dict[str, Any]:
    return more | {field.name: getattr(value, field.name) for field in fields(value)}


def _nested(value: Any) -> Any:
    """What the encoder does not know: nested dataclasses; numbers of NumPy; whatever `detail` holds."""
    if is_dataclass(value):
        return _plain(value)
    return value.item() if hasattr(value, "item") else repr(value)


def _event(line: str, where: str) -> Event:
    try:
        values = json.loads(line)
        kind = _TYPES[values.pop("type")]
        event: Event = _build(kind, values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{where} is not an event: {line.strip()[:80]}",
                         hint="The file is damaged, or another version of Fullpipe wrote it.") from error
    return event


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        hints = _hints(hint)
        return hint(**{name: _build(hints[name], item) for name, item in value.items()})
    if hint == list[float]:
        return [float(item) for item in value]  # "inf" among them
    if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
        return [_build(get_args(hint)[0], item) for item in value]
    if isinstance(value, str) and hint in (float, float | None):
        return float(value)
    return value
