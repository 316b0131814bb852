"""A host is looked at before anything is loaded on it: this runs there, and takes less than a second. No torch.

A model file that was never hashed is hashed first, which takes as long as reading it.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from functools import cache
from importlib import metadata
from pathlib import Path

from fullpipe import hub, kernels, threads
from fullpipe.cluster.addresses import own_addresses, pick_address
from fullpipe.cluster.gpus import gpus
from fullpipe.cluster.provenance import machine
from fullpipe.cluster.report import Device, HostReport, Look, ModelSeen, Problem
from fullpipe.errors import FullpipeError, ModelNotFound
from fullpipe.hub import cache as kept
from fullpipe.models.gguf_parts import gguf_parts
from fullpipe.models.memory import free_memory

_PACKAGE = Path(__file__).parents[1]
_PACKAGES = ("fullpipe", "torch", "ray", "pyzmq")


def look(asked: Look) -> HostReport:
    """Everything that decides whether this host can take part. What cannot be found out is among its problems."""
    problems: list[Problem] = []
    free = free_memory()
    if asked.memory_mib is not None:
        free = min(free, asked.memory_mib << 20)
    processor = str(machine()["cpu"]) or platform.machine()
    return HostReport(
        name=asked.name, address=_address(asked, problems), addresses=own_addresses(), versions=_versions(),
        code=code_of(_PACKAGE), processor=processor, kernels=_kernels(asked, problems), cores=_cores(asked, problems),
        devices=[Device("cpu", processor, free), *gpus()], free_memory=free, free_disk=_free_disk(kept.home()),
        cache=str(kept.home()), models=[_model(asked, name, problems) for name in asked.models], problems=problems)


def _address(asked: Look, problems: list[Problem]) -> str | None:
    try:
        return pick_address(asked.interface, asked.host_ip, asked.head, alone=asked.alone)
    except FullpipeError as error:
        problems.append(_told(asked, error, "address"))
        return None


def _kernels(asked: Look, problems: list[Problem]) -> str | None:
    try:
        native = kernels.load()
    except FullpipeError as error:
        problems.append(_told(asked, error, "kernels"))
        return None
    return native.level if native else None


def _cores(asked: Look, problems: list[Problem]) -> int:
    there = threads.cores()
    if asked.cores is not None and asked.cores > there:
        problems.append(Problem(asked.name, f"{asked.cores} cores are asked of it, and it has {there} to give",
                                f"Ask for {there} at most, or say nothing of cores in the hosts file.", "cores"))
    return min(there, asked.cores or there)


def _model(asked: Look, name: str, problems: list[Problem]) -> ModelSeen:
    """What is in this host's own cache. A model that is not there is no problem: it comes from the head."""
    try:
        path = hub.resolve(name, fetch=False)
        return ModelSeen(name, str(path), _bytes(path), kept.digest(path))
    except ModelNotFound:
        return ModelSeen(name)
    except FullpipeError as error:
        problems.append(_told(asked, error, name))
    except OSError as error:
        problems.append(Problem(asked.name, f"{name} cannot be read: {error.strerror or error}",
                                "Make its files readable for who runs Fullpipe there.", name))
    return ModelSeen(name)


def _bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else gguf_parts(path)
    return sum(file.stat().st_size for file in files if file.is_file())


def _told(asked: Look, error: FullpipeError, fact: str) -> Problem:
    return Problem(asked.name, error.message, error.hint or "", fact)


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def code_of(package: Path) -> str:
    """The same for two copies of the same sources, though one be a checkout between two versions."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).as_posix()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _free_disk(folder: Path) -> int:
    """Bytes that may be written there, though the folder need not exist yet."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return shutil.disk_usage(there).free
