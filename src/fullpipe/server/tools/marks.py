"""Strings with a meaning, such as `<tool_call>`, are found in text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from fullpipe.server.tools.events import Event, Reader


class Marks:
    """Finds the first of several strings. What may be the beginning of one is held back until it is certain.

    A string that has another one in it is not looked for: the other one is found first.
    """

    def __init__(self, *marks: str) -> None:
        self._pattern, self._heads, self._longest = _found_by(frozenset(marks))
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


@lru_cache(maxsize=32)
def _found_by(marks: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """A pattern of the marks that are looked for, the beginnings of these, and the longest beginning's length. A
    tokenizer may have thousands of marks, and every answer looks for them."""
    lengths = {len(mark) for mark in marks}
    kept = sorted(mark for mark in marks if marks.isdisjoint(_parts(mark, lengths)))
    heads = frozenset(mark[:length] for mark in kept for length in range(1, len(mark)))
    return re.compile("|".join(map(re.escape, kept)) or r"(?!)"), heads, max(map(len, heads), default=0)


def _parts(mark: str, lengths: Iterable[int]) -> Iterator[str]:
    """What is in it and of such a length, but for itself."""
    return (mark[begin : begin + length] for length in lengths if length < len(mark)
            for begin in range(len(mark) - length + 1))


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
