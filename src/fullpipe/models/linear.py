"""`y = x W^T + b` for few rows: weights packed once for oneDNN where that is possible, else `F.linear`.

A decode step is bound by reading weights. Plain `F.linear` lets oneDNN reorder bfloat16 weights on every call
(8-11 GB/s on the development machine); packed once, the same kernel reads 16-24 GB/s at one to eight rows.

Both kinds give a row the same bits whatever other rows are in the call, provided there are at least
`MIN_ROWS` (below that, other kernels with another order of summation are chosen). `DecoderSlice` pads to
it; a step of four rows costs what a step of one costs.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 4

# Rows that oneDNN is told to expect when it chooses the layout of a packed weight.
_ROWS_HINT = 8


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of this dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        weight = torch.ones(16, 16, dtype=dtype)
        out = _apply_packed(weight[:MIN_ROWS], _pack(weight), None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((out == 16).all())


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    return packed


def _apply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


class Linear:
    """One matrix product. Takes ownership of its weight; call it on [rows, in] to get [rows, out].

    weight: [out, in]. bias: [out] or None, of the same dtype.
    """

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, *, packed: bool) -> None:
        self._weight = _pack(weight) if packed else weight
        self._bias = bias
        self._packed = packed

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return _apply_packed(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)

    def to(self, device: torch.device) -> Linear:
        """The same on another device; of a weight that is not packed."""
        assert not self._packed
        bias = None if self._bias is None else self._bias.to(device)
        return Linear(self._weight.to(device), bias, packed=False)

    @property
    def weight(self) -> Tensor:
        """[out, in], where it is not packed."""
        assert not self._packed
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        return self._bias
