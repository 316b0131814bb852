"""The keys and values of one request on one slice of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullpipe.models.config import ModelConfig

# Attention reads slots in runs of this length, so that the shape of its products does not follow every token.
SLOT_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class KVArena:
    """Slots for `capacity` rows in each of some layers. Slots are written once per owner and never moved.

    kv: [layers, 2 * kv_heads, room, head_dim]; the first kv_heads are keys. `room` is capacity rounded up to
        a multiple of `SLOT_MULTIPLE`; what lies beyond capacity stays zero.
    """

    kv: Tensor
    capacity: int

    @classmethod
    def allocate(cls, config: ModelConfig, layers: int, capacity: int, dtype: torch.dtype) -> KVArena:
        """An empty arena. Zeros, not garbage: a masked slot has weight 0, and 0 x NaN would be NaN.

        The system hands out zero pages when they are first written, so unused slots cost no memory.
        """
        assert capacity > 0
        room = -(-capacity // SLOT_MULTIPLE) * SLOT_MULTIPLE
        return cls(torch.zeros(layers, 2 * config.kv_heads, room, config.head_dim, dtype=dtype), capacity)

    def enlarged(self, capacity: int, used: int) -> KVArena:
        """An arena for `capacity` rows, at least as many as in this one, with what stands in the first `used` slots of
        it. Where there is room already it is the same memory."""
        assert capacity >= self.capacity >= used
        layers, heads, room, width = self.kv.shape
        if capacity <= room:
            return KVArena(self.kv, capacity)
        more = -(-capacity // SLOT_MULTIPLE) * SLOT_MULTIPLE
        kv = torch.zeros(layers, heads, more, width, dtype=self.kv.dtype)
        kv[:, :, :used] = self.kv[:, :, :used]  # and no more: slots that nobody has touched go on costing no memory
        return KVArena(kv, capacity)

    def begin_with(self, other: KVArena, slots: Tensor) -> None:
        """Copy the rows of another arena's slots, of all layers, to slots 0, 1, ... slots: int64 [r], r <= capacity."""
        self.kv[:, :, : len(slots)] = other.kv.index_select(2, slots)

    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows of positions 0, 1, ... had been written there."""
        self.kv[:, :, :count].normal_(generator=torch.Generator().manual_seed(count))

    @property
    def nbytes(self) -> int:
        """Bytes when every slot is in use."""
        return self.kv.nbytes

    def keys(self, layer: int) -> Tensor:
        """[kv_heads, room, head_dim], a view."""
        return self.kv[layer, : self.kv.shape[1] // 2]

    def values(self, layer: int) -> Tensor:
        """[kv_heads, room, head_dim], a view."""
        return self.kv[layer, self.kv.shape[1] // 2 :]


class Writes:
    """Puts the rows of a step into the slots of their requests, layer by layer.

    arenas, slots: of each request; slots int64 [its rows], distinct.
    """

    def __init__(self, arenas: Sequence[KVArena], slots: Sequence[Tensor]) -> None:
        self._sizes, self._slots = [len(one) for one in slots], slots
        self._layers = list(zip(*(arena.kv.unbind() for arena in arenas)))

    def __call__(self, layer: int, kv: Tensor) -> None:
        """kv: [rows of all requests, or more, 2 * kv_heads, head_dim], keys first."""
        pieces = torch.split(kv[: sum(self._sizes)].transpose(0, 1), self._sizes, 1)
        for arena, slots, piece in zip(self._layers[layer], self._slots, pieces):
            arena.index_copy_(1, slots, piece)
