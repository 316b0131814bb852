"""Some models write a call as the whole of their answer, with nothing that marks it: Qwen2.5-Coder's small ones do."""

from __future__ import annotations

from collections.abc import Collection

from fullpipe.server.tools.events import Argued, Called, Notes
from fullpipe.server.tools.json_calls import CallReader

_FENCES = ("```", "```json")


class BareCall:
    """Holds back an answer for as long as it may be one call of a tool that is offered, in a fence or not.

    The call is told at the end, when nothing has followed it. state: "open" until then.
    """

    def __init__(self, notes: Notes, offered: Collection[str]) -> None:
        self.open = True
        self._notes, self._own = notes, Notes(str)
        self._call = CallReader(self._own, offered.__contains__, strict=True)
        self._raw: list[str] = []
        self._at = "start"
        self._line = ""  # of the fence

    def feed(self, text: str) -> str:
        """Hold the text back; or, where it can be no such call, all that was held back."""
        self._raw.append(text)
        for char in text:
            if not self._step(char):
                return self._give_up()
        return ""

    def finish(self) -> str:
        """There is no more text: tell the call, or return what is none."""
        if self._call.state != "done":
            return self._give_up()
        self.open = False
        for event in self._own.take():
            match event:
                case Called(name=name):
                    self._notes.begin(name)
                case Argued(text=text):
                    self._notes.argue(text)
        return ""

    def _give_up(self) -> str:
        self.open = False
        return "".join(self._raw)

    def _step(self, char: str) -> bool:
        """False where this is no such call."""
        if self._at == "call":
            self._call.feed(char)
            if self._call.state == "done":
                self._at, self._line = ("closing" if self._line else "end"), ""
            return self._call.state != "broken"
        if self._at == "fence":
            return self._in_fence(char)
        if char.isspace():
            return True
        match self._at, char:
            case "start", "`":
                self._at, self._line = "fence", char
            case ("start" | "fenced"), "{":
                self._at = "call"
                self._call.feed(char)
            case "closing", "`":
                self._line += char
                self._at = "closing" if len(self._line) < len(_FENCES[0]) else "end"
            case _:
                return False
        return True

    def _in_fence(self, char: str) -> bool:
        if char == "\n":
            self._at = "fenced"
            return self._line.strip() in _FENCES
        self._line += char
        return any(fence.startswith(self._line.rstrip()) for fence in _FENCES)
