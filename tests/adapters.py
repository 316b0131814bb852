"""LoRA adapters as peft writes them, made without it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
               "mlp.up_proj", "mlp.down_proj")
_BEFORE = "base_model.model."


def config_of(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json with what peft 0.17 writes."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "revision": None,
            "inference_mode": True, "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj"],
            "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "use_rslora": False, "use_dora": False,
            "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
            "layers_pattern": None, "layer_replication": None, "megatron_config": None,
            "megatron_core": "megatron.core", "lora_bias": False, "loftq_config": {}, "corda_config": None,
            "eva_config": None, "exclude_modules": None, "trainable_token_indices": None, "target_parameters": None,
            "qalora_group_size": 16, "use_qalora": False, "auto_mapping": None, "peft_version": "0.17.1", **changes}


def shapes_of(model: torch.nn.Module, leaves: Sequence[str] = PROJECTIONS,
              layers: Sequence[int] | None = None) -> dict[str, tuple[int, int]]:
    """Modules of a model of transformers, and the shapes of their matrices."""
    names = dict(model.named_parameters())
    return {name.removesuffix(".weight"): (values.shape[0], values.shape[1]) for name, values in names.items()
            if name.removesuffix(".weight").endswith(tuple(leaves)) and values.ndim == 2
            and (layers is None or int(name.split(".")[2]) in layers)}


def write_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], *, seed: int = 0, size: float = 0.1,
                  dtype: torch.dtype = torch.float32, tensors: Mapping[str, Tensor] | None = None,
                  ranks: Mapping[str, int] | None = None, alphas: Mapping[str, float] | None = None,
                  **changes: Any) -> dict[str, Tensor]:
    """Write one. Returns what it adds to each module's matrix, float64.

    ranks, alphas: of modules whose names end so, by the patterns of the configuration. tensors: further ones.
    """
    config = config_of(rank_pattern=dict(ranks or {}), alpha_pattern=dict(alphas or {}), **changes)
    generator, stored, added = torch.Generator().manual_seed(seed), dict(tensors or {}), dict[str, Tensor]()
    for module, (outputs, inputs) in shapes.items():
        leaf = module.rpartition(".")[2]
        rank, alpha = config["rank_pattern"].get(leaf, config["r"]), config["alpha_pattern"].get(
            leaf, config["lora_alpha"])
        down = (size * torch.randn(rank, inputs, generator=generator)).to(dtype)
        up = (size * torch.randn(outputs, rank, generator=generator)).to(dtype)
        stored[f"{_BEFORE}{module}.lora_A.weight"], stored[f"{_BEFORE}{module}.lora_B.weight"] = down, up
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        added[module] = scale * (up.double() @ down.double())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return added


def merge(model: torch.nn.Module, added: Mapping[str, Tensor], through: torch.dtype = torch.float32) -> None:
    """Put it into a model of transformers, rounded to what a file would store."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, values in added.items():
            weight = modules[name].weight
            weight.copy_((weight.double() + values).to(through))
