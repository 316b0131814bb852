"""Tiny random models of every family: built in memory by transformers, saved where a test wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LAYERS = 5
VOCAB = 96

_KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),  # heads * head_dim is not hidden
}
FAMILIES = tuple(_KINDS)


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model with 5 layers, 4 heads over 2 key-value heads; norms and biases are random too.

    changes: keys of config.json that differ.
    """
    config_type, model_type, special = _KINDS[family]
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": 1,
              "eos_token_id": 2, "pad_token_id": None, **special, **changes}
    model = model_type(config_type(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, *, shard_size: str = "5GB") -> Path:
    """Write it as transformers does."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


_GGUF_NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
               "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
               "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
               "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


_KINDS_OF_KEYS = {str: gguf.GGUFWriter.add_string, int: gguf.GGUFWriter.add_uint32,
                  float: gguf.GGUFWriter.add_float32, list: gguf.GGUFWriter.add_array}


def write_gguf(model: PreTrainedModel, path: Path, *, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
               rope_factors: Tensor | None = None, metadata: dict[str, Any] | None = None,
               tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a llama, qwen2 or qwen3 model as llama.cpp's converter does; matrices in `kind`, vectors in F32.

    rope_factors: becomes `rope_freqs.weight`. metadata: further keys. tensors: further ones.
    """
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        _KINDS_OF_KEYS[type(value)](writer, key, value)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, _gguf_name(name), _llama_order(name, values, config), kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    module, leaf = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{leaf}"


def _llama_order(name: str, values: Tensor, config: Any) -> Tensor:
    """llama.cpp rotates neighbours: q and k of a llama have their rows interleaved."""
    if config.model_type != "llama" or not any(part in name for part in ("q_proj", "k_proj")):
        return values
    size = _head_dim(config)
    return values.view(-1, 2, size // 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    array = values.detach().to(torch.float32).contiguous().numpy()
    if array.ndim < 2 or kind is gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, array.astype(np.float32))
        return
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
