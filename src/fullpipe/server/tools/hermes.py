"""Calls as Hermes and Qwen write them: `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Collection

from fullpipe.server.tools.bare import BareCall
from fullpipe.server.tools.events import Event, Notes
from fullpipe.server.tools.json_calls import CallReader
from fullpipe.server.tools.marks import Marks

BEGIN, END = "<tool_call>", "</tool_call>"
MARKS = (BEGIN, END)


class HermesParser:
    """Finds those calls. The end's mark may be missing; what stands between a call's brace and that mark is dropped.

    offered: names of tools. A call that is marked may have any name; an answer that is a call as a whole, unmarked, has
    one of these.
    """

    def __init__(self, notes: Notes, offered: Collection[str]) -> None:
        self._notes = notes
        self._marks = Marks(*MARKS)
        self._bare = BareCall(notes, offered)
        self._call: CallReader | None = None
        self._behind: list[str] | None = None  # what has followed a call whose mark has not come

    def push(self, text: str) -> list[Event]:
        if self._bare.open:
            text = self._bare.feed(text)
        self._read(text)
        return self._notes.take()

    def finish(self) -> list[Event]:
        if self._bare.open:
            self._read(self._bare.finish())
        if self._call:
            self._no_call(self._call)
        self._notes.say("".join(self._behind or ()) + self._marks.rest())
        self._notes.end()
        return self._notes.take()

    def _read(self, text: str) -> None:
        while text:
            text = self._within(self._call, text) if self._call else self._between(text)

    def _within(self, call: CallReader, text: str) -> str:
        rest = call.feed(text)
        if call.state != "reading":
            self._call = None
            if call.begun:
                self._behind = []
            else:
                self._no_call(call)
        return rest

    def _no_call(self, call: CallReader) -> None:
        if not call.begun:
            self._notes.say(BEGIN + call.raw)

    def _between(self, text: str) -> str:
        before, mark, rest = self._marks.split(text)
        if self._behind is not None:
            self._behind.append(before)
            if not mark:
                return rest
            before, self._behind = "" if mark == END else "".join(self._behind), None
            mark = "" if mark == END else mark
        self._notes.say(before)
        if mark == BEGIN:
            self._call = CallReader(self._notes)
        else:
            self._notes.say(mark)
        return rest
