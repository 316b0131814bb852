"""What a model looks like: one record, whatever file it came from. No torch.

Four families share one decoder; how they differ is in `FAMILIES`, one entry each. Everything that would need
other arithmetic (mixture of experts, a sliding window in force, another activation, a RoPE scaling that depends on
the length of the context) is refused by name rather than computed wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fullpipe.errors import DamagedModel, UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family differs from the others, and what its config.json means by leaving a key out.

    qkv_bias, o_bias: whether these projections have a bias; None: as the key `attention_bias` says.
    qk_norm: RMS norm over each head of query and key, before RoPE.
    sliding_window: the window where config.json does not mention one (transformers' own default).
    """

    architecture: str
    qkv_bias: bool | None
    o_bias: bool | None
    qk_norm: bool = False
    sliding_window: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 32768


FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", qkv_bias=None, o_bias=None, max_positions=2048),
    "mistral": Family(architecture="MistralForCausalLM", qkv_bias=False, o_bias=False, sliding_window=4096,
                      kv_heads=8, max_positions=131072),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, o_bias=False, kv_heads=32),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qkv_bias=None, o_bias=None, qk_norm=True, kv_heads=32,
                    head_dim=128),
}

# In GGUF a Mistral is stored as a llama, with the rows of q and k in llama's order; it needs no entry.
_GGUF_FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding: the inverse frequencies, already scaled, and the factor on cosine and sine.

    inv_freq: head_dim / 2 numbers, radians per position.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes and floating-point operations of the parts that a planner cuts between.

    `*_bytes`: weights as kept in memory, one copy each (a tied head is counted as a head of its own, for a
    step reads it as one). `*_flops`: operations per row, attention over the context not included.
    `kv_bytes`: of one slot in one layer. `row_bytes`: of the hidden state that travels between stages.
    """

    embedding_bytes: int
    layer_bytes: int
    head_bytes: int
    layer_flops: int
    head_flops: int
    kv_bytes: int
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a decoder-only model. Built by `from_hf` or `from_gguf`.

    intermediate: width of the gated MLP. max_positions: positions the model was made for.
    bos: first token of a text or None; eos: every token that ends one.
    """

    family: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    rms_eps: float
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for ok, what in (
            (self.num_layers >= 1, "no layers"),
            (self.kv_heads >= 1 and self.heads % self.kv_heads == 0,
             f"{self.heads} heads cannot share {self.kv_heads} key-value heads"),
            (self.head_dim % 2 == 0, f"an odd head size of {self.head_dim}"),
            (len(self.rope.inv_freq) == self.head_dim // 2,
             f"{len(self.rope.inv_freq)} RoPE frequencies for a head of {self.head_dim}"),
        ):
            if not ok:
                raise DamagedModel(f"the model's configuration makes no sense: {what}",
                                   hint="Fetch the model again, or report it if it is as its authors made it.")

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a layer, as transformers names them."""
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.q_size, self.hidden),
            "self_attn.k_proj.weight": (self.kv_size, self.hidden),
            "self_attn.v_proj.weight": (self.kv_size, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.q_size),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }
        if self.qkv_bias:
            shapes |= {"self_attn.q_proj.bias": (self.q_size,), "self_attn.k_proj.bias": (self.kv_size,),
                       "self_attn.v_proj.bias": (self.kv_size,)}
        if self.o_bias:
            shapes["self_attn.o_proj.bias"] = (self.hidden,)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor outside the layers; no `lm_head.weight` when tied."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden), "model.norm.weight": (self.hidden,)}
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocab_size, self.hidden)}

    def sizes(self, itemsize: int) -> Sizes:
        """What a planner needs to know, for weights and caches of `itemsize` bytes per number."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes(0).values())
        matrices = sum(math.prod(shape) for shape in self.layer_shapes(0).values() if len(shape) == 2)
        table = self.vocab_size * self.hidden
        return Sizes(
            embedding_bytes=table * itemsize, layer_bytes=layer * itemsize,
            head_bytes=(table + self.hidden) * itemsize, layer_flops=2 * matrices, head_flops=2 * table,
            kv_bytes=2 * self.kv_size * itemsize, row_bytes=self.hidden * itemsize)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the dictionary in config.json, of transformers 4 or 5.

        Raises `UnsupportedModel` naming what is not implemented, `DamagedModel` naming a missing key.
        """
        name = values.get("model_type")
        family = FAMILIES.get(str(name))
        if family is None:
            raise _unsupported(f"models of type {name!r} ({_first(values.get('architectures'))})")
        _refuse_hf_options(values, family)
        read = _Reader(values, "config.json")
        hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        head_dim = values.get("head_dim") or family.head_dim or hidden // heads
        has_bias = bool(values.get("attention_bias", False))
        max_positions = int(values.get("max_position_embeddings") or family.max_positions)
        return cls(
            family=str(name), num_layers=read.integer("num_hidden_layers"), hidden=hidden, heads=heads,
            kv_heads=int(values.get("num_key_value_heads") or family.kv_heads or heads),
            head_dim=head_dim, intermediate=read.integer("intermediate_size"),
            vocab_size=read.integer("vocab_size"), rms_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope=_rope_from_hf(values, head_dim, max_positions),
            qkv_bias=has_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=has_bias if family.o_bias is None else family.o_bias,
            qk_norm=family.qk_norm, tied=bool(values.get("tie_word_embeddings", False)),
            max_positions=max_positions, bos=_one_token(values.get("bos_token_id")),
            eos=token_ids(values.get("eos_token_id")))

    @classmethod
    def from_gguf(cls, values: Mapping[str, Any], *, vocab_size: int, tied: bool, o_bias: bool = False,
                  qkv_bias: bool = False, rope_factors: tuple[float, ...] | None = None) -> ModelConfig:
        """From the metadata of a GGUF file, and what only its tensor list tells.

        vocab_size: rows of the embedding. tied: no `output.weight`. rope_factors: the tensor
        `rope_freqs.weight` (head_dim / 2 divisors of the frequencies), where Llama 3's scaling is stored.

        Raises `UnsupportedModel` naming what is not implemented, `DamagedModel` naming a missing key.
        """
        arch = values.get("general.architecture")
        if arch not in _GGUF_FAMILIES:
            raise _unsupported(f"GGUF files of architecture {arch!r}")
        family = FAMILIES[arch]
        read = _Reader({key.removeprefix(f"{arch}."): value for key, value in values.items()}, "GGUF metadata")
        max_positions = read.integer("context_length")
        _refuse_gguf_options(read.values, arch, max_positions)
        hidden, heads = read.integer("embedding_length"), read.integer("attention.head_count")
        head_dim = int(read.values.get("attention.key_length") or hidden // heads)
        _refuse_partial(int(read.values.get("rope.dimension_count", head_dim)) / head_dim)
        return cls(
            family=arch, num_layers=read.integer("block_count"), hidden=hidden, heads=heads,
            kv_heads=int(read.values.get("attention.head_count_kv", heads)), head_dim=head_dim,
            intermediate=read.integer("feed_forward_length"), vocab_size=vocab_size,
            rms_eps=read.number("attention.layer_norm_rms_epsilon"),
            rope=_rope_from_gguf(read.values, head_dim, max_positions, rope_factors),
            qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=family.qk_norm, tied=tied, max_positions=max_positions,
            bos=_one_token(values.get("tokenizer.ggml.bos_token_id")),
            eos=token_ids([values[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
                           if key in values]))


def token_ids(value: Any) -> tuple[int, ...]:
    """An end-of-text entry (absent, one number, several) as distinct ids, in order."""
    if value is None:
        return ()
    return tuple(dict.fromkeys(int(v) for v in (value if isinstance(value, list | tuple) else [value])))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads required keys; a missing or wrongly typed one is a damaged file."""

    values: Mapping[str, Any]
    source: str = field(default="config.json")

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DamagedModel(f"{self.source} has {value!r} for {key}, where a number is needed",
                               hint="Fetch the model again.")
        return value

    def integer(self, key: str) -> int:
        value = self.number(key)
        if value != int(value) or value < 1:
            raise DamagedModel(f"{self.source} has {value!r} for {key}, where a count is needed",
                               hint="Fetch the model again.")
        return int(value)


def _unsupported(what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{what} are not supported",
                            hint=f"Supported are dense models of the families {', '.join(FAMILIES)}.")


def _first(architectures: Any) -> str:
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "no architecture named"


def _one_token(value: Any) -> int | None:
    return next(iter(token_ids(value)), None)


def _refuse_hf_options(values: Mapping[str, Any], family: Family) -> None:
    architectures = values.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise _unsupported(f"models of architecture {_first(architectures)}")
    if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise _unsupported(f"models with the activation {activation!r}")
    if values.get("mlp_bias"):
        raise _unsupported("models with a bias in the MLP (mlp_bias)")
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModel(f"safetensors weights quantised with {method!r} cannot be read",
                               hint="Use the unquantised weights, or a GGUF file.")
    if any(values.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise _unsupported("models with a mixture of experts")
    _refuse_window(values, family)


def _refuse_window(values: Mapping[str, Any], family: Family) -> None:
    """Refuse a sliding window that is narrower than the context: attention here reaches every position."""
    window = values.get("sliding_window", family.sliding_window)
    in_force = (values.get("use_sliding_window", False) if family.sliding_window is None else True)
    layers = values.get("layer_types") or []
    if strange := sorted(set(layers) - {"full_attention", "sliding_attention"}):
        raise _unsupported(f"models with layers of type {strange[0]!r}")
    if layers and "sliding_attention" not in layers:
        return
    limit = int(values.get("max_position_embeddings") or family.max_positions)
    if window and (in_force or "sliding_attention" in layers) and window < limit:
        raise _unsupported(f"models with a sliding window in force ({window} of {limit} positions)")


def _refuse_gguf_options(values: Mapping[str, Any], arch: str, max_positions: int) -> None:
    if values.get("expert_count"):
        raise _unsupported("models with a mixture of experts")
    if 0 < (values.get("attention.sliding_window") or 0) < max_positions:
        raise _unsupported(f"{arch} models with a sliding window in force")
    if values.get("attention.value_length", values.get("attention.key_length")) != values.get("attention.key_length"):
        raise _unsupported(f"{arch} models whose keys and values differ in size")


def _refuse_partial(share: float) -> None:
    if share != 1:
        raise _unsupported(f"models with rotary embedding over {share:.0%} of a head")


def _rope_from_hf(values: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    given = dict(values.get("rope_scaling") or {}) | dict(values.get("rope_parameters") or {})
    theta = float(given.get("rope_theta") or values.get("rope_theta") or 10000.0)
    _refuse_partial(float(given.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0))
    kind = given.get("rope_type") or given.get("type") or "default"
    original = int(given.get("original_max_position_embeddings")
                   or values.get("original_max_position_embeddings") or max_positions)
    return _scaled_rope(str(kind), _frequencies(theta, head_dim), theta, original, given)


def _rope_from_gguf(values: Mapping[str, Any], head_dim: int, max_positions: int,
                    factors: tuple[float, ...] | None) -> Rope:
    theta = float(values.get("rope.freq_base", 10000.0))
    kind = str(values.get("rope.scaling.type", "none"))
    plain = _frequencies(theta, head_dim)
    if factors is not None:
        if len(factors) != len(plain):
            raise DamagedModel(f"rope_freqs.weight has {len(factors)} numbers, a head of {head_dim} needs {len(plain)}",
                               hint="Fetch the file again.")
        plain = tuple(f / divisor for f, divisor in zip(plain, factors, strict=True))
    given = {"factor": values.get("rope.scaling.factor"),
             "attention_factor": values.get("rope.scaling.attn_factor")}
    original = int(values.get("rope.scaling.original_context_length") or max_positions)
    return _scaled_rope("default" if kind == "none" else kind, plain, theta, original, given)


def _frequencies(theta: float, head_dim: int) -> tuple[float, ...]:
    return tuple(theta ** (-i / head_dim) for i in range(0, head_dim, 2))


def _scaled_rope(kind: str, plain: tuple[float, ...], theta: float, original: int, given: Mapping[str, Any]) -> Rope:
    if kind == "default":
        return Rope(inv_freq=plain)
    if kind not in ("linear", "llama3", "yarn"):
        raise _unsupported(f"models with RoPE scaling of type {kind!r}")
    read = _Reader(given, "the RoPE scaling")
    factor = read.number("factor")
    if kind == "linear":
        return Rope(inv_freq=tuple(f / factor for f in plain))
    if kind == "llama3":
        return Rope(inv_freq=_llama3(plain, factor, original, read))
    return Rope(inv_freq=_yarn(plain, factor, theta, original, given), attention_factor=_yarn_attention(factor, given))


def _llama3(plain: tuple[float, ...], factor: float, original: int, read: _Reader) -> tuple[float, ...]:
    """Slow frequencies divided by `factor`, fast ones kept, a linear blend (in turns per context) between."""
    low, high = read.number("low_freq_factor"), read.number("high_freq_factor")

    def scaled(f: float) -> float:
        turns = original * f / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - keep) * f / factor + keep * f

    return tuple(scaled(f) for f in plain)


def _yarn(plain: tuple[float, ...], factor: float, theta: float, original: int,
          given: Mapping[str, Any]) -> tuple[float, ...]:
    """Dimensions that turn often are kept, those that turn rarely are divided, a linear ramp between."""
    dim = 2 * len(plain)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001

    def scaled(i: int, f: float) -> float:
        divide = min(max((i - low) / span, 0.0), 1.0)
        return divide * f / factor + (1 - divide) * f

    return tuple(scaled(i, f) for i, f in enumerate(plain))


def _yarn_attention(factor: float, given: Mapping[str, Any]) -> float:
    if (explicit := given.get("attention_factor")) is not None:
        return float(explicit)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = given.get("mscale"), given.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)
