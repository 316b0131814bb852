"""config.json, of transformers 4 or 5, as a `ModelConfig`. No torch.

What a key means, and what leaving it out means, is what transformers' class of that family makes of it. A key that is
unknown here is let be, for people add their own; those that are known to change results are in `NEUTRAL`. `READ` and
`HARMLESS` have the rest of what transformers writes, so that a test can ask whether there is a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models import rope
from fullpipe.models.config import FAMILIES, Family, ModelConfig
from fullpipe.models.keys import Keys, Neutral, unsupported
from fullpipe.models.rope import Rope

# Of these vLLM takes the smallest.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
            "max_sequence_length", "max_seq_length", "seq_len")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_QUANTISED = ("quantization_config", "compression_config")

READ = frozenset((
    "architectures", "attention_bias", "head_dim", "hidden_size", "intermediate_size",
    "layer_types", "max_window_layers", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "original_max_position_embeddings", "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window", "vocab_size",
    *_LENGTHS, *_EXPERTS, *_QUANTISED))

NEUTRAL: Neutral = {
    "hidden_act": ("silu", "swish"), "mlp_bias": (False,),
    # scales, of Granite, Cohere, MiniCPM, Gemma and others
    "attention_multiplier": (), "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,),
    "logit_scale": (1,), "scale_emb": (1,), "scale_depth": (), "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "clip_qkv": (0,), "swiglu_limit": (0,),
    # attention of another kind
    "is_causal": (True,), "use_bidirectional_attention": (False,), "is_encoder_decoder": (False,),
    "add_cross_attention": (False,), "alibi": (False,), "use_parallel_residual": (False,), "pruned_heads": ({},),
    "per_layer_config": ({},), "attention_chunk_size": (0,), "attn_temperature_tuning": (False,),
    "dual_chunk_attention_config": ({},), "llama_4_scaling": ({},),
    # positions of another kind
    "no_rope_layers": ([],), "no_rope_layer_interval": (0,), "rope_interleave": (False,), "rope_interleaved": (False,),
    "rotary_pct": (1,), "rope_pct": (1,),
}

HARMLESS = frozenset((
    # of training, of bookkeeping, and of tasks and outputs that are not asked for here
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "dtype", "finetuning_task", "id2label",
    "initializer_range", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers_version", "output_attentions", "output_hidden_states", "return_dict",
    # how something is computed, not what
    "_attn_implementation_autoset", "chunk_size_feed_forward", "pretraining_tp", "tf_legacy_loss", "torchscript",
    "use_bfloat16", "use_cache",
    # of text, which is the tokenizer's matter
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "prefix", "sep_token_id",
    # of decoders beside an encoder
    "cross_attention_hidden_size", "is_decoder", "tie_encoder_decoder",
    # layers behind those that speak: they guess ahead
    "num_nextn_predict_layers"))

ROPE_READ = frozenset((
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
    "partial_rotary_factor"))
ROPE_HARMLESS = frozenset(("finetuned",))


def read_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The model that config.json describes.

    Raises `UnsupportedModel` naming what is not implemented, `DamagedModel` naming a key that is missing or nonsense.
    """
    keys = Keys(values, "config.json")
    name = str(keys.get("model_type"))
    family = FAMILIES.get(name)
    if family is None:
        raise unsupported(f"models of type {name!r} ({_first(values.get('architectures'))})")
    _refuse_kinds(keys, family)
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    head_dim = keys.count("head_dim", family.head_dim or hidden // heads)
    layers, has_bias = keys.count("num_hidden_layers"), keys.flag("attention_bias")
    turning, max_positions = _rope_and_positions(keys, family, head_dim)
    _refuse_window(keys, family, layers, max_positions)
    return ModelConfig(
        family=name, num_layers=layers, hidden=hidden, heads=heads, kv_heads=_kv_heads(keys, family, heads),
        head_dim=head_dim, intermediate=keys.count("intermediate_size"), vocab_size=keys.count("vocab_size"),
        rms_eps=keys.number("rms_norm_eps", 1e-6), rope=turning,
        qkv_bias=has_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=has_bias if family.o_bias is None else family.o_bias,
        qk_norm=family.qk_norm, tied=keys.flag("tie_word_embeddings"), max_positions=max_positions)


def _kv_heads(keys: Keys, family: Family, heads: int) -> int:
    """Null means one for each head; only who leaves the key out gets the family's number."""
    usual = heads if "num_key_value_heads" in keys.values else family.kv_heads or heads
    return keys.count("num_key_value_heads", usual)


def _first(architectures: Any) -> str:
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "no architecture named"


def _refuse_kinds(keys: Keys, family: Family) -> None:
    architectures = keys.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise unsupported(f"models of architecture {_first(architectures)}")
    if any(keys.get(key) for key in _EXPERTS):
        raise unsupported("models with a mixture of experts")
    for key in _QUANTISED:
        if keys.get(key):
            raise _quantised(key, keys.get(key))
    keys.refuse(NEUTRAL, NEUTRAL)


def _quantised(key: str, value: Any) -> UnsupportedModel:
    method = value.get("quant_method") if isinstance(value, Mapping) else value
    what = f"weights quantised with {method!r}" if method else f"quantised weights (a {key} without quant_method)"
    return UnsupportedModel(f"config.json tells of {what}, which cannot be read from safetensors",
                            hint="Use the unquantised weights, or a GGUF file. If the weights are not quantised, take "
                                 f"{key} out of config.json.")


def _refuse_window(keys: Keys, family: Family, layers: int, positions: int) -> None:
    """Refuse a sliding window that is narrower than the context: attention here reaches every position."""
    kinds = keys.words("layer_types")
    if strange := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise unsupported(f"models with layers of type {strange[0]!r}")
    in_force = "sliding_attention" in kinds
    if family.slides == "all":  # whatever layer_types says, which transformers' class does not read
        in_force = True
    elif family.slides == "asked" and not kinds:
        in_force = keys.flag("use_sliding_window") and keys.number("max_window_layers", 28) < layers
    window = keys.values.get("sliding_window", family.sliding_window)
    if in_force and window and keys.count("sliding_window", family.sliding_window) < positions:
        raise UnsupportedModel(
            f"models with a sliding window in force ({window} of {positions} positions) are not supported",
            hint="Use a model without one. If your texts are shorter than the window, it changes nothing: take it out "
                 "of config.json, or set max_position_embeddings to it.")


def _rope_and_positions(keys: Keys, family: Family, head_dim: int) -> tuple[Rope, int]:
    """Rotary embedding, and positions of the model with it, as vLLM counts them: linear scaling stretches the model's
    by the factor, YaRN the original ones, and of llama3's they are stretched already."""
    trained = keys.count("max_position_embeddings", family.max_positions)
    positions = min([trained, *(keys.count(key) for key in _LENGTHS if keys.get(key) is not None)])
    given = _rope_keys(keys)
    kind = given.get("rope_type") or given.get("type") or ("default" if given.get("factor") in (None, 1) else None)
    theta = given.positive("rope_theta", keys.positive("rope_theta", 10000.0))
    plain = rope.plain(theta, head_dim)
    _refuse_rope_keys(given, keys, kind)
    if kind == "default":
        return Rope(inv_freq=plain), positions
    # transformers lets the one outside the scaling stand above the one within
    original = keys.count("original_max_position_embeddings",
                          given.count("original_max_position_embeddings", trained))
    if kind == "yarn":
        factor = given.positive("factor", trained / original if original < trained else None)
        return _yarn(given, plain, factor, theta, original), int(original * factor)
    factor = given.positive("factor")
    if kind == "linear":
        return Rope(inv_freq=rope.linear(plain, factor)), int(positions * factor)
    return Rope(inv_freq=_llama3(given, plain, factor, original)), positions


def _rope_keys(keys: Keys) -> Keys:
    """The keys of the scaling. transformers 4 has them in rope_scaling, which 5 still lets go first; 5 may have some
    for each type of layer."""
    name = "rope_scaling" if keys.part("rope_scaling") else "rope_parameters"
    given, source = keys.part(name), f"{name} of config.json"
    nested = {kind: one for kind, one in given.items() if isinstance(one, Mapping)}
    if not nested and not {"full_attention", "sliding_attention"} & given.keys():
        return Keys(given, source)
    used = [nested.get(kind) for kind in dict.fromkeys(keys.words("layer_types") or ["full_attention"])]
    if used[0] is None or any(one != used[0] for one in used):
        raise rope.unknown(f"rotary embedding that differs from layer to layer ({source}: {', '.join(nested)})")
    return Keys(used[0], source)


def _refuse_rope_keys(given: Keys, keys: Keys, kind: Any) -> None:
    if kind is None:
        raise rope.unknown(f"RoPE scaling without a type ({given.source} has a factor and no rope_type)")
    if kind not in ("default", *rope.KINDS):
        raise rope.unknown(f"RoPE scaling of type {kind!r}")
    if kind == "default" and given.get("factor") not in (None, 1):
        raise rope.unknown(f"RoPE scaling of type 'default' with a factor of {given.get('factor')} ({given.source})")
    share = given.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    if share != 1:
        raise rope.unknown(f"rotary embedding over {share:.0%} of a head (partial_rotary_factor)")
    given.refuse(given.values.keys() - ROPE_READ - ROPE_HARMLESS, {})


def _llama3(given: Keys, plain: rope.Frequencies, factor: float, original: int) -> rope.Frequencies:
    low, high = given.positive("low_freq_factor"), given.positive("high_freq_factor")
    if not low < high:
        raise DamagedModel(f"{given.source} has a low_freq_factor of {low} that is not below the high_freq_factor of "
                           f"{high}", hint="Fetch the model again, or mend the file if it is your own.")
    return rope.llama3(plain, factor, original=original, low=low, high=high)


def _yarn(given: Keys, plain: rope.Frequencies, factor: float, theta: float, original: int) -> Rope:
    frequencies = rope.yarn(plain, factor, theta=theta, original=original, truncate=given.flag("truncate", True),
                            beta_fast=given.number("beta_fast", 32) or 32, beta_slow=given.number("beta_slow", 1) or 1)
    mscale, of_all = given.number("mscale", 0), given.number("mscale_all_dim", 0)
    usual = (rope.yarn_attention(factor, mscale) / rope.yarn_attention(factor, of_all) if mscale and of_all
             else rope.yarn_attention(factor))
    return Rope(inv_freq=frequencies, attention_factor=given.number("attention_factor", usual))
