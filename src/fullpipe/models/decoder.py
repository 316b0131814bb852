"""One lean decoder for every family: a run of layers, with or without embedding and head.

Written for steps of few rows over large weights. What a step costs is reading the weights; everything else is kept
to a few operations per layer. Query, key and value are one product, gate and up another; key and value go into
the cache in one write; rotation treats values as rows turned by angle 0, so that no part is cut off and glued on.

A row's result does not depend on its company. Every product has at least `MIN_ROWS` rows (padding costs nothing
where reading weights is what takes time), which makes rows independent bit for bit; and attention sums over slots
in float64, so that which slots hold the context, and in which order, vanishes when the sum is rounded. What a
speculative step says of a token is then what a plain step says, in bfloat16 too; docs and tests state how far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fullpipe.models.attention import Attention, padded
from fullpipe.models.files import ModelFiles
from fullpipe.models.linear import can_pack
from fullpipe.models.loading import Layer, Loader
from fullpipe.models.pool import MOST_SLOTS, KVPool
from fullpipe.models.step import Step
from fullpipe.models.turning import Turn, Turner, turned


class DecoderSlice:
    """Layers first_layer..last_layer (exclusive; none is fine) of a model, with its weights loaded.

    files: where the weights come from; only this slice's are read.
    dtype: float32 or bfloat16, of weights, hidden states and caches.
    slots: of the cache pool. packed: keep weights in oneDNN's layout; None: where that is possible.

    Raises what reading raises: `DamagedModel`, `UnsupportedModel`.
    """

    def __init__(self, files: ModelFiles, first_layer: int, last_layer: int, *, has_embedding: bool, has_head: bool,
                 dtype: torch.dtype, slots: int = MOST_SLOTS, packed: bool | None = None) -> None:
        assert 0 <= first_layer <= last_layer <= files.config.num_layers
        self.config = files.config
        self.first_layer = first_layer
        self.dtype = dtype
        self.slots = slots
        self.packed = can_pack(dtype) if packed is None else packed
        self._turner = Turner(self.config, dtype)
        self._eps = torch.tensor(self.config.rms_eps, dtype=torch.float32)
        loader = Loader(files, dtype, self.packed)
        with loader:
            self._layers = loader.layers(first_layer, last_layer)
            self._embedding = loader.embedding() if has_embedding else None
            self._head = loader.head(self._embedding) if has_head else None
            self._norm = loader.norm("model.norm.weight") if has_head else None
        self._pool = KVPool(self.config, self.num_layers, slots, dtype)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows had been written there."""
        self._pool.pretend(count)

    @overload
    def forward(self, step: Step) -> Tensor: ...

    @overload
    def forward(self, step: Step, taps: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    @torch.inference_mode()
    def forward(self, step: Step, taps: Sequence[int] = ()) -> Tensor | tuple[Tensor, Tensor]:
        """Run a step through the slice, which takes tokens where it has the embedding.

        taps: after how many layers of the model hidden states are wanted, rising; first_layer < each <= the slice's
        last. What layer b - 1 put out is tap b; no norm is applied.

        Returns hidden states [rows, hidden] in the slice's dtype; with taps also [rows, len(taps), hidden], memory of
        its own. Within a layer all rows write their keys and values before any row attends, so rows of one step may
        be ancestors of each other.
        """
        rows = len(step)
        hidden = step.x if self._embedding is None else F.embedding(step.x, self._embedding)
        if not self._layers or not rows:
            return (hidden, hidden.new_empty(rows, len(taps), self.config.hidden)) if taps else hidden
        step.check(self.slots)
        hidden = padded(hidden)
        turn = self._turner(torch.from_numpy(step.positions), hidden.shape[0])
        slots, attention = torch.from_numpy(step.slots.astype(np.int64)), Attention(self.config, step)
        tapped: list[Tensor] = []
        for index, (layer, cache) in enumerate(zip(self._layers, self._pool.kv)):
            hidden = self._run(layer, cache, hidden, turn, slots, attention)
            if self.first_layer + index + 1 in taps:
                tapped.append(hidden[:rows])
        return (hidden[:rows], torch.stack(tapped, 1)) if taps else hidden[:rows]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [r, hidden] -> float32 [r, vocab]. The slice must have the head."""
        assert self._head is not None and self._norm is not None
        rows, start = hidden.shape[0], 0
        normed = self._normed(padded(hidden), self._norm)
        out = torch.empty(rows, self.config.vocab_size)
        for part in self._head:
            scores = part(normed)
            out[:, start : start + scores.shape[1]] = scores[:rows]
            start += scores.shape[1]
        return out

    def _run(self, layer: Layer, cache: Tensor, hidden: Tensor, turn: Turn, slots: Tensor,
             attention: Attention) -> Tensor:
        normed = self._normed(hidden, layer.attention_norm)
        hidden = hidden + self._attention(layer, cache, normed, turn, slots, attention)
        gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return hidden + layer.down(F.silu(gate).mul_(up))

    def _attention(self, layer: Layer, cache: Tensor, x: Tensor, turn: Turn, slots: Tensor,
                   attention: Attention) -> Tensor:
        heads = self.config.heads
        qkv = layer.qkv(x).view(x.shape[0], -1, self.config.head_dim)
        if layer.qk_norm is not None:
            queries_keys = qkv[:, : len(layer.qk_norm)]
            queries_keys.copy_(self._normed(queries_keys, layer.qk_norm))
        qkv = turned(qkv, turn)
        cache.index_copy_(0, slots, qkv[: len(slots), heads:])
        return layer.out(attention(cache, qkv[:, :heads]).flatten(1))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension, in float32; weight: float32 [..., last dimension], over rows.

        Spelled out because `F.rms_norm` is no single kernel on the CPU either, and takes twice as long.
        """
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (wide * scale).mul_(weight).to(x.dtype)
