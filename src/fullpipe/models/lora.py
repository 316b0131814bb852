"""A LoRA adapter, a folder that peft's `save_pretrained` wrote, is merged into a model while the weights are read.

    files = open_merged(Path("model"), Path("adapter"))     # `ModelFiles` like any other

Whoever reads a matrix gets W + scale * B A. A stage that reads three layers reads the adapter's part of these three.
The sum is made in double precision and rounded once, to what the matrix is stored in, so that it does not depend on how
many rows are read at a time; of a matrix in blocks of small integers it becomes float16.

What is not plain LoRA is refused by the name that peft has for it: a text would otherwise be another one than the
adapter's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from fullpipe.errors import DamagedModel, ModelError, ModelNotFound, UnsupportedModel
from fullpipe.models.files import ModelFiles, Place, read_exactly
from fullpipe.models.recognise import fetch_again
from fullpipe.models.shards import ADAPTER, ADAPTER_WEIGHTS, read_json
from fullpipe.models.weights import Entry, Shard, open_model

_DTYPES = {Kind.F64: torch.float64, Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MERGE = ("Merge it with peft, and name the new folder as the model: "
          "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder).")
# Keys of adapter_config.json that must be empty, and what they ask for.
_REFUSED = {
    "use_dora": "DoRA gives every row a new length",
    "use_qalora": "QALoRA pools what goes in",
    "fan_in_fan_out": "its matrices are transposed",
    "lora_bias": "its updates have biases",
    "modules_to_save": "it has whole modules in place of the model's",
    "layer_replication": "it repeats layers",
    "trainable_token_indices": "it changes the embedding",
    "target_parameters": "it changes parameters that are in no linear layer",
    "alora_invocation_tokens": "an activated LoRA begins in the middle of a text",
    "arrow_config": "Arrow mixes several adapters by the text",
    "megatron_config": "its layers are Megatron's",
}
# Ways to begin the training that take something off the model's own weights, which are then others than its files have.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Parts of names of tensors, and what such a tensor is.
_STRANGE = (("lora_embedding_", "it changes the embedding"), ("lora_magnitude_vector", "DoRA gives every row a new "
            "length"), ("modules_to_save", "it is a whole module in place of the model's"), (".bias", "it is a bias"))


@dataclass(frozen=True, slots=True)
class _Stored:
    """Is a tensor of the adapter's file."""

    shard: Shard
    entry: Entry

    def rows(self, first: int, rows: int) -> Tensor:
        """Some rows in double precision."""
        width = self.entry.shape[1]
        size = width * self.entry.dtype.itemsize
        raw = torch.empty(rows * size, dtype=torch.uint8)
        if not read_exactly(self.shard.file, raw, self.entry.offset + first * size):
            raise _damaged(self.shard.path, f"{self.shard.path} is cut short")
        return raw.view(self.entry.dtype).view(rows, width).double()


@dataclass(frozen=True, slots=True)
class _Update:
    """Is what a matrix gets: scale * up @ down. down: peft's A, [rank, in]; up: its B, [out, rank]."""

    down: _Stored
    up: _Stored
    scale: float

    def rows(self, first: int, rows: int) -> Tensor:
        rank = self.down.entry.shape[0]
        added: Tensor = self.up.rows(first, rows) @ self.down.rows(0, rank) * self.scale
        if not math.isfinite(added.sum()):
            raise _damaged(self.up.shard.path, f"{self.up.shard.path} holds numbers that are not finite")
        return added


class Adapter:
    """A LoRA adapter on disk, for a model with these tensors.

    Opening it reads the configuration and the header. Raises `ModelNotFound`, `UnsupportedModel`, `DamagedModel`.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self._config = _config_of(folder)
        stored = _tensors_of(folder)
        modules = dict.fromkeys(module for module, _ in stored)
        self._updates = {module: self._update(module, stored, shapes) for module in modules}
        if not self._updates:
            raise UnsupportedModel(f"the adapter {folder} changes nothing: it has no tensors",
                                   hint="Name another folder.")

    def __contains__(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._updates

    def __len__(self) -> int:
        """How many matrices it changes."""
        return len(self._updates)

    def rows(self, name: str, first: int, rows: int) -> Tensor:
        """What is added to these rows of a matrix, float64 [rows, in]."""
        return self._updates[name.removesuffix(".weight")].rows(first, rows)

    def _update(self, module: str, stored: Mapping[tuple[str, str], _Stored],
                shapes: Mapping[str, tuple[int, ...]]) -> _Update:
        shape, leaf = shapes.get(f"{module}.weight"), module.rpartition(".")[2]
        if shape is None or leaf not in _PROJECTIONS:
            known = leaf if leaf in ("embed_tokens", "lm_head") else module
            raise UnsupportedModel(f"the adapter {self.folder} changes {known}, and only {', '.join(_PROJECTIONS)} of "
                                   "the model's layers can be changed", hint=_MERGE)
        down, up = stored.get((module, "A")), stored.get((module, "B"))
        if down is None or up is None:
            raise _damaged(self.folder / ADAPTER_WEIGHTS, f"the adapter {self.folder} is damaged: it has one of the "
                           f"two matrices for {module}, and not the other")
        rank = down.entry.shape[0]
        if (up.entry.shape, down.entry.shape) != ((shape[0], rank), (rank, shape[1])):
            raise UnsupportedModel(
                f"the adapter {self.folder} is for another model: for {module} it has {list(up.entry.shape)} times "
                f"{list(down.entry.shape)}, and the matrix is {list(shape)}",
                hint=f"It was made for {self._config.get('base_model_name_or_path') or 'a model that it does not name'}"
                     ".")
        return _Update(down, up, self._scale(module, rank))

    def _scale(self, module: str, rank: int) -> float:
        config = self._config
        told = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        if not rank or told != rank or not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise _damaged(self.folder / ADAPTER, f"the adapter {self.folder} is damaged: for {module} its "
                           f"configuration says r={told!r} and lora_alpha={alpha!r}, and the matrices have rank {rank}")
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


class MergedFiles(ModelFiles):
    """A model with an adapter merged into it."""

    def __init__(self, base: ModelFiles, adapter: Adapter) -> None:
        super().__init__(base.path)
        self.config, self._base, self.adapter = base.config, base, adapter

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def kind(self, name: str) -> Kind:
        stored = self._base.kind(name)
        return stored if name not in self.adapter or stored in _DTYPES else Kind.F16

    def place(self, name: str) -> Place:
        """In the model's file: what the adapter adds lies elsewhere."""
        return self._base.place(name)

    def opening(self) -> list[Place]:
        return self._base.opening()

    def raw_rows(self, name: str, first: int, rows: int) -> Tensor:
        if name not in self.adapter:
            return self._base.raw_rows(name, first, rows)
        return self._merged(name, first, rows).contiguous().view(torch.uint8)

    @property
    def is_quantised(self) -> bool:
        """Whether the model's own matrices are; what else is quantised depends on it."""
        return self._base.is_quantised

    @property
    def is_half(self) -> bool:
        return self._base.is_half

    def told(self) -> str:
        """What a user should know of it."""
        widened = sum(self.kind(name) != self._base.kind(name) for name in self.matrices)
        more = f"; {widened} of them were quantised and take 16 bits now" if widened else ""
        return f"the LoRA adapter {self.adapter.folder} is merged into {len(self.adapter)} matrices{more}"

    def _read_rows(self, name: str, first: int, rows: int) -> Tensor:
        if name not in self.adapter:
            return self._base._read_rows(name, first, rows)
        return self._merged(name, first, rows)

    def _merged(self, name: str, first: int, rows: int) -> Tensor:
        """[rows, in], in the numbers of its kind."""
        own = self._base._read_rows(name, first, rows).view(rows, -1)
        return (own.double() + self.adapter.rows(name, first, rows)).to(_DTYPES[self.kind(name)])

    def _rows_per_block(self, name: str, shape: tuple[int, ...]) -> int:
        return self._base._rows_per_block(name, shape)

    def _file_of(self, name: str) -> Path:
        return self._base._file_of(name)

    def _others(self, wanted: Collection[str]) -> list[str]:
        return self._base._others(wanted)


def open_merged(model: Path, adapter: Path) -> MergedFiles:
    """Open a model with an adapter merged into it. Reads headers only.

    Raises what `open_model` raises, and the same of the adapter.
    """
    base = open_model(model)
    return MergedFiles(base, Adapter(adapter, base.wanted_shapes()))


# ---- the folder ------------------------------------------------------------------------------------------------------


def _config_of(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, of which nothing asks for more than plain LoRA."""
    if not (folder / ADAPTER).is_file():
        raise ModelNotFound(f"there is no LoRA adapter at {folder}: no {ADAPTER} lies there",
                            hint="Name a folder as peft's `save_pretrained` writes it; `hf download ORG/NAME` fetches "
                                 "one, and says where it is.")
    config = read_json(folder / ADAPTER)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        raise _unsupported(folder, "peft_type", kind, "only LORA can be merged")
    if task not in (None, "CAUSAL_LM"):
        raise _unsupported(folder, "task_type", task, "only CAUSAL_LM writes texts")
    if (bias := config.get("bias")) not in (None, "none"):
        raise _unsupported(folder, "bias", bias, "it changes biases")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_OTHER_BASE):
        raise _unsupported(folder, "init_lora_weights", begun, "it belongs to a model with other weights")
    for key, value in config.items():
        if value and key != "use_rslora" and (key in _REFUSED or key.startswith("use_")):
            raise _unsupported(folder, key, value, _REFUSED.get(key, "that is not known here"))
    return config


def _tensors_of(folder: Path) -> dict[tuple[str, str], _Stored]:
    """The matrices by module and "A" or "B"."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsupportedModel(f"the adapter {folder} is a PyTorch checkpoint; these can run code when they are "
                                   "read, and are never loaded",
                                   hint="Save it anew with peft, which writes safetensors.")
        raise ModelNotFound(f"the adapter {folder} has no weights: {ADAPTER_WEIGHTS} is missing",
                            hint="Copy or download it again from where it came from.")
    shard, found = Shard(path), dict[tuple[str, str], _Stored]()
    for name, entry in shard.entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(entry.shape) != 2:
            why = next((why for part, why in _STRANGE if part in name), "plain LoRA has no such tensor")
            raise UnsupportedModel(f"the adapter {folder} has the tensor {name}: {why}", hint=_MERGE)
        found[match[1], match[2]] = _Stored(shard, entry)
    return found


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """What the first pattern that fits says, as peft looks for it. Patterns that are none say None."""
    try:
        fits = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(fits, default)
    except (re.error, AttributeError, TypeError):
        return None


def _unsupported(folder: Path, key: str, value: Any, why: str) -> ModelError:
    return UnsupportedModel(f"the adapter {folder} cannot be merged: its {ADAPTER} has {key}="
                            f"{json.dumps(value)[:60]}, and {why}", hint=_MERGE)


def _damaged(path: Path, message: str) -> DamagedModel:
    return DamagedModel(message, hint=fetch_again(path))
