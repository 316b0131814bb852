"""Logits become tokens here: processors, shared noise, the pick of a stage and the guesses of a draft.

The pick is `argmax(processed_logits + gumbel(seed, position))`: an exact sample from the softmax of the
processed logits (the Gumbel-max trick), and a pure function of the row. Nothing here looks at two rows at
once, and ties go by token id or are kept whole, so a row's answer does not depend on its batch.

Processors act in the order that `SamplingParams` documents and with transformers' formulas, on three
points more strictly:

- top-k, top-p and min-p each keep all tokens at or above some score, so one score is computed and one
  comparison made. Tokens of equal score stay or go together; transformers leaves that to its sort in
  top-p. bfloat16 logits tie often, and which of them a sort prefers may change with the batch.
- Sampled scores are shifted so that the best is 0 before the temperature divides them. No probability
  changes, no temperature overflows, and scores that can win stay small enough for float32 to add noise
  to them with an error below 2**-20.
- Filters do nothing at temperature 0: the best token passes all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.errors import ModelError
from fullpipe.request import SamplingParams
from fullpipe.stations.noise import gumbel

History = Callable[[], tuple[NDArray[np.int64], NDArray[np.int64]]]

_FIRST_LOOK = 512  # candidates that top-p sorts first; it takes 16 times as many while they do not suffice
MOST_TYPICAL = 8  # tokens besides the pick that a lossy request may let pass at one place
_IMPOSSIBLE = -9999.0  # what OpenAI says in place of minus infinity, for which JSON has no word
_COLDEST = 1e-30  # below it, dividing by the temperature would overflow; no two logits are so close


def _no_history() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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

    logits: float [rows, vocab], left as it is.
    limit: the real vocabulary. Ids from there on are padding of the head; they are cut off, so the
    result is [rows, min(vocab, limit)].
    Ids of `logit_bias` outside the vocabulary are ignored: the target refuses them at the front door, and
    a draft's head may be padded less than the target's.
    """
    out = torch.empty_like(logits[:, :limit], dtype=torch.float32, memory_format=torch.contiguous_format)
    for scores, given, row in zip(out, logits[:, :limit], rows, strict=True):
        scores.copy_(given)
        _filter(scores, row)
        if row.params.temperature > 0:
            scores += _noise(scores, row)
    return out


def pick(logits: Tensor, rows: Sequence[RowContext], *, limit: int | None = None,
         margins: bool = False) -> tuple[list[int], list[float | None]]:
    """The token that follows each row; of equals the lowest id.

    logits, limit: as in `process`.
    margins: also say by how much each picked token's processed, noisy logit stands above the second best
    (None when it has no rival); else the second list is empty.

    Raises `ModelError` where no token can be picked, as with logits that are NaN.
    """
    if all(row.params.plain_greedy for row in rows):
        scores = logits[:, :limit]
        _check(scores.amax(-1), rows)
    else:
        scores = process(logits, rows, limit=limit)
    tokens = scores.argmax(-1, keepdim=True)
    picked: list[int] = tokens.squeeze(1).tolist()
    if not margins:
        return picked, []
    second = scores.scatter(1, tokens, -math.inf).amax(-1)
    gaps = (scores.gather(1, tokens).squeeze(1) - second).tolist()
    return picked, [gap if math.isfinite(gap) else None for gap in gaps]


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
    if not any(row.params.accept_typical for row in rows):
        return []
    return [_typical(given, row, token, most) if row.params.accept_typical else []
            for given, row, token in zip(logits[:, :limit], rows, picked, strict=True)]


def _typical(given: Tensor, row: RowContext, picked: int, most: int) -> list[int]:
    scores = given.to(torch.float32, copy=True)
    _filter(scores, row)
    probabilities = scores.softmax(0)
    epsilon, entropy = row.params.accept_typical, float(torch.special.entr(probabilities).sum())
    passing = (probabilities > min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))).nonzero().squeeze(1)
    order = probabilities[passing].sort(descending=True, stable=True).indices[: most + 1]
    return [token for token in passing[order].tolist() if token != picked][:most]


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
    logprobs = given.float().log_softmax(0).clamp(min=_IMPOSSIBLE)
    told = [(picked, float(logprobs[picked]))]
    if count := min(count, len(logprobs)):
        least = logprobs.topk(count).values[-1]
        best = (logprobs >= least).nonzero().squeeze(1)  # in order of id, which a stable sort keeps among equals
        values, order = logprobs[best].sort(descending=True, stable=True)
        told += zip(best[order[:count]].tolist(), values[:count].tolist())
    return told


def rank(logits: Tensor, rows: Sequence[RowContext], k: int, *,
         limit: int | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """A draft's k likeliest candidates for what the target picks, best first, and their log-probabilities.

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
    values, tokens = scores.topk(min(k, scores.shape[1]))
    logprobs = values - scores.logsumexp(-1, keepdim=True)
    possible = (values > -math.inf).sum(-1).tolist()
    return ([ids[:n] for ids, n in zip(tokens.tolist(), possible)],
            [row[:n] for row, n in zip(logprobs.tolist(), possible)])


def _expected(logits: Tensor, rows: Sequence[RowContext]) -> Tensor:
    """Unnormalised log-probabilities of the target's pick, by the draft's logits: float32 [rows, vocab]."""
    out = torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    out.copy_(logits)
    for scores, row in zip(out, rows, strict=True):
        _prepare(scores, row)
        if row.params.temperature > 0:
            floor = _floor(scores, row.params)
            noisy = scores + _noise(scores, row)
            if floor is not None:
                removed = scores < floor
                best = noisy.masked_fill(removed, -math.inf).amax()
                noisy = noisy.where(~removed, noisy.minimum(best) - (floor - scores))
            torch.mul(noisy, _heat(row), out=scores)
    return out


def _check(best: Tensor, rows: Sequence[RowContext]) -> None:
    """A NaN anywhere in a row makes its maximum NaN; a row of which nothing is left has -inf."""
    finite = best.isfinite()
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ModelError(
            f"no token can be picked for position {rows[row].position}: the best logit is {float(best[row])}",
            hint="NaN or inf comes from damaged weights or a dtype that overflows: try `dtype=float32`. "
                 "-inf means that logit_bias forbids every token.")


def _prepare(scores: Tensor, row: RowContext) -> None:
    """All that comes before the filters, in place: bias, penalties, temperature."""
    _penalise(scores, row)
    best = scores.amax()
    _check(best[None], [row])
    if row.params.temperature > 0:
        scores -= best
        scores /= _heat(row)


def _filter(scores: Tensor, row: RowContext) -> None:
    """All but the noise, in place; -inf where filtered."""
    _prepare(scores, row)
    if row.params.temperature > 0 and (floor := _floor(scores, row.params)) is not None:
        scores.masked_fill_(scores < floor, -math.inf)


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


def _floor(scores: Tensor, params: SamplingParams) -> Tensor | None:
    """The lowest score that passes top-k, top-p and min-p (a 0-dim tensor), or None when all are off.

    scores: float32 [vocab], with temperature, the best 0.
    """
    floors: list[Tensor] = []
    if 0 < params.top_k < len(scores):
        floors.append(scores.topk(params.top_k).values[-1])
    if params.top_p < 1:
        floors.append(_nucleus(scores if not floors else scores[scores >= floors[0]], params.top_p))
    if params.min_p > 0:
        # p >= min_p * p_best, as logarithms. It compares two tokens, so what was filtered has no say.
        floors.append(scores.new_tensor(math.log(params.min_p)))
    return torch.stack(floors).amax() if floors else None


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The score of the last token that top-p keeps: the first at which the probabilities reach `top_p`."""
    total = scores.logsumexp(0).double()
    count = min(_FIRST_LOOK, len(scores))
    while True:
        best = scores.topk(count).values
        reached = (best.double() - total).exp().cumsum(0)
        if count == len(scores) or reached[-1] >= top_p:
            kept = int((reached < top_p).sum())
            return best[min(kept, count - 1)]
        count = min(16 * count, len(scores))


def _noise(scores: Tensor, row: RowContext) -> Tensor:
    return gumbel(row.params.seed, row.position, len(scores), scores.device)
