"""Dequantisers for the block formats of GGUF: bytes in, float32 out, equal to `gguf.quants` bit for bit.

A block is a run of 32 or 256 numbers of one row that share scales. Each function takes the raw blocks,
uint8 [blocks, bytes per block], and returns float32 [blocks, numbers per block]. The formats that common
files use are vectorised here (several times faster than the package's NumPy); the rest falls back to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from torch import Tensor

from fullpipe.errors import UnsupportedModel


def block_shape(kind: Kind) -> tuple[int, int]:
    """Numbers and bytes of one block."""
    numbers, size = GGML_QUANT_SIZES[kind]
    return int(numbers), int(size)


def dequantise(raw: Tensor, kind: Kind) -> Tensor:
    """uint8 [blocks, bytes per block] -> float32 [blocks, numbers per block].

    Raises `UnsupportedModel` for a format that neither we nor the `gguf` package can read.
    """
    if kind in _FAST:
        return _FAST[kind](raw)
    try:
        return torch.from_numpy(dequantize(raw.numpy(), kind)).view(raw.shape[0], -1)
    except NotImplementedError as error:
        raise UnsupportedModel(f"tensors of the GGUF type {kind.name} cannot be read",
                               hint="Use a file of type Q4_K_M, Q8_0, F16 or BF16.") from error


def _half(raw: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, as float32 [blocks, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2, n]: the low halves, then the high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _bits32(raw: Tensor, at: int) -> Tensor:
    """The 32 bits at byte `at` of every block, one per number: uint8 [blocks, 32] of 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((raw[:, at : at + 4, None] >> shifts & 1) << 4).flatten(1)


def _q4_0(raw: Tensor) -> Tensor:
    return (_nibbles(raw[:, 2:18]).flatten(1).float() - 8) * _half(raw, 0)


def _q4_1(raw: Tensor) -> Tensor:
    return _nibbles(raw[:, 4:20]).flatten(1).float().mul_(_half(raw, 0)).add_(_half(raw, 2))


def _q5_0(raw: Tensor) -> Tensor:
    quants = _nibbles(raw[:, 6:22]).flatten(1) | _bits32(raw, 2)
    return quants.float().sub_(16).mul_(_half(raw, 0))


def _q5_1(raw: Tensor) -> Tensor:
    quants = _nibbles(raw[:, 8:24]).flatten(1) | _bits32(raw, 4)
    return quants.float().mul_(_half(raw, 0)).add_(_half(raw, 2))


def _q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:34].view(torch.int8).float().mul_(_half(raw, 0))


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight runs of 32 in a K block, float32 [blocks, 8, 1] each.

    Twelve bytes at 4 hold sixteen 6-bit numbers: the first four of each whole, of the others four bits
    here and two in the top of the first ones.
    """
    first, second, rest = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1)
    return (scales.float() * _half(raw, 0))[..., None], (minima.float() * _half(raw, 2))[..., None]


def _q4_k(raw: Tensor) -> Tensor:
    scales, minima = _k_scales(raw)
    quants = _nibbles(raw[:, 16:144].view(-1, 4, 32)).reshape(-1, 8, 32)
    return quants.float().mul_(scales).sub_(minima).flatten(1)


def _q5_k(raw: Tensor) -> Tensor:
    scales, minima = _k_scales(raw)
    low = _nibbles(raw[:, 48:176].view(-1, 4, 32)).reshape(-1, 8, 32)
    high = raw[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return (low | (high << 4)).float().mul_(scales).sub_(minima).flatten(1)


def _q6_k(raw: Tensor) -> Tensor:
    low = _nibbles(raw[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = raw[:, 128:192].view(-1, 2, 1, 32) >> shifts & 3
    scales = raw[:, 192:208].view(torch.int8).float().mul_(_half(raw, 208))
    quants = (low | (high << 4)).view(-1, 16, 16).float().sub_(32)
    return quants.mul_(scales[..., None]).flatten(1)


def _f16(raw: Tensor) -> Tensor:
    return raw.view(torch.float16).float()


def _bf16(raw: Tensor) -> Tensor:
    return raw.view(torch.bfloat16).float()


def _f32(raw: Tensor) -> Tensor:
    return raw.view(torch.float32)


_FAST: dict[Kind, Callable[[Tensor], Tensor]] = {
    Kind.F32: _f32, Kind.F16: _f16, Kind.BF16: _bf16, Kind.Q4_0: _q4_0, Kind.Q4_1: _q4_1, Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1, Kind.Q8_0: _q8_0, Kind.Q4_K: _q4_k, Kind.Q5_K: _q5_k, Kind.Q6_K: _q6_k,
}
