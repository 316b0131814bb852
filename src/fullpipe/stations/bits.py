"""Which tokens may follow a path, a bit for each: eight tokens in a byte, the lowest bit first. No torch."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fullpipe.kernels import load as load_kernels

Floats = NDArray[np.float32]
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


def mask(given: Floats, bits: Bits, out: Floats) -> bool:
    """Put logits into `out`, -inf for tokens that may not follow; whether anything is left.

    given, out: float32 [vocab], each in one piece.
    """
    assert given.dtype == out.dtype == np.float32 and given.flags.c_contiguous and out.flags.c_contiguous
    if (kernels := load_kernels()) is None:
        return mask_slowly(given, bits, out)
    return kernels.masked(given.ctypes.data, len(given), bits.ctypes.data, 8 * len(bits), out.ctypes.data)


def mask_slowly(given: Floats, bits: Bits, out: Floats) -> bool:
    """What `mask` does, where the kernels were not built."""
    known = min(len(given), 8 * len(bits))
    out[:known] = np.where(bools_of(bits)[:known], given[:known], np.float32(-np.inf))
    out[known:] = -np.inf
    return bool((out != -np.inf).any())
