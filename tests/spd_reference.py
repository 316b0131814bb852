"""Files as the SPD reference writes them (version 11), and base models that are only a config and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB, LAYERS = 16, 4, 2, 8, 24, 40, 8
BOUNDS = [0, 2, 4, 6, 7]
DRAFT_IDS = [0, 1, 5, 7, 11, 12, 30, 39]


def state_dict(*, qk_norm: bool = True, gated: bool = False, bias: bool = False, types: int = len(BOUNDS),
               spec_layers: int = 2, draft_vocab: int = len(DRAFT_IDS), intermediate: int = INTERMEDIATE,
               seed: int = 0) -> dict[str, Tensor]:
    """Names and shapes of spd.md section 5.1, in bfloat16."""
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {f"aggr_projs.{k}.weight": (HIDDEN, (k + 1) * HIDDEN) for k in range(types)}
    for layer in range(spec_layers):
        one: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (wide * (1 + gated), HIDDEN), "self_attn.k_proj.weight": (narrow, HIDDEN),
            "self_attn.v_proj.weight": (narrow, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, wide),
            "mlp.gate_proj.weight": (intermediate, HIDDEN), "mlp.up_proj.weight": (intermediate, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, intermediate)}
        if qk_norm:
            one |= {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
        if bias:
            one |= {"self_attn.q_proj.bias": (wide,), "self_attn.k_proj.bias": (narrow,),
                    "self_attn.v_proj.bias": (narrow,), "self_attn.o_proj.bias": (HIDDEN,)}
        shapes |= {f"spec_layers.{layer}.{name}": shape for name, shape in one.items()}
    shapes["lm_head.weight"] = (draft_vocab, HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def config(**changes: Any) -> dict[str, Any]:
    """The keys of spd.md section 5.2; a change to None leaves one out."""
    values = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "draft_vocab_size": len(DRAFT_IDS), "num_stages": 4,
              "num_spec_layers": 2, "num_aggr_types": len(BOUNDS), "version": 11, "trained_with_use_deepest": True,
              "aggr_feature_bound": BOUNDS, "base_model_path": "/private/models/base",
              "spec_intermediate_size_fallback": 9216, "draft_token_ids": DRAFT_IDS, **changes}
    return {key: value for key, value in values.items() if value is not None}


def write(file: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    torch.save({"state_dict": state_dict() if tensors is None else tensors, "config": config(**changes)}, file)
    return file


def write_base(folder: Path, family: str = "qwen3", **changes: Any) -> Path:
    """config.json and tokenizer.json of a base model; no weights."""
    kind = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}.get(family, family)
    values = {"model_type": family, "architectures": [kind], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
              "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
              "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
              "max_position_embeddings": 512, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, first: str = "a") -> Path:
    """VOCAB tokens of one character each."""
    symbols = {chr(ord(first) + i): i for i in range(VOCAB)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=symbols, merges=[])).save(str(folder / "tokenizer.json"))
    return folder
