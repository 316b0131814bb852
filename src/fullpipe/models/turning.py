"""Rows are rotated here: the positions of a step become cosines and sines, and these turn its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fullpipe.models.config import ModelConfig
from fullpipe.models.rope import Rope


@dataclass(slots=True)
class Turn:
    """Rotation of a step's rows, for query, key and value heads alike: [rows, heads + 2 * kv_heads, head_dim].

    sine: negative in the first half of a head.
    """

    cosine: Tensor
    sine: Tensor


def turned(qkv: Tensor, turn: Turn) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2)."""
    return torch.addcmul(qkv * turn.cosine, torch.roll(qkv, qkv.shape[-1] // 2, -1), turn.sine)


class Turner:
    """Makes the `Turn` of a step."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._rope: Rope = config.rope
        self._frequencies = torch.tensor(config.rope.inv_freq, dtype=torch.float32)
        self._turning, self._still = config.heads + config.kv_heads, config.kv_heads
        self._dtype = dtype

    def __call__(self, positions: Tensor, rows: int) -> Turn:
        angles = F.pad(positions, (0, rows - len(positions))).float()[:, None] * self._frequencies
        cosine, sine = angles.cos() * self._rope.attention_factor, angles.sin() * self._rope.attention_factor
        return Turn(self._spread(torch.cat((cosine, cosine), -1), 1.0),
                    self._spread(torch.cat((-sine, sine), -1), 0.0))

    def _spread(self, table: Tensor, still: float) -> Tensor:
        """[rows, head_dim] -> [rows, heads + 2 * kv_heads, head_dim], `still` for the value heads."""
        rows, size = table.shape
        out = torch.full((rows, self._turning + self._still, size), still, dtype=self._dtype)
        out[:, : self._turning] = table[:, None]
        return out
