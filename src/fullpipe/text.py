"""From tokens to the text a user sees: incremental, stop strings respected. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Gives the text that is certain after each token, and at the end what was held back."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Reply:
    """One request's text as it grows, token by token.

    stop: strings that end the text; neither they nor what follows is part of it. Text that may be the
    beginning of a stop string is held back until it is known not to be.
    min_tokens: stop strings that are complete with the first so many tokens do not count.
    include_stop: the stop string itself is part of it after all.

    length: characters that the tokens so far have certainly brought, those that are held back or cut off among them.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), min_tokens: int = 0,
                 include_stop: bool = False) -> None:
        self._detokenizer = detokenizer
        self._stop, self._include_stop = tuple(stop), include_stop
        self._early = min_tokens  # tokens to come with which no stop string counts
        self._ended = False
        self._held = ""  # certain text that may begin a stop string
        self._passed = 0  # characters of it that came while no stop string counted
        self._fresh: list[str] = []
        self.text = ""
        self.length = 0

    def push(self, token: int) -> bool:
        """Take a token in; True when a stop string is complete."""
        ended = self._take(self._detokenizer.push(token))
        self._early -= self._early > 0
        return ended

    def fresh(self) -> str:
        """The text that became certain since this was last asked."""
        text = "".join(self._fresh)
        self._fresh.clear()
        return text

    def finish(self) -> None:
        """No more tokens: what was held back belongs to the text, unless a stop string ended it."""
        if not self._take(self._detokenizer.finish()):
            self._give(self._held)
        self._held = ""

    def _take(self, text: str) -> bool:
        if self._ended:
            return True
        self.length += len(text)
        self._held += text
        if self._early:
            self._passed = len(self._held)
        ends = [(found, len(stop)) for stop in self._stop
                if (found := self._held.find(stop, max(0, self._passed - len(stop) + 1))) >= 0]
        if ends:
            begin, length = min(ends)
            self._give(self._held[: begin + length if self._include_stop else begin])
            self._held = ""
            self._ended = True
            return True
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        self._give(self._held[:cut])
        self._held, self._passed = self._held[cut:], max(0, self._passed - cut)
        return False

    def _give(self, text: str) -> None:
        if text:
            self.text += text
            self._fresh.append(text)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
