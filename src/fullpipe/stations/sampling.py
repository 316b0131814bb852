"""Logits become tokens here: processors, shared noise, the pick of a stage and the guesses of a draft.

The pick is `argmax(processed_logits + gumbel(seed, position))`: an exact sample from the softmax of the
processed logits (the Gumbel-max trick), and a pure function of the row. Rows are looked at together, but no
number of one goes into another, and ties go by token id or are kept whole, so a row's answer does not
depend on its batch.

Processors act in the order that `SamplingParams` documents and with transformers' formulas, on three
points more strictly:

- top-k, top-p and min-p each keep all tokens at or above some score, so one score is computed and one
  comparison made. Tokens of equal score stay or go together; transformers leaves that to its sort in
  top-p. bfloat16 logits tie often, and which of them a sort prefers may change with the batch.
- Sampled scores are shifted so that the best is 0 before the temperature divides them. No probability
  changes, no temperature overflows, and scores that can win stay small enough for float32 to add noise
  to them with an error below 2**-20.
- Filters do nothing at temperature 0: the best token passes all of them.

`process` does this over the whole vocabulary, and is what the others mean. They look at few tokens, and the
bounds that allow it lose no bit:

- Noise is never below `noise.FAINT`, and above `noise.QUIET` for few tokens, which are known. So what wins has
  a score within `_DEEP` of the best (0), or noise above `QUIET`: any other token has less than the best has
  with the faintest noise. Rounded subtraction, division and addition keep the order of their operands, so
  this holds of float32 too.
- The k best of a row are not below its k-th best maximum of a block, and maxima are quickly found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.errors import ModelError
from fullpipe.request import SamplingParams
from fullpipe.stations.noise import FAINT, QUIET, gumbel, gumbel_of, loud

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
History = Callable[[], tuple[Ids, Ids]]

MOST_TYPICAL = 8  # tokens besides the pick that a lossy request may let pass at one place
_DEEP = 9.75  # how far below the best a score may lie to be looked at whatever its noise
assert _DEEP > QUIET - FAINT
_BLOCK = 64  # tokens of which the maximum is taken
_LOOKS = (1 << 13, 1 << 17)  # how many tokens top-p sorts where those within `_DEEP` do not suffice
_IMPOSSIBLE = -9999.0  # what OpenAI says in place of minus infinity, for which JSON has no word
_COLDEST = 1e-30  # below it, dividing by the temperature would overflow; no two logits are so close


def _no_history() -> tuple[Ids, Ids]:
    raise AssertionError("penalties need the row's history")


@dataclass(frozen=True, slots=True)
class RowContext:
    """Holds what the pick of one row depends on, besides its logits.

    position: the position that the picked token will take (the row's own plus one); keys the noise.
    history: gives the prompt's and the output's token ids on this row's path, the row's own token
    included. Called only when `params.needs_history`.
    """

    params: SamplingParams
    position: int
    history: History = _no_history


def process(logits: Tensor, rows: Sequence[RowContext], *, limit: int | None = None) -> Tensor:
    """Processed logits with temperature and noise, -inf where filtered: float32 [rows, vocab].

    logits: float [rows, vocab] in the host's memory, left as it is.
    limit: the real vocabulary. Ids from there on are padding of the head; they are cut off, so the
    result is [rows, min(vocab, limit)].
    Ids of `logit_bias` outside the vocabulary are ignored: the target refuses them at the front door, and
    a draft's head may be padded less than the target's.
    """
    scores, _, sampled = _prepared(logits[:, :limit], rows)
    out = torch.from_numpy(scores).clone()
    for at, floor in sampled.floors().items():
        out[at] = sampled.scores(at, floor) + sampled.noise(at)
    return out


def pick(logits: Tensor, rows: Sequence[RowContext], *, limit: int | None = None,
         margins: bool = False) -> tuple[list[int], list[float | None]]:
    """The token that follows each row; of equals the lowest id.

    logits, limit: as in `process`.
    margins: also say by how much each picked token's processed, noisy logit stands above the second best
    (None when it has no rival); else the second list is empty.

    Raises `ModelError` where no token can be picked, as with logits that are NaN.
    """
    scores, tokens, sampled = _prepared(logits[:, :limit], rows)
    gaps = [_gap(own, token) for own, token in zip(scores, tokens.tolist())] if margins else []
    for at, band in sampled.bands().items():
        best = sampled.best_two(at, band)
        tokens[at] = best.token
        if margins and best.second < best.unseen:  # what comes second was not looked at
            gaps[at] = _gap(process(logits[at : at + 1], rows[at : at + 1], limit=limit)[0].numpy(), best.token)
        elif margins:
            gaps[at] = float(best.first - best.second)
    return tokens.tolist(), [gap if math.isfinite(gap) else None for gap in gaps]


def typical(logits: Tensor, rows: Sequence[RowContext], picked: Sequence[int], *,
            limit: int | None = None, most: int = MOST_TYPICAL) -> list[list[int]]:
    """What else a lossy request lets pass: for each row up to `most` tokens, likeliest first, without the picked one;
    none for a row whose request is exact, and an empty list when all are.

    logits, limit: as in `process`. picked: the tokens that `pick` chose.

    A token passes if its probability is above min(e, sqrt(e) exp(-H)), e the request's `accept_typical` and H the
    entropy of the distribution in nats (Medusa's typical acceptance, arXiv 2401.10774, section 2.3.2, its delta set to
    sqrt(e) as there). The distribution has all processors applied and no noise. Greedy decoding has none of its own:
    there it is that of temperature 1.
    """
    passing: list[list[int]] = [[] for _ in rows]
    lossy = [at for at, row in enumerate(rows) if row.params.accept_typical]
    if not lossy:
        return []
    scores, _, sampled = _prepared(logits[lossy, :limit], [rows[at] for at in lossy])
    floors = sampled.floors()
    for index, at in enumerate(lossy):
        own = sampled.scores(index, floors[index]) if index in floors else torch.from_numpy(scores[index])
        likely = _typical(own, rows[at].params.accept_typical, most + 1)
        passing[at] = [token for token in likely if token != picked[at]][:most]
    return passing


def _typical(scores: Tensor, epsilon: float, most: int) -> list[int]:
    probabilities = scores.softmax(0)
    entropy = float(torch.special.entr(probabilities).sum())
    least = np.float32(min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)))
    return _from(probabilities.numpy(), np.nextafter(least, np.float32(2)), most)[0]


def tell_logprobs(logits: Tensor, rows: Sequence[RowContext], picked: Sequence[int], *,
                  limit: int | None = None) -> list[list[tuple[int, float]]]:
    """For each row whose request asks (`SamplingParams.logprobs`): the picked token and behind it the likeliest ones,
    best first, of equals the lowest id, each with its log-probability. An empty list for the others, and for all rows
    together where none asks.

    logits, limit: as in `process`; probabilities are the softmax of `logits` as they are. picked: what `pick` chose.
    """
    if all(row.params.logprobs is None for row in rows):
        return []
    return [[] if row.params.logprobs is None else _told(given, token, row.params.logprobs)
            for given, row, token in zip(logits[:, :limit], rows, picked, strict=True)]


def _told(given: Tensor, picked: int, count: int) -> list[tuple[int, float]]:
    logprobs = given.float().log_softmax(0).clamp_(min=_IMPOSSIBLE).numpy()
    return [(picked, float(logprobs[picked])), *zip(*_best(logprobs, count))]


def rank(logits: Tensor, rows: Sequence[RowContext], k: int, *,
         limit: int | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """A draft's k likeliest candidates for what the target picks, best first, of equals the lowest id, and their
    log-probabilities.

    logits, limit: as in `process`, but of the draft. Rows have fewer than k candidates where fewer tokens
    are possible at all.

    Target and draft add the same noise g, so once g is known nothing random is left but the draft's own
    error. Let the target's logits be the draft's, d, plus independent errors of Gumbel shape and scale 1.
    Then the target's pick, the argmax of logits + T g, is token i with probability
    softmax(d + T g)_i. At T = 0 that is the draft's softmax, which is what one would have
    said anyway, and the order of candidates is always that of d / T + g. The scale belongs to the logits,
    not to logits / T: over 576 positions, two seeds each, of Qwen2.5-Coder 0.5B guessing 1.5B, the
    surprise at the target's pick is 0.56, 0.57, 0.57 nats at T = 0, 0.5, 1; by the softmax of d / T + g it
    is 0.63 at T = 0.5.

    A token that the draft's top-k, top-p or min-p removes may pass the target's. It stays a candidate,
    ranked below the best that passed, and the less likely the further its score lies below the filter:
    by the same assumption the target lifts it over a distance of x with probability about exp(-x). On the
    same positions, with T = 0.7, top-p 0.8 and top-k 20, the target's pick is among the first 8 in 97.7%
    this way and in 92.7% when the removed tokens are dropped.
    """
    scores, _, sampled = _prepared(logits[:, :limit], rows)
    floors = sampled.floors()
    tokens: list[list[int]] = []
    logprobs: list[list[float]] = []
    for at, own in enumerate(scores):
        weights = sampled.expected(at, floors[at]) if at in floors else torch.from_numpy(own)
        ids, values = _best(weights.numpy(), k)
        possible = [value for value in values if value > -math.inf]
        tokens.append(ids[: len(possible)])
        logprobs.append((torch.tensor(possible) - weights.logsumexp(0)).tolist())
    return tokens, logprobs


# ---- what comes before the noise -------------------------------------------------------------------------


def _prepared(logits: Tensor, rows: Sequence[RowContext]) -> tuple[Floats, Ids, _Sampled]:
    """Logits with bias and penalties, [rows, vocab]; their best tokens; and how rows with a temperature go on."""
    edited = logits.float()
    touched = [at for at, row in enumerate(rows) if row.params.needs_history or row.params.logit_bias]
    if touched:
        edited = edited.clone()
    for at in touched:
        _penalise(edited[at], rows[at])
    scores = edited.numpy()
    tokens = scores.argmax(1)
    best = scores[np.arange(len(rows)), tokens]
    _check(best, rows)
    return scores, tokens, _Sampled(rows, scores, best)


def _check(best: Floats, rows: Sequence[RowContext]) -> None:
    """A NaN anywhere in a row is its maximum; a row of which nothing is left has -inf."""
    finite = np.isfinite(best)
    if not finite.all():
        row = int(finite.argmin())
        raise ModelError(
            f"no token can be picked for position {rows[row].position}: the best logit is {float(best[row])}",
            hint="NaN or inf comes from damaged weights or a dtype that overflows: try `dtype=float32`. "
                 "-inf means that logit_bias forbids every token.")


def _heat(row: RowContext) -> float:
    return max(row.params.temperature, _COLDEST)


def _penalise(scores: Tensor, row: RowContext) -> None:
    """Bias, repetition penalty (prompt and output), frequency and presence penalty (output), in place."""
    params, vocab = row.params, len(scores)
    for token, bias in params.logit_bias.items():
        if 0 <= token < vocab:
            scores[token] += bias
    if not params.needs_history:
        return
    prompt, output = (ids[ids < vocab] for ids in row.history())
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.union1d(prompt, output)).to(scores.device)
        before = scores[seen]
        scores[seen] = torch.where(before < 0, before * params.repetition_penalty,
                                   before / params.repetition_penalty)
    said, counts = np.unique(output, return_counts=True)
    penalty = params.frequency_penalty * counts + params.presence_penalty
    scores[torch.from_numpy(said).to(scores.device)] -= torch.from_numpy(penalty).to(scores)


# ---- rows with a temperature -----------------------------------------------------------------------------


class _Band(NamedTuple):
    """The tokens of a row whose scores are at least `low`, in order of id. floor: the lowest score that passes filters;
    -inf when all are off."""

    tokens: Ids
    scores: Floats
    low: np.float32
    floor: np.float32


class _BestTwo(NamedTuple):
    """The two best of a row, noise included. No token that was not looked at has more than `unseen`."""

    token: int
    first: np.float32
    second: np.float32
    unseen: np.float32


class _Sampled:
    """The rows of a batch that have a temperature, each by its place in the batch; the others are passed over.

    A score is a logit less the row's best, divided by the temperature.
    logits: [rows, vocab], with bias and penalties. best: of each row.
    """

    def __init__(self, rows: Sequence[RowContext], logits: Floats, best: Floats) -> None:
        self._rows, self._logits, self._best = rows, logits, best
        self._at = [at for at, row in enumerate(rows) if row.params.temperature > 0]
        self._heats = np.array([_heat(row) for row in rows], np.float32)
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
    def bands(self) -> dict[int, _Band]:
        """The likeliest tokens of each row: those within `_DEEP`, or, where there is a top-k, its own and what ties."""
        if not self._at:
            return {}
        all_rows = len(self._at) == len(self._rows)
        logits = self._logits if all_rows else self._logits[self._at]
        best, heats = self._best[self._at], self._heats[self._at]
        lows = self._lows(logits, best, heats)
        owners, tokens = np.divmod(np.flatnonzero(logits >= _cuts(lows, best, heats)[:, None]), self._vocab)
        scores = (logits[owners, tokens] - best[owners]) / heats[owners]
        inside = scores >= lows[owners]
        owners, tokens, scores = owners[inside], tokens[inside], scores[inside]
        ends = np.searchsorted(owners, np.arange(1, len(lows)))
        return {at: _Band(ids, own, low, self._floor(at, own))
                for at, ids, own, low in zip(self._at, np.split(tokens, ends), np.split(scores, ends), lows)}

    @np.errstate(over="ignore")
    def best_two(self, at: int, band: _Band) -> _BestTwo:
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
        return _BestTwo(token, first, noisy[tokens != token].max(initial=np.float32(-math.inf)), unseen)

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
            floor = np.partition(likeliest, -count)[-count]
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


def _gap(scores: Floats, token: int) -> float:
    """How far a token stands above the best of the others."""
    others = (scores[:token], scores[token + 1 :])
    return float(scores[token] - max(some.max(initial=np.float32(-math.inf)) for some in others))


def _best(scores: Floats, count: int) -> tuple[list[int], list[float]]:
    """The `count` highest places and what stands there, best first, of equals the lowest place."""
    count = min(count, len(scores))
    return _from(scores, _bounds(scores[None], [count])[0], count) if count else ([], [])


def _from(scores: Floats, least: np.float32, count: int) -> tuple[list[int], list[float]]:
    """Of the places with `least` or more the `count` highest, ordered likewise."""
    places = np.flatnonzero(scores >= least)
    places = places[np.argsort(-scores[places], stable=True)[:count]]
    return places.tolist(), scores[places].tolist()


def _bounds(scores: Floats, counts: Sequence[int]) -> Floats:
    """For each row a number that at least so many places reach: as a rule not much below the last of them."""
    rows, vocab = scores.shape
    blocks = vocab // _BLOCK
    maxima = scores[:, : blocks * _BLOCK].reshape(rows, _BLOCK, blocks).max(1)
    found = [np.partition(some if count <= blocks else every, -count)[-count]
             for count, some, every in zip(counts, maxima, scores)]
    return np.array(found, np.float32)
