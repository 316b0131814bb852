"""What a model looks like: one record, whatever file it came from. No torch.

Four families share one decoder; how they differ is in `FAMILIES`, one entry each. `hf_config` and `gguf_config` read
the files. Everything that would need other arithmetic (mixture of experts, a sliding window in force, another
activation, a RoPE scaling that depends on the length of the context) is refused there by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fullpipe.errors import DamagedModel
from fullpipe.models.rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family differs from the others, and what its config.json means by leaving a key out.

    qkv_bias, o_bias: whether these projections have a bias; None: as the key `attention_bias` says.
    qk_norm: RMS norm over each head of query and key, before RoPE.
    sliding_window: the window where config.json does not mention one (transformers' own default).
    slides: the layers with a window: "all" that have one, those "asked" for by use_sliding_window, or "none"; those
    that layer_types names come to the latter two.
    """

    architecture: str
    qkv_bias: bool | None
    o_bias: bool | None
    qk_norm: bool = False
    sliding_window: int | None = None
    slides: str = "none"
    kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 32768


FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", qkv_bias=None, o_bias=None, max_positions=2048),
    "mistral": Family(architecture="MistralForCausalLM", qkv_bias=False, o_bias=False, sliding_window=4096,
                      slides="all", kv_heads=8, max_positions=131072),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, o_bias=False, sliding_window=4096,
                    slides="asked", kv_heads=32),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qkv_bias=None, o_bias=None, qk_norm=True, sliding_window=4096,
                    slides="asked", kv_heads=32, head_dim=128),
}


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
    """Shape and constants of a decoder-only model. Built by `hf_config.read_hf` or `gguf_config.read_gguf`.

    intermediate: width of the gated MLP. max_positions: positions the model was made for. Which tokens begin and end a
    text is the tokenizer's matter.
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
