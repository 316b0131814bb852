"""A sparse copy of the head's model on a host that has no files of it: as long, laid out the same, and filled where the
host's stages read. No torch.

    FOLDER/NAME           the file, or the folder with the files, as the head calls it
    FOLDER/NAME.filled    beside each file: which of its bytes are really there
    FOLDER/.lock          held while notes are read and written

Readers of models need not know: what they do not read may be zeros. A note is written after what it vouches for has
reached the disk, so a process may be killed at any moment, or the power fail. Several processes may fill one copy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Protocol, Self

import msgspec
from filelock import FileLock
from msgspec import Meta, Struct

from fullpipe.errors import CacheError, FetchError
from fullpipe.files import require_space, writing_in
from fullpipe.models.partial import Chunk, Manifest, checksum
from fullpipe.models.ranges import CHUNK, Range, chunks, merged, total, without

NOTE_EVERY_S = 1.0
"""Seconds of work that a killed process loses at most."""

_Filled = tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and those that are needed. Called often; must be quick."""


class _Note(Struct, forbid_unknown_fields=True):
    """Says which bytes of a file are there. size, sha256: of the whole file."""

    size: int
    sha256: str
    filled: list[_Filled]


class Exchange(Protocol):
    """The way to the head's files of one model. Several ranges are asked for before the first is taken; the order of
    the answers does not matter, nor whether one comes twice."""

    def ask(self, wanted: Range) -> None: ...

    def take(self) -> Chunk:
        """The next answer. Raises when there will be none."""
        ...


class Copy:
    """What a host has of one model. A context manager; one thread at a time.

    folder: by the manifest's digest, see `hub.cache.from_head_folder`.

    All raise `CacheError` when the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._open: dict[int, int] = {}
        self._fresh: list[Range] = []  # written, and not noted
        self.folder, self.manifest = folder, manifest
        self._paths = manifest.paths(folder)
        self._noted_at = time.monotonic()
        with writing_in(self.folder):
            for path in self._paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                for number in range(len(self._paths)):
                    self._lay_out(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(CacheError) if kind else nullcontext():  # the first error is the one to be told
            self.close()

    def __del__(self) -> None:
        self._shut()

    @property
    def path(self) -> Path:
        """What `open_model` opens."""
        return self.folder / self.manifest.name

    def missing(self, ranges: Iterable[Range]) -> list[Range]:
        """What of these ranges is not there yet, whoever filled it."""
        wanted = merged(ranges)
        there = [one for number in {one.file for one in wanted} for one in self._noted(number)]
        return without(wanted, [*there, *self._fresh])

    def write(self, chunk: Chunk) -> None:
        """Put it in its place. It is noted within a second, or by `flush`.

        Raises `FetchError` for one that was altered on its way.
        """
        size = self.manifest.files[chunk.range.file].size
        if len(chunk.data) != chunk.range.size or chunk.range.stop > size or checksum(chunk.data) != chunk.checksum:
            raise FetchError(f"a part of {self.manifest.name} that came from the head was altered on its way",
                             hint="Start again: what came before it is kept. If it happens again, look at the network.")
        with writing_in(self.folder):
            self._put(chunk)
        self._fresh = merged([*self._fresh, chunk.range])
        if time.monotonic() - self._noted_at >= NOTE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Note what was written, once it is on the disk."""
        fresh, self._noted_at = self._fresh, time.monotonic()
        with writing_in(self.folder):
            for number in {one.file for one in fresh}:
                os.fsync(self._open[number])
                with self._alone():
                    self._check_still_there(number)
                    self._note(number, [*self._noted(number), *fresh])
        self._fresh = []

    def close(self) -> None:
        """Note what is left, and let go of the files."""
        try:
            self.flush()
        finally:
            self._shut()

    def _shut(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open, self._fresh = {}, []

    # ---- files ----

    def _lay_out(self, number: int) -> None:
        """See to it that a file is there in its full size. A note of one that was not goes first: it would lie."""
        path, size = self._paths[number], self.manifest.files[number].size
        if path.is_file() and path.stat().st_size == size:
            return
        if _note_of(path).exists():
            _note_of(path).unlink()
            _sync_folder(path.parent)  # or it might be back after the power failed, and speak of the new file
        with path.open("ab") as file:
            file.truncate(size)

    def _put(self, chunk: Chunk) -> None:
        number, at, rest = chunk.range.file, chunk.range.start, memoryview(chunk.data)
        if number not in self._open:
            self._open[number] = os.open(self._paths[number], os.O_WRONLY | os.O_CLOEXEC)
        while rest:  # a disk that fills up takes less than it is given
            count = os.pwrite(self._open[number], rest, at)
            rest, at = rest[count:], at + count

    def _check_still_there(self, number: int) -> None:
        """A note for a file that somebody has removed meanwhile would speak of whatever is put in its place."""
        path = self._paths[number]
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(self._open[number])):
            raise CacheError(f"{path} was removed while it was filled", hint="Start again; it is fetched anew.")

    # ---- notes ----

    def _noted(self, number: int) -> list[Range]:
        """What the note says; nothing where there is none, or one that is not of this file or makes no sense."""
        file = self.manifest.files[number]
        try:
            note = msgspec.json.decode(_note_of(self._paths[number]).read_bytes(), type=_Note)
        except (OSError, ValueError):
            return []
        if (note.size, note.sha256) != (file.size, file.sha256) or any(stop > file.size for _, stop in note.filled):
            return []
        return merged(Range(number, start, stop) for start, stop in note.filled)

    def _note(self, number: int, ranges: Iterable[Range]) -> None:
        """Replace the note in one move."""
        file, place = self.manifest.files[number], _note_of(self._paths[number])
        filled = [(one.start, one.stop) for one in merged(ranges) if one.file == number]
        fresh = place.with_name(f".{place.name}")  # one that a killed process left is written over: we hold the lock
        with fresh.open("wb") as out:
            out.write(msgspec.json.encode(_Note(file.size, file.sha256, filled)))
            out.flush()
            os.fsync(out.fileno())
        os.replace(fresh, place)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.folder / ".lock"):
            yield


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.filled")


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def fill(copy: Copy, ranges: Iterable[Range], exchange: Exchange, *, window: int = 8, size: int = CHUNK,
         progress: Progress = lambda done, needed: None) -> None:
    """Fetch what of these ranges is missing. Whatever ends it early, what came until then is kept and noted.

    window: chunks that are under way at a time: with one, a link of 50 ms would carry ten chunks a second. size: of a
    chunk, at most `CHUNK`. progress: told at the start and after each chunk.

    Raises what `exchange` raises; `FetchError` for an answer that is damaged; `CacheError`.
    """
    wanted = merged(ranges)
    require_space(copy.folder, total(copy.missing(wanted)))
    try:
        _Filling(copy, wanted, exchange, progress).run(window, size)
    except BaseException:
        with suppress(CacheError):  # the first error is the one to be told
            copy.flush()
        raise
    copy.flush()


class _Filling:
    """Asks ahead, and puts away what comes."""

    def __init__(self, copy: Copy, ranges: list[Range], exchange: Exchange, progress: Progress) -> None:
        self._copy, self._ranges, self._exchange, self._progress = copy, ranges, exchange, progress
        self._under_way: set[Range] = set()

    def run(self, window: int, size: int) -> None:
        waiting = chunks(self._copy.missing(self._ranges), size)
        self._tell()
        while self._ask(waiting, window):
            self._take()
            self._tell()

    def _ask(self, waiting: Iterator[Range], window: int) -> bool:
        """Whether something is under way. What another process has filled meanwhile is not asked for."""
        while len(self._under_way) < window and (wanted := next(waiting, None)):
            if self._copy.missing([wanted]):
                self._under_way.add(wanted)
                self._exchange.ask(wanted)
        return bool(self._under_way)

    def _take(self) -> None:
        """Put away an answer; one that comes twice, or late to a filling before this one, is left aside."""
        chunk = self._exchange.take()
        if chunk.range in self._under_way:
            self._copy.write(chunk)
            self._under_way.remove(chunk.range)

    def _tell(self) -> None:
        needed = total(self._ranges)
        self._progress(needed - total(self._copy.missing(self._ranges)), needed)
