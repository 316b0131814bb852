"""A slice of a model on a device: static memory, steps of few fixed sizes, and on CUDA a captured graph for each.

Speculation is exact where a row has the same bits in any company. Between the products a kernel's program sees one
row (`kernels`). In a product all rows meet, and another number of them may be summed in another order: so a step is
filled up to a *bucket* of rows, and at the start it is tried which buckets agree bit by bit with the largest; only
those are used. Filling up costs little, for a step's time is that of reading the weights.

Hidden states come from the host and go back to it, whatever the device of the next stage is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fullpipe.errors import UsageError
from fullpipe.models.config import ModelConfig
from fullpipe.models.files import ModelFiles
from fullpipe.models.gpu import plain
from fullpipe.models.gpu.pool import SCRATCH, Pool
from fullpipe.models.gpu.rows import Rows
from fullpipe.models.linear import Linear
from fullpipe.models.loading import Layer, Loader
from fullpipe.models.memory import free_memory
from fullpipe.models.pool import slots_for
from fullpipe.models.step import Step

ROWS = (16, 32, 64)
"""Buckets of rows that are tried."""

Made = TypeVar("Made")


class Ops(Protocol):
    """What steps are made of; see `plain`, which keeps this promise as `kernels` does."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_norm(self, hidden: Tensor, parts: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor: ...

    def rotate_and_store(self, parts: Tensor, bias: Tensor | None, cosine: Tensor, sine: Tensor, qk_norm: Tensor | None,
                         eps: float, places: Tensor, cache: Tensor) -> Tensor: ...

    def attend(self, queries: Tensor, cache: Tensor, context: Tensor, lengths: Tensor) -> Tensor: ...

    def gate(self, parts: Tensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Weights:
    """Layers first_layer, first_layer + 1, ... of a model, all on one device. A head comes with its norm."""

    config: ModelConfig
    first_layer: int
    layers: list[Layer]
    embedding: Tensor | None
    head: Linear | None
    norm: Tensor | None

    @classmethod
    def read(cls, files: ModelFiles, first: int, last: int, *, has_embedding: bool, has_head: bool, dtype: torch.dtype,
             device: torch.device) -> Weights:
        """Those of layers first..last (exclusive), which go to the device one by one."""
        loader = Loader(files, dtype, packed=False)
        with loader:
            layers = [_moved(loader.layers(index, index + 1)[0], device) for index in range(first, last)]
            embedding = loader.embedding().to(device) if has_embedding else None
            head = loader.head(embedding)[0].to(device) if has_head else None
            norm = loader.norm("model.norm.weight").to(device) if has_head else None
        return cls(files.config, first, layers, embedding, head, norm)


def _moved(layer: Layer, device: torch.device) -> Layer:
    return Layer(layer.attention_norm.to(device), layer.qkv.to(device),
                 None if layer.qk_norm is None else layer.qk_norm.to(device), layer.out.to(device),
                 layer.mlp_norm.to(device), layer.gate_up.to(device), layer.down.to(device))


class DeviceSlice:
    """Keeps the contract of `DecoderSlice`, on a device: tensors go in and come out on the host.

    dtype: of weights, hidden states and cache. pool_bytes: of the cache; None: by what is free (see `pool.slots_for`).
    rows: buckets to try, `SCRATCH` at most; on CUDA powers of two from 16 on.

    graphs: capture them on CUDA; else kernels are launched one by one.

    library: products are the library's; else `kernels` has one of its own for 16 bits.

    rows, of the slice: the buckets that agree, rising; longer steps run in parts. exact: also the order of the rows
    in a step of the largest bucket changes no bit.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device, *,
                 pool_bytes: int | None = None, rows: Sequence[int] = ROWS, graphs: bool = True,
                 library: bool = False) -> None:
        assert max(rows) <= SCRATCH, "rows that fill a bucket up have no other place"
        self.config, self.first_layer, self.dtype, self.device = weights.config, weights.first_layer, dtype, device
        self._weights, self._layers = weights, weights.layers
        self._graphs = graphs and device.type == "cuda"
        with self._here():
            self._ops = operations(device)
        self._product = plain.product if library else self._ops.product
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums are float32, however split
        self._frequencies = torch.tensor(self.config.rope.inv_freq, dtype=torch.float32, device=device)
        with self._here(), torch.inference_mode():
            self.rows, self.exact = _agreeing(self._product, _shapes(weights), rows, dtype)
            self.slots = self._slots(pool_bytes)
            self.pool = Pool(self.config, self.num_layers, self.slots, dtype, device)
        self._steps: dict[tuple[int, int, tuple[int, ...]], Bucket] = {}
        self._heads: dict[int, Head] = {}
        self._capture = _Capture(device) if self._graphs else None

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def has_embedding(self) -> bool:
        return self._weights.embedding is not None

    @property
    def has_head(self) -> bool:
        return self._weights.head is not None

    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows had been written there."""
        self.pool.pretend(count)

    @overload
    def forward(self, step: Step) -> Tensor: ...

    @overload
    def forward(self, step: Step, taps: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    @torch.inference_mode()
    def forward(self, step: Step, taps: Sequence[int] = ()) -> Tensor | tuple[Tensor, Tensor]:
        """See `DecoderSlice.forward`. Rows come after their ancestors, for a long step runs in parts."""
        x = step.x
        with self._here():
            if self._layers and len(x):
                step.check(self.slots)
                hidden, tapped = self._run(x, Rows.of(step), tuple(taps))
            else:
                table = self._weights.embedding
                hidden = x if table is None else F.embedding(x.to(self.device), table).cpu()
                tapped = hidden.new_empty(len(x), len(taps), self.config.hidden)
        return (hidden, tapped) if taps else hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [r, hidden] -> float32 [r, vocab]. The slice must have the head."""
        with self._here():
            out = self._host(len(hidden), self.config.vocab_size, dtype=torch.float32)
            for start in range(0, len(hidden), self.rows[-1]):
                part = hidden[start : start + self.rows[-1]]
                head = self.head(self._bucket(len(part)))
                head.hidden[: len(part)].copy_(part)
                out[start : start + len(part)].copy_(head.replay()[: len(part)], non_blocking=True)
            self._wait()
        return out

    # ---- steps -------------------------------------------------------------------------------------------

    def _run(self, x: Tensor, rows: Rows, taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        hidden = self._host(len(x), self.config.hidden, dtype=self.dtype)
        tapped = self._host(len(x), len(taps), self.config.hidden, dtype=self.dtype) if taps else hidden
        for start in range(0, len(x), self.rows[-1]):
            end = min(start + self.rows[-1], len(x))
            part = rows.part(start, end)
            step = self.step(self._bucket(len(part)), part.context.shape[1], taps)
            step.inputs.fill(x[start:end], part)
            made, tap = step.replay()
            hidden[start:end].copy_(made[: end - start], non_blocking=True)
            if tap is not None:
                tapped[start:end].copy_(tap[: end - start], non_blocking=True)
            self._wait()  # also until what was sent has been read: the next part is written over it
        return hidden, tapped

    def _compute(self, inputs: Inputs, taps: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """The layers, over static tensors. Returns hidden states of the bucket, and what was tapped."""
        ops, eps, table = self._ops, self.config.rms_eps, self._weights.embedding
        hidden = inputs.hidden.clone() if table is None else F.embedding(inputs.tokens, table)
        angles = inputs.positions[:, None].float() * self._frequencies
        factor = self.config.rope.attention_factor
        cosine, sine = angles.cos() * factor, angles.sin() * factor
        normed, tapped = ops.norm(hidden, self._layers[0].attention_norm, eps), []
        for index, (layer, after) in enumerate(zip(self._layers, [*self._layers[1:], self._layers[0]])):
            cache = self.pool.kv[index]
            queries = ops.rotate_and_store(self._product(normed, layer.qkv.weight), layer.qkv.bias, cosine, sine,
                                           layer.qk_norm, eps, inputs.places, cache)
            mixed = ops.attend(queries, cache, inputs.context, inputs.lengths)
            normed = ops.add_norm(hidden, self._product(mixed, layer.out.weight), layer.out.bias, layer.mlp_norm, eps)
            gated = ops.gate(self._product(normed, layer.gate_up.weight), self.dtype)
            # What comes of the last layer is normed for nobody.
            normed = ops.add_norm(hidden, self._product(gated, layer.down.weight), None, after.attention_norm, eps)
            if self.first_layer + index + 1 in taps:
                tapped.append(hidden.clone())
        return hidden, torch.stack(tapped, 1) if taps else None

    def _score(self, hidden: Tensor) -> Tensor:
        norm, head = self._weights.norm, self._weights.head
        assert norm is not None and head is not None
        parts = self._product(self._ops.norm(hidden, norm, self.config.rms_eps), head.weight)
        return parts[0].float() if len(parts) == 1 else parts.sum(0, dtype=torch.float32)

    def step(self, rows: int, width: int, taps: tuple[int, ...] = ()) -> Bucket:
        """The layers, for a bucket of rows and one of width."""
        key = rows, width, taps
        if key not in self._steps:
            inputs = Inputs(rows, width, self.config.hidden, self.dtype, self.device)
            self._steps[key] = Bucket(inputs, self._replay(partial(self._compute, inputs, taps)))
        return self._steps[key]

    def head(self, rows: int) -> Head:
        """Norm and head, for a bucket of rows."""
        if rows not in self._heads:
            hidden = torch.zeros(rows, self.config.hidden, dtype=self.dtype, device=self.device)
            self._heads[rows] = Head(hidden, self._replay(partial(self._score, hidden)))
        return self._heads[rows]

    def _replay(self, run: Callable[[], Made]) -> Callable[[], Made]:
        return Replay(run, self._capture) if self._capture else run

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in self.rows if bucket >= rows)

    # ---- the device --------------------------------------------------------------------------------------

    def _here(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory on the host that the device can write to. torch keeps what was freed for the next."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _slots(self, pool_bytes: int | None) -> int:
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else free_memory()
        return slots_for(self.num_layers * self.config.sizes(self.dtype.itemsize).kv_bytes, pool_bytes, free)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Computes steps of one size: fill its inputs, then replay it. See `DeviceSlice._compute`."""

    inputs: Inputs
    replay: Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Head:
    """The head for one number of rows: fill hidden, [rows, hidden], then replay it for float32 [rows, vocab]."""

    hidden: Tensor
    replay: Callable[[], Tensor]


class Inputs:
    """Static memory from which the steps of a bucket read. What is an integer comes in one piece.

    tokens, positions, places, lengths: int32 [rows]. context: int32 [rows, width]. hidden: [rows, hidden].
    """

    def __init__(self, rows: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.zeros(rows * (4 + width), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._packed = torch.zeros_like(self._host, device=device)
        self.tokens, self.positions, self.places, self.lengths = self._packed[: 4 * rows].view(4, rows)
        self.context = self._packed[4 * rows :].view(rows, width)
        self.hidden = torch.zeros(rows, hidden, dtype=dtype, device=device)

    def fill(self, x: Tensor, rows: Rows) -> None:
        """Send a step's rows. The others of the bucket read nothing but their own place in the scratch block.

        x: int64 [rows], tokens; or hidden states [rows, hidden].
        """
        count, all_rows = len(rows), len(self.tokens)
        host = self._host.numpy()
        tokens, positions, places, lengths = host[: 4 * all_rows].reshape(4, all_rows)
        context = host[4 * all_rows :].reshape(all_rows, -1)
        positions[:count], lengths[:count], places[:count] = rows.positions, rows.positions + 1, rows.places
        context[:count] = rows.context
        positions[count:], lengths[count:] = 0, 1
        places[count:] = context[count:, 0] = range(all_rows - count)
        if x.ndim == 1:
            tokens[:count], tokens[count:] = x.numpy(), 0
        else:
            self.hidden[:count].copy_(x)
        self._packed.copy_(self._host, non_blocking=True)


class _Capture:
    """What all graphs of a slice are captured with: memory that they share, for one runs at a time, and a stream."""

    def __init__(self, device: torch.device) -> None:
        self.memory, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Replay(Generic[Made]):
    """Runs a function over static tensors as a graph, captured when it is first called.

    Bits come from the graph alone: what ran before it only had kernels compiled and libraries set up.
    """

    def __init__(self, run: Callable[[], Made], capture: _Capture) -> None:
        self._run, self._capture = run, capture
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Made:
        """Where the results are; the next call of any graph of the slice may write over them."""
        if self._graph is None:
            memory, stream = self._capture.memory, self._capture.stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                self._made = self._run()
            self._graph = graph
        self._graph.replay()
        return self._made


# ---- which buckets agree ---------------------------------------------------------------------------------


def _agreeing(product: Callable[[Tensor, Tensor], Tensor], weights: Sequence[Tensor], rows: Sequence[int],
              dtype: torch.dtype) -> tuple[tuple[int, ...], bool]:
    """The buckets in which products with these weights give each row the bits that it has in the largest; and whether
    in that one a row's bits do not depend on its place."""
    most, kept, placed = max(rows), set(rows), True
    for weight in weights:
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(most, weight.shape[1], generator=generator, device=weight.device).to(dtype)
        whole = product(x, weight)
        placed &= torch.equal(product(x.flip(0), weight).flip(1), whole)
        kept -= {one for one in kept if any(
            not torch.equal(product(x[at : at + one].clone(), weight), whole[:, at : at + one])
            for at in range(0, most, one))}
    return tuple(sorted(kept)), placed


def _shapes(weights: Weights) -> list[Tensor]:
    """A weight of every shape that steps multiply with."""
    found = [] if weights.head is None else [weights.head.weight]
    for layer in weights.layers[:1]:
        found += [layer.qkv.weight, layer.out.weight, layer.gate_up.weight, layer.down.weight]
    return found


def operations(device: torch.device) -> Ops:
    """Those of a device, which is the current one. Raises UsageError where its kernels cannot be had."""
    if device.type != "cuda":
        return plain
    try:
        from fullpipe.models.gpu import kernels
    except ImportError as error:
        raise UsageError(f"there are no kernels for {device}: {error}", param="device",
                         hint="Install a newer torch for CUDA, with the Triton that belongs to it (2.11 with 3.6 was "
                              "tried), or use `device=cpu`.") from error
    return kernels
