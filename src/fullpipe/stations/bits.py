"""Which tokens may follow a path, a bit for each: eight tokens in a byte, the lowest bit first."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.kernels import load as load_kernels

Bits = NDArray[np.uint8]
"""uint8 [tokens / 8, rounded up]. Tokens that it has no bit for may not follow."""


def bits_of(allowed: NDArray[np.bool_]) -> Bits:
    return np.packbits(allowed, bitorder="little")


def bools_of(bits: Bits) -> NDArray[np.bool_]:
    return np.unpackbits(bits, bitorder="little").view(np.bool_)


def put(bits: Bits, tokens: Collection[int], value: bool) -> None:
    """Say of some tokens whether they may follow; those without a bit are left out."""
    for token in tokens:
        if token < 8 * len(bits):
            bits[token >> 3] = bits[token >> 3] & (255 ^ 1 << (token & 7)) | value << (token & 7)


def has_any(bits: Bits, tokens: Collection[int]) -> bool:
    """Whether one of them may follow."""
    return any(token < 8 * len(bits) and bits[token >> 3] >> (token & 7) & 1 for token in tokens)


def both(one: Bits | None, other: Bits | None) -> Bits | None:
    """What may follow by either; None: all may."""
    if one is None or other is None:
        return other if one is None else one
    count = min(len(one), len(other))
    return one[:count] & other[:count]


def mask(given: Tensor, bits: Bits, out: Tensor) -> bool:
    """Put logits into `out`, -inf for tokens that may not follow; whether anything is left.

    given, out: float32 [vocab] in the host's memory, each in one piece.
    """
    if (kernels := load_kernels()) is None:
        return mask_slowly(given, bits, out)
    return kernels.masked(given.data_ptr(), len(given), bits.ctypes.data, 8 * len(bits), out.data_ptr())


def mask_slowly(given: Tensor, bits: Bits, out: Tensor) -> bool:
    """What `mask` does, where the kernels were not built."""
    known = min(len(given), 8 * len(bits))
    scores = out.numpy()
    scores[:known] = np.where(bools_of(bits)[:known], given.numpy()[:known], np.float32(-np.inf))
    scores[known:] = -math.inf
    return bool((scores != -math.inf).any())
