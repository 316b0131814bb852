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
    edited, sampled = _prepared(logits[:, :limit], rows)
    out = edited.clone()
    for index, at, floor in zip(range(len(sampled.rows)), sampled.at, sampled.floors(), strict=True):
        scores, row = sampled.all_scores(index), sampled.rows[index]
        out[at] = scores.masked_fill_(scores < floor, -math.inf) + gumbel(row.params.seed, row.position, len(scores))
    return out


def pick(logits: Tensor, rows: Sequence[RowContext], *, limit: int | None = None,
         margins: bool = False) -> tuple[list[int], list[float | None]]:
    """The token that follows each row; of equals the lowest id.

    logits, limit: as in `process`.
    margins: also say by how much each picked token's processed, noisy logit stands above the second best
    (None when it has no rival); else the second list is empty.

    Raises `ModelError` where no token can be picked, as with logits that are NaN.
    """
    edited, sampled = _prepared(logits[:, :limit], rows)
    greedy = [at for at, row in enumerate(rows) if row.params.temperature == 0]
    picked = np.zeros(len(rows), np.int64)
    picked[greedy] = _some(edited, greedy).numpy().argmax(1)
    gaps = np.zeros(len(rows), np.float32)
    if margins:
        gaps[greedy] = _gaps(_some(edited, greedy), picked[greedy])
    for index, band in enumerate(sampled.bands()):
        at = sampled.at[index]
        best = sampled.best_two(index, band)
        picked[at] = best.token
        if margins and best.second < best.unseen:  # what came second has not been looked at
            whole = process(logits[at : at + 1], rows[at : at + 1], limit=limit)
            gaps[at : at + 1] = _gaps(whole, picked[at : at + 1])
        else:
            gaps[at] = best.first - best.second
    return picked.tolist(), [gap if math.isfinite(gap) else None for gap in gaps.tolist()] if margins else []


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
    lossy = [at for at, row in enumerate(rows) if row.params.accept_typical]
    if not lossy:
        return []
    chosen = [rows[at] for at in lossy]
    edited, sampled = _prepared(_some(logits[:, :limit], lossy), chosen)
    scores = edited.clone()
    for index, at, floor in zip(range(len(sampled.rows)), sampled.at, sampled.floors(), strict=True):
        weighed = sampled.all_scores(index)
        scores[at] = weighed.masked_fill_(weighed < floor, -math.inf)
    probabilities = scores.softmax(-1)
    entropies = [float(row.sum()) for row in torch.special.entr(probabilities)]  # apart: for the same bits in any batch
    least = [min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))
             for epsilon, entropy in zip((row.params.accept_typical for row in chosen), entropies)]
    above = np.nextafter(np.array(least, np.float32), np.float32(math.inf))
    passing: list[list[int]] = [[] for _ in rows]
    for at, (tokens, _) in zip(lossy, _from(probabilities.numpy(), above, most + 1)):
        passing[at] = [token for token in tokens if token != picked[at]][:most]
    return passing


def tell_logprobs(logits: Tensor, rows: Sequence[RowContext], picked: Sequence[int], *,
                  limit: int | None = None) -> list[list[tuple[int, float]]]:
    """For each row whose request asks (`SamplingParams.logprobs`): the picked token and behind it the likeliest ones,
    best first, of equals the lowest id, each with its log-probability. An empty list for the others, and for all rows
    together where none asks.

    logits, limit: as in `process`; probabilities are the softmax of `logits` as they are. picked: what `pick` chose.
    """
    counts = {at: row.params.logprobs for at, row in enumerate(rows) if row.params.logprobs is not None}
    if not counts:
        return []
    asked = list(counts)
    logprobs = _some(logits[:, :limit], asked).float().log_softmax(-1).clamp_(min=_IMPOSSIBLE).numpy()
    told: list[list[tuple[int, float]]] = [[] for _ in rows]
    for at, own, (tokens, values) in zip(asked, logprobs, _best(logprobs, max(counts.values()))):
        token = picked[at]
        told[at] = [(token, float(own[token])), *list(zip(tokens, values))[: counts[at]]]
    return told


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
    scores = _expected(logits[:, :limit], rows)
    totals = scores.logsumexp(-1)
    tokens: list[list[int]] = []
    logprobs: list[list[float]] = []
    for total, (ids, values) in zip(totals, _best(scores.numpy(), k)):
        possible = [value for value in values if value > -math.inf]
        tokens.append(ids[: len(possible)])
        logprobs.append((torch.tensor(possible) - total).tolist())
    return tokens, logprobs


def _expected(logits: Tensor, rows: Sequence[RowContext]) -> Tensor:
    """Unnormalised log-probabilities of the target's pick, by the draft's logits: float32 [rows, vocab]."""
    edited, sampled = _prepared(logits, rows)
    if not sampled.rows:
        return edited
    out = edited.clone()
    for index, at, floor in zip(range(len(sampled.rows)), sampled.at, sampled.floors(), strict=True):
        scores, row = sampled.all_scores(index), sampled.rows[index]
        noisy = scores + gumbel(row.params.seed, row.position, len(scores))
        if floor > -math.inf:
            removed = scores < floor
            best = noisy.masked_fill(removed, -math.inf).amax()
            noisy = noisy.where(~removed, noisy.minimum(best) - (floor - scores))
        torch.mul(noisy, _heat(row), out=out[at])
    return out


# ---- what comes before the noise -------------------------------------------------------------------------


def _prepared(logits: Tensor, rows: Sequence[RowContext]) -> tuple[Tensor, _Sampled]:
    """Logits with bias and penalties, float32 [rows, vocab], and how those with a temperature go on."""
    edited = logits.float()
    touched = [at for at, row in enumerate(rows) if row.params.needs_history or row.params.logit_bias]
    if touched:
        edited = edited.clone()
    for at in touched:
        _penalise(edited[at], rows[at])
    best = edited.amax(-1)
    _check(best, rows)
    sampled = [at for at, row in enumerate(rows) if row.params.temperature > 0]
    return edited, _Sampled(sampled, [rows[at] for at in sampled], _some(edited, sampled).numpy(),
                            _some(best, sampled).numpy())


def _check(best: Tensor, rows: Sequence[RowContext]) -> None:
    """A NaN anywhere in a row makes its maximum NaN; a row of which nothing is left has -inf."""
    finite = best.isfinite()
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
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

    token: np.int64
    first: np.float32
    second: np.float32
    unseen: np.float32


class _Sampled:
    """Some rows with a temperature. A score is a logit less the row's best, divided by the temperature.

    at: their places in the batch. logits: [rows, vocab], with bias and penalties. best: of each row.
    """

    def __init__(self, at: Sequence[int], rows: Sequence[RowContext], logits: Floats, best: Floats) -> None:
        self.at, self.rows = at, rows
        self._logits, self._best = logits, best
        self._heats = np.array([_heat(row) for row in rows], np.float32)

    def all_scores(self, index: int) -> Tensor:
        """Scores of the whole vocabulary, made anew."""
        return torch.from_numpy(self._logits[index]).sub(float(self._best[index])).div_(float(self._heats[index]))

    def floors(self) -> list[float]:
        """The lowest score of each row that passes top-k, top-p and min-p; -inf when all are off."""
        if all(_keeps_all(row.params, self._logits.shape[1]) for row in self.rows):
            return [-math.inf] * len(self.rows)
        return [float(band.floor) for band in self.bands()]

    @np.errstate(over="ignore")  # far logits may become -inf
    def bands(self) -> list[_Band]:
        """The likeliest tokens of each row: those within `_DEEP`, or, where there is a top-k, its own and what ties."""
        if not self.rows:
            return []
        lows = self._lows()
        owners, tokens = _at_least(self._logits, self._cuts(lows))
        scores = (self._logits[owners, tokens] - self._best[owners]) / self._heats[owners]
        inside = scores >= lows[owners]
        owners, tokens, scores = owners[inside], tokens[inside], scores[inside]
        ends = np.searchsorted(owners, np.arange(1, len(self.rows)))
        return [_Band(ids, own, low, self._floor(index, own))
                for index, (ids, own, low) in enumerate(zip(np.split(tokens, ends), np.split(scores, ends), lows))]

    @np.errstate(over="ignore")
    def best_two(self, index: int, band: _Band) -> _BestTwo:
        row, logits = self.rows[index], self._logits[index]
        seed, position, vocab = row.params.seed, row.position, len(logits)
        passing = band.scores >= band.floor
        tokens, unseen = band.tokens[passing], np.float32(-math.inf)
        noisy = band.scores[passing] + gumbel_of(seed, position, tokens, vocab)
        if band.floor < band.low:
            others, noise = loud(seed, position, vocab)
            scores = (logits[others] - self._best[index]) / self._heats[index]
            more = (scores >= band.floor) & (scores < band.low)
            tokens, noisy = np.append(tokens, others[more]), np.append(noisy, scores[more] + noise[more])
            unseen = band.low + np.float32(QUIET)
        first = noisy.max()
        token = tokens[noisy == first].min()
        second = noisy[tokens != token].max(initial=np.float32(-math.inf))
        return _BestTwo(token, first, second, unseen)

    def _lows(self) -> Floats:
        lows = np.full(len(self.rows), -_DEEP, np.float32)
        vocab = self._logits.shape[1]
        counts = {index: row.params.top_k for index, row in enumerate(self.rows) if 0 < row.params.top_k < vocab}
        if counts:
            some = list(counts)
            bounds = _bounds(self._logits if len(some) == len(lows) else self._logits[some], list(counts.values()))
            lows[some] = (bounds - self._best[some]) / self._heats[some]
        return lows

    def _cuts(self, lows: Floats) -> Floats:
        """Logits below which no score is as high as `lows`: a bit below the inverse, for it is rounded."""
        best, depth = self._best.astype(np.float64), lows.astype(np.float64) * self._heats
        cuts = (best + depth - 1e-6 * (abs(best) + abs(depth)) - _COLDEST).astype(np.float32)
        too_high = (cuts - self._best) / self._heats >= lows
        cuts[too_high] = -math.inf
        return cuts

    def _floor(self, index: int, likeliest: Floats) -> np.float32:
        params = self.rows[index].params
        floor, narrowed = np.float32(-math.inf), 0 < params.top_k < self._logits.shape[1]
        if narrowed:
            floor = np.partition(likeliest, -params.top_k)[-params.top_k]
            likeliest = likeliest[likeliest >= floor]
        if params.top_p < 1:
            floor = max(floor, self._nucleus(index, likeliest, narrowed))
        if params.min_p > 0:
            # p >= min_p * p_best, as logarithms. It compares two tokens, so what was filtered has no say.
            floor = max(floor, np.float32(math.log(params.min_p)))
        return floor

    def _nucleus(self, index: int, likeliest: Floats, is_all: bool) -> np.float32:
        """The score of the last token that top-p keeps: the first at which the probabilities reach `top_p`."""
        top_p = self.rows[index].params.top_p
        scores = torch.from_numpy(likeliest) if is_all else self.all_scores(index)
        total = scores.logsumexp(0).double()
        for best in self._looks(torch.from_numpy(likeliest), scores):
            reached = (best.double() - total).exp().cumsum(0)
            if reached[-1] >= top_p:
                return np.float32(best[int((reached < top_p).sum())])
        return np.float32(best[-1])

    def _looks(self, likeliest: Tensor, scores: Tensor) -> Iterator[Tensor]:
        """The best scores in order, more and more of them."""
        yield likeliest.sort(descending=True).values
        for count in _LOOKS:
            if len(likeliest) < count < len(scores):
                yield scores.topk(count).values
        if len(likeliest) < len(scores):
            yield scores.sort(descending=True).values


def _keeps_all(params: SamplingParams, vocab: int) -> bool:
    return not 0 < params.top_k < vocab and params.top_p == 1 and params.min_p == 0


# ---- the best of rows ------------------------------------------------------------------------------------


def _some(values: Tensor, at: Sequence[int]) -> Tensor:
    """Some rows; no copy where all are meant."""
    return values if len(at) == len(values) else values[list(at)]


def _gaps(scores: Tensor, tokens: Ids) -> Floats:
    """How far these tokens stand above the best of the others."""
    own = torch.from_numpy(tokens)[:, None]
    second = scores.scatter(1, own, -math.inf).amax(-1)
    return (scores.gather(1, own).squeeze(1) - second).numpy()


def _best(values: Floats, count: int) -> list[tuple[list[int], list[float]]]:
    """Each row's `count` highest places and what stands there, best first, of equals the lowest place."""
    count = min(count, values.shape[1])
    if not count:
        return [([], [])] * len(values)
    return _from(values, _bounds(values, [count] * len(values)), count)


def _from(values: Floats, least: Floats, count: int) -> list[tuple[list[int], list[float]]]:
    """Of the places where a row has `least` or more, the `count` highest and what stands there, ordered likewise."""
    owners, places = _at_least(values, least)
    found = values[owners, places]
    order = np.lexsort((places, -found, owners))
    places, found = places[order], found[order]
    ends = np.searchsorted(owners, np.arange(1, len(values)))
    return [(ids[:count].tolist(), own[:count].tolist())
            for ids, own in zip(np.split(places, ends), np.split(found, ends))]


def _at_least(values: Floats, least: Floats) -> tuple[Ids, Ids]:
    """Where a row has its `least` or more: rows, and places in them."""
    rows, places = np.divmod(np.flatnonzero(values >= least[:, None]), values.shape[1])
    return rows, places


def _bounds(values: Floats, counts: Sequence[int]) -> Floats:
    """For each row a number that at least so many places reach: as a rule not much below the last of them."""
    rows, vocab = values.shape
    width = vocab // _BLOCK
    maxima = values[:, : width * _BLOCK].reshape(rows, _BLOCK, width).max(1)
    found = [np.partition(some if count <= width else every, -count)[-count]
             for count, some, every in zip(counts, maxima, values)]
    return np.array(found, np.float32)
