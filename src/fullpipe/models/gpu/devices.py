"""A device that somebody names is looked for here, and what it has to hold, before anything is read."""

from __future__ import annotations

import gc

import torch

from fullpipe.errors import UsageError
from fullpipe.models.files import ModelFiles
from fullpipe.models.pool import LEAST_BLOCKS
from fullpipe.options import BLOCK

_BESIDE = 512 << 20
"""Bytes that a slice needs beside weights and cache: code of kernels, static memory of its steps."""


def find_device(name: str) -> str:
    """The name with a number: "cpu" stays, "cuda" is "cuda:0".

    Raises UsageError where there is no such device. Counting devices does not start CUDA in this process.
    """
    if name == "cpu":
        return name
    count, number = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if not count:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device can be seen"
        raise UsageError(f"there is no device {name}: {why}", param="device",
                         hint="Use `device=cpu`. For a GPU, install a torch with CUDA and look whether nvidia-smi and "
                              "CUDA_VISIBLE_DEVICES show it.")
    if number >= count:
        raise UsageError(f"there is no device {name}: {count} can be seen", param="device",
                         hint=f"Use one of {', '.join(f'cuda:{one}' for one in range(count))}.")
    return f"cuda:{number}"


def device_name(device: str) -> dict[str, str]:
    """What a GPU calls itself, under "gpu"; nothing for the processor."""
    return {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}


def check_room(files: ModelFiles, first: int, last: int, *, has_embedding: bool, has_head: bool, dtype: torch.dtype,
               device: torch.device, pool_bytes: int | None) -> None:
    """Raise UsageError unless layers first..last (exclusive) will fit into what is free on a GPU.

    pool_bytes: of cache; None: as little as possible.
    """
    sizes = files.sizes(dtype)
    ends = sizes.head_bytes * has_head + sizes.embedding_bytes * has_embedding
    if has_head and has_embedding and files.config.tied:
        ends = sizes.head_bytes
    weights = (last - first) * sizes.layer_bytes + ends
    cache = (LEAST_BLOCKS + 1) * BLOCK * (last - first) * sizes.kv_bytes if pool_bytes is None else pool_bytes
    gc.collect()  # a slice of this process that nobody uses any more: its steps and it hold each other
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info(device)[0], weights + cache + _BESIDE
    if needed > free:
        raise UsageError(
            f"{last - first} layers of {files.path.name} need {needed >> 20} MiB on {device} ({weights >> 20} of "
            f"weights, {cache >> 20} of cache), and {free >> 20} are free", param="device",
            hint="Give more `stages` on several GPUs, a smaller `kv_pool_mib`, or `device=cpu`.")
