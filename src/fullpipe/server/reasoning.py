"""Models that think first, in `<think>` marks, have their thoughts told apart from their answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
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

    def shown(self, token: int) -> str:
        """What a reader sees of a token, a character for each byte: of special tokens the marks alone."""
        spelled = self.tokenizer.token_bytes(token)
        name = spelled.decode(errors="replace")
        return "" if name in self.special and name not in MARKS else spelled.decode("latin-1")


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


class ThoughtTokens:
    """Counts the tokens of thoughts: those of which something is read as thought, and special ones among them. A mark's
    own are none.

    shown: what a reader sees of a token. begins: the answer begins with thoughts, whether a mark says so or not.
    """

    def __init__(self, shown: Callable[[int], str], begins: bool) -> None:
        self._shown, self._begins = shown, begins
        self._text = ""  # the answer's end, as far as it is not decided upon
        self._places: list[tuple[int, int]] = []  # where the tokens in it begin and end
        self._thinking = self._over = False

    def count(self, tokens: Iterable[int], *, ended: bool = False) -> int:
        """How many more are thoughts, with these, which come next; what may be a mark is counted when that is known.
        ended: there are no more."""
        if self._over:
            return 0
        for token in tokens:
            begin = len(self._text)
            self._text += self._shown(token)
            self._places.append((begin, len(self._text)))
        if not self._thinking and not self._start(ended):
            return 0
        return self._thoughts(ended)

    def _start(self, ended: bool) -> bool:
        """Whether thoughts have begun; what is before them is dropped."""
        words = self._text.lstrip()
        if not words.startswith(BEGIN):
            if BEGIN.startswith(words) and not ended:
                return False
            self._thinking, self._over = self._begins, not self._begins
            return self._begins
        self._thinking = True
        self._drop(len(self._text) - len(words) + len(BEGIN))
        return True

    def _thoughts(self, ended: bool) -> int:
        """How many of the tokens in hand are, up to the mark that ends them or what may be the beginning of one."""
        place = self._text.find(END)
        self._over = place >= 0
        if self._over:
            return sum(begin < place for begin, _ in self._places)
        held = next((size for size in range(len(END) - 1, 0, -1) if self._text.endswith(END[:size])), 0)
        sure = len(self._text) - (0 if ended else held)
        number = sum(end <= sure for _, end in self._places)
        self._drop(self._places[number - 1][1] if number else 0)
        return number

    def _drop(self, size: int) -> None:
        """So much of the text is behind us, and the tokens that end there."""
        self._text = self._text[size:]
        self._places = [(max(begin - size, 0), end - size) for begin, end in self._places
                        if end > size]
