"""The keys and values of one request, and which position stands in each slot: attention goes by positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.models.arena import SLOT_MULTIPLE, KVArena
from fullpipe.models.config import ModelConfig

NOTHING = -1


def padded_head(config: ModelConfig) -> int:
    """Numbers of a head in a cache."""
    return -(-config.head_dim // 16) * 16


@dataclass(frozen=True, slots=True)
class NativeArena:
    """Slots for rows of one request in each layer of a slice.

    kv: see `KVArena`; heads are filled up with zeros to a multiple of 16 numbers. standing: int32 [capacity], the
    position of what was written last into each slot, or `NOTHING`.
    """

    kv: KVArena
    standing: NDArray[np.int32]

    @classmethod
    def allocate(cls, config: ModelConfig, layers: int, capacity: int, dtype: torch.dtype) -> NativeArena:
        """An empty arena; slots that are never written cost no memory."""
        room = -(-capacity // SLOT_MULTIPLE) * SLOT_MULTIPLE
        kv = torch.zeros(layers, 2 * config.kv_heads, room, padded_head(config), dtype=dtype)
        return cls._of(KVArena(kv, capacity))

    @classmethod
    def _of(cls, kv: KVArena) -> NativeArena:
        return cls(kv, np.full(kv.capacity, NOTHING, np.int32))

    @property
    def capacity(self) -> int:
        return self.kv.capacity

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def enlarged(self, capacity: int, used: int) -> NativeArena:
        """See `KVArena.enlarged`."""
        more = NativeArena._of(self.kv.enlarged(capacity, used))
        more.standing[: len(self.standing)] = self.standing
        return more

    def begin_with(self, other: NativeArena, slots: Tensor) -> None:
        """See `KVArena.begin_with`."""
        self.kv.begin_with(other.kv, slots)
        self.standing[: len(slots)] = other.standing[slots.numpy()]

    def pretend(self, count: int) -> None:
        """See `KVArena.pretend`."""
        noise = torch.zeros(self.kv.kv[:, :, :count].shape).normal_(generator=torch.Generator().manual_seed(count))
        self.kv.kv[:, :, :count] = noise
        self.standing[:count] = np.arange(count)
