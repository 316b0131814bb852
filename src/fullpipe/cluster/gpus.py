"""Which GPUs this machine has, asked of its driver: importing torch for it would take seconds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fullpipe.cluster.report import Device

_DRIVER = Path("/dev/nvidiactl")
_ASK = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.free", "--format=csv,noheader,nounits")
_WAIT_S = 5.0


class _Gpu(NamedTuple):
    number: str
    uuid: str
    title: str
    free_mib: str


def gpus() -> list[Device]:
    """Those that torch would see, under the names that it would give them; none where it cannot use any."""
    if not _DRIVER.exists() or not _torch_uses_gpus():
        return []
    try:
        told = subprocess.run(_ASK, capture_output=True, text=True, check=True, timeout=_WAIT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return seen_by_torch(told, os.environ.get("CUDA_VISIBLE_DEVICES"))


def seen_by_torch(told: str, visible: str | None) -> list[Device]:
    """told: what `nvidia-smi` says, a line for each. visible: which of them, and in which order, by number or identity;
    the first that is neither ends the list. None: all."""
    lines = (line.split(",") for line in told.splitlines())
    there = [_Gpu(*(part.strip() for part in line)) for line in lines if len(line) == len(_Gpu._fields)]
    chosen = there if visible is None else list(_chosen(there, visible.split(",")))
    return [Device(f"cuda:{number}", gpu.title, int(gpu.free_mib) << 20)
            for number, gpu in enumerate(chosen) if gpu.free_mib.isdigit()]


def _chosen(there: Sequence[_Gpu], visible: Sequence[str]) -> Iterator[_Gpu]:
    for wanted in map(str.strip, visible):
        found = next((gpu for gpu in there if wanted and (gpu.number == wanted or gpu.uuid.startswith(wanted))), None)
        if found is None:
            return
        yield found


def _torch_uses_gpus() -> bool:
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
