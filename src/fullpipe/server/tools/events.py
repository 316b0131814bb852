"""An answer's text becomes events: words, thoughts, calls and pieces of their arguments."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Said:
    """The model says this to whoever asked."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """The model says this to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool begins. index: its place among the calls of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """A piece of a call's arguments has come; they are JSON as the model wrote it, broken where the model broke it."""

    index: int
    text: str


Event = Said | Thought | Called | Argued


def joined(events: Sequence[Event]) -> list[Event]:
    """The same, with pieces of one call's arguments that come together as one: what was held back is one piece then,
    however it was read."""
    found: list[Event] = []
    for index, group in groupby(events, lambda event: event.index if isinstance(event, Argued) else None):
        together = list(group)
        text = "".join(event.text for event in together if isinstance(event, Argued))
        found += together if index is None else [Argued(index, text)]
    return found


class Reader(Protocol):
    """Takes the text of one answer in pieces. The events of all pieces join to the same, however the text is cut."""

    def push(self, text: str) -> list[Event]:
        """What is certain now."""
        ...

    def finish(self) -> list[Event]:
        """What was held back; there is no more text."""
        ...


class Words:
    """Reads an answer that is nothing but words."""

    def push(self, text: str) -> list[Event]:
        return [Said(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class Notes:
    """Collects what a parser finds in an answer.

    White space around calls is none of the answer's words: it is kept until words follow it, or the end of an answer
    without calls.

    new_id: names calls. most: calls at most; further ones are left out.
    """

    def __init__(self, new_id: Callable[[], str], most: int | None = None) -> None:
        self._new_id, self._most = new_id, most
        self._events: list[Event] = []
        self._blank = ""
        self._calls = 0

    def say(self, text: str) -> None:
        whole = self._blank + text
        words = whole.rstrip()
        self._blank = whole[len(words):]
        if words:
            self._events.append(Said(words))

    def begin(self, name: str) -> None:
        self._blank = ""
        if not self._full:
            self._events.append(Called(self._calls, self._new_id(), name))
        self._calls += 1

    def argue(self, text: str) -> None:
        """Of the call that was begun last."""
        if text and (self._most is None or self._calls <= self._most):
            self._events.append(Argued(self._calls - 1, text))

    def end(self) -> None:
        """The answer is over."""
        if self._blank and not self._calls:
            self._events.append(Said(self._blank))
        self._blank = ""

    def take(self) -> list[Event]:
        """What was found since this was last asked."""
        taken, self._events = self._events, []
        return taken

    @property
    def _full(self) -> bool:
        return self._most is not None and self._calls >= self._most


def call_id() -> str:
    """A name for a call, in OpenAI's manner."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """One of nine letters and digits, the only kind that Mistral's templates take."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
