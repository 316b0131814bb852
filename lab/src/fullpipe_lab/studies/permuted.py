"""A model is written in bfloat16 with its channels in another order: it says the same, and none of its blocks of 32
numbers is one of the file's.

All models that the catalogue has came quantised. Written in bfloat16 as they are, a block would be quantised back to
what it was, which says nothing of models that never were. Here every block has numbers of 32 other blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fullpipe.models.config import FAMILIES, ModelConfig
from fullpipe.models.files import ModelFiles


def write_permuted(files: ModelFiles, folder: Path, seed: int = 0) -> Path:
    """Write it into a folder, as transformers would; without a tokenizer, and for a plain RoPE."""
    order = _Order(files, torch.Generator().manual_seed(seed))
    save_file({name: values.bfloat16().contiguous() for name, values in order.tensors()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(files.config)), encoding="utf-8")
    return folder


class _Order:
    """Numbers of the hidden state, of each head's values and of each MLP get new places."""

    def __init__(self, files: ModelFiles, generator: torch.Generator) -> None:
        self._files, self._config, self._generator = files, files.config, generator
        self._hidden = self._shuffled(files.config.hidden)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._config.outer_shapes():
            yield name, self._read(name)[..., self._hidden]
        for layer in range(self._config.num_layers):
            yield from self._layer(f"model.layers.{layer}.")

    def _layer(self, base: str) -> Iterator[tuple[str, Tensor]]:
        config, neurons = self._config, self._shuffled(self._config.intermediate)
        heads = [self._shuffled(config.head_dim) + config.head_dim * head for head in range(config.kv_heads)]
        values = torch.cat(heads)
        mixed = torch.cat([heads[head // config.groups] - head // config.groups * config.head_dim
                           + head * config.head_dim for head in range(config.heads)])
        places = {"v_proj": values, "o_proj": self._hidden, "gate_proj": neurons, "up_proj": neurons,
                  "down_proj": self._hidden, "layernorm": self._hidden}
        inputs = {"o_proj": mixed, "down_proj": neurons}
        for name, shape in self._config.layer_shapes(0).items():
            rest = name.removeprefix("model.layers.0.")
            tensor = self._read(base + rest)
            place = next((place for part, place in places.items() if part in rest), None)
            if place is not None:
                tensor = tensor[place]
            if len(shape) == 2:
                tensor = tensor[:, next((place for part, place in inputs.items() if part in rest), self._hidden)]
            yield base + rest, tensor

    def _read(self, name: str) -> Tensor:
        return self._files.tensor(name, torch.float32)

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)


def _config(config: ModelConfig) -> dict[str, object]:
    assert config.rope.attention_factor == 1
    theta = config.rope.inv_freq[1] ** (-config.head_dim / 2)
    return {"architectures": [FAMILIES[config.family].architecture], "model_type": config.family,
            "num_hidden_layers": config.num_layers, "hidden_size": config.hidden, "head_dim": config.head_dim,
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
            "intermediate_size": config.intermediate, "vocab_size": config.vocab_size, "rms_norm_eps": config.rms_eps,
            "rope_theta": round(theta, 3), "tie_word_embeddings": config.tied, "attention_bias": config.o_bias,
            "max_position_embeddings": config.max_positions, "hidden_act": "silu"}
