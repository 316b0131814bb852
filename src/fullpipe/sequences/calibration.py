"""Probabilities that mean what they say: what a draft claims is mapped to how often such claims came true.

When the root moves on, every guess of what follows it was right or wrong, launched or not: an unbiased sample of
P(child is true | parent is true) for all ranks. Claims of one kind share a table over probability. A kind is who named
the guess (`Expansion.sources`), and where: at first sight of its parent, at another look, or behind another guess.

A table counts, at a few knots, how many claims stood there, how many of them should have come true, and how many did.
The odds of a knot move by what the second and the third differ in, with `_PRIOR` claims that were right on top. Those
weigh less the less the difference can be chance (by its square over the variance): without data nothing moves, little
moves where little is wrong, and a draft that is always wrong is found out within twenty tokens. (With 16 such claims,
whatever was seen, a few misses of a good draft make it 1% slower on eight imagined GPUs; with 64, whatever was seen, a
useless one is believed for hundreds of tokens.) Pooling adjacent violators keeps the knots in order, and between them
the logarithm is interpolated.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import repeat

from msgspec.structs import replace

from fullpipe.messages import Expansion
from fullpipe.sequences.tree import Node

KNOTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92, 0.98, 0.995, 0.9995)
"""Claimed probabilities at which is counted."""

Right = tuple[float, float, float]
"""Of tokens of which the draft was asked: how many, how many were its best guess, how many were among its guesses."""

Counts = dict[int, list[tuple[float, float, float]]]
"""By kind, for each knot: claims, how many of them were expected to come true, how many did."""

_PRIOR = 64.0  # claims of a knot that came true as they should have, where what was seen is no more than chance
_MEMORY = 1024.0  # claims of a knot, and then the older ones count half
_MOST_MOVES = 8192.0  # tokens, likewise
_LOGS = [math.log(knot) for knot in KNOTS]
_ODDS = [math.log(knot / (1 - knot)) for knot in KNOTS]
_LEFT = [_LOGS[0], *_LOGS]  # where the segment before each knot begins; the last one has no end
_LEAST = math.log(3e-4)  # what is claimed to be rarer is not counted
_NOTHING = 1e-9  # the probability of a guess for which nothing is left
_ROUNDING = 1e-6  # by which probabilities may together exceed 1

_FIRST, _AGAIN, _BEHIND = range(3)  # at first sight of the parent, at another look, behind another guess


class Calibration:
    """What became of guesses, of all requests of an engine, and what is to be thought of the next.

    counts: of an earlier life (`counts`), which must be as `check_counts` wants them. right: likewise; it changes
    nothing here, and tells a planner what to expect of the draft.
    """

    def __init__(self, counts: Mapping[int, Sequence[tuple[float, float, float]]] | None = None,
                 right: Right = (0.0, 0.0, 0.0)) -> None:
        self.right = right
        self._tables = {kind: _Table(rows) for kind, rows in (counts or {}).items()}
        self.noted = 0  # claims, in this life

    def counts(self) -> Counts:
        return {kind: table.rows() for kind, table in self._tables.items()}

    def map(self, kind: int, logprob: float) -> float:
        """The log-probability, at most 0, with which a claim of this kind comes true."""
        table = self._tables.get(kind)
        return min(logprob, 0.0) if table is None else table.map(logprob)

    def note(self, kind: int, logprob: float, hit: bool) -> None:
        """A claim came true, or did not. Those far below every knot are not counted."""
        if logprob >= _LEAST:
            table = self._tables.get(kind)
            if table is None:
                table = self._tables[kind] = _Table([(0.0, 0.0, 0.0)] * len(KNOTS))
            table.note(min(logprob, 0.0), hit)
            self.noted += 1

    def take(self, node: Node, expansion: Expansion) -> Expansion:
        """What the draft says of `node` as it is to be believed. Its own words are remembered for `learn`."""
        again = bool(node.said)
        if expansion.tokens:
            node.said = (*node.said, expansion)
        return self.believed(expansion, again)

    def believed(self, expansion: Expansion, again: bool = False) -> Expansion:
        """The same guesses, with mapped probabilities; those of one parent are together at most 1."""
        place, mapped = _AGAIN if again else _FIRST, expansion.logprobs
        chained = max(expansion.parents, default=-1) >= 0
        if (chained or expansion.sources) and not expansion.learned:
            mapped = [self.map(kind, logprob) for kind, logprob in zip(kinds(expansion, place), mapped)]
        elif (table := self._tables.get(place)) and not expansion.learned:  # one draft and no chains: one kind
            mapped = table.map_all(mapped)
        mapped = _capped(mapped, expansion.parents) if chained else _capped_together(mapped)
        return expansion if mapped is expansion.logprobs else replace(expansion, logprobs=mapped)

    def learn(self, root: Node, following: Node) -> None:
        """The root moves on to `following`: of all that was said to follow it, only that was right."""
        token = following.token
        self._judge(root, token)
        for again, said in enumerate(root.said):
            true = self._learn(said, -1, _AGAIN if again else _FIRST, token)
            if true in said.parents:
                following.foretold = (*following.foretold, (said, true))
        # Of a chain only the next guess: the others of one repeat come true together, and would count as many.
        for said, under in root.foretold:
            self._learn(said, under, _BEHIND, token)

    def _judge(self, root: Node, token: int) -> None:
        """Count whether the first that was said of what follows the root is right."""
        said, under = (root.said[0], -1) if root.said else root.foretold[0] if root.foretold else (None, -1)
        if said is None and not root.answered:
            return
        guesses = [(logprob, guess) for parent, guess, logprob in zip(said.parents, said.tokens, said.logprobs)
                   if parent == under] if said else []
        moves, best, among = (part / 2 if self.right[0] >= _MOST_MOVES else part for part in self.right)
        self.right = (moves + 1, best + (max(guesses)[1] == token if guesses else 0),
                      among + any(guess == token for _, guess in guesses))

    def _learn(self, said: Expansion, under: int, place: int, token: int) -> int:
        """Note the guesses behind guess `under`, and say which was right; of none a number that is no parent."""
        true = len(said.tokens)
        for at, (parent, guess, logprob) in enumerate(zip(said.parents, said.tokens, said.logprobs)):
            if parent == under:
                if guess == token:
                    true = at
                if logprob >= _LEAST and not said.learned:
                    self.note(3 * said.sources[at] + place if said.sources else place, logprob, guess == token)
        return true


def kinds(said: Expansion, place: int) -> list[int]:
    """Of each guess its kind. place: of those that follow the node itself."""
    return [3 * source + (place if parent < 0 else _BEHIND)
            for source, parent in zip(said.sources or repeat(0), said.parents)]


def check_counts(counts: Counts) -> None:
    """Raise ValueError for what cannot have been counted, with these knots."""
    for kind, rows in counts.items():
        if kind < 0 or len(rows) != len(KNOTS):
            raise ValueError(f"kind {kind} has {len(rows)} knots, not {len(KNOTS)}")
        if not all(0 <= part <= claims <= _MEMORY for claims, *parts in rows for part in parts):
            raise ValueError(f"kind {kind}: more came true than were claimed, or more were claimed than are kept")


class _Table:
    """Of one kind: what was counted at each knot, and the map that follows from it, a straight line in logarithms on
    each segment: log p + shift + slope (log p - its left end). The outermost segments have no slope."""

    __slots__ = ("_claims", "_due", "_expected", "_pieces", "_true")

    def __init__(self, rows: Sequence[tuple[float, float, float]]) -> None:
        self._claims, self._expected, self._true = (list(column) for column in zip(*rows))
        self._fit()

    def rows(self) -> list[tuple[float, float, float]]:
        return list(zip(self._claims, self._expected, self._true))

    def map(self, logprob: float) -> float:
        shift, slope, left = self._pieces[bisect_right(_LOGS, logprob)]
        mapped = logprob + shift + slope * (logprob - left) if slope else logprob + shift  # also minus infinity
        return mapped if mapped < 0 else 0.0

    def map_all(self, logprobs: Sequence[float]) -> list[float]:
        """The same of many: an answer has sixteen, and a call for each would take longer than the sums."""
        pieces = self._pieces
        mapped = [logprob + shift + slope * (logprob - left) if slope else logprob + shift for logprob in logprobs
                  for shift, slope, left in [pieces[bisect_right(_LOGS, logprob)]]]
        return [min(logprob, 0.0) for logprob in mapped] if mapped and max(mapped) > 0 else mapped

    def note(self, logprob: float, hit: bool) -> None:
        """Count it at the knots on both sides, the nearer one more."""
        right = bisect_right(_LOGS, logprob)
        if 0 < right < len(_LOGS):
            share = (logprob - _LOGS[right - 1]) / (_LOGS[right] - _LOGS[right - 1])
            self._count(right, share, logprob, hit)
            self._count(right - 1, 1 - share, logprob, hit)
        else:
            self._count(max(right - 1, 0), 1.0, logprob, hit)
        self._due -= 1
        if self._due <= 0:
            self._fit()

    def _count(self, knot: int, share: float, logprob: float, hit: bool) -> None:
        self._claims[knot] += share
        self._expected[knot] += share * min(math.exp(logprob), KNOTS[-1])  # beyond it odds say too much
        self._true[knot] += share * hit
        if self._claims[knot] > _MEMORY:
            for column in (self._claims, self._expected, self._true):
                column[knot] /= 2

    def _fit(self) -> None:
        """Make the map anew; seldom once there is much, for then a claim more changes little."""
        odds = [own + _moved(*row, knot) for own, knot, row in zip(_ODDS, KNOTS, self.rows())]
        # A knot where nothing was seen gives way to its neighbours.
        risen = _in_order(odds, [claims + 1 for claims in self._claims])
        shifts = [-math.log1p(math.exp(-own)) - log for own, log in zip(risen, _LOGS)]
        slopes = [(shifts[k + 1] - shifts[k]) / (_LOGS[k + 1] - _LOGS[k]) for k in range(len(shifts) - 1)]
        self._pieces = list(zip([shifts[0], *shifts], [0.0, *slopes, 0.0], _LEFT))
        self._due = 16 + int(sum(self._claims)) // 16


def _moved(claims: float, expected: float, true: float, knot: float) -> float:
    """By how much the logarithm of the odds of a knot moves."""
    variance = 1 + expected * (1 - expected / claims) if claims else 1.0
    prior = _PRIOR / max(1.0, (true - expected) ** 2 / variance)
    return _logit((true + prior * knot) / (claims + prior)) - _logit((expected + prior * knot) / (claims + prior))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _in_order(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest rising values: neighbours that fall are pooled."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights):
        number = 1
        while pools and pools[-1][0] > value:
            before, heavy, many = pools.pop()
            value = (before * heavy + value * weight) / (heavy + weight)
            weight, number = weight + heavy, number + many
        pools.append((value, weight, number))
    return [value for value, _, number in pools for _ in range(number)]


def _capped_together(logprobs: list[float]) -> list[float]:
    total = sum(map(math.exp, logprobs))
    return _capped(logprobs, [-1] * len(logprobs)) if total > 1 + _ROUNDING else logprobs


def _capped(logprobs: list[float], parents: Sequence[int]) -> list[float]:
    """Guesses of one parent are together at most certain: the likelier ones are believed, and the others, in their
    order, get what is left. (Taking from all in proportion makes a mixture on eight GPUs 1.5% slower.)"""
    capped, left = list(logprobs), dict.fromkeys(parents, 1.0)
    for at in sorted(range(len(capped)), key=lambda at: -capped[at]):
        room = left[parents[at]]
        if (claimed := math.exp(capped[at])) > room:
            capped[at] = min(capped[at], math.log(max(room, _NOTHING)))
        left[parents[at]] = max(room - claimed, 0.0)
    return capped
