"""The folder where fetched models live, and what is remembered about each file.

    <home>/models/NAME.gguf         complete and checked; appears in one `os.replace`
    <home>/models/NAME.gguf.json    its stamp: size and time of the file that was hashed
    <home>/partial/NAME/            a download under way, kept when it is interrupted
    <home>/locks/NAME.lock          one process at a time
    <home>/stamps/KEY.json          stamps of models that lie elsewhere; KEY stands for the file's path
    <home>/from-head/DIGEST/        what a host has of a model that it gets from the head; see `models.copies`

A file is hashed once. Afterwards its stamp vouches for it, so that opening a model does not read a gigabyte
first; a file whose size or modification time differs from its stamp is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from fullpipe import files
from fullpipe.errors import CacheError
from fullpipe.models.partial import Manifest, files_of, manifest_of

HOME_VARIABLE = files.HOME_VARIABLE
_CHUNK = 1 << 20


def home() -> Path:
    """`$FULLPIPE_HOME`, else `$XDG_CACHE_HOME/fullpipe`, else `~/.cache/fullpipe`; it need not exist."""
    if own := os.environ.get(HOME_VARIABLE):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache").absolute() / "fullpipe"


def model_file(name: str) -> Path:
    """Where the catalogue model `name` lives when it is there."""
    return home() / "models" / f"{name}.gguf"


def partial_folder(name: str) -> Path:
    return home() / "partial" / name


def lock_file(name: str) -> Path:
    return home() / "locks" / f"{name}.lock"


def from_head_folder(digest: str) -> Path:
    """Where a host keeps what it has of a model that it got from the head; see `models.copies.Copy`."""
    return home() / "from-head" / digest


def writing() -> AbstractContextManager[None]:
    """Turns what the operating system says against writing in the cache into `CacheError`."""
    return files.writing_in(home())


def disk_full(detail: str) -> CacheError:
    """The error for a cache folder whose disk has no room."""
    return files.disk_full(home(), detail)


def make_folder(folder: Path) -> None:
    """Creates `folder` and its parents. Raises `CacheError`."""
    with writing():
        folder.mkdir(parents=True, exist_ok=True)


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `on_bytes` is told how many bytes were read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            done += len(block)
            if on_bytes is not None:
                on_bytes(done)
    return digest.hexdigest()


def manifest(path: Path, on_bytes: Callable[[int, int], None] | None = None) -> Manifest:
    """What the model at `path` (as `resolve` gives it) consists of. Each of its files is hashed once; from then on its
    stamp vouches for it.

    on_bytes: told how many bytes were read so far, and of how many; not called when all is known.

    Raises what `files_of` raises.
    """
    sizes = {file: file.stat().st_size for file in files_of(path)}
    total, done = sum(sizes.values()), 0

    def sha256(file: Path) -> str:
        nonlocal done
        found = _stamped(file, None if on_bytes is None else lambda read: on_bytes(done + read, total))
        done += sizes[file]
        return found

    return manifest_of(path, sha256)


def digest(path: Path, on_bytes: Callable[[int, int], None] | None = None) -> str:
    """What is the same for two models if their files have the same content: of one file its SHA-256. See `manifest`."""
    return manifest(path, on_bytes).digest


def _stamped(path: Path, on_bytes: Callable[[int], None] | None) -> str:
    """The SHA-256 of a file, from a stamp where there is one. A stamp that cannot be written costs time alone."""
    before = _stamp_of(path, "")
    for stamp in (_stamp_file(path), _stamp_elsewhere(path)):
        known = _read_stamp(stamp)
        if known | {"sha256": ""} == before:
            return str(known["sha256"])
    found = file_sha256(path, on_bytes)
    if _stamp_of(path, "") == before:  # else it changed while it was read
        with suppress(CacheError):
            make_folder(_stamp_elsewhere(path).parent)
            _write_stamp(_stamp_elsewhere(path), path, found)
    return found


def _stamp_elsewhere(path: Path) -> Path:
    """Where the stamp of a file lies that others may have put where it is."""
    return home() / "stamps" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _stamp_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _stamp_of(path: Path, sha256: str) -> dict[str, int | str]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}


def write_stamp(path: Path, sha256: str) -> None:
    """Remembers that `path`, as it is now, hashes to `sha256`. Raises `CacheError`."""
    _write_stamp(_stamp_file(path), path, sha256)


def _write_stamp(stamp: Path, path: Path, sha256: str) -> None:
    fresh = stamp.with_name(f"{stamp.name}.{os.getpid()}")
    with writing():
        fresh.write_text(json.dumps(_stamp_of(path, sha256)))
        os.replace(fresh, stamp)


def has_stamp(path: Path, sha256: str) -> bool:
    """Whether `path` is unchanged since it was found to hash to `sha256`."""
    try:
        return _read_stamp(_stamp_file(path)) == _stamp_of(path, sha256)
    except OSError:
        return False


def _read_stamp(stamp: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        found = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_model(path: Path) -> None:
    """Deletes a model file and its stamp. Raises `CacheError`."""
    with writing():
        path.unlink(missing_ok=True)
        _stamp_file(path).unlink(missing_ok=True)
