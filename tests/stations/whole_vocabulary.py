"""What `stations/sampling.py` says, computed the slow and obvious way: row by row, over the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fullpipe.request import SamplingParams
from fullpipe.stations.noise import gumbel
from fullpipe.stations.sampling import RowContext


def process(logits: Tensor, rows: Sequence[RowContext]) -> Tensor:
    return torch.stack([_filtered(given, row) + _noise(given, row) if row.params.temperature else _filtered(given, row)
                        for given, row in zip(logits, rows, strict=True)])


def pick(logits: Tensor, rows: Sequence[RowContext]) -> tuple[list[int], list[float | None]]:
    scores = process(logits, rows)
    tokens = scores.argmax(-1, keepdim=True)
    gaps = scores.gather(1, tokens) - scores.scatter(1, tokens, -math.inf).amax(-1, keepdim=True)
    return tokens.squeeze(1).tolist(), [gap if math.isfinite(gap) else None for gap in gaps.squeeze(1).tolist()]


def typical(logits: Tensor, rows: Sequence[RowContext], picked: Sequence[int], most: int) -> list[list[int]]:
    found: list[list[int]] = []
    for given, row, token in zip(logits, rows, picked, strict=True):
        probabilities = _filtered(given, row).softmax(0)
        epsilon, entropy = row.params.accept_typical, float(torch.special.entr(probabilities).sum())
        passing = probabilities > min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))
        order = probabilities.sort(descending=True, stable=True).indices
        likely = [other for other in order.tolist() if passing[other]][: most + 1] if epsilon else []
        found.append([other for other in likely if other != token][:most])
    return found


def tell_logprobs(logits: Tensor, rows: Sequence[RowContext], picked: Sequence[int]) -> list[list[tuple[int, float]]]:
    told: list[list[tuple[int, float]]] = []
    for given, row, token in zip(logits, rows, picked, strict=True):
        logprobs = given.float().log_softmax(0).clamp(min=-9999)
        values, order = logprobs.sort(descending=True, stable=True)
        best = list(zip(order.tolist(), values.tolist()))[: row.params.logprobs]
        told.append([] if row.params.logprobs is None else [(token, float(logprobs[token])), *best])
    return told


def rank(logits: Tensor, rows: Sequence[RowContext], k: int) -> tuple[list[list[int]], list[list[float]]]:
    tokens: list[list[int]] = []
    logprobs: list[list[float]] = []
    for given, row in zip(logits, rows, strict=True):
        scores = _expected(given, row)
        values, order = scores.sort(descending=True, stable=True)
        count = min(k, int((values > -math.inf).sum()))
        tokens.append(order[:count].tolist())
        logprobs.append((values[:count] - scores.logsumexp(-1)).tolist())
    return tokens, logprobs


def _expected(given: Tensor, row: RowContext) -> Tensor:
    scores = _prepared(given, row)
    if not row.params.temperature:
        return scores
    noisy, floor = scores + _noise(scores, row), _floor(scores, row.params)
    best = noisy[scores >= floor].amax()
    noisy = torch.where(scores < floor, noisy.minimum(best) - (floor - scores), noisy)
    return noisy * max(row.params.temperature, 1e-30)


def _filtered(given: Tensor, row: RowContext) -> Tensor:
    scores = _prepared(given, row)
    return scores.masked_fill(scores < _floor(scores, row.params), -math.inf) if row.params.temperature else scores


def _prepared(given: Tensor, row: RowContext) -> Tensor:
    params, scores = row.params, given.float().clone()
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if params.needs_history:
        prompt, output = row.history()
        for token in np.union1d(prompt, output):
            scores[token] = scores[token] * params.repetition_penalty if scores[token] < 0 else (
                scores[token] / params.repetition_penalty)
        for token, count in zip(*np.unique(output, return_counts=True)):
            scores[token] -= params.frequency_penalty * count + params.presence_penalty
    return (scores - scores.amax()) / max(params.temperature, 1e-30) if params.temperature else scores


def _floor(scores: Tensor, params: SamplingParams) -> Tensor:
    floors, kept = [torch.tensor(-math.inf)], scores
    if 0 < params.top_k < len(scores):
        floors.append(scores.sort(descending=True).values[params.top_k - 1])
        kept = scores[scores >= floors[-1]]
    if params.top_p < 1:
        best = kept.sort(descending=True).values
        reached = (best.double() - kept.logsumexp(0).double()).exp().cumsum(0)
        floors.append(best[min(int((reached < params.top_p).sum()), len(best) - 1)])
    if params.min_p > 0:
        floors.append(torch.tensor(math.log(params.min_p)))
    return torch.stack(floors).amax()


def _noise(scores: Tensor, row: RowContext) -> Tensor:
    return gumbel(row.params.seed, row.position, len(scores))
