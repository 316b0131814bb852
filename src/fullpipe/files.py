"""Files that change in one move, and what the system says against writing in our folders."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fullpipe.errors import CacheError, UsageError

HOME_VARIABLE = "FULLPIPE_HOME"
# EFBIG is what a file-size limit (`ulimit -f`) says where a full disk says ENOSPC.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(path: Path, text: str) -> None:
    """Replace what is in a file. Raises UsageError, and leaves what was there, when it cannot be written."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}",
                         hint="Name a file in a folder that exists, is writable and has room.") from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)  # after the move there is none


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turns what the operating system says against writing in a folder of the cache into `CacheError`."""
    try:
        yield
    except OSError as error:
        raise cache_error(folder, error) from error


def cache_error(folder: Path, error: OSError) -> CacheError:
    """The error for a folder of the cache in which the system would not write."""
    if error.errno in _FULL:
        return disk_full(folder, str(error.strerror).lower())
    return CacheError(
        f"cannot write in the cache folder {folder}: {error.strerror or error}",
        hint=f"Make it writable, or set {HOME_VARIABLE} to a folder that is.",
    )


def disk_full(folder: Path, detail: str) -> CacheError:
    """The error for a folder of the cache whose disk has no room."""
    return CacheError(
        f"no room in the cache folder {folder}: {detail}",
        hint=f"Free some space, or set {HOME_VARIABLE} to a folder on a larger disk. "
        "What was fetched so far is kept.",
    )


def require_space(folder: Path, need: int) -> None:
    """Raises `CacheError` unless the disk of `folder` (which exists) has `need` bytes to give."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise disk_full(folder, f"{need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")
