"""Attention of a step's rows over what they read, requests of about one size in one product.
Sums over slots are float64 (`decoder` says why).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.models.config import ModelConfig
from fullpipe.models.linear import MIN_ROWS
from fullpipe.models.step import Step

# Attention reads slots in runs of this length, so that the shape of its products does not follow every token.
_SLOT_MULTIPLE = 32

_FEW_ROWS, _FEW_SLOTS = 7, 255  # so many of a request attend in the time that starting an operation takes


@dataclass(frozen=True, slots=True)
class _Segment:
    """The rows start..end of a step that begin to read at one place. slots: int32 [width], all that they read.
    mask: bool [rows, width], which of these each reads."""

    start: int
    end: int
    slots: NDArray[np.int32]
    mask: NDArray[np.bool_]

    @classmethod
    def of(cls, step: Step, start: int, end: int) -> _Segment:
        spans = step.spans[start:end]
        first, shared, lengths = spans[0, 0], spans[:, 1] - spans[0, 0], spans[:, 3] - spans[:, 2]
        line = step.reads[first : first + shared.max()]
        branches = [step.reads[a:b] for a, b in spans[:, 2:].tolist() if b > a]
        own, column = np.unique(np.concatenate(branches), return_inverse=True) if branches else (line[:0], [])
        mask = np.zeros((end - start, len(line) + len(own)), np.bool_)
        mask[:, : len(line)] = np.arange(len(line)) < shared[:, None]
        mask[np.repeat(np.arange(end - start), lengths), len(line) + np.asarray(column, np.int64)] = True
        return cls(start, end, np.concatenate((line, own)), mask)


def _segments(step: Step) -> list[_Segment]:
    firsts = step.spans[:, 0]
    bounds = [0, *(np.flatnonzero(firsts[1:] != firsts[:-1]) + 1).tolist(), len(step)]
    return [_Segment.of(step, start, end) for start, end in pairwise(bounds)]


@dataclass(slots=True)
class _View:
    """Segments of about the same size, which attend in one product, as every layer needs them.

    m: the most rows that one of them has, and width the most slots; others are filled up.
    rows: int64 [segments * m]: which row of the step each of theirs is; fillers are row 0.
    taken, put: of those rows the real ones, and where their results go; None: all, in order.
    bias: float32 [segments * kv_heads, m * groups (at least MIN_ROWS), width], 0 or -inf.
    slots: int64 [segments * width], what they read; fillers read one of their own once more, with weight 0.
    keys, values: float32 and float64 [segments, kv_heads, width, head_dim]: a layer's, filled anew for each.
    """

    m: int
    rows: Tensor
    taken: Tensor | None
    put: Tensor
    bias: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor


class Attention:
    """Attends for the rows of one step, layer by layer."""

    def __init__(self, config: ModelConfig, step: Step) -> None:
        self._config = config
        self._views = [self._view(alike) for alike in _alike(_segments(step))]

    def __call__(self, cache: Tensor, queries: Tensor) -> Tensor:
        """Give what each row reads of a layer, in the shape of queries: [rows of the step, heads, head_dim].

        cache: the layer's, [slots, 2 * kv_heads, head_dim], keys first.
        """
        mixed, kv_heads = torch.zeros_like(queries), self._config.kv_heads
        for view in self._views:
            segments, _, width, size = view.keys.shape
            read = cache.index_select(0, view.slots).view(segments, width, 2 * kv_heads, size).transpose(1, 2)
            view.keys.copy_(read[:, :kv_heads])
            view.values.copy_(read[:, kv_heads:])
            self._attend(queries, view, mixed)
        return mixed

    def _attend(self, queries: Tensor, view: _View, out: Tensor) -> None:
        """queries: [rows of the step, heads, head_dim]; fills the view's rows of out, of the same shape.

        The query heads that share a key-value head are rows of one product. Products with keys and the
        exponentials are float32 and do not mix slots; what sums over slots is float64.
        """
        kv_heads, groups, size = self._config.kv_heads, self._config.groups, self._config.head_dim
        keys, values = view.keys.flatten(0, 1), view.values.flatten(0, 1)
        q = queries.index_select(0, view.rows).view(-1, view.m, kv_heads, groups, size).transpose(1, 2)
        q = q.reshape(-1, view.m * groups, size).float()
        scores = torch.baddbmm(view.bias, padded(q), keys.transpose(1, 2), alpha=size**-0.5)
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().double()
        mixed = torch.bmm(weights, values).div_(weights.sum(-1, keepdim=True))[:, : view.m * groups].to(out.dtype)
        mixed = mixed.view(-1, kv_heads, view.m, groups, size).transpose(1, 2).reshape(len(view.rows), -1, size)
        out.index_copy_(0, view.put, mixed if view.taken is None else mixed.index_select(0, view.taken))

    def _view(self, segments: Sequence[_Segment]) -> _View:
        groups, kv_heads = self._config.groups, self._config.kv_heads
        m = max(len(segment.mask) for segment in segments)
        width = -(-max(len(segment.slots) for segment in segments) // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
        rows = torch.zeros(len(segments), m, dtype=torch.int64)
        real = torch.zeros(len(segments), m, dtype=torch.bool)
        slots = torch.empty(len(segments), width, dtype=torch.int64)
        bias = torch.zeros(len(segments), max(m * groups, MIN_ROWS), width)  # fillers attend to whatever is there
        for number, segment in enumerate(segments):
            count, given = segment.mask.shape
            rows[number, :count] = torch.arange(segment.start, segment.end)
            real[number, :count] = True
            slots[number, :given] = torch.from_numpy(segment.slots)
            slots[number, given:] = int(segment.slots[0])
            bias[number, : count * groups] = -math.inf
            own = bias[number, : count * groups, :given].view(count, groups, given)
            own.masked_fill_(torch.from_numpy(segment.mask)[:, None], 0.0)
        rows, real = rows.flatten(), real.flatten()
        taken = None if real.all() else real.nonzero().flatten()
        bias = bias[:, None].expand(-1, kv_heads, -1, -1)
        keys = torch.empty(len(segments), kv_heads, width, self._config.head_dim)
        return _View(m, rows, taken, rows[real], bias.reshape(len(segments) * kv_heads, *bias.shape[2:]),
                     slots.flatten(), keys, torch.empty_like(keys, dtype=torch.float64))


def _alike(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Segments by size: in a group none has twice as many rows or slots as another, unless both are few, so that
    filling up is cheap."""
    groups: dict[tuple[int, int], list[_Segment]] = {}
    for segment in segments:
        rows, width = segment.mask.shape
        groups.setdefault((max(rows, _FEW_ROWS).bit_length(), max(width, _FEW_SLOTS).bit_length()), []).append(segment)
    return list(groups.values())


def padded(x: Tensor) -> Tensor:
    """[..., rows, n] with zero rows added up to `MIN_ROWS`."""
    missing = MIN_ROWS - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x
