"""Tokens become text one by one here, and it is the text that the `tokenizers` library makes of all of them.

The library decodes whole lists. Its decoders look at neighbours: the first token loses its space, the last its suffix,
bytes in a row are one text. So each of them is mirrored as something that takes tokens as they come, gives what is
certain, and holds back the rest until it is certain or the text ends. A decoder is a list of steps, of three kinds:

- placed: makes of a token what depends on it and on whether it is the first. The library itself does these, once for
  each token.
- joining (`ByteLevel`, `ByteFallback`, `BPEDecoder`): makes text of several tokens.
- what may follow those: works on tokens that come in pieces.

Of a run of byte tokens (`<0xE4>`) that is no UTF-8 as a whole the library keeps nothing: every byte becomes U+FFFD.
Here whole characters stay and the broken bytes alone are replaced, as in sentencepiece and llama.cpp; otherwise no
character of a run could be shown before the run has ended. Everything else is what the library says, to the letter.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import tokenizers

from fullpipe.errors import UnsupportedModel
from fullpipe.text import overlap

# GPT-2's alphabet, by which byte-level tokens are written: a printable Latin-1 character is its own byte, the others
# follow from U+0100 on in their order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # the library takes a sign for half of a number

_PLACED = ("Replace", "Strip", "Metaspace", "WordPiece")
_JOINING = ("ByteLevel", "ByteFallback", "BPEDecoder")

_OPEN_BYTES = 3  # a character has at most 4 bytes, so at most so many wait for the others
_UTF8 = codecs.getincrementaldecoder("utf-8")
_EACH_BYTE = "fullpipe.each_byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore

_NEUTRAL = "\ue000"  # a character that no decoder does anything to

Item = str | bytes | None
"""What a token brings along: text, or bytes that need not be whole characters. None: it is not there at all."""

Step = Mapping[str, Any]


class Decoding:
    """Knows how the tokens of one tokenizer become text.

    backend: the `tokenizers.Tokenizer`. name: of its model. special: texts of special tokens.

    Raises `UnsupportedModel` for a decoder that works in none of the ways we know.
    """

    def __init__(self, backend: Any, name: str, special: frozenset[str]) -> None:
        self._backend, self._special = backend, special
        steps = [] if backend.decoder is None else _flat(json.loads(backend.decoder.__getstate__()))
        placed = list(takewhile(_is_placed, steps))
        self._placed = _Placed(placed, spaces=backend.decoder is None)
        self._behind = steps[len(placed):]
        self._joining = self._behind.pop(0) if self._behind and self._behind[0]["type"] in _JOINING else None
        if bad := [step["type"] for step in self._behind if not _may_follow(step)]:
            raise UnsupportedModel(
                f"the tokenizer of {name} decodes with {', '.join(step['type'] for step in steps)}; {bad[0]} at this "
                "place cannot be done token by token",
                hint="Known are Replace, Strip, Metaspace and WordPiece, then ByteLevel, ByteFallback or BPEDecoder, "
                     "then Fuse, Strip, Metaspace and Replace (of a string).")
        self._reach = _reach(self._joining, self._behind)
        self._items = {(skip, first): _Filled(partial(self._item, skip_special=skip, first=first))
                       for skip in (False, True) for first in (False, True)}
        self._spelled = _Filled(self._spell)

    def stream(self, prompt: Sequence[int], skip_special: bool) -> TextStream:
        """A stream that goes on where the text of `prompt` is certain."""
        said: list[str] = []
        stream = TextStream(said, self._join(said), self._items[skip_special, True], self._items[skip_special, False])
        for token in self._tail(prompt, skip_special):
            stream.push(token)
        return stream

    @property
    def byte_level(self) -> bool:
        """Whether a token's characters stand for bytes, as in GPT-2."""
        return _kind(self._joining) == "ByteLevel"

    def bytes_of(self, token: int) -> bytes:
        """What a token brings along in the middle of a text."""
        return self._spelled[token] or b""

    def bytes_of_all(self, tokens: Mapping[int, str], count: int) -> list[bytes]:
        """The same of the first `count` tokens, which need not be remembered. tokens: all of them, as the tokenizer
        writes them, by id."""
        if self.byte_level and not self._placed.does_anything:
            return [_byte_level(tokens[token]) if token in tokens else b"" for token in range(count)]
        return [self.bytes_of(token) for token in range(count)]

    def _item(self, token: int, skip_special: bool, first: bool) -> Item:
        text = self._backend.id_to_token(token)
        if text is None or (skip_special and text in self._special):
            return None
        text = self._placed(text, first)
        match _kind(self._joining):
            case "ByteLevel":
                return _byte_level(text)
            case "ByteFallback" if found := _BYTE_TOKEN.fullmatch(text):
                return bytes([int(found[1], 16)])
        return text

    def _join(self, said: list[str]) -> Joining:
        pieces: Pieces = _Said(said)
        for step in reversed(self._behind):
            pieces = _piecewise(step, pieces)
        match self._joining:
            case {"type": "ByteLevel"}:
                return _Bytes(pieces)
            case {"type": "ByteFallback"}:
                return _ByteRuns(pieces)
            case {"type": "BPEDecoder", "suffix": suffix}:
                return _Suffixed(pieces, suffix)
        return _Whole(pieces)

    def _tail(self, prompt: Sequence[int], skip_special: bool) -> Sequence[int]:
        """The end of `prompt` behind which a text goes on as behind all of it.

        What is held back, and what a step knows of the text so far, is a matter of the last `_reach` bytes or
        characters. Before them goes one token more, so that no other is taken for the first; and if bytes make runs it
        is none of them, so that a run is not cut.
        """
        items, missing = self._items[skip_special, False], self._reach
        runs = _kind(self._joining) == "ByteFallback"
        if missing is None:
            return prompt
        for place in range(len(prompt) - 1, -1, -1):
            item = items[prompt[place]]
            if item is None:
                continue
            if missing <= 0 and not (runs and isinstance(item, bytes)):
                return prompt[place:]
            missing -= len(item)
        return prompt

    def _spell(self, token: int) -> bytes:
        item = self._items[False, False][token]
        if not isinstance(item, str):
            return item or b""
        said: list[str] = []
        steps = self._join(said)
        for each in (_NEUTRAL, item, _NEUTRAL):
            steps.push(each)
        return "".join(said)[1:-1].encode()


class TextStream:
    """Turns tokens into text as they come. Is made by `Tokenizer.stream`.

    first, later: what tokens bring along as the first of a text, and behind others.
    """

    def __init__(self, said: list[str], steps: Joining, first: _Filled, later: _Filled) -> None:
        self._said, self._steps = said, steps
        self._items, self._later = first, later

    def push(self, token: int) -> str:
        """The text that is certain after `token`; may be empty."""
        item = self._items[token]
        if item is None:
            return ""
        self._items = self._later
        self._said.clear()
        self._steps.push(item)
        return "".join(self._said)

    def finish(self) -> str:
        """What was held back. Nothing may be pushed any more."""
        self._said.clear()
        self._steps.end()
        return "".join(self._said)


# ---- what a token brings along -----------------------------------------------------------------------------


class _Filled(dict[int, Any]):
    """A table that fills itself: for 150,000 tokens at once it would take tenths of a second."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __missing__(self, token: int) -> Any:
        made = self[token] = self._make(token)
        return made


class _Placed:
    """Does the first steps of a decoder, by the library's own. spaces: put one between tokens, as the library does
    without any decoder."""

    def __init__(self, steps: Sequence[Step], spaces: bool) -> None:
        self._spaces = spaces
        self._decoder = None
        if steps:
            self._decoder = tokenizers.decoders.Sequence([])
            self._decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": steps}).encode())
            self._nothing = len(self._decoder.decode([""]))

    @property
    def does_anything(self) -> bool:
        return self._spaces or self._decoder is not None

    def __call__(self, text: str, first: bool) -> str:
        if self._decoder is None:
            return text if first or not self._spaces else f" {text}"
        return str(self._decoder.decode([text]) if first else self._decoder.decode(["", text])[self._nothing:])


def _byte_level(text: str) -> bytes:
    """A token with a character beyond the alphabet, as added ones may be, is text as it stands."""
    try:
        return bytes([_BYTES[character] for character in text])
    except KeyError:
        return text.encode()


# ---- several tokens become text ----------------------------------------------------------------------------


class Joining(Protocol):
    def push(self, item: Any) -> None: ...

    def end(self) -> None: ...


class Pieces(Protocol):
    """Takes tokens in pieces. begins: whether the piece is the first of a token."""

    def take(self, piece: str, begins: bool) -> None: ...

    def end(self) -> None: ...


@dataclass(slots=True)
class _Whole:
    """Tokens stay what they are."""

    then: Pieces

    def push(self, item: str) -> None:
        self.then.take(item, True)

    def end(self) -> None:
        self.then.end()


class _Bytes:
    """`ByteLevel`: the bytes of all tokens are one text."""

    def __init__(self, then: Pieces) -> None:
        self._then, self._begins = then, True
        self._utf8 = _UTF8("replace")

    def push(self, item: bytes) -> None:
        self._then.take(self._utf8.decode(item), self._begins)
        self._begins = False

    def end(self) -> None:
        self._then.take(self._utf8.decode(b"", True), self._begins)
        self._then.end()


class _ByteRuns:
    """`ByteFallback`: bytes in a row are one token."""

    def __init__(self, then: Pieces) -> None:
        self._then, self._running = then, False
        self._utf8 = _UTF8(_EACH_BYTE)

    def push(self, item: str | bytes) -> None:
        if isinstance(item, bytes):
            self._then.take(self._utf8.decode(item), not self._running)
            self._running = True
        else:
            self._close()
            self._then.take(item, True)

    def end(self) -> None:
        self._close()
        self._then.end()

    def _close(self) -> None:
        if self._running:
            self._then.take(self._utf8.decode(b"", True), False)
            self._running = False


class _Suffixed:
    """`BPEDecoder`: the suffix that ends a word is a space, and in the last token nothing."""

    def __init__(self, then: Pieces, suffix: str) -> None:
        self._then, self._suffix = then, suffix
        self._rest: str | None = None  # of the last token, from its first suffix on

    def push(self, item: str) -> None:
        self._close(" ")
        place = item.find(self._suffix)
        cut = len(item) if place < 0 else place
        self._then.take(item[:cut], True)
        self._rest = item[cut:]

    def end(self) -> None:
        self._close("")
        self._then.end()

    def _close(self, ending: str) -> None:
        if self._rest is not None:
            self._then.take(self._rest.replace(self._suffix, ending), False)


# ---- what may follow, on tokens in pieces ------------------------------------------------------------------


def _flat(decoder: Step) -> list[Step]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _kind(step: Step | None) -> str:
    return "" if step is None else str(step["type"])


def _is_placed(step: Step) -> bool:
    """The library's `Strip` panics where it strips at the end and nothing is left, and then ours stands in."""
    return step["type"] in _PLACED and not step.get("stop")


def _may_follow(step: Step) -> bool:
    """What regular expressions match in a text may change with every character that comes."""
    if step["type"] == "Replace":
        return bool(step["pattern"].get("String"))
    return step["type"] in ("Fuse", "Strip", "Metaspace")


def _piecewise(step: Step, then: Pieces) -> Pieces:
    match step:
        case {"type": "Replace"}:
            return _Replace(then, step["pattern"]["String"], step["content"])
        case {"type": "Strip"}:
            return _Strip(then, step["content"], step["start"], step["stop"])
        case {"type": "Metaspace"}:
            return _Metaspace(then, step["replacement"], "" if step["prepend_scheme"] != "never" else " ")
    return _Fuse(then)


def _reach(joining: Step | None, behind: Sequence[Step]) -> int | None:
    """Bytes or characters, of whole tokens, that fix what is held back behind them; None: no number does.

    `Strip` has done its part when it has seen so many characters, and of one there are up to 4 bytes, or a suffix. What
    drops characters, or finds strings that overlap themselves, has no bound.
    """
    fused = _kind(joining) in ("", "ByteLevel")  # else the first token ends
    reach = 0 if joining is None else _OPEN_BYTES
    most = len(joining["suffix"]) if joining is not None and _kind(joining) == "BPEDecoder" else 4
    for step in behind:
        match step["type"]:
            case "Fuse":
                fused = True
            case "Strip":
                reach += max(most, 1) * (step["start"] + step["stop"])
            case "Replace" if len(step["pattern"]["String"]) > 1 or not step["content"]:
                return None
            case "Metaspace" if fused and step["prepend_scheme"] != "never":
                return None
    return reach


@dataclass(slots=True)
class _Said:
    """The end of all steps."""

    said: list[str]

    def take(self, piece: str, begins: bool) -> None:
        self.said.append(piece)

    def end(self) -> None:
        pass


@dataclass(slots=True)
class _Fuse:
    """All tokens are one."""

    then: Pieces
    begun: bool = False

    def take(self, piece: str, begins: bool) -> None:
        self.then.take(piece, not self.begun)
        self.begun = True

    def end(self) -> None:
        self.then.end()


@dataclass(slots=True)
class _Strip:
    """Drops a character at the beginning of each token, `start` times at most, and at its end, `stop` times.

    left: how many may still go at the beginning. held: how many at the end, if it is the end."""

    then: Pieces
    content: str
    start: int
    stop: int
    left: int = 0
    held: str = ""

    def take(self, piece: str, begins: bool) -> None:
        if begins:
            self.left, self.held = self.start, ""
        if self.left:
            cut = min(len(piece) - len(piece.lstrip(self.content)), self.left)
            self.left = 0 if cut < len(piece) else self.left - cut
            piece = piece[cut:]
        if self.stop:
            piece = self.held + piece
            cut = max(len(piece.rstrip(self.content)), len(piece) - self.stop)
            piece, self.held = piece[:cut], piece[cut:]
        self.then.take(piece, begins)

    def end(self) -> None:
        self.then.end()


@dataclass(slots=True)
class _Replace:
    """Replaces a string in each token. held: what may be its beginning."""

    then: Pieces
    pattern: str
    content: str
    held: str = ""

    def take(self, piece: str, begins: bool) -> None:
        if begins:
            self._close()
        *before, last = (self.held + piece).split(self.pattern)
        cut = len(last) - overlap(last, self.pattern)
        self.held = last[cut:]
        self.then.take(self.content.join([*before, last[:cut]]), begins)

    def end(self) -> None:
        self._close()
        self.then.end()

    def _close(self) -> None:
        if self.held:
            self.then.take(self.held, False)
            self.held = ""


@dataclass(slots=True)
class _Metaspace:
    """A mark stands for a space. blank: what it is in the first token."""

    then: Pieces
    mark: str
    blank: str
    number: int = 0

    def take(self, piece: str, begins: bool) -> None:
        self.number += begins
        self.then.take(piece.replace(self.mark, self.blank if self.number == 1 else " "), begins)

    def end(self) -> None:
        self.then.end()
