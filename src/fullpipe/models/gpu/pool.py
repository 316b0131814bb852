"""Cache memory on a device is one pool, taken at the start. Rows are written once and never moved."""

from __future__ import annotations

import torch

from fullpipe.models.config import ModelConfig
from fullpipe.options import BLOCK

SCRATCH = BLOCK
"""Places before the first slot: rows that only fill a bucket up write there."""


class Pool:
    """All cache memory of a slice.

    kv: [layers, 2 * kv_heads, SCRATCH + slots, head_dim]; the first kv_heads are keys. Zeros at first: what nobody has
    written is read with weight 0, and 0 x NaN would be NaN.
    """

    def __init__(self, config: ModelConfig, layers: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kv = torch.zeros(layers, 2 * config.kv_heads, SCRATCH + slots, config.head_dim, dtype=dtype, device=device)

    @torch.inference_mode()
    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows had been written there."""
        self.kv[:, :, SCRATCH : SCRATCH + count].normal_()
