"""The promise that every kind of slice keeps: some layers of a model, with or without embedding and head.

`native.slice` keeps it on the processor with weights as they are stored, `decoder` there with weights in 16 or 32 bits,
and `gpu.decoder` on a device, with static memory and steps of fixed sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, overload

import torch
from torch import Tensor

from fullpipe.models.attention import Segment
from fullpipe.models.config import ModelConfig
from fullpipe.models.dtypes import DTYPES, native_kernels
from fullpipe.models.files import ModelFiles
from fullpipe.models.forms import kernels_of


class Arena(Protocol):
    """Slots for the rows of one request in all layers of a slice, which has allocated it."""

    @property
    def capacity(self) -> int: ...

    def enlarged(self, capacity: int, used: int) -> Self:
        """One for `capacity` rows, at least as many as in this one, with what stands in the first `used` slots. This
        one is not used any more."""
        ...

    def begin_with(self, other: Any, slots: Tensor) -> None:
        """Copy the rows of slots of another arena of the slice to slots 0, 1, ... slots: int64 [r], r <= capacity."""
        ...

    def pretend(self, count: int) -> None:
        """Let noise stand in the first slots, as if rows of positions 0, 1, ... had been written there."""
        ...


class Slice(Protocol):
    """Computes steps: see `DecoderSlice`, whose methods say what they take and give."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def first_layer(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    def allocate(self, capacity: int) -> Arena: ...

    @overload
    def forward(self, x: Tensor, positions: Tensor, segments: Sequence[Segment]) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, positions: Tensor, segments: Sequence[Segment],
                taps: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def load_slice(files: ModelFiles, first: int, last: int, *, has_embedding: bool, has_head: bool, dtype: str,
               device: str = "cpu", kv_pool_mib: int | None = None) -> Slice:
    """Read layers first..last (exclusive) onto a device, "cpu" or "cuda:N".

    dtype: see `models.dtypes`; "stored", "int8" and "int4" are for the processor.
    kv_pool_mib: size of the cache pool on a GPU; None: by what is free (see `DeviceSlice`).

    Raises what reading raises, and UsageError, before anything is read, for a device that is not there, has no kernels,
    or has too little memory.
    """
    by = kernels_of(dtype, device)
    if by == "native":
        from fullpipe.models.native.slice import NativeSlice

        return NativeSlice(native_kernels(), files, first, last, has_embedding=has_embedding, has_head=has_head,
                           dtype=dtype)
    kind = DTYPES[dtype]
    if by == "torch":
        from fullpipe.models.decoder import DecoderSlice

        return DecoderSlice(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=kind)
    from fullpipe.models.gpu.decoder import DeviceSlice, Weights, operations
    from fullpipe.models.gpu.devices import check_room, find_device

    where, pool_bytes = torch.device(find_device(device)), None if kv_pool_mib is None else kv_pool_mib << 20
    with torch.cuda.device(where):
        operations(where)
    check_room(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=kind, device=where,
               pool_bytes=pool_bytes)
    weights = Weights.read(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=kind,
                           device=where)
    return DeviceSlice(weights, kind, where, pool_bytes=pool_bytes)
