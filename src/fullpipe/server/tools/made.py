"""Calls that were demanded have a form of their own, which the text is made to have, whatever the model's own is."""

from __future__ import annotations

from fullpipe.server.tools.events import Event, Notes
from fullpipe.server.tools.json_calls import ListReader


class RequiredCalls:
    """Reads an answer that is a list of calls (`tool_choice: "required"`). Where it breaks off, what is no call is
    words."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._calls: ListReader | None = ListReader(notes)

    def push(self, text: str) -> list[Event]:
        if self._calls:
            text = self._calls.feed(text)
            if self._calls.state != "reading":
                self._end(self._calls)
        self._notes.say(text)
        return self._notes.take()

    def finish(self) -> list[Event]:
        if self._calls:
            self._end(self._calls)
        self._notes.end()
        return self._notes.take()

    def _end(self, calls: ListReader) -> None:
        self._notes.say(calls.raw)
        self._calls = None


class NamedCall:
    """Reads an answer that is the arguments of one call, whose name was chosen by whoever asked."""

    def __init__(self, notes: Notes, name: str) -> None:
        self._notes, self._name = notes, name
        self._begun = False

    def push(self, text: str) -> list[Event]:
        if not self._begun:
            text = text.lstrip()
            if text:
                self._begin()
        self._notes.argue(text)
        return self._notes.take()

    def finish(self) -> list[Event]:
        if not self._begun:
            self._begin()
        return self._notes.take()

    def _begin(self) -> None:
        self._begun = True
        self._notes.begin(self._name)
