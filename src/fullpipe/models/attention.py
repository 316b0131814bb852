"""Attention of a step's rows over the caches of their requests, requests of about one size in one product.
Sums over slots are float64 (`decoder` says why).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullpipe.models.arena import SLOT_MULTIPLE
from fullpipe.models.config import ModelConfig
from fullpipe.models.linear import MIN_ROWS

_FEW_ROWS, _FEW_SLOTS = 7, 255  # so many of a request attend in the time that starting an operation takes


@dataclass(slots=True)
class Segment:
    """The rows of one request in a step.

    start, end: row range in the step.
    cache: the request's arena on this slice, of the kind that the slice allocates.
    slots: int64 [r]: where each row writes its key and value; distinct.
    mask: bool [r, width], width <= the arena's capacity: True = attend. A row's own slot must be included.
    """

    start: int
    end: int
    cache: Any
    slots: Tensor
    mask: Tensor


@dataclass(slots=True)
class _View:
    """Segments of about the same size, which attend in one product, as every layer needs them.

    m: the most rows that one of them has, and width the most slots; others are filled up.
    rows: int64 [segments * m]: which row of the step each of theirs is; fillers are row 0.
    taken, put: of those rows the real ones, and where their results go; None: all, in order.
    bias: float32 [segments * kv_heads, m * groups (at least MIN_ROWS), width], 0 or -inf.
    keys, values: float32 and float64 [segments * kv_heads, width, head_dim]: a layer's, filled anew for each.
    filled: their parts that belong to a segment, keys of all and then values; zeros lie behind.
    caches: for each layer what goes there.
    """

    m: int
    rows: Tensor
    taken: Tensor | None
    put: Tensor
    bias: Tensor
    keys: Tensor
    values: Tensor
    filled: list[Tensor]
    caches: list[tuple[Tensor, ...]]


class Attention:
    """Attends for the rows of one step, layer by layer. segments: whose rows these are."""

    def __init__(self, config: ModelConfig, segments: Sequence[Segment]) -> None:
        self._config = config
        self._views = [self._view(alike) for alike in _alike(segments)]

    def __call__(self, layer: int, queries: Tensor) -> Tensor:
        """Give what each row reads of a layer, in the shape of queries: [rows of the step, heads, head_dim]."""
        mixed = torch.zeros_like(queries)
        for view in self._views:
            torch._foreach_copy_(view.filled, view.caches[layer])
            self._attend(queries, view, mixed)
        return mixed

    def _attend(self, queries: Tensor, view: _View, out: Tensor) -> None:
        """queries: [rows of the step, heads, head_dim]; fills the view's rows of out, of the same shape.

        The query heads that share a key-value head are rows of one product. Products with keys and the
        exponentials are float32 and do not mix slots; what sums over slots is float64.
        """
        kv_heads, groups, size = self._config.kv_heads, self._config.groups, self._config.head_dim
        q = queries.index_select(0, view.rows).view(-1, view.m, kv_heads, groups, size).transpose(1, 2)
        q = q.reshape(-1, view.m * groups, size).float()
        scores = torch.baddbmm(view.bias, padded(q), view.keys.transpose(1, 2), alpha=size**-0.5)
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().double()
        mixed = torch.bmm(weights, view.values).div_(weights.sum(-1, keepdim=True))[:, : view.m * groups].to(out.dtype)
        mixed = mixed.view(-1, kv_heads, view.m, groups, size).transpose(1, 2).reshape(len(view.rows), -1, size)
        out.index_copy_(0, view.put, mixed if view.taken is None else mixed.index_select(0, view.taken))

    def _view(self, segments: Sequence[Segment]) -> _View:
        groups, kv_heads = self._config.groups, self._config.kv_heads
        widths = [-(-segment.mask.shape[1] // SLOT_MULTIPLE) * SLOT_MULTIPLE for segment in segments]
        m, width = max(len(segment.mask) for segment in segments), max(widths)
        rows = torch.zeros(len(segments), m, dtype=torch.int64)
        real = torch.zeros(len(segments), m, dtype=torch.bool)
        bias = torch.zeros(len(segments), max(m * groups, MIN_ROWS), width)  # fillers attend to whatever is there
        for number, segment in enumerate(segments):
            count, given = segment.mask.shape
            rows[number, :count] = torch.arange(segment.start, segment.end)
            real[number, :count] = True
            bias[number, : count * groups] = -math.inf
            own = bias[number, : count * groups, :given].view(count, groups, given)
            own.masked_fill_(segment.mask[:, None], 0.0)
        rows, real = rows.flatten(), real.flatten()
        taken = None if real.all() else real.nonzero().flatten()
        bias = bias[:, None].expand(-1, kv_heads, -1, -1)
        keys = torch.zeros(len(segments), kv_heads, width, self._config.head_dim)
        values = torch.zeros_like(keys, dtype=torch.float64)
        filled = [whole[number, :, :own] for whole in (keys, values) for number, own in enumerate(widths)]
        caches = [segment.cache.kv[:, half, :own].unbind() for half in (slice(kv_heads), slice(kv_heads, None))
                  for segment, own in zip(segments, widths)]
        return _View(m, rows, taken, rows[real], bias.reshape(len(segments) * kv_heads, *bias.shape[2:]),
                     keys.flatten(0, 1), values.flatten(0, 1), filled, list(zip(*caches)))


def _alike(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by size: in a group none has twice as many rows or slots as another, unless both are few, so that
    filling up is cheap."""
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        rows, width = segment.mask.shape
        groups.setdefault((max(rows, _FEW_ROWS).bit_length(), max(width, _FEW_SLOTS).bit_length()), []).append(segment)
    return list(groups.values())


def padded(x: Tensor) -> Tensor:
    """[..., rows, n] with zero rows added up to `MIN_ROWS`."""
    missing = MIN_ROWS - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x
