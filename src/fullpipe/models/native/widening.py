"""Block formats without a kernel of their own, told in one that has: the same numbers in more bits.

Each function takes raw blocks, uint8 [blocks, bytes per block], and returns those of a wider format.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import IQ4_NL, MXFP4
from torch import Tensor

from fullpipe.errors import UnsupportedModel
from fullpipe.kernels import Form


def _shifted(raw: Tensor, *by: int) -> Tensor:
    """uint8 [blocks, n] -> [blocks, number of shifts, n]."""
    return raw[:, None, :] >> torch.tensor(by, dtype=torch.uint8)[:, None]


def _q3_k_as_q6_k(raw: Tensor) -> Tensor:
    """Three bits less four, in runs of 16 with a scale of six bits less 32: all of it has room in a Q6_K."""
    low = _shifted(raw[:, 32:96].reshape(-1, 32), 0, 2, 4, 6).view(-1, 8, 32) & 3
    high = _shifted(raw[:, :32], *range(8)) & 1
    first, above = _shifted(raw[:, 96:104], 0, 4).flatten(1), _shifted(raw[:, 104:108], 0, 2, 4, 6).flatten(1)
    scales = (first & 15) | (above & 3) << 4
    return _q6_k(low + (high << 2) + (32 - 4), scales - 32, raw[:, 108:110])


def _q6_k(numbers: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """numbers: uint8 [blocks, 8, 32], of 0..63, 32 stands for 0. scales: [blocks, 16], signed bytes. d: halves."""
    halves = numbers.view(-1, 2, 4, 32)
    low, high = halves & 15, halves >> 4
    packed = torch.cat((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), -1)
    top = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat((packed.flatten(1), top.flatten(1), scales, d), 1)


def _q8_0(table: tuple[int, ...], packed: Tensor, d: Tensor) -> Tensor:
    """Numbers of a table, two in a byte. d: halves [blocks, 1], as bytes [blocks, 2]."""
    which = torch.cat((packed & 15, packed >> 4), 1).long()
    return torch.cat((d, torch.tensor(table, dtype=torch.int8)[which].view(torch.uint8)), 1)


def _iq4_nl_as_q8_0(raw: Tensor) -> Tensor:
    return _q8_0(IQ4_NL.kvalues, raw[:, 2:], raw[:, :2])


def _mxfp4_as_q8_0(raw: Tensor) -> Tensor:
    """The scale is a power of two, which a half can hold from 2^-24 to 2^15."""
    exponents = raw[:, :1].int() - 128
    if (raw[:, 1:] != 0).any(1, keepdim=True).logical_and((exponents < -24) | (exponents > 15)).any():
        raise UnsupportedModel("a tensor of the type MXFP4 has scales beyond those of half precision",
                               hint="Use `dtype=bfloat16`.")
    d = torch.exp2(exponents.clamp(-24, 15).float()).half()
    return _q8_0(MXFP4.kvalues, raw[:, 1:], d.view(torch.uint8))


WIDENED: dict[Kind, tuple[Form, Callable[[Tensor], Tensor]]] = {
    Kind.Q3_K: (Form.Q6_K, _q3_k_as_q6_k), Kind.IQ4_NL: (Form.Q8_0, _iq4_nl_as_q8_0),
    Kind.MXFP4: (Form.Q8_0, _mxfp4_as_q8_0)}
"""Format, form in which it is kept, and how it gets there."""
