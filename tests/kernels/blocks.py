"""Random weights in every form, as a file stores them, and in tiles."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from numpy.typing import NDArray

from fullpipe.kernels import Form, Kernels, Weight
from fullpipe.models.dequant import block_shape

# Bytes at which a block has its half-precision numbers.
_HALVES = {Form.Q4_0: (0,), Form.Q4_1: (0, 2), Form.Q5_0: (0,), Form.Q5_1: (0, 2), Form.Q8_0: (0,), Form.Q4_K: (0, 2),
           Form.Q5_K: (0, 2), Form.Q6_K: (208,)}
_FLOATS = {Form.F32: torch.float32, Form.F16: torch.float16, Form.BF16: torch.bfloat16}


def stored(form: Form, outputs: int, inputs: int, seed: int = 0) -> NDArray[np.uint8]:
    """Rows as a file has them, uint8 [outputs, bytes of a row]; any bits in the blocks, scales about 0.01."""
    rng = np.random.default_rng(seed)
    if form.is_float:
        numbers = torch.from_numpy(rng.normal(0, 0.1, (outputs, inputs)))
        return numbers.to(_FLOATS[form]).view(torch.uint8).numpy()
    numbers_of, size = block_shape(Kind[form.name])
    blocks = rng.integers(0, 256, (outputs * inputs // numbers_of, size), dtype=np.uint8)
    for at in _HALVES[form]:
        blocks[:, at : at + 2] = rng.normal(0, 0.01, len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(outputs, -1)


def dequantised(form: Form, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the gguf package makes of them, float32 [outputs, inputs]."""
    if form.is_float:
        return torch.from_numpy(raw).view(_FLOATS[form]).float().numpy()
    return dequantize(raw, Kind[form.name])


@dataclass
class Tiles:
    """A weight and the memory that it lies in."""

    weight: Weight
    memory: ctypes.Array[ctypes.c_char]
    bias: NDArray[np.float32] | None


def tiles(native: Kernels, form: Form, raw: NDArray[np.uint8], inputs: int, *, step: int = 1 << 30,
          bias: NDArray[np.float32] | None = None) -> Tiles:
    """Repack rows, `step` of them at a time."""
    numbers, scales = native.sizes(form, len(raw), inputs)
    memory = ctypes.create_string_buffer(numbers + scales + 64)
    start = -(-ctypes.addressof(memory) // 64) * 64
    weight = Weight(form, len(raw), inputs, start, start + numbers, None if bias is None else bias.ctypes.data)
    for first in range(0, len(raw), step):
        part = np.ascontiguousarray(raw[first : first + step])
        assert native.repack(weight, first, len(part), part.ctypes.data)
    return Tiles(weight, memory, bias)


def product(native: Kernels, weight: Weight, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
    x, out = np.ascontiguousarray(x), np.empty((len(x), weight.outputs), np.float32)
    native.product(weight, x.ctypes.data, len(x), out.ctypes.data, threads)
    return out


def looked_up(native: Kernels, weight: Weight) -> NDArray[np.float32]:
    which, out = np.arange(weight.outputs), np.empty((weight.outputs, weight.inputs), np.float32)
    native.look_up(weight, which.ctypes.data, len(which), out.ctypes.data)
    return out


def quantised(native: Kernels, x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 like x, and float32 [numbers of x / 32]."""
    x = np.ascontiguousarray(x)
    q, scales = np.empty(x.shape, np.int8), np.empty(x.size // 32, np.float32)
    native.quantised(x.ctypes.data, x.size, q.ctypes.data, scales.ctypes.data)
    return q, scales
