"""Weights of a slice in the blocks that their file stores, or quantised while they are read, in tiles for the native
kernels.

All lie in one region of memory in huge pages: read through small ones, as every step does, they take twice as long.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fullpipe.errors import UnsupportedModel
from fullpipe.kernels import Form, Kernels, Layer, Weight
from fullpipe.models.config import ModelConfig
from fullpipe.models.dequant import block_shape
from fullpipe.models.dtypes import STORED
from fullpipe.models.files import ModelFiles
from fullpipe.models.forms import kept_tensor
from fullpipe.models.native.widening import WIDENED

_LOG = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20
# Memory that could be shared with other processes, as Python's mmap makes it where nothing is said, gets huge pages by
# another setting (shmem_enabled), which says never nearly everywhere.
_OWN = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LINE = 64  # words of tiles begin at multiples of it
_READ_BYTES = 1 << 22  # of a file at a time, for each thread
_CHANNELS = 16
_GREATEST = torch.finfo(torch.float16).max  # scales and minima of blocks are of that type

# Names of a layer's products in the order of `Layer`'s fields.
_MATRICES = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
             "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
          "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight that is to be read, and its size. how: what becomes of its numbers, as `forms` has it."""

    name: str
    form: Form
    how: str
    outputs: int
    inputs: int

    def sizes(self, native: Kernels) -> tuple[int, int]:
        numbers, scales = native.sizes(self.form, self.outputs, self.inputs)
        return _lines(numbers), _lines(scales)


@dataclass(slots=True)
class NativeWeights:
    """Layers first_layer, first_layer + 1, ... of a model. A head comes with its norm.

    nbytes: of all matrices in tiles. memory, vectors: what the addresses in the others point to.
    """

    config: ModelConfig
    first_layer: int
    layers: ctypes.Array[Layer]
    embedding: Weight | None
    head: Weight | None
    norm: Tensor | None
    nbytes: int
    memory: mmap.mmap | None
    vectors: list[Tensor] = field(default_factory=list)

    @classmethod
    def read(cls, native: Kernels, files: ModelFiles, first: int, last: int, *, has_embedding: bool,
             has_head: bool, dtype: str = STORED) -> NativeWeights:
        """Those of layers first..last (exclusive). dtype: "stored", or what weights that are floats are quantised to.

        Raises what reading raises; `DamagedModel` too where scales or numbers are not finite.
        """
        return _Reading(native, files, first, last, has_embedding, has_head, dtype).done()


class _Reading:
    """Reads the weights of a slice, several at a time."""

    def __init__(self, native: Kernels, files: ModelFiles, first: int, last: int, has_embedding: bool,
                 has_head: bool, dtype: str) -> None:
        self._native, self._files, self._config, self._dtype = native, files, files.config, dtype
        self._first, self._numbers = first, range(first, last)
        table = "model.embed_tokens.weight"
        self._embedding = table if has_embedding else None
        self._head = (table if files.config.tied else "lm_head.weight") if has_head else None
        self._vectors: list[Tensor] = []

    def done(self) -> NativeWeights:
        matrices = [self._matrix(name) for name in dict.fromkeys(self._names())]
        sizes = [matrix.sizes(self._native) for matrix in matrices]
        total = sum(map(sum, sizes))
        memory, start = _region(total) if total else (None, 0)
        weights: dict[str, Weight] = {}
        for matrix, (numbers, scales) in zip(matrices, sizes):
            weights[matrix.name] = Weight(matrix.form, matrix.outputs, matrix.inputs, start, start + numbers, None)
            start += numbers + scales
        _each(lambda matrix: self._fill(matrix, weights[matrix.name]), matrices)
        layers = (Layer * len(self._numbers))(*(self._layer(number, weights) for number in self._numbers))
        return NativeWeights(
            self._config, self._first, layers, weights[self._embedding] if self._embedding else None,
            weights[self._head] if self._head else None,
            self._vector("model.norm.weight") if self._head else None, total, memory, self._vectors)

    def _names(self) -> Iterator[str]:
        """Matrices in the order in which a step reads them."""
        for number in self._numbers:
            yield from (f"model.layers.{number}.{module}.weight" for module in _MATRICES.values())
        yield from (name for name in (self._head, self._embedding) if name)

    def _matrix(self, name: str) -> _Matrix:
        outputs, inputs = self._files.shape(name)
        found = kept_tensor(self._files, name, self._dtype)
        return _Matrix(name, Form[found.form.name], found.how, outputs, inputs)

    def _layer(self, number: int, weights: dict[str, Weight]) -> Layer:
        base, layer = f"model.layers.{number}.", Layer()
        for place, module in _MATRICES.items():
            weight = weights[f"{base}{module}.weight"]
            if f"{base}{module}.bias" in self._config.layer_shapes(number):
                weight.bias = self._vector(f"{base}{module}.bias").data_ptr()
            setattr(layer, place, weight)
        for place, module in _NORMS.items():
            if f"{base}{module}.weight" in self._config.layer_shapes(number):
                setattr(layer, place, self._vector(f"{base}{module}.weight").data_ptr())
        return layer

    def _vector(self, name: str) -> Tensor:
        self._vectors.append(self._files.tensor(name, torch.float32))
        return self._vectors[-1]

    def _fill(self, matrix: _Matrix, weight: Weight) -> None:
        row_bytes = self._native.row_bytes(matrix.form, matrix.inputs)
        most = max(row_bytes, 4 * matrix.inputs if matrix.how == "quantised" else 0)
        whole = math.lcm(_CHANNELS, self._config.head_dim)
        step = max(1, _READ_BYTES // (most * whole)) * whole
        for first in range(0, matrix.outputs, step):
            rows = min(step, matrix.outputs - first)
            raw = self._raw(matrix, first, rows)
            assert raw.numel() == rows * row_bytes
            if not self._native.repack(weight, first, rows, raw.data_ptr()):
                raise self._files.not_finite(matrix.name)

    def _raw(self, matrix: _Matrix, first: int, rows: int) -> Tensor:
        """Rows in the bytes of the matrix's form."""
        kind = self._files.kind(matrix.name)
        if matrix.how == "as stored":
            return self._files.raw_rows(matrix.name, first, rows).contiguous()
        if kind in WIDENED:
            blocks = self._files.raw_rows(matrix.name, first, rows).reshape(-1, block_shape(kind)[1])
            return WIDENED[kind][1](blocks).contiguous()
        wide = torch.empty(rows, matrix.inputs, dtype=torch.float16 if matrix.form is Form.F16 else torch.float32)
        self._files.read_into(matrix.name, wide, first)
        if matrix.how != "quantised":
            return wide.view(torch.uint8)
        if wide.abs().max() > _GREATEST:
            raise UnsupportedModel(f"tensor {matrix.name} has numbers that are too great to be quantised",
                                   hint="Leave out `quantization`.")
        out = torch.empty(rows, self._native.row_bytes(matrix.form, matrix.inputs), dtype=torch.uint8)
        self._native.anew(matrix.form, wide.data_ptr(), rows, matrix.inputs, out.data_ptr())
        return out


def _lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _region(size: int) -> tuple[mmap.mmap, int]:
    """Memory for so many bytes, zeros, in huge pages where the system gives them; and the address where it begins."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE, **_OWN)
    refused = _refusal()
    if not refused:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            refused = str(error)
    if refused:
        _tell_once(refused)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -(-address // _HUGE_PAGE) * _HUGE_PAGE


def _refusal() -> str | None:
    """Why there are no huge pages; None where there may be."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system has none"
    try:
        return f"{_SETTING} says never" if "[never]" in _SETTING.read_text() else None
    except OSError:
        return None


@cache
def _tell_once(why: str) -> None:
    _LOG.warning("weights do not lie in huge pages (%s): steps of few rows may take up to twice as long", why)


def _each(work: Callable[[_Matrix], None], matrices: Iterable[_Matrix]) -> None:
    """Do it for all, in as many threads as torch would use."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for _ in pool.map(work, matrices):
            pass
