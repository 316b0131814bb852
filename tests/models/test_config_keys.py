"""Every key that transformers and llama.cpp write is read, refused by name, or known to be harmless."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import gguf
import pytest
from transformers import GenerationConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import RopeParameters

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models import gguf_config, hf_config
from fullpipe.models.config import ModelConfig
from fullpipe.models.gguf_config import read_gguf
from fullpipe.models.hf_config import read_hf

SMALL = {"architectures": None, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 512}
LLAMA, QWEN = SMALL | {"model_type": "llama"}, SMALL | {"model_type": "qwen2"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}
GGUF = {"block_count": 3, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6}
GGUF_YARN = GGUF | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 128}

# What transformers 4 wrote beside: its common attributes, as `PretrainedConfig.to_dict` of 4.57 has them.
OLD = ("_name_or_path", "_attn_implementation_autoset", "add_cross_attention", "cross_attention_hidden_size",
       "decoder_start_token_id", "finetuning_task", "is_decoder", "output_attentions", "prefix", "pruned_heads",
       "rope_scaling", "rope_theta", "sep_token_id", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
       "tokenizer_class", "torch_dtype", "torchscript", "use_bfloat16", "quantization_config", "pretraining_tp",
       "attention_bias", "mlp_bias", "max_window_layers", "use_sliding_window", "head_dim")


def transformers_keys() -> set[str]:
    """All that config.json of a family may have; keys of generation in it are dropped by transformers itself."""
    found = set(OLD)
    for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config):
        found |= set(kind().to_dict())
    return found - set(GenerationConfig._get_default_generation_params())


def test_every_key_of_transformers_is_classified() -> None:
    known = hf_config.READ | hf_config.NEUTRAL.keys() | hf_config.HARMLESS
    assert not transformers_keys() - known, "say what the reader makes of it: hf_config.READ, NEUTRAL or HARMLESS"
    assert set(RopeParameters.__annotations__) - hf_config.ROPE_READ == {"short_factor", "long_factor", "mrope_section"}


# A key that is said to be read, and a base and another value with which the model is another, or refused.
READ: dict[str, tuple[dict[str, Any], Any]] = {
    "architectures": (LLAMA, ["Other"]), "attention_bias": (LLAMA, True),
    "head_dim": (LLAMA, 32), "hidden_size": (LLAMA, 128),
    "intermediate_size": (LLAMA, 32), "layer_types": (LLAMA, ["linear_attention"] * 3),
    "max_window_layers": (QWEN | {"use_sliding_window": True, "sliding_window": 8}, 1), "model_type": (LLAMA, "qwen3"),
    "num_attention_heads": (LLAMA, 8), "num_hidden_layers": (LLAMA, 4), "num_key_value_heads": (LLAMA, 4),
    "original_max_position_embeddings": (LLAMA | {"rope_scaling": YARN}, 64), "partial_rotary_factor": (LLAMA, 0.5),
    "rms_norm_eps": (LLAMA, 1e-5), "rope_parameters": (LLAMA, YARN), "rope_scaling": (LLAMA, YARN),
    "rope_theta": (LLAMA, 500.0), "sliding_window": (SMALL | {"model_type": "mistral", "sliding_window": None}, 8),
    "tie_word_embeddings": (LLAMA, True), "vocab_size": (LLAMA, 96),
    "use_sliding_window": (QWEN | {"max_window_layers": 0, "sliding_window": 8}, True),
    **dict.fromkeys(hf_config._LENGTHS, (LLAMA, 77)), **dict.fromkeys(hf_config._EXPERTS, (LLAMA, 8)),
    **{key: (LLAMA, {"quant_method": "gptq"}) for key in hf_config._QUANTISED}}


def outcome(values: dict[str, Any]) -> ModelConfig | str:
    try:
        return read_hf(values)
    except (UnsupportedModel, DamagedModel) as error:
        return error.message


def test_every_read_key_has_its_case() -> None:
    assert READ.keys() == hf_config.READ


@pytest.mark.parametrize("key", READ)
def test_a_key_that_is_read_counts(key: str) -> None:
    base, value = READ[key]
    assert isinstance(read_hf(base), ModelConfig)
    assert outcome(base | {key: value}) != outcome(base)


@pytest.mark.parametrize("key", hf_config.NEUTRAL)
def test_a_key_that_would_count_is_refused_by_name(key: str) -> None:
    for neutral in (None, *hf_config.NEUTRAL[key]):
        assert read_hf(LLAMA | {key: neutral}) == read_hf(LLAMA)
    with pytest.raises(UnsupportedModel, match=f"{key} = ") as caught:
        read_hf(LLAMA | {key: {"is_causal": False}.get(key, 13.0)})
    assert "take it out" in str(caught.value.hint)


def test_a_key_that_nobody_knows_is_let_be() -> None:
    assert read_hf(LLAMA | {"our_own_bookkeeping": {"run": 7}}) == read_hf(LLAMA)


ROPE_READ: dict[str, tuple[dict[str, Any], Any]] = {
    "rope_theta": (YARN, 500.0), "rope_type": (YARN, "linear"), "type": ({"factor": 2.0, "type": "linear"}, "dynamic"),
    "factor": (YARN, 2.0), "original_max_position_embeddings": (YARN, 64), "attention_factor": (YARN, 1.5),
    "beta_fast": (YARN, 2), "beta_slow": (YARN, 4), "low_freq_factor": (LLAMA3, 2.0),
    "high_freq_factor": (LLAMA3, 8.0), "mscale": (YARN | {"mscale_all_dim": 0.5}, 2.0),
    "mscale_all_dim": (YARN | {"mscale": 2.0}, 0.5), "truncate": (YARN, False), "partial_rotary_factor": (YARN, 0.5)}


def test_every_read_key_of_rope_has_its_case() -> None:
    assert ROPE_READ.keys() == hf_config.ROPE_READ


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ROPE_READ)
def test_a_key_of_rope_that_is_read_counts(key: str, name: str) -> None:
    base, value = ROPE_READ[key]
    assert outcome(LLAMA | {name: base | {key: value}}) != outcome(LLAMA | {name: base})


@pytest.mark.parametrize("key", ["short_factor", "long_factor", "mrope_section", "llama_4_scaling_beta", "alpha"])
def test_any_other_key_of_rope_is_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{key} = "):
        read_hf(LLAMA | {"rope_scaling": YARN | {key: [2.0]}})


# ---- GGUF ------------------------------------------------------------------------------------------------


def gguf_keys(found: type = gguf.Keys) -> Iterator[str]:
    """Whatever the package has a name for."""
    for value in vars(found).values():
        if inspect.isclass(value):
            yield from gguf_keys(value)
        elif isinstance(value, str) and not value.startswith("gguf.") and "." in value:
            yield value


ARCH_KEYS = sorted({key.removeprefix("{arch}.") for key in gguf_keys() if key.startswith("{arch}.")})
NOT_OF_ARCH = {key.split(".")[0] for key in gguf_keys() if not key.startswith("{arch}.")}

GGUF_READ: dict[str, tuple[dict[str, Any], Any]] = {
    "block_count": (GGUF, 4), "context_length": (GGUF, 77), "embedding_length": (GGUF, 128),
    "feed_forward_length": (GGUF, 32), "expert_count": (GGUF, 8), "attention.head_count": (GGUF, 8),
    "attention.head_count_kv": (GGUF, 4), "attention.key_length": (GGUF, 32), "attention.value_length": (GGUF, 32),
    "attention.layer_norm_rms_epsilon": (GGUF, 1e-5), "attention.sliding_window": (GGUF, 8),
    "rope.dimension_count": (GGUF, 8), "rope.freq_base": (GGUF, 500.0), "rope.scale_linear": (GGUF, 4.0),
    "rope.scaling.attn_factor": (GGUF, 1.5), "rope.scaling.factor": (GGUF, 4.0),
    "rope.scaling.original_context_length": (GGUF_YARN, 256), "rope.scaling.type": (GGUF_YARN, "linear"),
    "rope.scaling.yarn_attn_factor": (GGUF_YARN, 1.5), "rope.scaling.yarn_beta_fast": (GGUF_YARN, 2.0),
    "rope.scaling.yarn_beta_slow": (GGUF_YARN, 4.0)}


def from_gguf(values: dict[str, Any], **more: Any) -> ModelConfig:
    named = {f"qwen2.{key}": value for key, value in values.items()}
    return read_gguf({"general.architecture": "qwen2"} | named | more, vocab_size=100, tied=True)


def gguf_outcome(values: dict[str, Any]) -> ModelConfig | str:
    try:
        return from_gguf(values)
    except (UnsupportedModel, DamagedModel) as error:
        return error.message


def test_the_package_has_no_namespace_that_we_do_not_know() -> None:
    """Of tokenizers and splits others take care; imatrix is bookkeeping, and the rest belongs to other models."""
    assert {"general", "split", "tokenizer", "imatrix", "adapter", "clip", "diffusion", "xielu"} == NOT_OF_ARCH
    assert GGUF_READ.keys() == gguf_config.READ


@pytest.mark.parametrize("key", sorted({*ARCH_KEYS, *gguf_config.READ, "a_key_of_next_year"}))
def test_a_key_of_the_architecture_counts_or_is_refused_or_is_known_to_be_harmless(key: str) -> None:
    if key in gguf_config.HARMLESS:
        assert from_gguf(GGUF | {key: 13}) == from_gguf(GGUF)
    elif key in gguf_config.READ:
        base, value = GGUF_READ[key]
        assert gguf_outcome(base | {key: value}) != gguf_outcome(base)
    else:
        for neutral in gguf_config.NEUTRAL.get(key, (0, False, [0, 0, 0])):
            assert from_gguf(GGUF | {key: neutral}) == from_gguf(GGUF)
        with pytest.raises(UnsupportedModel, match=f"{key} = ".replace("{", r"\{")):
            from_gguf(GGUF | {key: {"attention.causal": False}.get(key, 13.0)})


@pytest.mark.parametrize(("more", "named"), [
    ({"general.type": "adapter"}, "adapter"), ({"adapter.type": "lora"}, r"adapter\.type"),
    ({"xielu.beta": [0.5]}, r"xielu\.beta"), ({"diffusion.shift_logits": True}, r"diffusion\.shift_logits")])
def test_files_of_other_kinds_are_refused_by_name(more: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        from_gguf(GGUF, **more)


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_a_number_for_each_layer_is_one_where_they_agree(key: str) -> None:
    same = copy.deepcopy(GGUF) | {key: [GGUF[key]] * 3}
    assert from_gguf(same) == from_gguf(GGUF)
    with pytest.raises(UnsupportedModel, match=f"layers differ .*{key}"):
        from_gguf(same | {key: [GGUF[key], GGUF[key], 1]})
    with pytest.raises(DamagedModel, match=key):
        from_gguf(same | {key: [GGUF[key]] * 2})
