"""Tokenizers of sentencepiece's kind, whose data lie in GGUF files and in `tokenizer.model` alike."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, Literal

import tokenizers

_SPACE = "▁"  # how pieces write it


class Kind(IntEnum):
    """What a token is, in the numbers of sentencepiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Pieces:
    """unknown: the id of what stands for a character without a token. unigram: the pieces are chosen for the best sum
    of their scores; otherwise neighbours are merged, the best score first. prefix: which text gets a space before it:
    none, the first, or each between special tokens too. squeeze: spaces around the text go, and of several one stays.
    charsmap: sentencepiece's compiled normalisation. inner: user-defined pieces are found in the normalised text, as
    sentencepiece does, and not in the raw one, as llama.cpp does.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unknown: int | None
    unigram: bool = False
    prefix: Literal["never", "first", "always"] = "always"
    squeeze: bool = False
    charsmap: bytes = b""
    inner: bool = False

    def of_kind(self, kind: Kind) -> list[str]:
        return [token for token, its in zip(self.tokens, self.kinds, strict=True) if its == kind]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Unused tokens only pad it; the names they were given must not match text."""
        return {token: i for i, token in enumerate(self.tokens) if self.kinds[i] != Kind.UNUSED}


def piece_tokenizer(pieces: Pieces) -> Any:
    """The `tokenizers.Tokenizer`, without special tokens."""
    cutters: list[Any] = []
    scored = {token: pieces.scores[i] for token, i in pieces.vocabulary.items() if pieces.kinds[i] == Kind.NORMAL}
    whole = pieces.of_kind(Kind.USER_DEFINED) if pieces.inner else []
    if whole:
        pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        cutters.append(tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    merges = [] if pieces.unigram else _merges(scored)
    if tied := _are_tied(scored, merges):
        cutters.append(tokenizers.pre_tokenizers.PreTokenizer.custom(_Merger(scored, frozenset(pieces.vocabulary))))
    if pieces.unigram:
        model = _unigram(pieces)
    else:
        model = _bpe(pieces, [] if tied else merges, ignore_merges=tied or bool(whole))
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Sequence(list(_normalizers(pieces)))
    if pieces.prefix == "first":
        cutters.insert(0, tokenizers.pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(cutters) if cutters else None
    backend.decoder = _decoder(pieces)
    return backend


def _unigram(pieces: Pieces) -> Any:
    return tokenizers.models.Unigram(list(zip(pieces.tokens, pieces.scores, strict=True)), pieces.unknown,
                                     byte_fallback=bool(pieces.of_kind(Kind.BYTE)))


def _bpe(pieces: Pieces, merges: list[tuple[str, str]], ignore_merges: bool) -> Any:
    return tokenizers.models.BPE(
        vocab=pieces.vocabulary, merges=merges, fuse_unk=True, byte_fallback=bool(pieces.of_kind(Kind.BYTE)),
        unk_token=None if pieces.unknown is None else pieces.tokens[pieces.unknown], ignore_merges=ignore_merges,
    )


def _merges(scored: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best token first. Of the ways to one token that with the longer left
    side comes first: a row of equal characters has been merged from the left, so its longer tokens stand there."""
    ways = [
        (-score, -cut, token)
        for token, score in scored.items()
        for cut in range(1, len(token))
        if token[:cut] in scored and token[cut:] in scored
    ]
    return [(token[:-cut], token[-cut:]) for _, cut, token in sorted(ways)]


def _are_tied(scored: Mapping[str, float], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether two tokens have one score. Which of them comes first then depends on where they stand in the text, and no
    order of merges can say it. Early converters gave all tokens the same score."""
    made = {left + right: None for left, right in merges}
    return any(scored[one] == scored[other] for one, other in pairwise(made))


def _normalizers(pieces: Pieces) -> Iterator[Any]:
    kinds = tokenizers.normalizers
    if pieces.charsmap:
        yield kinds.Precompiled(pieces.charsmap)
    if pieces.squeeze:
        yield kinds.Replace(tokenizers.Regex(r"\A +| +\z"), "")
        yield kinds.Replace(tokenizers.Regex(" {2,}"), " ")
    if pieces.prefix == "always":
        yield kinds.Prepend(_SPACE)
    yield kinds.Replace(" ", _SPACE)


def _decoder(pieces: Pieces) -> Any:
    kinds = tokenizers.decoders
    steps = [kinds.Replace(_SPACE, " "), kinds.ByteFallback(), kinds.Fuse()]
    if pieces.prefix != "never":
        steps.append(kinds.Strip(" ", 1, 0))
    return kinds.Sequence(steps)


class _Merger:
    """Cuts a text into tokens by merging neighbours, the best score first and of equal ones the leftmost.

    A pre-tokenizer in Python, some microseconds for each character: for vocabularies that have ties.
    """

    def __init__(self, scored: Mapping[str, float], known: frozenset[str]) -> None:
        self._scored, self._known = scored, known

    def pre_tokenize(self, text: Any) -> None:
        text.split(lambda _, part: [part[start:end] for start, end in self._spans(part.normalized)])

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Unknown characters in a row are one span, for which there will be one unknown token."""
        start = 0
        for end, following in pairwise([*self._ends(text), None]):
            assert end is not None
            if following is None or text[start:end] in self._known or text[end:following] in self._known:
                yield start, end
                start = end

    def _ends(self, text: str) -> list[int]:
        ends = list(range(1, len(text) + 1))  # of the symbol that begins at an index; 0 when there is none any more
        starts = list(range(len(text)))  # of the symbol that ends before an index + 1
        waiting: list[tuple[float, int, int]] = []

        def consider(start: int, end: int) -> None:
            if (score := self._scored.get(text[start:end])) is not None:
                heapq.heappush(waiting, (-score, start, end))

        for start in range(len(text) - 1):
            consider(start, start + 2)
        while waiting:
            _, start, end = heapq.heappop(waiting)
            middle = ends[start]
            if not 0 < middle < end or ends[middle] != end:
                continue  # one of the two has been merged with another
            ends[start], ends[middle], starts[end - 1] = end, 0, start
            if start > 0:
                consider(starts[start - 1], end)
            if end < len(text):
                consider(start, ends[end])
        return [end for end in ends if end]
