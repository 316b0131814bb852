"""One lean decoder for every family: a run of layers, with or without embedding and head.

Written for steps of few rows over large weights. What a step costs is reading the weights; everything else is kept
to a few operations per layer. Query, key and value are one product, gate and up another; key and value go into
the cache in one write; rotation treats values as rows turned by angle 0, so that no part is cut off and glued on.

A row's result does not depend on its company. Every product has at least `MIN_ROWS` rows (padding costs nothing
where reading weights is what takes time), which makes rows independent bit for bit; and attention sums over slots
in float64, so that which slots hold the context, and in which order, vanishes when the sum is rounded. What a
speculative step says of a token is then what a plain step says, in bfloat16 too; docs and tests state how far.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fullpipe.models.arena import SLOT_MULTIPLE, KVArena, Writes
from fullpipe.models.config import ModelConfig, Rope
from fullpipe.models.files import ModelFiles
from fullpipe.models.linear import MIN_ROWS, Linear, can_pack

# Rows of the head that are packed at a time: packing needs a second copy, so of a small part only.
_HEAD_ROWS = 4096

# Layers, or parts of the head, for each thread that loads: the second copies of all threads stay small beside them.
_PARTS_PER_WORKER = 3

_FEW_ROWS, _FEW_SLOTS = 7, 255  # so many of a request attend in the time that starting an operation takes

_Part = TypeVar("_Part")


@dataclass(slots=True)
class Segment:
    """The rows of one request in a step.

    start, end: row range in the step.
    cache: the request's arena on this slice.
    slots: int64 [r]: where each row writes its key and value; distinct.
    mask: bool [r, width], width <= the arena's capacity: True = attend. A row's own slot must be included.
    """

    start: int
    end: int
    cache: KVArena
    slots: Tensor
    mask: Tensor


@dataclass(slots=True)
class _View:
    """Segments of about the same size, which attend in one product, as every layer needs them.

    m: the most rows that one of them has, and width the most slots; others are filled up.
    rows: int64 [segments * m]: which row of the step each of theirs is; fillers are row 0.
    taken, put: of those rows the real ones, and where their results go; None: all, in order.
    bias: float32 [segments * kv_heads, m * groups (at least MIN_ROWS), width], 0 or -inf.
    keys, values: float32 and float64 [segments * kv_heads, width, head_dim]: a layer's, filled anew for each.
    filled: their parts that belong to a segment, keys of all and then values; zeros lie behind.
    caches: for each layer what goes there.
    """

    m: int
    rows: Tensor
    taken: Tensor | None
    put: Tensor
    bias: Tensor
    keys: Tensor
    values: Tensor
    filled: list[Tensor]
    caches: list[tuple[Tensor, ...]]


@dataclass(slots=True)
class _Turn:
    """Rotation of a step's rows, for query, key and value heads alike: [rows, heads + 2 * kv_heads, head_dim].

    sine: negative in the first half of a head.
    """

    cosine: Tensor
    sine: Tensor


@dataclass(slots=True)
class _Layer:
    """Weights of one layer. qk_norm: [heads + kv_heads, head_dim] or None."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class DecoderSlice:
    """Layers first_layer..last_layer (exclusive; none is fine) of a model, with its weights loaded.

    files: where the weights come from; only this slice's are read.
    dtype: float32 or bfloat16, of weights, hidden states and caches.
    packed: keep weights in oneDNN's layout; None: where that is possible.

    Raises what reading raises: `DamagedModel`, `UnsupportedModel`.
    """

    def __init__(self, files: ModelFiles, first_layer: int, last_layer: int, *, has_embedding: bool, has_head: bool,
                 dtype: torch.dtype, packed: bool | None = None) -> None:
        assert 0 <= first_layer <= last_layer <= files.config.num_layers
        self.config = files.config
        self.first_layer = first_layer
        self.dtype = dtype
        self.packed = can_pack(dtype) if packed is None else packed
        self._turner = _Turner(self.config, dtype)
        self._eps = torch.tensor(self.config.rms_eps, dtype=torch.float32)
        loader = _Loader(files, dtype, self.packed)
        with loader:
            self._layers = loader.layers(first_layer, last_layer)
            self._embedding = loader.embedding() if has_embedding else None
            self._head = loader.head(self._embedding) if has_head else None
            self._norm = loader.norm("model.norm.weight") if has_head else None

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def allocate(self, capacity: int) -> KVArena:
        """An empty arena for one request on this slice."""
        return KVArena.allocate(self.config, self.num_layers, capacity, self.dtype)

    @overload
    def forward(self, x: Tensor, positions: Tensor, segments: Sequence[Segment]) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, positions: Tensor, segments: Sequence[Segment],
                taps: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    @torch.inference_mode()
    def forward(self, x: Tensor, positions: Tensor, segments: Sequence[Segment],
                taps: Sequence[int] = ()) -> Tensor | tuple[Tensor, Tensor]:
        """Run a step through the slice.

        x: token ids, int64 [rows], where the slice has the embedding; else hidden states [rows, hidden].
        positions: int64 [rows], for RoPE. segments: whose rows these are; they cover all rows.

        taps: after how many layers of the model hidden states are wanted, rising; first_layer < each <= the slice's
        last. What layer b - 1 put out is tap b; no norm is applied.

        Returns hidden states [rows, hidden] in the slice's dtype; with taps also [rows, len(taps), hidden], memory of
        its own. Within a layer all rows write their keys and values before any row attends, so rows of one step may
        be ancestors of each other.
        """
        rows = x.shape[0]
        hidden = x if self._embedding is None else F.embedding(x, self._embedding)
        if not self._layers or not rows:
            return (hidden, hidden.new_empty(rows, len(taps), self.config.hidden)) if taps else hidden
        hidden = _padded(hidden)
        turn = self._turner(positions, hidden.shape[0])
        writes = Writes([one.cache for one in segments], [one.slots for one in segments])
        views = [self._view(alike) for alike in _alike(segments)]
        tapped: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            hidden = self._run(layer, index, hidden, turn, writes, views)
            if self.first_layer + index + 1 in taps:
                tapped.append(hidden[:rows])
        return (hidden[:rows], torch.stack(tapped, 1)) if taps else hidden[:rows]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [r, hidden] -> float32 [r, vocab]. The slice must have the head."""
        assert self._head is not None and self._norm is not None
        rows, start = hidden.shape[0], 0
        normed = self._normed(_padded(hidden), self._norm)
        out = torch.empty(rows, self.config.vocab_size)
        for part in self._head:
            scores = part(normed)
            out[:, start : start + scores.shape[1]] = scores[:rows]
            start += scores.shape[1]
        return out

    def _run(self, layer: _Layer, index: int, hidden: Tensor, turn: _Turn, writes: Writes,
             views: list[_View]) -> Tensor:
        normed = self._normed(hidden, layer.attention_norm)
        hidden = hidden + self._attention(layer, index, normed, turn, writes, views)
        gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return hidden + layer.down(F.silu(gate).mul_(up))

    def _attention(self, layer: _Layer, index: int, x: Tensor, turn: _Turn, writes: Writes,
                   views: list[_View]) -> Tensor:
        heads = self.config.heads
        qkv = layer.qkv(x).view(x.shape[0], -1, self.config.head_dim)
        if layer.qk_norm is not None:
            queries_keys = qkv[:, : len(layer.qk_norm)]
            queries_keys.copy_(self._normed(queries_keys, layer.qk_norm))
        qkv = _turned(qkv, turn)
        writes(index, qkv[:, heads:])
        mixed = x.new_zeros(x.shape[0], heads, self.config.head_dim)
        for view in views:
            torch._foreach_copy_(view.filled, view.caches[index])
            self._attend(qkv[:, :heads], view, mixed)
        return layer.out(mixed.flatten(1))

    def _attend(self, queries: Tensor, view: _View, out: Tensor) -> None:
        """queries: [rows of the step, heads, head_dim]; fills the view's rows of out, of the same shape.

        The query heads that share a key-value head are rows of one product. Products with keys and the
        exponentials are float32 and do not mix slots; what sums over slots is float64.
        """
        kv_heads, groups, size = self.config.kv_heads, self.config.groups, self.config.head_dim
        q = queries.index_select(0, view.rows).view(-1, view.m, kv_heads, groups, size).transpose(1, 2)
        q = q.reshape(-1, view.m * groups, size).float()
        scores = torch.baddbmm(view.bias, _padded(q), view.keys.transpose(1, 2), alpha=size**-0.5)
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().double()
        mixed = torch.bmm(weights, view.values).div_(weights.sum(-1, keepdim=True))[:, : view.m * groups].to(out.dtype)
        mixed = mixed.view(-1, kv_heads, view.m, groups, size).transpose(1, 2).reshape(len(view.rows), -1, size)
        out.index_copy_(0, view.put, mixed if view.taken is None else mixed.index_select(0, view.taken))

    def _view(self, segments: Sequence[Segment]) -> _View:
        groups, kv_heads = self.config.groups, self.config.kv_heads
        widths = [-(-segment.mask.shape[1] // SLOT_MULTIPLE) * SLOT_MULTIPLE for segment in segments]
        m, width = max(len(segment.mask) for segment in segments), max(widths)
        rows = torch.zeros(len(segments), m, dtype=torch.int64)
        real = torch.zeros(len(segments), m, dtype=torch.bool)
        bias = torch.zeros(len(segments), max(m * groups, MIN_ROWS), width)  # fillers attend to whatever is there
        for number, segment in enumerate(segments):
            count, given = segment.mask.shape
            rows[number, :count] = torch.arange(segment.start, segment.end)
            real[number, :count] = True
            bias[number, : count * groups] = -math.inf
            own = bias[number, : count * groups, :given].view(count, groups, given)
            own.masked_fill_(segment.mask[:, None], 0.0)
        rows, real = rows.flatten(), real.flatten()
        taken = None if real.all() else real.nonzero().flatten()
        bias = bias[:, None].expand(-1, kv_heads, -1, -1)
        keys = torch.zeros(len(segments), kv_heads, width, self.config.head_dim)
        values = torch.zeros_like(keys, dtype=torch.float64)
        filled = [whole[number, :, :own] for whole in (keys, values) for number, own in enumerate(widths)]
        caches = [segment.cache.kv[:, half, :own].unbind() for half in (slice(kv_heads), slice(kv_heads, None))
                  for segment, own in zip(segments, widths)]
        return _View(m, rows, taken, rows[real], bias.reshape(len(segments) * kv_heads, *bias.shape[2:]),
                     keys.flatten(0, 1), values.flatten(0, 1), filled, list(zip(*caches)))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension, in float32; weight: float32 [..., last dimension], over rows.

        Spelled out because `F.rms_norm` is no single kernel on the CPU either, and takes twice as long.
        """
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (wide * scale).mul_(weight).to(x.dtype)


def _alike(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by size: in a group none has twice as many rows or slots as another, unless both are few, so that
    filling up is cheap."""
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        rows, width = segment.mask.shape
        groups.setdefault((max(rows, _FEW_ROWS).bit_length(), max(width, _FEW_SLOTS).bit_length()), []).append(segment)
    return list(groups.values())


def _padded(x: Tensor) -> Tensor:
    """[..., rows, n] with zero rows added up to `MIN_ROWS`."""
    missing = MIN_ROWS - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def _turned(qkv: Tensor, turn: _Turn) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2)."""
    return torch.addcmul(qkv * turn.cosine, torch.roll(qkv, qkv.shape[-1] // 2, -1), turn.sine)


class _Turner:
    """Makes the `_Turn` of a step."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._rope: Rope = config.rope
        self._frequencies = torch.tensor(config.rope.inv_freq, dtype=torch.float32)
        self._turning, self._still = config.heads + config.kv_heads, config.kv_heads
        self._dtype = dtype

    def __call__(self, positions: Tensor, rows: int) -> _Turn:
        angles = F.pad(positions, (0, rows - len(positions))).float()[:, None] * self._frequencies
        cosine, sine = angles.cos() * self._rope.attention_factor, angles.sin() * self._rope.attention_factor
        return _Turn(self._spread(torch.cat((cosine, cosine), -1), 1.0),
                     self._spread(torch.cat((-sine, sine), -1), 0.0))

    def _spread(self, table: Tensor, still: float) -> Tensor:
        """[rows, head_dim] -> [rows, heads + 2 * kv_heads, head_dim], `still` for the value heads."""
        rows, size = table.shape
        out = torch.full((rows, self._turning + self._still, size), still, dtype=self._dtype)
        out[:, : self._turning] = table[:, None]
        return out


class _Loader:
    """Reads the weights of a slice, largest of a layer first: packing needs a second copy for a moment.

    That copy lies in pages of its own, which go back to the system at once. From the allocator it would leave
    holes between the packed weights, up to the size of the head.

    As a context manager it keeps torch from splitting operations over threads and lets each thread load a part
    of its own instead. Conversion is thousands of small operations; split, they wait for each other, for minutes
    where other processes want the cores too.
    """

    def __init__(self, files: ModelFiles, dtype: torch.dtype, packed: bool) -> None:
        self._files, self._dtype, self._packed = files, dtype, packed

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)

    def layers(self, first: int, last: int) -> list[_Layer]:
        return self._spread(self._layer, range(first, last))

    def norm(self, name: str) -> Tensor:
        """The weight of an RMS norm, which is computed in float32 whatever the model's dtype."""
        return self._files.tensor(name, torch.float32)

    def _spread(self, load: Callable[[int], _Part], which: range) -> list[_Part]:
        """Parts in order, several at a time if there are many: each holds a second copy of one of its weights."""
        workers = min(self._threads, len(which) // _PARTS_PER_WORKER)
        if workers <= 1:
            return [load(index) for index in which]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(load, which))

    def _layer(self, index: int) -> _Layer:
        config, base = self._files.config, f"model.layers.{index}."
        gate_up = self._fused(base, "mlp.gate_proj", "mlp.up_proj", has_bias=False)
        down = self._fused(base, "mlp.down_proj", has_bias=False)
        qkv = self._fused(base, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", has_bias=config.qkv_bias)
        out = self._fused(base, "self_attn.o_proj", has_bias=config.o_bias)
        return _Layer(self.norm(f"{base}input_layernorm.weight"), qkv, self._qk_norm(base), out,
                      self.norm(f"{base}post_attention_layernorm.weight"), gate_up, down)

    def embedding(self) -> Tensor:
        """The table, which is only looked up and never packed."""
        config = self._files.config
        out = torch.empty(config.vocab_size, config.hidden, dtype=self._dtype)

        def load(start: int) -> None:
            self._files.read_into("model.embed_tokens.weight", out[start : start + _HEAD_ROWS], start)

        self._spread(load, range(0, config.vocab_size, _HEAD_ROWS))
        return out

    def head(self, embedding: Tensor | None) -> list[Linear]:
        """The head in parts of rows of the vocabulary; a tied one that is not packed is the embedding itself."""
        config = self._files.config
        name = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        if config.tied and embedding is not None and not self._packed:
            return [Linear(embedding, None, packed=False)]
        return self._spread(partial(self._head_part, name), range(0, config.vocab_size, _HEAD_ROWS))

    def _head_part(self, name: str, start: int) -> Linear:
        config = self._files.config
        part = self._room(min(_HEAD_ROWS, config.vocab_size - start), config.hidden)
        self._files.read_into(name, part, start)
        return Linear(part, None, packed=self._packed)

    def _fused(self, base: str, *modules: str, has_bias: bool) -> Linear:
        weight = self._stacked([f"{base}{module}.weight" for module in modules])
        bias = self._stacked([f"{base}{module}.bias" for module in modules]) if has_bias else None
        return Linear(weight, bias, packed=self._packed)

    def _stacked(self, names: list[str]) -> Tensor:
        """Tensors one below the other, each read into its place."""
        shapes = [self._files.shape(name) for name in names]
        out = self._room(sum(shape[0] for shape in shapes), *shapes[0][1:])
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            self._files.read_into(name, out[start : start + shape[0]])
            start += shape[0]
        return out

    def _room(self, *shape: int) -> Tensor:
        """Where a weight is read into: for good, or until it is packed."""
        if not self._packed or len(shape) == 1:
            return torch.empty(shape, dtype=self._dtype)
        pages = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize)
        return torch.frombuffer(pages, dtype=self._dtype).view(shape)

    def _qk_norm(self, base: str) -> Tensor | None:
        config = self._files.config
        if not config.qk_norm:
            return None
        query, key = self.norm(f"{base}self_attn.q_norm.weight"), self.norm(f"{base}self_attn.k_norm.weight")
        return torch.cat((query.expand(config.heads, -1), key.expand(config.kv_heads, -1)))
