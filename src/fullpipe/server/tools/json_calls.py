"""Calls that are written in JSON are read character by character, so that arguments can be told before they are whole.

A call is an object with a name and arguments, {"name": "f", "arguments": {...}}; some models call these "parameters".
It counts as one from the moment that both are known, a name that is taken and the arguments' first brace; what breaks
before is no call, and is words. What breaks behind that moment ends the call: a stream cannot take back what it has
said.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any, Literal, Protocol

from fullpipe.server.tools.events import Notes

ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "type", "id", *ARGUMENTS})  # of calls that nothing marks as such
_BLANK = " \t\r\n"
_OUTSIDE_STRINGS = frozenset(string.ascii_letters + string.digits + _BLANK + '{}[]:,+-._"')

State = Literal["reading", "done", "broken"]


class CallsReader(Protocol):
    """Reads calls out of text that comes in pieces.

    state: "done" behind the last character; "broken" before one that cannot stand there.
    begun: whether a call was told. raw: what was read and is no call so far.
    """

    state: State

    @property
    def begun(self) -> bool: ...

    @property
    def raw(self) -> str: ...

    def feed(self, text: str) -> str:
        """Read on; what is not read, being behind the end, is returned."""
        ...


class Value:
    """Follows one value by its quotes and brackets."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def is_object(self) -> bool:
        return bool(self._parts) and self._parts[0] == "{"

    def take(self, char: str) -> Literal["more", "last", "behind", "bad"]:
        """What the next character is to the value: in it, the last of it, already behind it, or wrong."""
        if self._in_string:
            return self._take_of_string(char)
        if self._parts and not self._depth:  # a number or a word
            if char in f",]}}{_BLANK}":
                return "behind"
            if char in '"{[:':
                return "bad"
        if char not in _OUTSIDE_STRINGS or (not self._parts and char in ",:]}"):
            return "bad"
        self._parts.append(char)
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return "more" if self._depth else "last"
        return "more"

    def _take_of_string(self, char: str) -> Literal["more", "last"]:
        self._parts.append(char)
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            return "more" if self._depth else "last"
        return "more"


class CallReader:
    """Reads one call.

    takes: which names are those of tools; with `strict` the object has no members but a call's.
    """

    def __init__(self, notes: Notes, takes: Callable[[str], bool] = bool, *, strict: bool = False) -> None:
        self.state: State = "reading"
        self.begun = False
        self._notes, self._takes, self._strict = notes, takes, strict
        self._raw: list[str] = []
        self._at = "object"
        self._key = ""
        self._value = Value()
        self._name: str | None = None
        self._arguments: list[str] | None = None  # what is not told of them; None: they have not come
        self._certain = False  # that they are an object

    @property
    def raw(self) -> str:
        return "" if self.begun else "".join(self._raw)

    def feed(self, text: str) -> str:
        place = 0
        while self.state == "reading" and place < len(text) and self._step(text[place]):
            place += 1
        self._raw.append(text[:place])
        self._tell()
        return text[place:]

    def _tell(self) -> None:
        if self._name is None or self._arguments is None or not self._certain:
            return
        if not self.begun:
            self.begun = True
            self._notes.begin(self._name)
        self._notes.argue("".join(self._arguments))
        self._arguments.clear()

    def _step(self, char: str) -> bool:
        """False where the character is not the call's."""
        if self._at in ("key", "value"):
            return self._inside(char)
        if char in _BLANK:
            return True
        match self._at, char:
            case "object", "{":
                self._at = "first"
            case ("first" | "member"), '"':
                self._at, self._value = "key", Value()
                self._value.take(char)
            case "colon", ":":
                self._at = "before value"
            case "before value", _:
                return self._begin_value(char)
            case "next", ",":
                self._at = "member"
            case ("first" | "next"), "}":
                self._end()
            case _:
                return self._break()
        return True

    def _begin_value(self, char: str) -> bool:
        self._at, self._value = "value", Value()
        if self._key in ARGUMENTS and self._arguments is None:
            self._arguments, self._certain = [], char == "{"
        else:
            self._key = self._key if self._key == "name" and self._name is None else ""
        return self._inside(char)

    def _inside(self, char: str) -> bool:
        """In a key or a value."""
        what = self._value.take(char)
        if what == "bad":
            return self._break()
        if what != "behind" and self._at == "value" and self._key in ARGUMENTS and self._certain:
            assert self._arguments is not None, "they begin with their first character"
            self._arguments.append(char)
        if what == "more":
            return True
        if self._at == "key":
            self._end_key()
        else:
            self._end_value()
        return what == "last" or self.state != "reading" or self._step(char)

    def _end_key(self) -> None:
        key = _loaded(self._value.text)
        if not isinstance(key, str) or (self._strict and key not in _KEYS):
            self._break()
        else:
            self._at, self._key = "colon", key

    def _end_value(self) -> None:
        self._at = "next"
        if self._key == "name":
            name = _loaded(self._value.text)
            if isinstance(name, str) and name and self._takes(name):
                self._name = name
            else:
                self._break()
        elif self._key in ARGUMENTS and not self._certain:
            said = _as_object(self._value.text)
            if said is None:
                self._break()
            else:
                self._arguments, self._certain = [said], True

    def _end(self) -> None:
        """Behind the last brace. Who needs no arguments may be called without."""
        if self._name is None:
            self._break()
            return
        if self._arguments is None:
            self._arguments, self._certain = ["{}"], True
        self.state = "done"

    def _break(self) -> Literal[False]:
        self.state = "broken"
        return False


class ListReader:
    """Reads a list of calls, [{...}, {...}]."""

    def __init__(self, notes: Notes, takes: Callable[[str], bool] = bool) -> None:
        self.state: State = "reading"
        self.begun = False
        self._notes, self._takes = notes, takes
        self._call: CallReader | None = None
        self._raw: list[str] = []  # between calls
        self._at = "list"

    @property
    def raw(self) -> str:
        within = self._call.raw if self._call else ""
        return within if self.begun else "".join(self._raw) + within

    def feed(self, text: str) -> str:
        while text and self.state == "reading":
            text = self._within(self._call, text) if self._call else self._between(text)
        return text

    def _within(self, call: CallReader, text: str) -> str:
        rest = call.feed(text)
        self.begun = self.begun or call.begun
        if call.state == "broken":
            self.state = "broken"
        elif call.state == "done":
            self._call, self._at = None, "next"
        return rest

    def _between(self, text: str) -> str:
        char = text[0]
        match self._at, char:
            case _, (" " | "\t" | "\r" | "\n"):
                pass
            case "list", "[":
                self._at = "first"
            case ("first" | "item"), "{":
                self._call = CallReader(self._notes, self._takes)
                return text
            case "next", ",":
                self._at = "item"
            case ("first" | "next"), "]":
                self.state = "done"
            case _:
                self.state = "broken"
                return text
        self._raw.append(char)
        return text[1:]


def _loaded(text: str) -> Any:
    """The value; None too where it is none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _as_object(text: str) -> str | None:
    """Arguments that are no object: some models say null for none, or write the object into a string."""
    if text == "null":
        return "{}"
    value = _loaded(text)
    return value if isinstance(value, str) and isinstance(_loaded(value), dict) else None
