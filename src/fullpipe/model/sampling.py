"""From logits to tokens: processors, shared noise, the pick of a stage and the guesses of a draft.

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
from fullpipe.model.noise import gumbel
from fullpipe.request import SamplingParams

History = Callable[[], tuple[NDArray[np.int64], NDArray[np.int64]]]

_FIRST_LOOK = 512  # candidates that top-p sorts first; it takes 16 times as many while they do not suffice


def _no_history() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    raise AssertionError("penalties need the row's history")


@dataclass(frozen=True, slots=True)
class RowContext:
    """What the pick of one row depends on, besides its logits.

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
    logits = logits[:, :limit]
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    for scores, given, row in zip(out, logits, rows, strict=True):
        scores.copy_(given)
        _penalise(scores, row)
        if row.params.temperature > 0:
            _heat(scores, row.params.temperature)
            if (floor := _floor(scores, row.params)) is not None:
                scores.masked_fill_(scores < floor, -math.inf)
            scores += _noise(scores, row)
    return out


def pick(logits: Tensor, rows: Sequence[RowContext], *, limit: int | None = None,
         margins: bool = False) -> tuple[list[int], list[float]]:
    """The token that follows each row; of equals the lowest id.

    logits, limit: as in `process`.
    margins: also say by how much each picked token's processed, noisy logit stands above the second best
    (inf when it has no rival); else the second list is empty.

    Raises `ModelError` where no token can be picked, as with logits that are NaN.
    """
    plain = all(row.params.plain_greedy for row in rows)
    scores = logits[:, :limit] if plain else process(logits, rows, limit=limit)
    tokens = scores.argmax(-1, keepdim=True)
    best = scores.gather(1, tokens).squeeze(1).float()
    _check(best, rows)
    picked: list[int] = tokens.squeeze(1).tolist()
    if not margins:
        return picked, []
    second = scores.scatter(1, tokens, -math.inf).amax(-1)
    gaps: list[float] = (best - second).tolist()
    return picked, gaps


def rank(logits: Tensor, rows: Sequence[RowContext], k: int, *,
         limit: int | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """A draft's k likeliest candidates for what the target picks, best first, and their log-probabilities.

    logits, limit: as in `process`, but of the draft. Rows have fewer than k candidates where fewer tokens
    are possible at all.
    """
    scores = _draft_scores(logits[:, :limit], rows)
    _check(scores.amax(-1), rows)
    values, tokens = scores.topk(min(k, scores.shape[1]))
    logprobs = values - scores.logsumexp(-1, keepdim=True)
    possible = (values > -math.inf).sum(-1).tolist()
    return ([ids[:n] for ids, n in zip(tokens.tolist(), possible)],
            [row[:n] for row, n in zip(logprobs.tolist(), possible)])
