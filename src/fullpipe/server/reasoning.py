"""Models that think first, in `<think>` marks, have their thoughts told apart from their answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.server.tools.events import Event, Reader, Thought
from fullpipe.server.tools.marks import Marks

BEGIN, END = "<think>", "</think>"
MARKS = (BEGIN, END)

STYLES = {"deepseek_r1": True, "qwen3": False}
"""By the names of vLLM's parsers: whether such a model thinks where neither its prompt nor its answer begins with the
mark."""

_LAST = 16  # tokens of a prompt, in which it is seen whether thoughts have begun


@dataclass(frozen=True, slots=True)
class Thinking:
    """Says how a model's thoughts are known.

    always: the model thinks where no mark says whether it does. told: thoughts are told, else left out.
    """

    tokenizer: Tokenizer
    always: bool
    told: bool = True

    def opened(self, prompt: Sequence[int]) -> bool | None:
        """Whether the prompt has opened the thoughts for the model, or closed them to have it answer at once; None: it
        ends with neither mark."""
        end = self.tokenizer.decode(prompt[-_LAST:], skip_special_tokens=False).rstrip()
        return True if end.endswith(BEGIN) else False if end.endswith(END) else None

    @property
    def special(self) -> Collection[str]:
        return self.tokenizer.special

    @property
    def marks(self) -> tuple[int | None, int | None]:
        """The tokens that are the marks, where there are such."""
        begin, end = (self.tokenizer.backend.token_to_id(mark) for mark in MARKS)
        return begin, end


class Thoughtful:
    """Reads thoughts, up to the mark that ends them, and has another read what is behind.

    begins: the answer begins with thoughts, whether a mark says so or not. told: thoughts are told, else left out.
    """

    def __init__(self, begins: bool, then: Reader, told: bool = True) -> None:
        self._begins, self._then, self._told = begins, then, told
        self._start: str | None = ""  # of the answer, while it may be the mark; None: it is behind us
        self._thinking: Marks | None = None

    def push(self, text: str) -> list[Event]:
        if self._start is not None:
            text = self._from_start(self._start + text)
        return self._read(text)

    def finish(self) -> list[Event]:
        held, self._start = self._start or "", None
        if held and self._begins:
            self._thinking = Marks(END)
        events = self._read(held)
        if self._thinking:
            events += self._thought(self._thinking.rest())
        return [*events, *self._then.finish()]

    def _from_start(self, text: str) -> str:
        """What is to be read, once it is certain whether the answer begins with the mark."""
        words = text.lstrip()
        if BEGIN.startswith(words[: len(BEGIN)]) and len(words) < len(BEGIN):
            self._start = text
            return ""
        self._start = None
        marked = words.startswith(BEGIN)
        if marked or self._begins:
            self._thinking = Marks(END)
        return words.removeprefix(BEGIN) if marked else text

    def _read(self, text: str) -> list[Event]:
        if not self._thinking:
            return self._then.push(text)
        thoughts, mark, answer = self._thinking.split(text)
        events = self._thought(thoughts)
        if mark:
            self._thinking = None
            events += self._then.push(answer)
        return events

    def _thought(self, text: str) -> list[Event]:
        return [Thought(text)] if text and self._told else []


@dataclass(slots=True)
class ThoughtTokens:
    """Counts the tokens of thoughts by the tokens that are their marks. A model without such tokens has none counted.

    begin, end: the marks' ids. thinking: whether the answer begins with thoughts.
    """

    begin: int | None
    end: int | None
    thinking: bool

    def count(self, tokens: Iterable[int]) -> int:
        """Of these, which come next."""
        number = 0
        for token in tokens:
            if self.end is None:
                break
            if token == self.begin:
                self.thinking, self.begin = True, None
            elif token == self.end or not self.thinking:
                self.end = None  # what comes now is no thought
            else:
                number += 1
        return number
