"""GGUF: the weights behind the header.

The `gguf` package lends its constants and its dequantisers. Its reader is not used: it is slow with the
vocabulary (see `gguf_header`), and maps the file, whose pages would count as the stage's memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from fullpipe.models.dequant import block_shape, dequantise
from fullpipe.models.files import ModelFiles, Place, read_exactly
from fullpipe.models.gguf_config import read_gguf
from fullpipe.models.gguf_header import Header, read_header
from fullpipe.models.gguf_parts import check_parts, gguf_parts
from fullpipe.models.recognise import damaged

# Our name for what follows "blk.N." in a GGUF tensor name.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight"}
# Frequencies of the rotary embedding: those of rope_freqs are read elsewhere, the others only repeat what it computes.
_BUFFERS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """shape: rows first, as torch has it. offset: bytes from the start of the file that holds it."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    path: Path

    @property
    def row_bytes(self) -> int:
        numbers, size = block_shape(self.kind)
        return self.shape[-1] // numbers * size

    @property
    def place(self) -> Place:
        return Place(self.path, self.offset, math.prod(self.shape[:-1]) * self.row_bytes)

    @property
    def end(self) -> int:
        return self.offset + self.place.size


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """A GGUF model's metadata without the vocabulary, and its tensors by name.

    path: of the file, or of any part of a split one.

    Raises `DamagedModel` when a file is not GGUF or ends too early, `ModelNotFound` when a part is missing,
    `UnsupportedModel` for another version of the format or an unknown tensor type.
    """
    headers = {part: read_header(part, arrays=False) for part in gguf_parts(path)}
    check_parts(headers)
    tensors: dict[str, GGUFTensor] = {}
    for part, header in headers.items():
        tensors |= _tensors_of(part, header)
    return next(iter(headers.values())).metadata, tensors


def _tensors_of(path: Path, header: Header) -> dict[str, GGUFTensor]:
    try:
        tensors = {name: GGUFTensor(place.shape, GGMLQuantizationType(place.kind), place.offset, path)
                   for name, place in header.tensors.items()}
    except ValueError as error:
        raise damaged(path, f"the header of {path} names a type of tensor that does not exist ({error})") from error
    size = path.stat().st_size
    for name, tensor in tensors.items():
        numbers, _ = block_shape(tensor.kind)
        if tensor.shape[-1] % numbers:
            raise damaged(path, f"tensor {name} of {path} has rows of {tensor.shape[-1]} numbers, which are no whole "
                                f"blocks of {tensor.kind.name} ({numbers})")
        if tensor.end > size:
            raise damaged(path, f"{path} is cut short: tensor {name} ends at byte {tensor.end}, the file at {size}")
    return tensors


class GGUFFiles(ModelFiles):
    """A model in a GGUF file, or in the parts of a split one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        metadata, self._tensors = read_tensors(path)
        self._files: dict[Path, int] = {}
        for part in {tensor.path for tensor in self._tensors.values()}:
            self._files[part] = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        self.config = read_gguf(
            metadata, vocab_size=self._entry("token_embd.weight", "model.embed_tokens.weight").shape[0],
            tied="output.weight" not in self._tensors, qkv_bias="blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors, rope_factors=self._rope_factors())
        self._check_shapes()

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(_gguf_name(name), name).shape

    def kind(self, name: str) -> GGMLQuantizationType:
        return self._entry(_gguf_name(name), name).kind

    def place(self, name: str) -> Place:
        return self._entry(_gguf_name(name), name).place

    def opening(self) -> list[Place]:
        begins = {part: part.stat().st_size for part in gguf_parts(self.path)}  # of one without tensors all
        for tensor in self._tensors.values():
            begins[tensor.path] = min(begins[tensor.path], tensor.offset)
        factors = self._tensors.get("rope_freqs.weight")
        return [Place(part, 0, end) for part, end in begins.items()] + ([factors.place] if factors else [])

    def raw_rows(self, name: str, first: int, rows: int) -> Tensor:
        entry = self._entry(_gguf_name(name), name)
        raw = self._raw(entry, name, first * entry.row_bytes, rows * entry.row_bytes).view(rows, -1)
        return self._in_halves(raw) if self._is_interleaved(name) else raw

    def _entry(self, stored: str, name: str) -> GGUFTensor:
        if stored not in self._tensors:
            raise self._damaged(name, f"it is missing (as {stored})")
        return self._tensors[stored]

    def _others(self, wanted: Collection[str]) -> list[str]:
        known = {_gguf_name(name) for name in wanted}
        return [name for name in self._tensors if name not in known and not _BUFFERS.fullmatch(name)]

    def _file_of(self, name: str) -> Path:
        tensor = self._tensors.get(_gguf_name(name)) or self._tensors.get(name)
        return tensor.path if tensor else self.path

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
        return self._in_halves(stored.view(rows, -1)) if self._is_interleaved(name) else stored

    def _in_halves(self, rows: Tensor) -> Tensor:
        """Rows of whole heads, in our order."""
        heads = rows.view(-1, self.config.head_dim // 2, 2, rows.shape[1])
        return heads.transpose(1, 2).reshape(rows.shape)

    def _dequantised(self, entry: GGUFTensor, name: str, first: int, rows: int) -> Tensor:
        """Rows of a matrix, or (a vector is one row to GGUF) numbers of a vector; float32.

        A vector is read whole when `rows` is 0.
        """
        numbers, size = block_shape(entry.kind)
        per_row = math.prod(entry.shape[1:])
        first, count = first * per_row, (rows or entry.shape[0]) * per_row
        raw = self._raw(entry, name, first // numbers * size, count // numbers * size)
        return dequantise(raw.view(-1, size), entry.kind).flatten()

    def _raw(self, entry: GGUFTensor, name: str, start: int, size: int) -> Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        if not read_exactly(self._files[entry.path], raw, entry.offset + start):
            raise self._damaged(name, "the file ends within it")
        return raw


def _gguf_name(name: str) -> str:
    """The name that GGUF gives to what transformers calls `name`."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{leaf}"
