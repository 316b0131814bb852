"""Opening a model: `open_model`, and the reader of safetensors folders."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from fullpipe.errors import ModelNotFound, UnsupportedModel
from fullpipe.models.files import ModelFiles, Place, read_exactly
from fullpipe.models.gguf_file import GGUFFiles
from fullpipe.models.hf_config import read_hf
from fullpipe.models.recognise import damaged, strange_folder
from fullpipe.models.shards import CONFIG, INDEX, read_json, shard_files


def open_model(path: Path) -> ModelFiles:
    """Open a GGUF file, or a folder with config.json and safetensors, single or sharded.

    Reads headers only, and checks that every tensor is there and whole as far as the sizes tell.

    Raises `ModelNotFound`, `UnsupportedModel`, `DamagedModel`.
    """
    path = Path(path)
    if path.is_dir():
        return SafetensorsFiles(path)
    if not path.is_file():
        raise ModelNotFound(f"there is no model at {path}",
                            hint="Name a GGUF file, or a folder with config.json and safetensors.")
    return GGUFFiles(path)


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {torch.float64: Kind.F64, torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
# Frequencies of the rotary embedding, which only repeat what is computed, and the critic of reinforcement learning.
_BUFFERS = re.compile(r".*\brotary_emb\.inv_freq|v_head\..*")


class SafetensorsFiles(ModelFiles):
    """A folder as transformers' `save_pretrained` writes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if strange := strange_folder(folder):
            raise strange
        files = shard_files(folder)
        self.config = read_hf(read_json(folder / CONFIG))
        self._entries: dict[str, tuple[Shard, Entry]] = {}
        self._shards = [Shard(file) for file in files]
        for shard in self._shards:
            self._entries |= {name: (shard, entry) for name, entry in shard.entries.items()}
        self._check_shapes()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1].shape

    def kind(self, name: str) -> Kind:
        return _KINDS[self._entry(name)[1].dtype]

    def place(self, name: str) -> Place:
        shard, entry = self._entry(name)
        return Place(shard.path, entry.offset, math.prod(entry.shape) * entry.dtype.itemsize)

    def opening(self) -> list[Place]:
        small = [file for file in (self.path / CONFIG, self.path / INDEX) if file.is_file()]
        return [*(Place(file, 0, file.stat().st_size) for file in small),
                *(Place(shard.path, 0, shard.header_bytes) for shard in self._shards)]

    def _entry(self, name: str) -> tuple[Shard, Entry]:
        if name not in self._entries:
            raise self._damaged(name, "it is missing")
        return self._entries[name]

    def _others(self, wanted: Collection[str]) -> list[str]:
        tied = {"lm_head.weight"} if self.config.tied else set()
        return [name for name in self._entries
                if name not in wanted and name not in tied and not _BUFFERS.fullmatch(name)]

    def _file_of(self, name: str) -> Path:
        return self._entries[name][0].path if name in self._entries else self.path

    def raw_rows(self, name: str, first: int, rows: int) -> Tensor:
        shard, entry = self._entry(name)
        size = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        raw = torch.empty(rows * size, dtype=torch.uint8)
        if not read_exactly(shard.file, raw, entry.offset + first * size):
            raise self._damaged(name, "the file ends within it")
        return raw.view(rows, -1)

    def _read_rows(self, name: str, first: int, rows: int) -> Tensor:
        return self.raw_rows(name, first, rows).flatten().view(self._entry(name)[1].dtype)


class Entry:
    """Where a tensor lies in its file."""

    __slots__ = ("dtype", "offset", "shape")

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> None:
        self.dtype, self.shape, self.offset = dtype, shape, offset


class Shard:
    """One safetensors file: a JSON header that lists tensors, then their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.entries = self._read_entries()

    def __del__(self) -> None:
        os.close(self.file)

    def _read_entries(self) -> dict[str, Entry]:
        size = os.fstat(self.file).st_size
        length = int.from_bytes(os.pread(self.file, 8, 0), "little")
        try:
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            self.header_bytes = 8 + length
            header: dict[str, Any] = json.loads(os.pread(self.file, length, 8))
            header.pop("__metadata__", None)
            return {name: self._entry(name, value, self.header_bytes, size) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(self.path, f"the header of {self.path} is damaged: {error}") from error

    def _entry(self, name: str, value: Mapping[str, Any], base: int, file_size: int) -> Entry:
        dtype = _SAFETENSORS_DTYPES.get(value["dtype"])
        if dtype is None:
            raise UnsupportedModel(f"tensor {name} of {self.path} has the type {value['dtype']}, which cannot be read",
                                   hint="Use weights in float32, float16 or bfloat16, or a GGUF file.")
        begin, end = value["data_offsets"]
        shape = tuple(int(n) for n in value["shape"])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name} has {end - begin} bytes, its shape {list(shape)} needs "
                             f"{math.prod(shape) * dtype.itemsize}")
        if base + end > file_size:
            raise damaged(self.path, f"{self.path} is cut short: tensor {name} ends at byte {base + end}, the file at "
                                     f"{file_size}")
        return Entry(dtype, shape, base + begin)
