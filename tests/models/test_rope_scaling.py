"""Scaled rotary embeddings: transformers' numbers, vLLM's lengths, llama.cpp's defaults, and refusals by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models.config import ModelConfig
from fullpipe.models.gguf_config import read_gguf
from fullpipe.models.hf_config import read_hf
from fullpipe.models.weights import open_model
from tiny import tiny_model, write_gguf

SMALL = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

SCALINGS = [
    ({"rope_type": "default"}, 512), ({"rope_type": "linear", "factor": 4.0}, 2048), (YARN, 2048),
    ({"rope_type": "yarn", "factor": 4.0}, 2048), (YARN | {"original_max_position_embeddings": 64}, 256),
    (YARN | {"attention_factor": 1.25}, 2048), (YARN | {"mscale": 0.8, "mscale_all_dim": 0.6}, 2048),
    (YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False}, 2048),
    ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}, 512),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256, **BANDS}, 512)]


def from_gguf(**scaling: Any) -> ModelConfig:
    values = {"block_count": 3, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
              "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6}
    named = {f"qwen2.{key}": value for key, value in values.items()}
    named |= {f"qwen2.rope.{key.replace('__', '.')}": value for key, value in scaling.items()}
    return read_gguf({"general.architecture": "qwen2"} | named, vocab_size=100, tied=True)


@pytest.mark.parametrize(("scaling", "positions"), SCALINGS)
def test_it_is_what_transformers_computes_and_as_long_as_vllm_has_it(scaling: dict[str, Any], positions: int) -> None:
    """vLLM: linear times the model's positions, YaRN times the original ones, llama3's are stretched already."""
    ours = read_hf(SMALL | {"rope_scaling": scaling, "rope_theta": 5000.0})
    config = LlamaConfig(**{**SMALL, "rope_parameters": dict(scaling) | {"rope_theta": 5000.0}})
    theirs = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(torch.tensor(ours.rope.inv_freq), theirs.inv_freq, rtol=1e-5, atol=0)
    assert ours.rope.attention_factor == pytest.approx(theirs.attention_scaling)
    assert ours.max_positions == positions


def test_the_shortest_of_the_lengths_counts_as_in_vllm() -> None:
    assert read_hf(SMALL | {"max_sequence_length": 300}).max_positions == 300
    assert read_hf(SMALL | {"model_max_length": 1e30}).max_positions == 512


def test_scalings_by_type_of_layer() -> None:
    nested = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    plain = read_hf(SMALL | {"rope_parameters": YARN})
    assert read_hf(SMALL | {"rope_parameters": nested, "layer_types": ["full_attention"] * 3}) == plain
    assert read_hf(SMALL | {"rope_parameters": nested}) == plain
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    for given in (nested, {"full_attention": YARN}, {"sliding_attention": YARN, "full_attention": None}):
        with pytest.raises(UnsupportedModel, match="differs from layer to layer"):
            read_hf(SMALL | {"rope_parameters": given, "layer_types": kinds})


@pytest.mark.parametrize(("scaling", "named"), [
    ({"rope_type": "dynamic", "factor": 2.0}, "RoPE scaling of type 'dynamic'"),
    ({"rope_type": "longrope", "factor": 2.0}, "RoPE scaling of type 'longrope'"),
    ({"type": "su", "factor": 2.0}, "RoPE scaling of type 'su'"),
    ({"type": "mrope", "mrope_section": [2, 3, 3]}, "RoPE scaling of type 'mrope'"),
    ({"rope_type": "proportional", "factor": 2.0}, "RoPE scaling of type 'proportional'"),
    ({"factor": 2.0}, "without a type"), ({"rope_type": "default", "factor": 2.0}, "factor of 2.0"),
    ({"rope_type": "default", "partial_rotary_factor": 0.25}, "25% of a head")])
def test_an_unknown_scaling_is_named_with_those_that_are_known(scaling: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named) as caught:
        read_hf(SMALL | {"rope_scaling": scaling})
    hint = str(caught.value.hint)
    assert "linear, llama3 or yarn" in hint and "families" not in hint


@pytest.mark.parametrize(("scaling", "named"), [
    ({"rope_type": "linear", "factor": 0}, "factor"), ({"rope_type": "linear", "factor": "4.0"}, "'4.0' for factor"),
    (YARN | {"original_max_position_embeddings": "many"}, "'many'"), (YARN | {"truncate": "yes"}, "truncate"),
    ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low_freq_factor"),
    ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta")])
def test_nonsense_in_a_scaling_is_a_damaged_model(scaling: dict[str, Any], named: str) -> None:
    with pytest.raises(DamagedModel, match=named):
        read_hf(SMALL | {"rope_scaling": scaling})


# ---- GGUF ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [
    {"scaling__type": "linear", "scaling__factor": 4.0}, {"scaling__factor": 4.0}, {"scale_linear": 4.0}])
def test_in_gguf_a_factor_alone_is_linear(given: dict[str, Any]) -> None:
    assert [4 * f for f in from_gguf(**given).rope.inv_freq] == pytest.approx(from_gguf().rope.inv_freq)
    assert from_gguf(**given | {"scaling__type": "none"}).rope == from_gguf().rope
    assert from_gguf(**given).max_positions == 512, "context_length is what llama.cpp takes"


def test_attention_factors_of_yarn_in_gguf() -> None:
    """llama.cpp multiplies its own 1 + 0.1 ln(factor) by attn_factor; the converter writes config.json's whole one."""
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 512}
    usual = 1 + 0.1 * math.log(4)
    assert from_gguf(**yarn).rope.attention_factor == pytest.approx(usual)
    assert from_gguf(**yarn, scaling__attn_factor=1.5).rope.attention_factor == pytest.approx(1.5 * usual)
    assert from_gguf(**yarn, scaling__yarn_attn_factor=1.5).rope.attention_factor == 1.5
    assert from_gguf(scaling__attn_factor=1.5).rope.attention_factor == 1.5


def test_how_far_yarn_reaches_in_gguf() -> None:
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0}
    assert from_gguf(**yarn).max_positions == 512, "stretched already, for all we know"
    assert from_gguf(**yarn, scaling__original_context_length=512).max_positions == 2048
    assert from_gguf(**yarn, scaling__original_context_length=64).max_positions == 512


def test_a_key_with_a_number_for_each_layer_is_not_skipped_in_the_file(tmp_path: Path) -> None:
    """Arrays of the header are skipped, for the vocabulary is long: not those that describe the model."""
    path = write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf", metadata={"qwen2.rope.dimension_sections": [2, 3, 3]})
    with pytest.raises(UnsupportedModel, match=r"rope\.dimension_sections = \[2, 3, 3\]"):
        open_model(path)
