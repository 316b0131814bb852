"""A slice computed by the native kernels: quantised weights stay quantised, and a step is one call.

Hidden states are float32, so that where the model is cut changes nothing; the cache is float16, or what is asked for. A
row's bits depend on its tokens alone: see `kernels/native.h` and, for attention, `between.h`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.kernels import CacheKind, Kernels, Model, Weight
from fullpipe.kernels import Step as NativeStep
from fullpipe.models.config import ModelConfig
from fullpipe.models.dtypes import STORED
from fullpipe.models.files import ModelFiles
from fullpipe.models.native.weights import NativeWeights
from fullpipe.models.pool import MOST_SLOTS, empty
from fullpipe.models.step import Step
from fullpipe.options import BLOCK

_FLOATS = {CacheKind.FLOAT32: torch.float32, CacheKind.FLOAT16: torch.float16}
_ANGLES = 512  # positions whose angles are computed at a time


def padded_head(config: ModelConfig) -> int:
    """Numbers of a head in a cache."""
    return -(-config.head_dim // 16) * 16


def slot_bytes(native: Kernels, config: ModelConfig, cache: str) -> int:
    """Bytes of a slot in one layer of a cache of this kind."""
    return 2 * config.kv_heads * native.cached_bytes(CacheKind[cache.upper()], padded_head(config))


class NativeSlice:
    """Layers first_layer..last_layer (exclusive; none is fine) of a model, with its weights loaded.

    files: where the weights come from; only this slice's are read.
    slots: of the cache pool. cache: "float16", "float32" or "int8", of keys and values. dtype: "stored", or "int8" or
    "int4" for weights that are not yet quantised.

    One step at a time; with as many threads as torch is told to use. Raises what reading raises: `DamagedModel`,
    `UnsupportedModel`.
    """

    def __init__(self, native: Kernels, files: ModelFiles, first_layer: int, last_layer: int, *, has_embedding: bool,
                 has_head: bool, slots: int = MOST_SLOTS, cache: str = "float16", dtype: str = STORED) -> None:
        assert 0 <= first_layer <= last_layer <= files.config.num_layers
        self.config, self.first_layer = files.config, first_layer
        self._native, self.slots = native, slots
        self._weights = NativeWeights.read(native, files, first_layer, last_layer, has_embedding=has_embedding,
                                           has_head=has_head, dtype=dtype)
        self._angles = _Angles(self.config)
        self.cache = CacheKind[cache.upper()]
        self._kv = empty((-(-slots // BLOCK), self.num_layers, 2 * self.config.kv_heads, BLOCK,
                          native.cached_bytes(self.cache, padded_head(self.config))), torch.uint8)
        self._model = self._described()

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self._native.release(self._model)

    @property
    def num_layers(self) -> int:
        return len(self._weights.layers)

    @property
    def nbytes(self) -> int:
        """Of the matrices, as they lie in memory."""
        return self._weights.nbytes

    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows had been written there."""
        part, size = self._kv[: -(-count // BLOCK)], padded_head(self.config)
        noise = torch.zeros(*part.shape[:-1], size).normal_(generator=torch.Generator().manual_seed(count))
        if self.cache in _FLOATS:
            part.view(_FLOATS[self.cache])[...] = noise
            return
        part[..., :size].view(torch.int8)[...] = (noise * 32).round().clamp(-127, 127)
        part.view(torch.float32)[..., size // 4] = 1 / 32

    @overload
    def forward(self, step: Step) -> Tensor: ...

    @overload
    def forward(self, step: Step, taps: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    @torch.inference_mode()
    def forward(self, step: Step, taps: Sequence[int] = ()) -> Tensor | tuple[Tensor, Tensor]:
        """See `DecoderSlice.forward`; hidden states are float32."""
        table = self._weights.embedding
        hidden = (step.x.to(torch.float32, copy=True).contiguous() if table is None else
                  self._looked_up(table, step.x))
        tapped = torch.empty(len(step), len(taps), self.config.hidden)
        if self.num_layers and len(step):
            self._run(step, hidden, taps, tapped)
        return (hidden, tapped) if taps else hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [r, hidden] -> float32 [r, vocab]. The slice must have the head."""
        head, norm = self._weights.head, self._weights.norm
        assert head is not None and norm is not None
        hidden, out = hidden.float().contiguous(), torch.empty(len(hidden), self.config.vocab_size)
        self._native.logits(head, norm.data_ptr(), self.config.rms_eps, hidden.data_ptr(), len(hidden), out.data_ptr(),
                            torch.get_num_threads())
        return out

    def _run(self, step: Step, hidden: Tensor, taps: Sequence[int], tapped: Tensor) -> None:
        assert hidden.shape == (len(step), self.config.hidden)
        self._angles.reach(int(step.positions.max()))
        self._model.cosine, self._model.sine = self._angles.addresses
        self._model.angles = len(self._angles)
        arrays = [np.ascontiguousarray(one, kind) for one, kind in (
            (step.positions, np.int64), (step.slots, np.int32), (step.reads, np.int32), (step.spans, np.int64))]
        described = NativeStep(len(step), len(step.reads), *(one.ctypes.data for one in arrays))
        self._native.run(self._model, described, hidden.data_ptr(), tuple(tap - self.first_layer for tap in taps),
                         tapped.data_ptr(), torch.get_num_threads())

    def _looked_up(self, table: Weight, tokens: Tensor) -> Tensor:
        assert not len(tokens) or (tokens.min() >= 0 and tokens.max() < self.config.vocab_size)
        tokens, out = tokens.contiguous(), torch.empty(len(tokens), self.config.hidden)
        self._native.look_up(table, tokens.data_ptr(), len(tokens), out.data_ptr())
        return out

    def _described(self) -> Model:
        config = self.config
        return Model(layers=self.num_layers, hidden=config.hidden, heads=config.heads, kv_heads=config.kv_heads,
                     head_dim=config.head_dim, size=padded_head(config), intermediate=config.intermediate,
                     kind=self.cache, eps=config.rms_eps, layer=self._weights.layers,
                     cache=self._kv.data_ptr(), slots=self.slots)


class _Angles:
    """Cosine and sine of the rotary embedding, of positions 0, 1, ... as far as they were asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self._rope = config.rope
        self._frequencies = np.array(self._rope.inv_freq, np.float32)
        self._tables = [np.empty((0, len(self._frequencies)), np.float32) for _ in range(2)]

    def __len__(self) -> int:
        return len(self._tables[0])

    @property
    def addresses(self) -> tuple[int, int]:
        cosine, sine = self._tables
        return cosine.ctypes.data, sine.ctypes.data

    def reach(self, position: int) -> None:
        """Have the angles of this position and all before it. What is there is not computed anew, and what is not in
        runs of one length: a position has the same bits whenever it is asked for."""
        while len(self._tables[0]) <= position:
            self._tables = [np.concatenate(pair) for pair in zip(self._tables, self._more(len(self._tables[0])))]

    def _more(self, first: int) -> list[NDArray[np.float32]]:
        angles = np.arange(first, first + _ANGLES, dtype=np.float32)[:, None] * self._frequencies
        factor = self._rope.attention_factor
        return [(turn(angles.astype(np.float64)) * factor).astype(np.float32) for turn in (np.cos, np.sin)]
