"""Cache memory on a device is one pool, taken at the start: blocks of slots, which arenas own and give back.

Rows are written once and never moved; an arena that grows takes another block. A slot of an arena is an index that all
stations share; its place is where it lies in this pool.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.errors import UsageError
from fullpipe.models.config import ModelConfig

BLOCK = 256
"""Slots of a block."""

SCRATCH = 0
"""The block that nobody owns: rows that only fill a bucket up write there."""


class Pool:
    """All cache memory of a slice.

    kv: [layers, 2 * kv_heads, places, head_dim]; the first kv_heads are keys. Zeros at first: what nobody has written
    is read with weight 0, and 0 x NaN would be NaN.
    """

    def __init__(self, config: ModelConfig, layers: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """slots: room for so many at least, the scratch block not counted."""
        blocks = max(1, -(-slots // BLOCK))
        self.kv = torch.zeros(layers, 2 * config.kv_heads, (blocks + 1) * BLOCK, config.head_dim, dtype=dtype,
                              device=device)
        self._free = list(range(blocks, SCRATCH, -1))
        self._slots = blocks * BLOCK

    @property
    def num_free(self) -> int:
        """Slots in blocks that nobody owns."""
        return len(self._free) * BLOCK

    def take(self, blocks: int) -> list[int]:
        """Numbers of blocks that are the caller's now. Raises UsageError when there are not as many."""
        if blocks > len(self._free):
            raise UsageError(
                f"the pool of {self._slots} cache slots on the device is full: {self.num_free} are free, "
                f"{blocks * BLOCK} more are needed", param="kv_pool_mib",
                hint="Give a larger `kv_pool_mib`, or let requests wait for room by a smaller `kv_cache_tokens` or "
                     "`max_num_seqs`.")
        return [self._free.pop() for _ in range(blocks)]  # one by one: an arena may be let go of at any moment

    def give(self, blocks: list[int]) -> None:
        """Take blocks back."""
        self._free += blocks[::-1]


class DeviceArena:
    """Slots of one request in a pool. Whoever lets go of it gives its blocks back.

    positions: int64 [room], on the host: where the row in each slot stands in its text.
    places: int32 [room]: where each slot lies in the pool.
    """

    def __init__(self, pool: Pool, capacity: int) -> None:
        self._pool, self._blocks = pool, list[int]()
        self.capacity = 0
        self.positions = np.zeros(0, np.int64)
        self.places: NDArray[np.int32] = np.zeros(0, np.int32)
        self._grow(capacity)

    def enlarged(self, capacity: int, used: int) -> DeviceArena:
        """This arena, with room for `capacity` rows. Raises UsageError when the pool has no more."""
        assert capacity >= self.capacity >= used
        self._grow(capacity)
        return self

    @torch.inference_mode()
    def begin_with(self, other: DeviceArena, slots: Tensor) -> None:
        """Copy the rows of another arena's slots, of all layers, to slots 0, 1, ... slots: int64 [r], r <= capacity."""
        count, theirs, kv = len(slots), slots.numpy(), self._pool.kv
        self.positions[:count] = other.positions[theirs]
        source, target = (torch.from_numpy(places.astype(np.int64)).to(kv.device)
                          for places in (other.places[theirs], self.places[:count]))
        for layer in kv:  # the copy in between takes no more room than it must
            layer.index_copy_(1, target, layer.index_select(1, source))

    @torch.inference_mode()
    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows of positions 0, 1, ... had been written there."""
        self.positions[:count] = range(count)
        kv, places = self._pool.kv, torch.from_numpy(self.places[:count].astype(np.int64)).to(self._pool.kv.device)
        kv.index_copy_(2, places, torch.randn_like(kv[:, :, :count]))

    def _grow(self, capacity: int) -> None:
        more = self._pool.take(-(-capacity // BLOCK) - len(self._blocks))
        self._blocks += more
        places = (np.asarray(more, np.int32)[:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).ravel()
        self.places = np.concatenate((self.places, places))
        self.positions = np.pad(self.positions, (0, len(places)))
        self.capacity = capacity

    def __del__(self) -> None:
        self._pool.give(self._blocks)
