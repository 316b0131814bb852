"""The metadata of a GGUF file as a `ModelConfig`. No torch.

What a key means, and what leaving it out means, is what llama.cpp makes of it. Keys that begin with the architecture's
name describe the model: one of them that is neither read nor known to be harmless must say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fullpipe.errors import DamagedModel
from fullpipe.models import rope
from fullpipe.models.config import FAMILIES, ModelConfig
from fullpipe.models.keys import Keys, Neutral, unsupported
from fullpipe.models.rope import Rope

# A Mistral is stored as a llama, with the rows of q and k in llama's order; it needs no entry.
_FAMILIES = ("llama", "qwen2", "qwen3")
# Other models' whole namespaces.
_FOREIGN = ("adapter.", "clip.", "diffusion.", "xielu.")

READ = frozenset((
    "block_count", "context_length", "embedding_length", "feed_forward_length", "expert_count",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"))

NEUTRAL: Neutral = {
    "attention.causal": (True,), "attention.output_scale": (0, 1), "embedding_scale": (0, 1), "logit_scale": (0, 1),
    "residual_scale": (0, 1), "rope.scaling.yarn_ext_factor": (1,), "tensor_data_layout": ("Meta AI original pth",)}

HARMLESS = frozenset((
    "vocab_size",  # the embedding's rows are counted
    "features_length", "embedding_length_out", "decoder_start_token_id", "rope.scaling.finetuned",
    "attention.layer_norm_epsilon", "attention.group_norm_epsilon", "attention.group_norm_groups",  # no such norms here
    # of experts, and there are none; of sliding windows, and none is in force
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_chunk_feed_forward_length",
    "expert_used_count", "expert_shared_count", "expert_group_count", "expert_group_used_count", "expert_weights_scale",
    "expert_weights_norm", "expert_gating_func", "expert_group_scale", "experts_per_group", "moe_every_n_layers",
    "moe_latent_size", "interleave_moe_layer_step", "leading_dense_block_count", "router_logit_softcapping",
    "attention.sliding_window_pattern", "attention.key_length_swa", "attention.value_length_swa",
    "rope.dimension_count_swa", "rope.freq_base_swa"))


def read_gguf(values: Mapping[str, Any], *, vocab_size: int, tied: bool, o_bias: bool = False, qkv_bias: bool = False,
              rope_factors: tuple[float, ...] | None = None) -> ModelConfig:
    """The model that the metadata describes, and what only the list of tensors tells.

    vocab_size: rows of the embedding. tied: no `output.weight`. rope_factors: the tensor `rope_freqs.weight`
    (head_dim / 2 divisors of the frequencies), where Llama 3's scaling is stored.

    Raises `UnsupportedModel` naming what is not implemented, `DamagedModel` naming a key that is missing or nonsense.
    """
    arch = str(values.get("general.architecture"))
    _refuse_kinds(values, arch)
    layers = Keys(values, "the GGUF file").count(f"{arch}.block_count")
    keys = Keys({key.removeprefix(f"{arch}."): _of_all_layers(key, value, layers) for key, value in values.items()
                 if key.startswith(f"{arch}.")}, f"the GGUF file ({arch}.*)")
    context = keys.count("context_length")
    _refuse_options(keys, arch, context)
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = _head_dim(keys, hidden // heads)
    turning, max_positions = _rope_and_positions(keys, head_dim, context, rope_factors)
    return ModelConfig(
        family=arch, num_layers=layers, hidden=hidden, heads=heads,
        kv_heads=keys.count("attention.head_count_kv", heads), head_dim=head_dim,
        intermediate=keys.count("feed_forward_length"), vocab_size=vocab_size,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"), rope=turning, qkv_bias=qkv_bias, o_bias=o_bias,
        qk_norm=FAMILIES[arch].qk_norm, tied=tied, max_positions=max_positions)


def _refuse_kinds(values: Mapping[str, Any], arch: str) -> None:
    if (kind := values.get("general.type", "model")) != "model":
        raise unsupported(f"GGUF files of type {kind!r} (general.type)")
    if arch not in _FAMILIES:
        raise unsupported(f"GGUF files of architecture {arch!r}")
    if foreign := sorted(key for key in values if key.startswith(_FOREIGN)):
        raise unsupported(f"GGUF files with {foreign[0]}")


def _of_all_layers(key: str, value: Any, layers: int) -> Any:
    """A number for each layer is one for all of them where they agree; llama.cpp takes both."""
    if not isinstance(value, list) or len(value) != layers or len(set(value)) == 1:
        return value[0] if isinstance(value, list) and len(value) == layers else value
    raise unsupported(f"models whose layers differ ({key} in the GGUF file)")


def _refuse_options(keys: Keys, arch: str, context: int) -> None:
    if keys.get("expert_count"):
        raise unsupported("models with a mixture of experts")
    if keys.get("attention.sliding_window") and keys.count("attention.sliding_window") < context:
        raise unsupported(f"{arch} models with a sliding window in force")
    keys.refuse(sorted(keys.values.keys() - READ - HARMLESS), NEUTRAL)


def _head_dim(keys: Keys, usual: int) -> int:
    size = keys.count("attention.key_length", usual)
    if (values := keys.count("attention.value_length", usual)) != size:
        raise unsupported(f"models whose keys and values differ in size ({size} and {values})")
    if (turned := keys.count("rope.dimension_count", size)) != size:
        raise rope.unknown(f"rotary embedding over {turned / size:.0%} of a head (rope.dimension_count)")
    return size


def _rope_and_positions(keys: Keys, head_dim: int, context: int,
                        divisors: tuple[float, ...] | None) -> tuple[Rope, int]:
    """Rotary embedding, and positions of the model with it: context_length as in llama.cpp; more where YaRN stretches
    the original ones, that are named, beyond it."""
    theta = keys.positive("rope.freq_base", 10000.0)
    plain = _divided(rope.plain(theta, head_dim), divisors)
    kind = str(keys.get("rope.scaling.type") or "linear")  # llama.cpp's, where a factor stands alone
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0)) or 1.0
    scale = keys.number("rope.scaling.attn_factor", 1.0)  # on top of YaRN's own
    if kind not in ("none", "linear", "yarn"):
        raise rope.unknown(f"RoPE scaling of type {kind!r}")
    if kind == "none":
        return Rope(inv_freq=plain, attention_factor=scale), context
    if factor < 0:
        raise DamagedModel(f"the GGUF file has a RoPE scaling factor of {factor}", hint="Fetch the file again.")
    if kind == "linear":
        return Rope(inv_freq=rope.linear(plain, factor), attention_factor=scale), context
    original = keys.count("rope.scaling.original_context_length", context)
    frequencies = rope.yarn(plain, factor, theta=theta, original=original,
                            beta_fast=keys.positive("rope.scaling.yarn_beta_fast", 32),
                            beta_slow=keys.positive("rope.scaling.yarn_beta_slow", 1))
    # The converter puts config.json's attention_factor here, which llama.cpp does not read of these families.
    usual = keys.number("rope.scaling.yarn_attn_factor", rope.yarn_attention(factor))
    stretched = int(original * factor) if "rope.scaling.original_context_length" in keys.values else context
    return Rope(inv_freq=frequencies, attention_factor=usual * scale), max(context, stretched)


def _divided(frequencies: rope.Frequencies, divisors: tuple[float, ...] | None) -> rope.Frequencies:
    if divisors is None:
        return frequencies
    if len(divisors) != len(frequencies):
        raise DamagedModel(f"rope_freqs.weight has {len(divisors)} numbers, a head of {2 * len(frequencies)} needs "
                           f"{len(frequencies)}", hint="Fetch the file again.")
    return tuple(f / divisor for f, divisor in zip(frequencies, divisors, strict=True))
