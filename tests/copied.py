"""A head that answers from its files, for tests of copies."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from fullpipe.models.copies import Copy, fill
from fullpipe.models.partial import Chunk, Manifest, Source, manifest_of
from fullpipe.models.ranges import Range


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Head:
    """Answers in the order in which it was asked. most: the most questions that waited at a time."""

    def __init__(self, path: Path) -> None:
        self.manifest: Manifest = manifest_of(path, sha256)
        self.asked: list[Range] = []
        self.most = 0
        self._source, self._waiting = Source(path, self.manifest), deque[Range]()

    def ask(self, wanted: Range) -> None:
        self.asked.append(wanted)
        self._waiting.append(wanted)
        self.most = max(self.most, len(self._waiting))

    def take(self) -> Chunk:
        return self._source.read(self._waiting.popleft())


def filled(folder: Path, head: Head, ranges: Iterable[Range]) -> Path:
    """The path of a copy that has these ranges."""
    with Copy(folder, head.manifest) as copy:
        fill(copy, ranges, head, size=1 << 16)
        return copy.path
