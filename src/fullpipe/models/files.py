"""The promise that every kind of weight file keeps: `ModelFiles`, which reads one tensor at a time.

Files are read with `pread` into buffers of our own, never mapped: a stage that loads three layers of a large
model touches only their bytes, and no page of the file counts as its memory. Tensors carry the names that
transformers gives them, whatever the file calls them.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models.config import ModelConfig, Sizes
from fullpipe.models.dequant import block_shape
from fullpipe.models.recognise import fetch_again

# Numbers converted at a time: they and their float32 copy stay in the processor's cache.
BLOCK_NUMBERS = 1 << 17

_ONE_OF_ALL = "model.layers.0.mlp.gate_proj.weight"


class Place(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    size: int


class ModelFiles(ABC):
    """A model on disk. Reading is thread-safe; nothing of the weights is kept."""

    config: ModelConfig

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as transformers would have it. Raises `DamagedModel` when it is not there."""

    @abstractmethod
    def kind(self, name: str) -> Kind:
        """How a tensor is stored. Raises `DamagedModel` when it is not there."""

    @abstractmethod
    def place(self, name: str) -> Place:
        """Where a tensor is stored. Raises `DamagedModel` when it is not there."""

    @abstractmethod
    def opening(self) -> list[Place]:
        """What is read when the model is opened."""

    @abstractmethod
    def raw_rows(self, name: str, first: int, rows: int) -> Tensor:
        """Rows of a matrix as they are stored, uint8 [rows, bytes of a row]; `first` and `rows` multiples of the size
        of a head. Raises `DamagedModel` when the file ends within them."""

    @abstractmethod
    def _read_rows(self, name: str, first: int, rows: int) -> Tensor:
        """Rows first..first + rows of a tensor ([n] counts as n rows of one number), in any float dtype."""

    @abstractmethod
    def _file_of(self, name: str) -> Path:
        """The file that holds a tensor."""

    @abstractmethod
    def _others(self, wanted: Collection[str]) -> list[str]:
        """Tensors of the file beside the wanted ones, those that cannot matter left out."""

    @property
    def matrices(self) -> list[str]:
        """Names of all tensors that are multiplied with."""
        return [name for name, shape in self.wanted_shapes().items() if len(shape) == 2]

    def names_of(self, first: int, last: int, *, has_embedding: bool, has_head: bool) -> list[str]:
        """Names of all tensors that a slice of layers first..last (exclusive) is made of; see `slice.load_slice`."""
        names = [name for layer in range(first, last) for name in self.config.layer_shapes(layer)]
        table = "model.embed_tokens.weight"
        head = ["model.norm.weight", table if self.config.tied else "lm_head.weight"] if has_head else []
        return list(dict.fromkeys([*([table] if has_embedding else []), *names, *head]))

    def wanted_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that the model is made of."""
        shapes = self.config.outer_shapes()
        for layer in range(self.config.num_layers):
            shapes |= self.config.layer_shapes(layer)
        return shapes

    @property
    def is_quantised(self) -> bool:
        """Whether the matrices are stored in blocks of small integers."""
        return block_shape(self.kind(_ONE_OF_ALL))[0] > 1

    @property
    def is_half(self) -> bool:
        """Whether the matrices are stored in 16 bits."""
        return self.kind(_ONE_OF_ALL) in (Kind.F16, Kind.BF16)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor in a new buffer. See `read_into`."""
        out = torch.empty(self.shape(name), dtype=dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor, first: int = 0) -> None:
        """Fill `out` with rows `first`.. of a tensor, converted to out's dtype block by block.

        out: [rows, ...]; may be a slice of something larger.

        Raises `DamagedModel` (naming file and tensor) when the tensor is missing, of another shape, cut
        short, or holds numbers that are not finite; `UnsupportedModel` for a type that cannot be read.
        """
        shape = self.shape(name)
        if out.shape[1:] != shape[1:] or first + out.shape[0] > shape[0]:
            raise self._damaged(name, f"it has shape {list(shape)}, the configuration asks for "
                                      f"{[first + out.shape[0], *out.shape[1:]]}")
        step = self._rows_per_block(name, shape)
        for start in range(0, out.shape[0], step):
            part = out[start : start + step]
            block = self._read_rows(name, first + start, part.shape[0])
            if not math.isfinite(block.sum(dtype=torch.float32)):
                raise self.not_finite(name)
            part.copy_(block.view(part.shape))

    def not_finite(self, name: str) -> DamagedModel:
        """The error for a tensor that holds inf or NaN."""
        return self._damaged(name, "it holds numbers that are not finite")

    def sizes(self, dtype: torch.dtype) -> Sizes:
        """Bytes and operations of embedding, layer and head, for a planner."""
        return self.config.sizes(dtype.itemsize)

    def stored_sizes(self, bytes_of: Callable[[str], int]) -> Sizes:
        """The same of weights that stay about as they are stored, with hidden states in float32 and caches in float16.

        A layer's bytes are the mean. bytes_of: what a tensor takes in memory.
        """
        layers = range(self.config.num_layers)
        names = [name for layer in layers for name in self.config.layer_shapes(layer)]
        head = "model.embed_tokens.weight" if self.config.tied else "lm_head.weight"
        return replace(
            self.config.sizes(2), layer_bytes=sum(map(bytes_of, names)) // len(layers),
            embedding_bytes=bytes_of("model.embed_tokens.weight"),
            head_bytes=bytes_of(head) + 4 * self.config.hidden, row_bytes=4 * self.config.hidden)

    def layer_bytes(self, layer: int, dtype: torch.dtype) -> int:
        """Bytes of one layer's weights (all layers of a supported model are equal)."""
        assert 0 <= layer < self.config.num_layers
        return self.sizes(dtype).layer_bytes

    def embedding_bytes(self, dtype: torch.dtype) -> int:
        return self.sizes(dtype).embedding_bytes

    def head_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of head and final norm; a tied head is a copy of the embedding, in the order a step reads."""
        return self.sizes(dtype).head_bytes

    def _rows_per_block(self, name: str, shape: tuple[int, ...]) -> int:
        return max(1, BLOCK_NUMBERS // math.prod(shape[1:]))

    def _check_shapes(self) -> None:
        """Raise `DamagedModel` unless every tensor that the configuration asks for is there as it should be, and
        `UnsupportedModel` where there are others: they would have changed the result."""
        wanted = self.wanted_shapes()
        for name, shape in wanted.items():
            if self.shape(name) != shape:
                raise self._damaged(name, f"it has shape {list(self.shape(name))}, the configuration asks "
                                          f"for {list(shape)}")
        if others := self._others(wanted):
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise UnsupportedModel(
                f"{self.path} has tensors that a {self.config.family} of {self.config.num_layers} layers does not "
                f"have: {others[0]}{more}", hint="Without them the model might say something else. If you know that it "
                "does not, save it without them.")

    def _damaged(self, name: str, what: str) -> DamagedModel:
        file = self._file_of(name)
        return DamagedModel(f"tensor {name} of {file} is damaged: {what}", hint=fetch_again(file))


def read_exactly(file: int, buffer: Tensor, offset: int) -> bool:
    """Fill a contiguous uint8 tensor from a descriptor; False when the file ends first."""
    view = memoryview(buffer.numpy().data)
    while len(view):
        count = os.preadv(file, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True
