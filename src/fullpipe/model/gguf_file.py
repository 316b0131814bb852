"""GGUF: the header (metadata and where each tensor lies) and the weights behind it.

The `gguf` package lends its constants and its dequantisers. Its reader is not used: it makes an array object
of every string of the vocabulary (7 s for Qwen's on the development machine, in every stage process), and
maps the file, whose pages would count as the stage's memory.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.model.config import ModelConfig
from fullpipe.model.dequant import block_shape, dequantise
from fullpipe.model.files import FETCH_AGAIN, ModelFiles, read_exactly

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Our name for what follows "blk.N." in a GGUF tensor name.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """shape: rows first, as torch has it. offset: bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        numbers, size = block_shape(self.kind)
        return self.shape[-1] // numbers * size

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """metadata: numbers, bools and strings by key; arrays (the vocabulary) are skipped."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Read a GGUF file's header: 0.2 s for a vocabulary of 150,000.

    Raises `DamagedModel` when it is not a GGUF file or ends too early, `UnsupportedModel` for another
    version of the format or an unknown tensor type.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Cursor(data, path).header()
    except (struct.error, ValueError, KeyError) as error:  # ValueError: empty file, no UTF-8, unknown tensor type
        raise DamagedModel(f"the header of {path} is not that of a whole GGUF file ({error})",
                           hint=FETCH_AGAIN) from error
    size = path.stat().st_size
    for name, tensor in header.tensors.items():
        if tensor.end > size:
            raise DamagedModel(f"{path} is cut short: tensor {name} ends at byte {tensor.end}, the file at {size}",
                               hint=FETCH_AGAIN)
    return header


class _Cursor:
    """Reads values one after the other from the start of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def header(self) -> GGUFHeader:
        magic, version = self._unpack("4sI")
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        if version not in (2, 3):
            raise UnsupportedModel(f"{self._path} is GGUF version {version}; 2 and 3 (little-endian) can be read",
                                   hint="Convert it with a current llama.cpp.")
        num_tensors, num_keys = self._unpack("QQ")
        metadata = dict(self._pair() for _ in range(num_keys))
        tensors = dict(self._tensor() for _ in range(num_tensors))
        alignment = int(metadata.get("general.alignment", 32))
        base = -(-self._at // alignment) * alignment
        return GGUFHeader({key: value for key, value in metadata.items() if value is not None},
                          {name: GGUFTensor(t.shape, t.kind, base + t.offset) for name, t in tensors.items()})

    def _pair(self) -> tuple[str, Any]:
        return self._string(), self._value(self._one("I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._skip_array()
        return self._one(_SCALARS[kind])

    def _skip_array(self) -> None:
        element, count = self._unpack("IQ")
        if element in _SCALARS:
            self._at += count * struct.calcsize(_SCALARS[element])
            return
        if element != _STRING:
            raise ValueError(f"an array of type {element}")
        length_at, at = struct.Struct("<Q").unpack_from, self._at
        for _ in range(count):
            at += 8 + length_at(self._data, at)[0]
        self._at = at

    def _tensor(self) -> tuple[str, GGUFTensor]:
        name = self._string()
        dims = self._unpack(f"{self._one('I')}Q")
        kind, offset = GGMLQuantizationType(self._one("I")), self._one("Q")
        return name, GGUFTensor(tuple(reversed(dims)), kind, offset)

    def _string(self) -> str:
        text: bytes = self._one(f"{self._one('Q')}s")
        return text.decode("utf-8")

    def _one(self, form: str) -> Any:
        return self._unpack(form)[0]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values


class GGUFFiles(ModelFiles):
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        header = read_header(path)
        if header.metadata.get("split.count", 1) > 1:
            raise UnsupportedModel(f"{path} is one of {header.metadata['split.count']} parts of a split GGUF file",
                                   hint="Merge the parts with llama.cpp's gguf-split --merge.")
        self._tensors = header.tensors
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.config = ModelConfig.from_gguf(
            header.metadata, vocab_size=self._entry("token_embd.weight", "model.embed_tokens.weight").shape[0],
            tied="output.weight" not in header.tensors, qkv_bias="blk.0.attn_q.bias" in header.tensors,
            o_bias="blk.0.attn_output.bias" in header.tensors, rope_factors=self._rope_factors())
        self._check_shapes()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(_gguf_name(name), name).shape

    def _entry(self, stored: str, name: str) -> GGUFTensor:
        if stored not in self._tensors:
            raise self._damaged(name, f"it is missing (as {stored})")
        return self._tensors[stored]

    def _file_of(self, name: str) -> Path:
        return self.path

    def _rope_factors(self) -> tuple[float, ...] | None:
        if "rope_freqs.weight" not in self._tensors:
            return None
        return tuple(self._dequantised(self._tensors["rope_freqs.weight"], "rope_freqs.weight", 0, 0).tolist())

    def _rows_per_block(self, name: str, shape: tuple[int, ...]) -> int:
        rows = super()._rows_per_block(name, shape)
        if not self._is_interleaved(name):
            return rows
        return max(1, rows // self.config.head_dim) * self.config.head_dim

    def _is_interleaved(self, name: str) -> bool:
        """Llama's q and k: GGUF rotates neighbours (0, 1), we and transformers rotate halves (0, d/2)."""
        return self.config.family == "llama" and (".q_proj." in name or ".k_proj." in name)

    def _read_rows(self, name: str, first: int, rows: int) -> Tensor:
        stored = self._dequantised(self._entry(_gguf_name(name), name), name, first, rows)
        if not self._is_interleaved(name):
            return stored
        return stored.view(-1, self.config.head_dim // 2, 2, stored.numel() // rows).transpose(1, 2).reshape(rows, -1)

    def _dequantised(self, entry: GGUFTensor, name: str, first: int, rows: int) -> Tensor:
        """Rows of a matrix, or (a vector is one row to GGUF) numbers of a vector; float32.

        A vector is read whole when `rows` is 0.
        """
        numbers, size = block_shape(entry.kind)
        per_row = math.prod(entry.shape[1:])
        first, count = first * per_row, (rows or entry.shape[0]) * per_row
        raw = torch.empty(count // numbers, size, dtype=torch.uint8)
        if not read_exactly(self._file, raw.flatten(), entry.offset + first // numbers * size):
            raise self._damaged(name, "the file ends within it")
        return dequantise(raw, entry.kind).flatten()


def _gguf_name(name: str) -> str:
    """The name that GGUF gives to what transformers calls `name`."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{leaf}"
