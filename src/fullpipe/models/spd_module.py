"""The Pipeline Draft Module of SPD (arXiv 2605.30852): it reads hidden states of every depth of the pipeline.

One definition for training and decoding. Its rows are tokens; what a row shows of a token is its *type*: type k is a
linear map of the hidden states after the first k + 1 of the module's `bounds` (0 layers: the embedding). A token that
has just entered the pipeline is a row of type 0, one that has left it a row of the last type. The rows go through a few
decoder layers of the target's family; the target's final norm and a head over a draft vocabulary end it.

Depth decides how old knowledge about a token may be, and so who may see what:

- a row of a completed token sees completed tokens only, so it can be kept for good;
- a row of a token in flight sees the tokens before it as deep as they are *now*.

`Layout` is that rule for a training text, where every position is the newest token once; the draft on its
station applies it to the tokens that are really in flight. In the first layer a row's key and value follow from its
type alone; deeper they also depend on how deep its neighbours were. So with one layer a block of rows for each type
is exact, with more there is one for each token in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fullpipe.models.config import ModelConfig
from fullpipe.models.linear import Linear, can_pack
from fullpipe.models.spd_checkpoint import ParityFixture

Cache = tuple[Tensor, Tensor]  # keys and values, [batch, rows, kv_heads, head_dim]


class Shape(Protocol):
    """What a module's tensors look like; `spd_checkpoint.ModuleConfig` has it all."""

    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def rms_eps(self) -> float: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def bounds(self) -> tuple[int, ...]: ...
    @property
    def draft_vocab_size(self) -> int: ...
    @property
    def shared_head(self) -> bool: ...


class PipelineDraftModule(nn.Module):
    """Tensor names are those of the reference's version 11 (notes, spd.md section 5.1).

    rope: rotation of the target. The target's final norm, and with `shared_head` the rows of its head that belong to
    the draft vocabulary, come in by `adopt`: they are frozen and no part of the module's state.
    """

    final_norm: Tensor
    head_rows: Tensor
    frequencies: Tensor
    feature_scale: Tensor

    def __init__(self, shape: Shape, target: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        hidden = shape.hidden
        self.aggr_projs = nn.ModuleList(
            nn.Linear((k + 1) * hidden, hidden, bias=False) for k in range(len(shape.bounds)))
        self.spec_layers = nn.ModuleList(SpecLayer(shape) for _ in range(shape.num_layers))
        self.lm_head = None if shape.shared_head else nn.Linear(hidden, shape.draft_vocab_size, bias=False)
        self._attention_factor = target.rope.attention_factor
        self.register_buffer("frequencies", torch.tensor(target.rope.inv_freq, dtype=torch.float32), persistent=False)
        self.register_buffer("final_norm", torch.ones(hidden), persistent=False)
        self.register_buffer("head_rows", torch.empty(0), persistent=False)
        self.register_buffer("feature_scale", torch.empty(0), persistent=False)
        self.checkpointing = False  # compute the layers again in the backward pass instead of keeping them

    def adopt(self, final_norm: Tensor, head_rows: Tensor | None) -> None:
        """Take over what stays the target's: its final norm [hidden], and its head's rows [draft vocab, hidden]."""
        self.final_norm = final_norm.detach().clone()
        if head_rows is not None:
            self.head_rows = head_rows.detach().clone()

    def aggregate(self, features: Tensor, kind: int) -> Tensor:
        """Rows of one type: [..., bounds, hidden] with at least the first kind + 1 bounds -> [..., hidden]."""
        read = features[..., : kind + 1, :]
        if len(self.feature_scale):
            read = read * self.feature_scale[: kind + 1].to(read.dtype)
        projected: Tensor = self.aggr_projs[kind](read.flatten(-2))
        return projected

    def scale_features(self, scale: Tensor) -> None:
        """While training, multiply features by `scale` [bounds, hidden] first. A few of a hidden state's numbers are
        hundreds of times the others, and an optimiser that moves every weight by the same amount would be led by
        them. `folded` makes it part of the weights."""
        self.feature_scale = scale

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The module's state without the scale: the same function of plain features."""
        state = {name: value.detach().clone() for name, value in self.state_dict().items()}
        if len(self.feature_scale):
            for kind in range(len(self.aggr_projs)):
                state[f"aggr_projs.{kind}.weight"] *= self.feature_scale[: kind + 1].flatten()
        return state

    def forward(self, x: Tensor, positions: Tensor, masks: Sequence[Tensor], queries: Tensor,
                past: Sequence[Cache] = ()) -> tuple[Tensor, list[Cache]]:
        """Rows through all layers.

        x: [batch, rows, hidden]. positions: int64 [rows]. queries: int64 [q], the rows whose answer is wanted; the
        last layer computes no others. past: for each layer keys and values of rows seen earlier.
        masks: bool, True = attend, [rows, past + rows] for every layer but the last, [q, past + rows] for that.

        Returns hidden states [batch, q, hidden] before the final norm, and each layer's keys and values of `rows`.
        """
        turn = self._turn(positions)
        everyone = torch.arange(x.shape[1], device=x.device)
        caches: list[Cache] = []
        for index, layer in enumerate(self.spec_layers):
            rows = queries if index + 1 == len(self.spec_layers) else everyone
            arguments = (x, turn, masks[index], rows, past[index] if past else None)
            if self.checkpointing and torch.is_grad_enabled():
                x, cache = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, cache = layer(*arguments)
            caches.append(cache)
        return x, caches

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [..., hidden] -> float32 [..., draft vocab]."""
        normed = _rms(hidden, self.final_norm, self.shape.rms_eps)
        scores = self.lm_head(normed) if self.lm_head is not None else F.linear(normed, self.head_rows.to(normed.dtype))
        return scores.float()

    def pack(self) -> None:
        """For decoding: weights in oneDNN's layout where the dtype allows. They can no longer be read or trained."""
        dtype = next(self.parameters()).dtype
        if not can_pack(dtype):
            return
        if self.lm_head is None:
            self.lm_head = nn.Linear(self.shape.hidden, len(self.head_rows), bias=False, dtype=dtype)
            self.lm_head.weight = nn.Parameter(self.head_rows.to(dtype), requires_grad=False)
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, _Packed(child))

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * self._attention_factor, angles.sin() * self._attention_factor


class SpecLayer(nn.Module):
    """A dense decoder layer, pre-norm, grouped-query attention, SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = _Norm(shape.hidden, shape.rms_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = _Norm(shape.hidden, shape.rms_eps)
        self.mlp = _Mlp(shape)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, queries: Tensor,
                past: Cache | None) -> tuple[Tensor, Cache]:
        """x: [batch, rows, hidden]; turn: cosine and sine, each [rows, head_dim]; the rest as in
        `PipelineDraftModule.forward`. Returns [batch, q, hidden] and the keys and values of `x`."""
        normed = self.input_layernorm(x)
        mixed, cache = self.self_attn(normed, turn, mask, queries, past)
        hidden = x[:, queries] + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._size, self._kv_heads, self._groups = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, wide, bias=shape.attention_bias)
        self.k_proj = nn.Linear(shape.hidden, narrow, bias=shape.attention_bias)
        self.v_proj = nn.Linear(shape.hidden, narrow, bias=shape.attention_bias)
        self.o_proj = nn.Linear(wide, shape.hidden, bias=False)
        self.q_norm = _Norm(shape.head_dim, shape.rms_eps) if shape.qk_norm else None
        self.k_norm = _Norm(shape.head_dim, shape.rms_eps) if shape.qk_norm else None

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, queries: Tensor,
                past: Cache | None) -> tuple[Tensor, Cache]:
        batch, count, groups = len(x), len(queries), self._groups
        q = self.q_proj(x[:, queries]).view(batch, count, -1, self._size)
        k = self.k_proj(x).view(batch, x.shape[1], -1, self._size)
        v = self.v_proj(x).view(batch, x.shape[1], -1, self._size)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cosine, sine = turn
        q, k = _turned(q, cosine[queries], sine[queries]), _turned(k, cosine, sine)
        keys, values = (k, v) if past is None else (torch.cat((past[0], k), 1), torch.cat((past[1], v), 1))
        # The query heads that share a key-value head stand one after another as rows of one product.
        q = q.view(batch, count, self._kv_heads, groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(q, keys.transpose(1, 2).to(q.dtype), values.transpose(1, 2).to(q.dtype),
                                               attn_mask=mask.repeat(groups, 1))
        mixed = mixed.view(batch, self._kv_heads, groups, count, -1).permute(0, 3, 1, 2, 4).flatten(2)
        return self.o_proj(mixed), (k, v)


class _Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms(x, self.weight, self._eps)


class _Packed(nn.Module):
    """A linear map whose weight is packed for few rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = linear.bias.detach() if linear.bias is not None else None
        self._linear = Linear(linear.weight.detach(), bias, packed=True)

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of [batch, rows, heads, head_dim]."""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x.float() * cosine[:, None] + turned * sine[:, None]).to(x.dtype)


@torch.no_grad()
def fixture_logits(module: PipelineDraftModule, fixture: ParityFixture) -> Tensor:
    """What a module says to a parity fixture: float32 [q, draft vocab]."""
    dtype = next(module.aggr_projs.parameters()).dtype
    x = torch.empty(1, len(fixture.positions), module.shape.hidden, dtype=dtype)
    for kind, where in fixture.rows.items():
        x[0, where] = module.aggregate(fixture.features[kind].to(dtype), kind)
    layers = module.shape.num_layers
    masks = [fixture.mask] * (layers - 1) + [fixture.mask[fixture.queries]]
    hidden, _ = module(x, fixture.positions, masks, fixture.queries)
    return module.logits(hidden)[0]


# ---- who sees what ---------------------------------------------------------------------------------------------


def types_by_depth(bounds: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The row type of a token that has finished d stages, d = 0..n: the last whose bounds are all there, -1 if none
    is (notes, spd.md section 1.2). ends: layers finished after each stage."""
    finished = [0, *ends]
    return [sum(bound <= layers for bound in bounds) - 1 for layers in finished]


def depths_in_flight(stages: int, fill: int, *, shift: int = 0, lead: int = 0) -> list[int]:
    """Depths of the tokens in flight, the newest first, one token entering per step.

    fill: tokens in flight, 1..n; those before them are complete. shift: depth of the newest, above 0 where an older
    token's followers are asked for anew. lead: tokens beyond the newest launched one that have not entered yet.
    """
    assert 1 <= fill <= stages and shift >= 0
    return [max(0, lag - lead) + shift for lag in range(max(0, fill - shift) + lead)]


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of a training text of `size` tokens: blocks of `size` rows, one row per position.

    block_types: row type of each block. masks: one per layer, as `PipelineDraftModule.forward` wants them.
    queries: int64 [size], the rows that stand for "this token is the newest".
    """

    size: int
    block_types: list[int]
    masks: list[Tensor]
    queries: Tensor

    @classmethod
    def of(cls, in_flight: Sequence[int], complete: int, size: int, layers: int) -> Layout:
        """in_flight: row types of the tokens in flight, the newest first. complete: type of all before them."""
        types = [*in_flight, complete]
        if layers == 1:
            blocks = sorted(set(types))
            masks = [_seen([blocks.index(kind) for kind in types], size, len(blocks))]
            newest = blocks.index(types[0])
        else:
            blocks, newest = types, 0
            every = torch.cat([_seen(list(range(first, len(types))), size, len(types)) for first in range(len(types))])
            masks = [every] * (layers - 1) + [every[:size]]
        return cls(size, blocks, masks, torch.arange(newest * size, (newest + 1) * size))

    def rows(self, module: PipelineDraftModule, features: Tensor) -> Tensor:
        """features [batch, size, bounds, hidden] -> rows [batch, blocks * size, hidden]."""
        made = {kind: module.aggregate(features, kind) for kind in set(self.block_types)}
        return torch.cat([made[kind] for kind in self.block_types], 1)

    def positions(self) -> Tensor:
        """int64 [blocks * size]."""
        return torch.arange(self.size, device=self.queries.device).repeat(len(self.block_types))

    def to(self, device: torch.device) -> Layout:
        return Layout(self.size, self.block_types, [mask.to(device) for mask in self.masks], self.queries.to(device))


def _seen(block_by_lag: list[int], size: int, blocks: int) -> Tensor:
    """Whom each position of one block sees: bool [size, blocks * size]. A token that lies j positions back is seen
    as the row of block `block_by_lag[j]`, the last entry counting for all further back."""
    lag = torch.arange(size)[:, None] - torch.arange(size)
    block = torch.tensor(block_by_lag)[lag.clamp(0, len(block_by_lag) - 1)]
    return torch.cat([(block == index) & (lag >= 0) for index in range(blocks)], 1)
