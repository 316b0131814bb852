"""A worker whose host has no files of a model gets what its station reads of it from the engine's host."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fullpipe.models.copies import Copy, fill
from fullpipe.models.partial import Chunk
from fullpipe.models.ranges import Range
from fullpipe.pipeline.frames import Fetch, Fetched, FromWorker, Part, Setup, Want
from fullpipe.stations.spec import StationSpec

Parts = queue.SimpleQueue[tuple[Part, bytes]]

_TOLD_EVERY_S = 0.5


class FromHead:
    """Is the way to the files of one model at the engine's host (`models.copies.Exchange`).

    send: to the engine. parts: what comes from there.
    """

    def __init__(self, path: str, send: Callable[[FromWorker], None], parts: Parts) -> None:
        self._path, self._send, self._parts = path, send, parts
        self._told_at = 0.0

    def ask(self, wanted: Range) -> None:
        self._send(Want(self._path, wanted))

    def take(self) -> Chunk:
        part, data = self._parts.get()
        return Chunk(part.range, data, part.checksum)

    def tell(self, done: int, needed: int) -> None:
        """How much is there, of what is needed, in bytes."""
        if done == needed or time.monotonic() - self._told_at > _TOLD_EVERY_S:
            self._told_at = time.monotonic()
            self._send(Fetched(self._path, done, needed))


def fetch(wanted: Fetch, folder: Path, send: Callable[[FromWorker], None], parts: Parts) -> str:
    """Where the model lies here, when all that the station reads of it is there. folder: for copies of all models."""
    way = FromHead(wanted.path, send, parts)
    with Copy(folder / wanted.manifest.digest, wanted.manifest) as copy:
        if copy.missing(wanted.ranges):
            fill(copy, wanted.ranges, way, progress=way.tell)
        return str(copy.path)


def localised(setup: Setup, send: Callable[[FromWorker], None], parts: Parts) -> StationSpec:
    """The station's spec with paths of this host."""
    paths = dict(setup.paths)
    for wanted in setup.fetch:
        paths[wanted.path] = fetch(wanted, Path(wanted.folder).expanduser(), send, parts)
    return replaced(setup.spec, paths) if paths else setup.spec


def replaced(spec: StationSpec, paths: dict[str, str]) -> StationSpec:
    """The spec with other paths in its arguments, those of the drafts of a mix included."""
    return StationSpec(spec.builder, _replaced(spec.args, paths))


def reads(spec: StationSpec, path: str) -> bool:
    """Whether the station opens that model, target or draft."""
    return replaced(spec, {path: ""}) != spec


def _replaced(value: Any, paths: dict[str, str]) -> Any:
    match value:
        case dict():
            return {key: _replaced(one, paths) for key, one in value.items()}
        case list():
            return [_replaced(one, paths) for one in value]
        case str():
            return paths.get(value, value)
    return value
