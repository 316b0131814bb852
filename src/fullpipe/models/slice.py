"""The promise that every kind of slice keeps: some layers of a model, with or without embedding and head.

`native.slice` keeps it on the processor with weights as they are stored, `decoder` there with weights in 16 or 32 bits,
and `gpu.decoder` on a device, with static memory and steps of fixed sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

import torch
from torch import Tensor

from fullpipe.models.config import ModelConfig
from fullpipe.models.dtypes import DTYPES, native_kernels, pick_kv_cache_dtype, sizes_in
from fullpipe.models.files import ModelFiles
from fullpipe.models.forms import kernels_of
from fullpipe.models.memory import free_memory
from fullpipe.models.pool import slots_for
from fullpipe.models.step import Step


class Slice(Protocol):
    """Computes steps: see `DecoderSlice`, whose methods say what they take and give.

    slots: of its pool of cache memory.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def first_layer(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def slots(self) -> int: ...

    def pretend(self, count: int) -> None: ...

    @overload
    def forward(self, step: Step) -> Tensor: ...

    @overload
    def forward(self, step: Step, taps: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def load_slice(files: ModelFiles, first: int, last: int, *, has_embedding: bool, has_head: bool, dtype: str,
               device: str = "cpu", kv_pool_mib: int | None = None, kv_cache_dtype: str = "auto",
               sharing: int = 1) -> Slice:
    """Read layers first..last (exclusive) onto a device, "cpu" or "cuda:N".

    dtype: see `models.dtypes`; "stored", "int8" and "int4" are for the processor.
    kv_pool_mib: size of the cache pool; None: by what is free (see `pool.slots_for`). sharing: how many slices of about
    this size there will be in the processor's memory. kv_cache_dtype: see `models.dtypes.pick_kv_cache_dtype`.

    Raises what reading raises, and UsageError, before anything is read, for a device that is not there, has no kernels,
    or has too little memory.
    """
    pool_bytes = None if kv_pool_mib is None else kv_pool_mib << 20
    cache = pick_kv_cache_dtype(kv_cache_dtype, dtype, device)
    if device == "cpu":
        return _on_processor(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=dtype,
                             pool_bytes=pool_bytes, cache=cache, sharing=sharing)
    kind = DTYPES[dtype]
    from fullpipe.models.gpu.decoder import DeviceSlice, Weights, operations
    from fullpipe.models.gpu.devices import check_room, find_device

    where = torch.device(find_device(device))
    with torch.cuda.device(where):
        operations(where)
    check_room(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=kind, device=where,
               pool_bytes=pool_bytes)
    weights = Weights.read(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=kind,
                           device=where)
    return DeviceSlice(weights, kind, where, pool_bytes=pool_bytes)


def cache_bytes(config: ModelConfig, dtype: str, device: str, kv_cache_dtype: str) -> int:
    """Bytes of a slot in one layer of the cache of a slice that is loaded so."""
    if kernels_of(dtype, device) == "native":
        from fullpipe.models.native.slice import slot_bytes

        return slot_bytes(native_kernels(), config, pick_kv_cache_dtype(kv_cache_dtype, dtype, device))
    return config.sizes(DTYPES[dtype].itemsize).kv_bytes


def _on_processor(files: ModelFiles, first: int, last: int, *, has_embedding: bool, has_head: bool, dtype: str,
                  pool_bytes: int | None, cache: str, sharing: int) -> Slice:
    sizes = sizes_in(files, dtype)
    native = kernels_of(dtype, "cpu") == "native"
    one_table = native and files.config.tied and has_head  # which is embedding and head
    ends = has_head * sizes.head_bytes + (has_embedding and not one_table) * sizes.embedding_bytes
    weights = (last - first) * sizes.layer_bytes + ends

    def slots(slot_bytes: int) -> int:
        return slots_for((last - first) * slot_bytes, pool_bytes, free_memory() // sharing - weights)

    if native:
        from fullpipe.models.native.slice import NativeSlice, slot_bytes

        return NativeSlice(native_kernels(), files, first, last, has_embedding=has_embedding, has_head=has_head,
                           slots=slots(slot_bytes(native_kernels(), files.config, cache)), cache=cache, dtype=dtype)
    from fullpipe.models.decoder import DecoderSlice

    return DecoderSlice(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=DTYPES[dtype],
                        slots=slots(sizes.kv_bytes))
