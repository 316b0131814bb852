"""Few tokens of a vocabulary can win: here they are found, for all rows with a temperature at once.

Nothing is lost by not looking at the others, not a bit:

- Noise is never below `noise.FAINT`, and above `noise.QUIET` for few tokens, which are known. So what wins has
  a score within `_DEEP` of the best (0), or noise above `QUIET`: any other token has less than the best has
  with the faintest noise. Rounded subtraction, division and addition keep the order of their operands, so
  this holds of float32 too.
- A filter keeps the tokens from some score on. Top-k's is among the k best; top-p's and min-p's mostly within
  `_DEEP`, and where top-p's is not, more is sorted.
- The k best of a row are not below its k-th best maximum of a block, and maxima are quickly found.

What takes numbers for the whole vocabulary of a row (its scores, its noise) goes row by row: one row of 152k
stays in a processor's second cache, eight do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.request import SamplingParams
from fullpipe.stations.noise import FAINT, QUIET, gumbel, gumbel_of, loud

if TYPE_CHECKING:
    from fullpipe.stations.sampling import RowContext

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

_DEEP = 9.75  # how far below the best a score may lie to be looked at whatever its noise
assert _DEEP > QUIET - FAINT
_BLOCK = 64  # tokens of which the maximum is taken
_LOOKS = (1 << 13, 1 << 17)  # how many tokens top-p sorts where those within `_DEEP` do not suffice
_IMPOSSIBLE = np.finfo(np.float32).min  # every logit of a token that may be picked is at least this
_COLDEST = 1e-30  # below it, dividing by the temperature would overflow; no two logits are so close


class Band(NamedTuple):
    """The tokens of a row whose scores are at least `low`, in order of id. floor: the lowest score that passes filters;
    -inf when all are off."""

    tokens: Ids
    scores: Floats
    low: np.float32
    floor: np.float32


class BestTwo(NamedTuple):
    """The two best of a row, noise included. No token that was not looked at has more than `unseen`."""

    token: int
    first: np.float32
    second: np.float32
    unseen: np.float32


class Sampled:
    """The rows of a batch that have a temperature, each by its place in the batch; the others are passed over.

    A score is a logit less the row's best, divided by the temperature.
    logits: [rows, vocab], with bias and penalties. best: of each row.
    """

    def __init__(self, rows: Sequence[RowContext], logits: Floats, best: Floats) -> None:
        self._rows, self._logits, self._best = rows, logits, best
        self._at = [at for at, row in enumerate(rows) if row.params.temperature > 0]
        self._heats = np.array([max(row.params.temperature, _COLDEST) for row in rows], np.float32)
        self._vocab = logits.shape[1]

    def scores(self, at: int, floor: float = -math.inf) -> Tensor:
        """A row's scores of the whole vocabulary; -inf what is below the floor."""
        scores = torch.from_numpy(self._logits[at]).sub(float(self._best[at])).div_(float(self._heats[at]))
        return scores.masked_fill_(scores < floor, -math.inf) if floor > -math.inf else scores

    def noise(self, at: int) -> Tensor:
        """A row's noise for the whole vocabulary."""
        return gumbel(self._rows[at].params.seed, self._rows[at].position, self._vocab)

    def expected(self, at: int, floor: float) -> Tensor:
        """Unnormalised log-probabilities of the target's pick, by the draft's logits (see `rank`)."""
        scores = self.scores(at)
        noisy = scores + self.noise(at)
        if floor > -math.inf:
            best = noisy.masked_fill(scores < floor, -math.inf).amax()
            noisy.clamp_(max=best).sub_(scores.neg_().add_(floor).clamp_(min=0))  # by how far the floor is missed
        return noisy.mul_(float(self._heats[at]))

    def floors(self) -> dict[int, float]:
        """The lowest score of each row that passes top-k, top-p and min-p; -inf when all are off."""
        params = [self._rows[at].params for at in self._at]
        if not any(self._top_k(each) or each.top_p < 1 or each.min_p for each in params):
            return dict.fromkeys(self._at, -math.inf)
        return {at: float(band.floor) for at, band in self.bands().items()}

    @np.errstate(over="ignore")  # far logits may become -inf
    def bands(self) -> dict[int, Band]:
        """The likeliest tokens of each row: those within `_DEEP`, or, where there is a top-k, its own and what ties."""
        if not self._at:
            return {}
        all_rows = len(self._at) == len(self._rows)
        logits = self._logits if all_rows else self._logits[self._at]
        best, heats = self._best[self._at], self._heats[self._at]
        lows = self._lows(logits, best, heats)
        cuts = np.maximum(_cuts(lows, best, heats), _IMPOSSIBLE)  # with a mask few are left, and top-k has room for all
        owners, tokens = np.divmod(np.flatnonzero(logits >= cuts[:, None]), self._vocab)
        scores = (logits[owners, tokens] - best[owners]) / heats[owners]
        inside = scores >= lows[owners]
        owners, tokens, scores = owners[inside], tokens[inside], scores[inside]
        ends = np.searchsorted(owners, np.arange(1, len(lows)))
        return {at: Band(ids, own, low, self._floor(at, own))
                for at, ids, own, low in zip(self._at, np.split(tokens, ends), np.split(scores, ends), lows)}

    @np.errstate(over="ignore")
    def best_two(self, at: int, band: Band) -> BestTwo:
        seed, position = self._rows[at].params.seed, self._rows[at].position
        passing = band.scores >= band.floor
        tokens, unseen = band.tokens[passing], np.float32(-math.inf)
        noisy = band.scores[passing] + gumbel_of(seed, position, tokens, self._vocab)
        if band.floor < band.low:
            others, noise = loud(seed, position, self._vocab)
            scores = (self._logits[at, others] - self._best[at]) / self._heats[at]
            more = (scores >= band.floor) & (scores < band.low)
            tokens, noisy = np.append(tokens, others[more]), np.append(noisy, scores[more] + noise[more])
            unseen = band.low + np.float32(QUIET)
        first = noisy.max()
        token = int(tokens[noisy == first].min())
        return BestTwo(token, first, noisy[tokens != token].max(initial=np.float32(-math.inf)), unseen)

    def _top_k(self, params: SamplingParams) -> int:
        """How many tokens top-k keeps; 0 where it keeps all."""
        return params.top_k if 0 < params.top_k < self._vocab else 0

    def _lows(self, logits: Floats, best: Floats, heats: Floats) -> Floats:
        lows = np.full(len(logits), -_DEEP, np.float32)
        counts = np.array([self._top_k(self._rows[at].params) for at in self._at])
        some = counts.nonzero()[0]
        if len(some):
            bounds = _bounds(logits if len(some) == len(lows) else logits[some], counts[some].tolist())
            lows[some] = (bounds - best[some]) / heats[some]
        return lows

    def _floor(self, at: int, likeliest: Floats) -> np.float32:
        params, floor = self._rows[at].params, np.float32(-math.inf)
        if count := self._top_k(params):
            floor = likeliest.min() if count >= len(likeliest) else np.partition(likeliest, -count)[-count]
            likeliest = likeliest[likeliest >= floor]
        if params.top_p < 1:
            floor = max(floor, self._nucleus(at, likeliest, is_all=count > 0))
        if params.min_p > 0:
            # p >= min_p * p_best, as logarithms. It compares two tokens, so what was filtered has no say.
            floor = max(floor, np.float32(math.log(params.min_p)))
        return floor

    def _nucleus(self, at: int, likeliest: Floats, *, is_all: bool) -> np.float32:
        """The score of the last token that top-p keeps: the first at which the probabilities reach `top_p`."""
        top_p = self._rows[at].params.top_p
        scores = torch.from_numpy(likeliest) if is_all else self.scores(at)
        total = scores.logsumexp(0).double()
        for best in _looks(torch.from_numpy(likeliest), scores):
            reached = (best.double() - total).exp().cumsum(0)
            if reached[-1] >= top_p:
                return np.float32(best[int((reached < top_p).sum())])
        return np.float32(best[-1])


def _looks(likeliest: Tensor, scores: Tensor) -> Iterator[Tensor]:
    """The best scores in order, more and more of them, all in the end."""
    yield likeliest.sort(descending=True).values
    for count in _LOOKS:
        if len(likeliest) < count < len(scores):
            yield scores.topk(count).values
    if len(likeliest) < len(scores):
        yield scores.sort(descending=True).values


def _cuts(lows: Floats, best: Floats, heats: Floats) -> Floats:
    """Logits below which no score is as high as `lows`: a bit below the inverse, for that is rounded."""
    exact = best.astype(np.float64)
    depth = lows.astype(np.float64) * heats
    cuts = (exact + depth - 1e-6 * (abs(exact) + abs(depth)) - _COLDEST).astype(np.float32)
    cuts[(cuts - best) / heats >= lows] = -math.inf
    return cuts


# ---- the best of a row -----------------------------------------------------------------------------------


def gap_below(scores: Floats, token: int) -> float:
    """How far a token stands above the best of the others."""
    others = (scores[:token], scores[token + 1 :])
    return float(scores[token] - max(some.max(initial=np.float32(-math.inf)) for some in others))


def best_of(scores: Floats, count: int) -> tuple[list[int], list[float]]:
    """The `count` highest places and what stands there, best first, of equals the lowest place; fewer where all others
    have minus infinity."""
    count = min(count, len(scores))
    return highest_from(scores, _bounds(scores[None], [count])[0], count) if count else ([], [])


def highest_from(scores: Floats, least: np.float32, count: int) -> tuple[list[int], list[float]]:
    """Of the places with `least` or more the `count` highest, ordered likewise; never those with minus infinity."""
    places = np.flatnonzero(scores >= np.maximum(least, _IMPOSSIBLE))
    places = places[np.argsort(-scores[places], kind="stable")[:count]]
    return places.tolist(), scores[places].tolist()


def _bounds(scores: Floats, counts: Sequence[int]) -> Floats:
    """For each row a number that at least so many places reach: as a rule not much below the last of them."""
    rows, vocab = scores.shape
    blocks = vocab // _BLOCK
    maxima = scores[:, : blocks * _BLOCK].reshape(rows, _BLOCK, blocks).max(1)
    found = [np.partition(some if count <= blocks else every, -count)[-count]
             for count, some, every in zip(counts, maxima, scores)]
    return np.array(found, np.float32)
