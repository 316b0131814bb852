"""How many slots the pool of cache memory of a slice has.

Rows are written once and never moved. Who has which slot the engine decides, for all stations alike.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fullpipe.errors import UsageError
from fullpipe.models.config import ModelConfig
from fullpipe.options import BLOCK

MOST_SLOTS = 1 << 17
"""Of a pool whose size nobody has said, which also takes no more than a quarter of what is free."""

LEAST_BLOCKS = 8
"""Of a pool whose size nobody has said, however little is free."""


def slots_for(slot_bytes: int, pool_bytes: int | None, free: int) -> int:
    """How many slots a pool has, in whole blocks.

    slot_bytes: of a slot in all layers of a slice; 0, of a slice without layers, means that slots take no memory.
    pool_bytes: what was asked for; None: by what is free, in bytes.

    Raises UsageError where what was asked for is not free, or too small for a block.
    """
    if not slot_bytes:
        return MOST_SLOTS
    block_bytes, free = slot_bytes * BLOCK, max(free, 0)
    if pool_bytes is None:
        return max(min(MOST_SLOTS // BLOCK, free // 4 // block_bytes), LEAST_BLOCKS) * BLOCK
    if free < block_bytes:
        raise UsageError(f"the weights leave {free >> 20} MiB, which is no room for a cache", param="kv_pool_mib",
                         hint="Cut the model over more `stages` on more machines, or use a smaller one.")
    if pool_bytes > free:
        raise UsageError(f"a cache pool of {pool_bytes >> 20} MiB does not fit: {free >> 20} MiB are free beside the "
                         "weights", param="kv_pool_mib",
                         hint=f"Give `kv_pool_mib={free >> 20}` at most, or cut the model over more `stages`.")
    if pool_bytes < block_bytes:
        least = -(-block_bytes // (1 << 20))
        raise UsageError(f"a cache pool of {pool_bytes >> 20} MiB has no room for a block of {BLOCK} tokens, which "
                         f"takes {least} MiB", param="kv_pool_mib", hint=f"Give `kv_pool_mib={least}` or more.")
    return pool_bytes // block_bytes * BLOCK


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros. The system hands out its pages when they are first written, so what nobody uses costs nothing.

    Zeros, not garbage: a slot that is read with weight 0 must not be NaN.
    """
    if not (count := math.prod(shape)):
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class KVPool:
    """Holds the cache of a `DecoderSlice`. kv: [layers, slots, 2 * kv_heads, head_dim], keys first."""

    def __init__(self, config: ModelConfig, layers: int, slots: int, dtype: torch.dtype) -> None:
        self.kv = empty((layers, slots, 2 * config.kv_heads, config.head_dim), dtype)

    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows had been written there."""
        self.kv[:, :count].normal_(generator=torch.Generator().manual_seed(count))
