"""The folder where fetched models live, and what is remembered about each file.

    <home>/models/NAME.gguf         complete and checked; appears in one `os.replace`
    <home>/models/NAME.gguf.json    its stamp: size and time of the file that was hashed
    <home>/partial/NAME/            a download under way, kept when it is interrupted
    <home>/locks/NAME.lock          one process at a time

A file is hashed once. Afterwards its stamp vouches for it, so that opening a model does not read a gigabyte
first; a file whose size or modification time differs from its stamp is hashed again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fullpipe.errors import CacheError

HOME_VARIABLE = "FULLPIPE_HOME"
_CHUNK = 1 << 20
# EFBIG is what a file-size limit (`ulimit -f`) says where a full disk says ENOSPC.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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


@contextmanager
def writing() -> Iterator[None]:
    """Turns what the operating system says against writing in the cache into `CacheError`."""
    try:
        yield
    except OSError as error:
        raise cache_error(error) from error


def cache_error(error: OSError) -> CacheError:
    if error.errno in _FULL:
        return disk_full(str(error.strerror).lower())
    return CacheError(
        f"cannot write in the cache folder {home()}: {error.strerror or error}",
        hint=f"Make it writable, or set {HOME_VARIABLE} to a folder that is.",
    )


def disk_full(detail: str) -> CacheError:
    return CacheError(
        f"no room in the cache folder {home()}: {detail}",
        hint=f"Free some space, or set {HOME_VARIABLE} to a folder on a larger disk. "
        "What was fetched so far is kept.",
    )


def make_folder(folder: Path) -> None:
    """Creates `folder` and its parents. Raises `CacheError`."""
    with writing():
        folder.mkdir(parents=True, exist_ok=True)


def require_space(folder: Path, need: int) -> None:
    """Raises `CacheError` unless the disk of `folder` (which exists) has `need` bytes to give."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise disk_full(f"{need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")


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


def _stamp_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _stamp_of(path: Path, sha256: str) -> dict[str, int | str]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}


def write_stamp(path: Path, sha256: str) -> None:
    """Remembers that `path`, as it is now, hashes to `sha256`. Raises `CacheError`."""
    stamp = _stamp_file(path)
    fresh = stamp.with_name(f"{stamp.name}.{os.getpid()}")
    with writing():
        fresh.write_text(json.dumps(_stamp_of(path, sha256)))
        os.replace(fresh, stamp)


def has_stamp(path: Path, sha256: str) -> bool:
    """Whether `path` is unchanged since it was found to hash to `sha256`."""
    try:
        return bool(json.loads(_stamp_file(path).read_text()) == _stamp_of(path, sha256))
    except (OSError, ValueError):
        return False


def remove_model(path: Path) -> None:
    """Deletes a model file and its stamp. Raises `CacheError`."""
    with writing():
        path.unlink(missing_ok=True)
        _stamp_file(path).unlink(missing_ok=True)
