"""Reading the weights of a slice into the form in which the decoder computes with them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fullpipe.models.files import ModelFiles
from fullpipe.models.linear import Linear

# Rows of the head that are packed at a time: packing needs a second copy, so of a small part only.
_HEAD_ROWS = 4096

# Layers, or parts of the head, for each thread that loads: the second copies of all threads stay small beside them.
_PARTS_PER_WORKER = 3

_Part = TypeVar("_Part")


@dataclass(slots=True)
class Layer:
    """Holds the weights of one layer. qk_norm: [heads + kv_heads, head_dim] or None."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Loader:
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

    def layers(self, first: int, last: int) -> list[Layer]:
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

    def _layer(self, index: int) -> Layer:
        config, base = self._files.config, f"model.layers.{index}."
        gate_up = self._fused(base, "mlp.gate_proj", "mlp.up_proj", has_bias=False)
        down = self._fused(base, "mlp.down_proj", has_bias=False)
        qkv = self._fused(base, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", has_bias=config.qkv_bias)
        out = self._fused(base, "self_attn.o_proj", has_bias=config.o_bias)
        return Layer(self.norm(f"{base}input_layernorm.weight"), qkv, self._qk_norm(base), out,
                      self.norm(f"{base}post_attention_layernorm.weight"), gate_up, down)

    def embedding(self) -> Tensor:
        """The table, which is only looked up and never packed."""
        return self._table("model.embed_tokens.weight")

    def head(self, embedding: Tensor | None) -> list[Linear]:
        """The head, one that is packed in parts of rows of the vocabulary; a tied one that is not packed is the
        embedding itself."""
        config = self._files.config
        name = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        if not self._packed:
            whole = embedding if config.tied and embedding is not None else self._table(name)
            return [Linear(whole, None, packed=False)]
        return self._spread(partial(self._head_part, name), range(0, config.vocab_size, _HEAD_ROWS))

    def _table(self, name: str) -> Tensor:
        """[vocab, hidden], not packed."""
        config = self._files.config
        out = torch.empty(config.vocab_size, config.hidden, dtype=self._dtype)

        def load(start: int) -> None:
            self._files.read_into(name, out[start : start + _HEAD_ROWS], start)

        self._spread(load, range(0, config.vocab_size, _HEAD_ROWS))
        return out

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
