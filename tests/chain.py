"""A chain model says what a test wants: its next token is a fixed function of the last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_chain(folder: Path, backend: Any, says: Sequence[int], *, config: dict[str, Any] | None = None,
                **files: dict[str, Any]) -> Path:
    """Write a Llama of one layer, with this tokenizer: after the token says[i] comes says[i + 1], and after the last
    of them, or any other token, the last again.

    Attention and MLP add nothing, embeddings are unit vectors, and the head maps each to the token that follows.

    backend: a `tokenizers.Tokenizer`. says: token ids that differ. config: keys of config.json that differ.
    files: further JSON files by stem, such as `tokenizer_config` or `generation_config`.
    """
    assert len(set(says)) == len(says), "a token has one successor"
    size = -(-max(says[-1] + 1, backend.get_vocab_size(with_added_tokens=True)) // 8) * 8
    follows = torch.full((size,), says[-1])
    for token, successor in pairwise(says):
        follows[token] = successor
    eye, nothing = torch.eye(size), torch.zeros(size, size)
    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": eye, "lm_head.weight": eye[follows].T.contiguous(),
        "model.norm.weight": torch.ones(size), f"{layer}input_layernorm.weight": torch.ones(size),
        f"{layer}post_attention_layernorm.weight": torch.ones(size), f"{layer}self_attn.o_proj.weight": nothing,
        f"{layer}mlp.down_proj.weight": torch.zeros(size, 8),
        **{f"{layer}self_attn.{name}_proj.weight": nothing.clone() for name in "qkv"},
        **{f"{layer}mlp.{name}_proj.weight": torch.zeros(8, size) for name in ("gate", "up")},
    }
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": size, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 8, "vocab_size": size,
              "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    backend.save(str(folder / "tokenizer.json"))
    for name, content in {"config": values | (config or {}), **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
