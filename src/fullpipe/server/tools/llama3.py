"""Calls as Llama 3 writes them: `{"name": "f", "parameters": {...}}`, several with semicolons between, and
`<|python_tag|>` before them or not."""

from __future__ import annotations

from collections.abc import Collection

from fullpipe.server.tools.events import Event, Notes
from fullpipe.server.tools.json_calls import CallReader
from fullpipe.server.tools.marks import Marks

TAG = "<|python_tag|>"
MARKS = (TAG,)


class Llama3Parser:
    """Finds those calls: behind the tag, of any name, or, of tools that are offered, where the answer begins with one.

    The tag itself is never part of what is said.
    """

    def __init__(self, notes: Notes, offered: Collection[str]) -> None:
        self._notes, self._offered = notes, offered
        self._marks = Marks(*MARKS)
        self._call: CallReader | None = None
        self._at = "start"
        self._marked = False
        self._blank = ""  # at the start, and between calls

    def push(self, text: str) -> list[Event]:
        self._read(text)
        return self._notes.take()

    def finish(self) -> list[Event]:
        if self._call:
            self._notes.say(self._call.raw)
        self._notes.say(self._blank + self._marks.rest())
        self._notes.end()
        return self._notes.take()

    def _read(self, text: str) -> None:
        while text:
            if self._call:
                text = self._within(self._call, text)
            elif self._at == "words":
                text = self._in_words(text)
            else:
                text = self._before_call(text)

    def _within(self, call: CallReader, text: str) -> str:
        rest = call.feed(text)
        if call.state == "reading":
            return rest
        self._call = None
        self._at = "behind" if call.state == "done" else "words"
        self._notes.say(call.raw)
        return rest

    def _in_words(self, text: str) -> str:
        before, mark, rest = self._marks.split(text)
        self._notes.say(before)
        if mark:
            self._at, self._marked = "call", True
        return rest

    def _before_call(self, text: str) -> str:
        """Where a call may begin: at the start, behind the tag, behind a semicolon, behind a call."""
        char = text[0]
        if char.isspace():
            self._blank += char
        elif char == ";" and self._at == "behind":
            self._at = "call"
        elif char == "{":
            self._call = CallReader(self._notes) if self._marked \
                else CallReader(self._notes, self._offered.__contains__, strict=True)
            self._notes.say(self._blank)
            self._blank = ""
            return text
        else:
            self._at = "words"
            blank, self._blank = self._blank, ""
            self._notes.say(blank)
            return text
        return text[1:]
