"""GGUF: the weights behind the header.

The `gguf` package lends its constants and its dequantisers. Its reader is not used: it is slow with the
vocabulary (see `gguf_header`), and maps the file, whose pages would count as the stage's memory.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from fullpipe.errors import UnsupportedModel
from fullpipe.models.config import ModelConfig
from fullpipe.models.dequant import block_shape, dequantise
from fullpipe.models.files import ModelFiles, read_exactly
from fullpipe.models.gguf_header import read_header
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


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """A GGUF file's metadata without its arrays (the vocabulary), and its tensors by name.

    Raises `DamagedModel` when it is not a GGUF file or ends too early, `UnsupportedModel` for another
    version of the format or an unknown tensor type.
    """
    header = read_header(path, arrays=False)
    try:
        tensors = {name: GGUFTensor(place.shape, GGMLQuantizationType(place.kind), place.offset)
                   for name, place in header.tensors.items()}
    except ValueError as error:
        raise damaged(path, f"the header of {path} names a type of tensor that does not exist ({error})") from error
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise damaged(path, f"{path} is cut short: tensor {name} ends at byte {tensor.end}, the file at {size}")
    return header.metadata, tensors


class GGUFFiles(ModelFiles):
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        metadata, self._tensors = read_tensors(path)
        if metadata.get("split.count", 1) > 1:
            raise UnsupportedModel(f"{path} is one of {metadata['split.count']} parts of a split GGUF file",
                                   hint="Merge the parts with llama.cpp: `llama-gguf-split --merge FIRST OUT`.")
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.config = ModelConfig.from_gguf(
            metadata, vocab_size=self._entry("token_embd.weight", "model.embed_tokens.weight").shape[0],
            tied="output.weight" not in self._tensors, qkv_bias="blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors, rope_factors=self._rope_factors())
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
