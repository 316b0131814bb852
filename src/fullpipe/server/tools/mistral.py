"""Calls as Mistral writes them: `[TOOL_CALLS] [{"name": "f", "arguments": {...}}]`, or in newer models, for each,
`[TOOL_CALLS]f{...}`, with `[CALL_ID]id` and `[ARGS]` before the arguments in some."""

from __future__ import annotations

import re
from collections.abc import Collection

from fullpipe.server.tools.events import Event, Notes
from fullpipe.server.tools.json_calls import CallReader, CallsReader, ListReader, State, Value
from fullpipe.server.tools.marks import Marks

BEGIN = "[TOOL_CALLS]"
MARKS = (BEGIN, "[ARGS]", "[CALL_ID]")

_HEAD = re.compile(r"([\w.:/-]+)\s*(?:\[CALL_ID\][\w-]*\s*)?(?:\[ARGS\]\s*)?")
_HEAD_SO_FAR = re.compile(r"[\w.:/-]+[\w\s\[\]-]*")
_LONGEST_HEAD = 400


class MistralParser:
    """Finds those calls. The marks are never part of what is said."""

    def __init__(self, notes: Notes, offered: Collection[str]) -> None:
        self._notes = notes
        self._marks = Marks(BEGIN)
        self._calls: CallsReader | None = None
        self._marked = False  # a call is to begin

    def push(self, text: str) -> list[Event]:
        while text:
            if self._calls:
                text = self._within(self._calls, text)
            elif self._marked:
                text = self._behind_mark(text)
            else:
                text = self._in_words(text)
        return self._notes.take()

    def finish(self) -> list[Event]:
        if self._calls:
            self._notes.say(self._calls.raw)
        self._notes.say(self._marks.rest())
        self._notes.end()
        return self._notes.take()

    def _within(self, calls: CallsReader, text: str) -> str:
        rest = calls.feed(text)
        if calls.state != "reading":
            self._calls = None
            self._notes.say(calls.raw)
        return rest

    def _behind_mark(self, text: str) -> str:
        char = text[0]
        if char.isspace():
            self._notes.say(char)
            return text[1:]
        self._marked = False
        if char == "[":
            self._calls = ListReader(self._notes)
        elif char == "{":
            self._calls = CallReader(self._notes)
        else:
            self._calls = NamedReader(self._notes)
        return text

    def _in_words(self, text: str) -> str:
        before, mark, rest = self._marks.split(text)
        self._notes.say(before)
        self._marked = bool(mark)
        return rest


class NamedReader:
    """Reads one call of the newer kind, a name and then its arguments."""

    def __init__(self, notes: Notes) -> None:
        self.state: State = "reading"
        self.begun = False
        self._notes = notes
        self._head = ""
        self._value = Value()

    @property
    def raw(self) -> str:
        return "" if self.begun else self._head

    def feed(self, text: str) -> str:
        place = 0
        while not self.begun and self.state == "reading" and place < len(text):
            place += self._in_head(text[place])
        if not self.begun:
            return text[place:]
        told = place
        while self.state == "reading" and place < len(text):
            place += self._in_arguments(text[place])
        self._notes.argue(text[told:place])
        return text[place:]

    def _in_head(self, char: str) -> bool:
        """Whether the character is of what stands before the arguments. With their brace the call begins."""
        if char == "{" and (found := _HEAD.fullmatch(self._head)):
            self.begun = True
            self._notes.begin(found[1])
            return False
        if char == "{" or len(self._head) >= _LONGEST_HEAD or not _HEAD_SO_FAR.fullmatch(self._head + char):
            self.state = "broken"
            return False
        self._head += char
        return True

    def _in_arguments(self, char: str) -> bool:
        what = self._value.take(char)
        if what != "more":
            self.state = "done" if what == "last" else "broken"
        return what in ("more", "last")
