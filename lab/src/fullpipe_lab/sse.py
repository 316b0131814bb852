"""The bytes of a stream are held against the rules of server-sent events, and of OpenAI's streams.

    events = check_bytes(raw)            # the rules of the HTML standard, section 9.2, and no looser habits
    chunks = check_chunks(raw)           # and those of chats and completions: one JSON object an event, [DONE] last
    told = check_named(raw)              # and those of responses: events have names, and rising numbers

Browsers forgive much that other readers do not: here nothing is forgiven.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

DONE = "[DONE]"
_FIELDS = ("data", "event", "id", "retry")


class BadStream(ValueError):
    """The bytes break a rule."""


@dataclass(frozen=True, slots=True)
class Event:
    """name: "" where the event has none."""

    data: str
    name: str = ""


def check_bytes(raw: bytes) -> list[Event]:
    """The events of a whole stream; comments are left out. Raises BadStream."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadStream(f"it is not UTF-8: {error}") from None
    if text.startswith("\ufeff"):
        raise BadStream("it begins with a byte order mark")
    if "\r" in text:
        raise BadStream("a line ends with a carriage return, or a text has one that is not escaped")
    if "\0" in text:
        raise BadStream("it holds a null character")
    if text and not text.endswith("\n\n"):
        raise BadStream(f"its last event is cut off: {text[-80:]!r}")
    return [event for block in text.removesuffix("\n\n").split("\n\n") if (event := _event(block)) is not None]


def _event(block: str) -> Event | None:
    """None of a comment. A block that begins with an empty line stands behind two where there must be one."""
    data: list[str] = []
    name = ""
    for line in block.split("\n"):
        if line.startswith(":"):
            continue
        field, colon, value = line.partition(":")
        if field not in _FIELDS or not colon:
            raise BadStream(f"{line[:80]!r} is no line of an event")
        if not value.startswith(" ") or value.startswith("  "):
            raise BadStream(f"{line[:80]!r} has not one space behind the colon")
        if field == "data":
            data.append(value[1:])
        elif field == "event":
            if name or not value.strip():
                raise BadStream(f"an event has two names, or none: {block[:80]!r}")
            name = value[1:]
        elif field == "retry" and not value[1:].isdecimal():
            raise BadStream(f"{line[:80]!r} is no number of milliseconds")
    if name and not data:
        raise BadStream(f"the event {name} has no data, so that readers leave it out")
    return Event("\n".join(data), name) if data else None


def check_chunks(raw: bytes) -> list[dict[str, Any]]:
    """The chunks of a chat or a completion, errors among them. Raises BadStream."""
    events = check_bytes(raw)
    if not events or events[-1] != Event(DONE):
        raise BadStream(f"{DONE} does not stand last, but {events[-1].data[:80] if events else 'nothing'!r}")
    if any(event.name for event in events):
        raise BadStream("its events have names, which OpenAI's have not")
    return [_object(event) for event in events[:-1]]


def check_named(raw: bytes) -> list[dict[str, Any]]:
    """The events of a response. Raises BadStream."""
    told = []
    for number, event in enumerate(check_bytes(raw)):
        said = _object(event)
        if said.get("type") != event.name:
            raise BadStream(f"an event is called {event.name!r} and says that it is {said.get('type')!r}")
        if said.get("sequence_number") != number:
            raise BadStream(f"event {number} says that it is number {said.get('sequence_number')!r}")
        told.append(said)
    return told


def _object(event: Event) -> dict[str, Any]:
    try:
        said = json.loads(event.data, parse_constant=_refuse)
    except ValueError as error:
        raise BadStream(f"{event.data[:80]!r} is not JSON: {error}") from None
    if not isinstance(said, dict) or "\n" in event.data:
        raise BadStream(f"{event.data[:80]!r} is not one JSON object on one line")
    return said


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
