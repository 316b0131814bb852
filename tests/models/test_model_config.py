"""Configurations: read as transformers and llama.cpp write them; what we cannot compute is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models.gguf_config import read_gguf
from fullpipe.models.hf_config import read_hf
from tiny import FAMILIES, tiny_model

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 100,
         "max_position_embeddings": 512, "rope_theta": 500.0}
GGUF = {"general.architecture": "qwen2", "qwen2.block_count": 3, "qwen2.context_length": 512,
        "qwen2.embedding_length": 64, "qwen2.feed_forward_length": 96, "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2, "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_is_known_by_name_and_shape(family: str) -> None:
    model = tiny_model(family)
    config = read_hf(model.config.to_dict() | {"architectures": None})
    shapes = config.outer_shapes()
    for layer in range(config.num_layers):
        shapes |= config.layer_shapes(layer)
    assert shapes == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_sizes_add_up_to_the_model() -> None:
    model = tiny_model("qwen2")
    config = read_hf(model.config.to_dict())
    size = config.sizes(4)
    assert (size.embedding_bytes + config.num_layers * size.layer_bytes + size.head_bytes
            == 4 * sum(parameter.numel() for parameter in model.parameters()))
    assert (size.kv_bytes, size.row_bytes) == (2 * 2 * 16 * 4, 64 * 4)
    assert size.head_flops == 2 * 96 * 64


def test_old_and_new_spelling_of_rope_mean_the_same() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = read_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    new = read_hf({k: v for k, v in LLAMA.items() if k != "rope_theta"}
                              | {"rope_parameters": scaling | {"rope_theta": 500.0}})
    assert old.rope == new.rope
    assert old.rope.inv_freq[1] == pytest.approx(500.0 ** (-2 / 16) / 2)


@pytest.mark.parametrize("kinds", [5, "full_attention", [{"a": 1}]])
def test_types_of_layers_that_are_no_list_of_words(kinds: Any) -> None:
    with pytest.raises(DamagedModel, match="for layer_types, where a list of words is needed"):
        read_hf(LLAMA | {"layer_types": kinds})


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "gemma3"}, "gemma3"),
    ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"num_local_experts": 8}, "mixture of experts"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"quantization_config": {"bits": 4}}, "a quantization_config without quant_method"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"partial_rotary_factor": 0.5}, "50%"),
    ({"model_type": "mistral", "architectures": None, "sliding_window": 128}, "sliding window"),
    ({"model_type": "mistral", "architectures": None, "max_position_embeddings": 8192}, "sliding window"),
    ({"model_type": "qwen2", "architectures": None, "sliding_window": 64, "use_sliding_window": True,
      "max_window_layers": 2}, "sliding window"),
    ({"model_type": "qwen2", "architectures": None, "sliding_window": 64,
      "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding window"),
    ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
])
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named) as caught:
        read_hf(LLAMA | changes)
    assert caught.value.hint


@pytest.mark.parametrize("changes", [
    {"model_type": "mistral", "architectures": None, "sliding_window": None},
    {"model_type": "mistral", "architectures": None, "sliding_window": 512},
    {"model_type": "qwen2", "architectures": None, "sliding_window": 64, "use_sliding_window": False},
    {"model_type": "qwen2", "architectures": None, "sliding_window": 64, "layer_types": ["full_attention"] * 3},
])
def test_a_sliding_window_that_hides_nothing_is_fine(changes: dict[str, Any]) -> None:
    assert read_hf(LLAMA | changes).max_positions == 512


def test_layers_behind_the_last_that_slides_are_none() -> None:
    """transformers: layers from max_window_layers on slide, 28 where it is not named; the window is 4096 then."""
    asked = {"model_type": "qwen2", "architectures": None, "use_sliding_window": True, "max_position_embeddings": 8192}
    assert read_hf(LLAMA | asked).max_positions == 8192
    with pytest.raises(UnsupportedModel, match="4096 of 8192"):
        read_hf(LLAMA | asked | {"max_window_layers": 0})


def test_a_stretched_context_may_be_wider_than_the_window() -> None:
    mistral = {"model_type": "mistral", "architectures": None, "sliding_window": 512}
    with pytest.raises(UnsupportedModel, match="512 of 2048"):
        read_hf(LLAMA | mistral | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    with pytest.raises(UnsupportedModel, match="64 of 512"):  # transformers' Mistral does not read layer_types
        read_hf(LLAMA | mistral | {"sliding_window": 64, "layer_types": ["full_attention"] * 3})


@pytest.mark.parametrize("family", FAMILIES)
def test_key_value_heads_that_are_left_out_or_null(family: str) -> None:
    """As transformers' classes have it: null is one for each head, leaving them out is the family's own number."""
    values = LLAMA | {"model_type": family, "architectures": None, "sliding_window": None, "num_attention_heads": 64,
                      "hidden_size": 128}
    assert read_hf(values | {"num_key_value_heads": None}).kv_heads == 64
    del values["num_key_value_heads"]
    assert read_hf(values).kv_heads == {"llama": 64, "mistral": 8}.get(family, 32)


@pytest.mark.parametrize(("changes", "named"), [
    ({"general.architecture": "gemma2"}, "gemma2"),
    ({"qwen2.expert_count": 8}, "mixture of experts"),
    ({"qwen2.attention.sliding_window": 64}, "sliding window"),
    ({"qwen2.rope.scaling.type": "longrope"}, "longrope"),
    ({"qwen2.rope.dimension_count": 8}, "50%"),
    ({"qwen2.attention.key_length": 16, "qwen2.attention.value_length": 32}, "differ in size"),
])
def test_what_is_not_supported_in_gguf_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read_gguf(GGUF | changes, vocab_size=100, tied=False)


@pytest.mark.parametrize(("changes", "named"), [
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"hidden_size": "many"}, "hidden_size"),
    ({"intermediate_size": 0}, "intermediate_size"),
    ({"num_key_value_heads": 3}, "key-value heads"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
])
def test_nonsense_is_a_damaged_model(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(DamagedModel, match=named):
        read_hf(LLAMA | changes)


def test_gguf_yarn_is_that_of_config_json() -> None:
    gguf = read_gguf(
        GGUF | {"qwen2.rope.freq_base": 1e6, "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
                "qwen2.rope.scaling.original_context_length": 128}, vocab_size=100, tied=False)
    hf = read_hf(LLAMA | {"rope_theta": 1e6, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}})
    assert gguf.rope == hf.rope


def test_llama3_frequencies_from_gguf_must_fit_the_head() -> None:
    with pytest.raises(DamagedModel, match="rope_freqs"):
        read_gguf(GGUF, vocab_size=100, tied=False, rope_factors=(1.0, 2.0))
