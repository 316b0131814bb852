"""Strings with a meaning, such as `<tool_call>`, are found in text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fullpipe.server.tools.events import Event, Reader


class Marks:
    """Finds the first of several strings. What may be the beginning of one is held back until it is certain.

    A string that has another one in it is not looked for: the other one is found first.
    """

    def __init__(self, *marks: str) -> None:
        kept = [mark for mark in marks if not any(other != mark and other in mark for other in marks)]
        self._pattern = re.compile("|".join(map(re.escape, kept)) or r"(?!)")
        self._heads = {mark[:length] for mark in kept for length in range(1, len(mark))}
        self._longest = max(map(len, self._heads), default=0)
        self._held = ""

    def split(self, text: str) -> tuple[str, str, str]:
        """What is certainly before the first mark, the mark ("": none yet), and what is behind it."""
        text, self._held = self._held + text, ""
        if found := self._pattern.search(text):
            return text[: found.start()], found[0], text[found.end():]
        cut = len(text) - self._open(text)
        self._held = text[cut:]
        return text[:cut], "", ""

    def rest(self) -> str:
        """What was held back; there is no more text."""
        held, self._held = self._held, ""
        return held

    def _open(self, text: str) -> int:
        """Length of the longest end of the text with which a mark may begin."""
        lengths = range(min(self._longest, len(text)), 0, -1)
        return next((length for length in lengths if text[-length:] in self._heads), 0)


class Without:
    """Leaves marks out of a text, and has the rest read by another.

    So an answer is read whose parser needs to see some special tokens: the others are left out here.
    """

    def __init__(self, marks: Iterable[str], then: Reader) -> None:
        self._marks, self._then = Marks(*marks), then

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            before, _, text = self._marks.split(text)
            events += self._then.push(before)
        return events

    def finish(self) -> list[Event]:
        return [*self._then.push(self._marks.rest()), *self._then.finish()]
