"""Prompt lookup guesses what followed the last time these words stood here. No model, no torch.

`NgramIndex` finds earlier occurrences of a path's last n tokens, `Rates` learns how far such finds can be
trusted, `NgramDraft` makes expansions of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fullpipe.errors import UsageError
from fullpipe.messages import ArenaId, Expansion, Flight, Opening, Part
from fullpipe.stations.masks import leading
from fullpipe.stations.structure import Place, Structures
from fullpipe.stations.table import Slots, SlotTable

_LOOK_BACK = 16  # occurrences of one n-gram that a lookup looks at; keeps its cost flat on endless repeats
_RANKS = 4  # rates are kept for the first, second, third and any later choice


@dataclass(frozen=True, slots=True)
class Match:
    """Says what may follow.

    tokens: those that followed before. length: how many tokens before them agree (at most the index's max_n).
    """

    tokens: tuple[int, ...]
    length: int


class NgramIndex:
    """Knows where every n-gram of one request's committed text stands, for n from `min_n` to `max_n`.

    A token costs one dictionary entry and one integer per n when it commits, and is never looked at
    again. The occurrences of an n-gram form a chain from the newest to the oldest.
    """

    def __init__(self, *, min_n: int = 1, max_n: int = 6) -> None:
        if not 1 <= min_n <= max_n:
            raise UsageError(f"n-grams need 1 <= min_n <= max_n (got {min_n} and {max_n})")
        self.min_n, self.max_n = min_n, max_n
        self._text: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}  # n-gram -> where its newest occurrence ends
        # Per n: where an n-gram ends -> where its next older occurrence ends; 0: there is none.
        self._older: dict[int, list[int]] = {n: [0] for n in range(min_n, max_n + 1)}

    def __len__(self) -> int:
        return len(self._text)

    def tail(self, count: int) -> list[int]:
        """The last `count` committed tokens, or all when there are fewer."""
        return self._text[max(0, len(self._text) - count):]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens that were committed."""
        for token in tokens:
            self._text.append(token)
            end = len(self._text)
            last = self.tail(self.max_n)
            for n, older in self._older.items():
                gram = tuple(last[-n:])
                older.append(self._newest.get(gram, 0) if len(gram) == n else 0)
                if len(gram) == n:
                    self._newest[gram] = end

    def lookup(self, tail: Sequence[int], *, ahead: int = 0, max_continuation: int = 8,
               max_matches: int = 4) -> list[Match]:
        """Distinct continuations of a path: longest match first, among equals the newest first.

        tail: the path's last tokens, its own last; longer is fine, at least `ahead + max_n` is best.
        ahead: how many of them, at the end, are not committed yet; what stands before them must be the
        end of the committed text.

        Every continuation has `max_continuation` tokens: where the text it repeats ends it goes on with
        the path's own end and then with itself, as a repeating text does.
        """
        pending = list(tail[len(tail) - ahead:])
        found: dict[tuple[int, ...], int] = {}
        for n in range(min(self.max_n, len(tail)), self.min_n - 1, -1):
            for end in self._ends(tuple(tail[-n:])):
                if end == len(self._text) and not ahead:
                    continue  # that is the path's own end
                found.setdefault(self._continuation(end, pending, max_continuation), n)
                if len(found) == max_matches:
                    return [Match(tokens, length) for tokens, length in found.items()]
        return [Match(tokens, length) for tokens, length in found.items()]

    def _ends(self, gram: tuple[int, ...]) -> Iterator[int]:
        """Where the occurrences of an n-gram end, newest first."""
        end, older = self._newest.get(gram, 0), self._older[len(gram)]
        for _ in range(_LOOK_BACK):
            if not end:
                return
            yield end
            end = older[end]

    def _continuation(self, end: int, pending: list[int], count: int) -> tuple[int, ...]:
        path = pending + self._text[end : end + count]  # from the end of the committed text on
        for at in range(count + len(pending) - len(path)):
            path.append(path[at])  # exists: the match ended before the path did, so we read behind its end
        return tuple(path[len(pending):])


class Rates:
    """Learns how often a guess came true, by length of the match it rests on and by rank among its siblings.

    The estimate is (hits + S * prior) / (guesses + S): it starts at the prior and moves to what this
    request's text shows. S, the weight of the prior, is 4 guesses. The prior is the estimate of `common`, which
    counts the guesses of all requests; its own, after n matching tokens, is 1 - 0.75**n for the first choice and
    0.15 times that for each later one, as counted on answers of Qwen2.5-Coder 1.5B to code, mathematics and
    conversation (first choice: 0.24, 0.49, 0.62, 0.75 for n = 1 to 4, 0.95 for 6 and more; later choices 0.03 to
    0.04 where there were many).

    Other models and questions are not like these, and many a request has ended before its own text has shown it:
    where guesses compete for dear rows, one that is too hopeful costs all requests.
    """

    STRENGTH = 4.0
    MEMORY = 512  # guesses of a kind, and then the older ones count half

    def __init__(self, max_n: int, common: Rates | None = None) -> None:
        self._max_n, self._common = max_n, common
        self._hits = [[0] * _RANKS for _ in range(max_n + 1)]
        self._guesses = [[0] * _RANKS for _ in range(max_n + 1)]

    def note(self, length: int, rank: int, hit: bool) -> None:
        """A guess resting on `length` matching tokens, `rank`-th among its siblings, was true or not."""
        if self._common is not None:
            self._common.note(length, rank, hit)
        length, rank = self._cell(length, rank)
        self._guesses[length][rank] += 1
        self._hits[length][rank] += hit
        if self._guesses[length][rank] >= self.MEMORY:
            self._guesses[length][rank] //= 2
            self._hits[length][rank] //= 2

    def logprob(self, length: int, rank: int) -> float:
        """Natural logarithm of the probability that such a guess is true."""
        return math.log(self._probability(*self._cell(length, rank)))

    def _probability(self, length: int, rank: int) -> float:
        if self._common is not None:
            prior = self._common._probability(length, rank)
        else:
            prior = (1 - 0.75**length) * (0.15 if rank else 1.0)
        return ((self._hits[length][rank] + self.STRENGTH * prior)
                / (self._guesses[length][rank] + self.STRENGTH))

    def _cell(self, length: int, rank: int) -> tuple[int, int]:
        return min(length, self._max_n), min(rank, _RANKS - 1)


class _Reader:
    """Is one request as the draft sees it: its text so far, indexed, and how well its guesses do."""

    def __init__(self, table: SlotTable, index: NgramIndex, common: Rates) -> None:
        self.table, self.index, self.rates = table, index, Rates(index.max_n, common)

    def take(self, part: Part) -> None:
        """Take over a part. Each token of the answer that it commits tests what we would have guessed,
        asked or not: that shows how true guesses are without keeping any."""
        self.table.apply(part)
        if self.table.num_committed == len(self.index):
            return
        tokens: list[int] = self.table.committed_tokens()[len(self.index):].tolist()
        prompt = max(0, self.table.prompt_len - len(self.index))
        self.index.extend(tokens[:prompt])
        for token in tokens[prompt:]:
            matches = self.index.lookup(self.index.tail(self.index.max_n), max_continuation=1)
            for rank, match in enumerate(matches):
                self.rates.note(match.length, rank, match.tokens[0] == token)
            self.index.extend([token])


class NgramDraft:
    """Guesses repeats. It answers with trees: chains of what followed, branching where earlier
    occurrences went different ways.

    min_n, max_n: shortest and longest match. max_continuation: depth of a chain. max_matches: chains per
    node. `Flight.fanout` bounds the children of every guess. structures: what structured texts may say; without them
    guesses are held to no structure.

    A guess that follows j guesses of a chain resting on n matching tokens rests on n + j; `Rates` gives
    its probability. Raises `UsageError` for sizes that make no sense.
    """

    def __init__(self, *, min_n: int = 1, max_n: int = 6, max_continuation: int = 8,
                 max_matches: int = 4, structures: Structures | None = None) -> None:
        self._structures = structures or Structures(strict=False)
        NgramIndex(min_n=min_n, max_n=max_n)
        if max_continuation < 1 or max_matches < 1:
            raise UsageError("max_continuation and max_matches must be 1 or more "
                             f"(got {max_continuation} and {max_matches})")
        self._min_n, self._max_n = min_n, max_n
        self._max_continuation, self._max_matches = max_continuation, max_matches
        self._slots = Slots()
        self._readers: dict[ArenaId, _Reader] = {}
        self._rates = Rates(max_n)  # of all requests

    def run(self, job: Flight) -> list[Expansion]:
        for opening in job.opens:
            self._open(opening)
        expansions = []
        for part in job.parts:
            reader = self._readers[part.arena]
            reader.take(part)
            wanted = [row for row in range(len(part)) if part.wants[row]]
            expansions += [self._expand(reader, part, row, job.fanout) for row in wanted]
        for request in job.closes:
            self._readers.pop(request, None)
        return expansions

    def _open(self, opening: Opening) -> None:
        """A text that another request has brought is indexed with the first part of the new one, like a prompt."""
        self._readers[opening.arena] = _Reader(SlotTable(opening, self._slots),
                                               NgramIndex(min_n=self._min_n, max_n=self._max_n), self._rates)

    def _expand(self, reader: _Reader, part: Part, row: int, fanout: int) -> Expansion:
        # Mapped once more they are nearer to the truth, but nothing is faster: of guesses that are rare, though not as
        # rare as said, more are launched (docs/log).
        expansion = Expansion(part.nodes[row], [], [], [], learned=True)
        ahead = len(part.paths[row])
        if part.positions[row] + 1 - ahead != len(reader.index):
            return expansion  # the row branches off the committed path further back: it is dead
        tail = reader.table.tail(part, row, ahead + self._max_n)
        matches = reader.index.lookup(tail, ahead=ahead, max_continuation=self._max_continuation,
                                      max_matches=self._max_matches)
        if reader.table.params.restricted:
            matches = self._possible(reader.table, Place.of(reader.table, part, row), matches)
        _grow(expansion, matches, reader.rates, fanout)
        return expansion

    def _possible(self, table: SlotTable, place: Place, matches: Sequence[Match]) -> list[Match]:
        """Continuations, each cut where the request forbids its next token."""
        walk, kept = self._structures.walk(table), []
        for match in matches:
            count = leading(table.params, table.ends, place, match.tokens)
            if count and walk is not None:
                count = walk.allowed(place, match.tokens[:count])
            if count:
                kept.append(replace(match, tokens=match.tokens[:count]))
        return kept


def _grow(expansion: Expansion, matches: Sequence[Match], rates: Rates, fanout: int) -> None:
    """Merge the continuations into one tree below the node, better ones first."""
    children: dict[int, dict[int, int]] = {-1: {}}  # guess (-1: the node itself) -> token -> guess
    for match in matches:
        under = -1
        for depth, token in enumerate(match.tokens):
            siblings = children[under]
            if token not in siblings:
                if len(siblings) == fanout:
                    break
                expansion.logprobs.append(rates.logprob(match.length + depth, len(siblings)))
                expansion.tokens.append(token)
                expansion.parents.append(under)
                siblings[token] = len(expansion.tokens) - 1
                children[siblings[token]] = {}
            under = siblings[token]


def build_ngram(*, min_n: int = 1, max_n: int = 6, max_continuation: int = 8, max_matches: int = 4,
                tokenizer: str | list[str] | None = None, vocab: int | None = None) -> NgramDraft:
    """The builder that a `StationSpec` names; arguments as of `NgramDraft`.

    tokenizer: the model whose tokenizer structured texts are read by; vocab: number of its real tokens. Its path where
    the station reads that model anyway; else in two parts, folder and name, for a path would have a host that has no
    such model given all of it (`pipeline/fetching.py:reads`). There guesses are held to no structure.
    """
    parts = [tokenizer] if isinstance(tokenizer, str) else tokenizer
    structures = Structures(Path(*parts) if parts else None, vocab, strict=False)
    return NgramDraft(min_n=min_n, max_n=max_n, max_continuation=max_continuation, max_matches=max_matches,
                      structures=structures)
