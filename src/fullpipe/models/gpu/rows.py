"""A step's rows become flat arrays here, on the host: where each writes, how much it reads, and where that lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.models.attention import Segment
from fullpipe.models.gpu.pool import DeviceArena

LEAST_WIDTH = 256


def width_for(length: int) -> int:
    """The bucket of a context of so many positions: a power of two."""
    return max(LEAST_WIDTH, 1 << (length - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a step. All arrays are int32.

    positions, places: [rows], where a row stands in its text and where its key and value go in the pool.
    context: [rows, width], the places of what it reads, by position, its own last; the first positions + 1 count.
    """

    positions: NDArray[np.int32]
    places: NDArray[np.int32]
    context: NDArray[np.int32]

    @classmethod
    def of(cls, positions: Tensor, segments: Sequence[Segment]) -> Rows:
        """positions: int64 [rows]. segments: as `DecoderSlice.forward` takes them, their arenas of the device."""
        where = positions.numpy()
        places = np.empty(len(where), np.int32)
        context = np.zeros((len(where), width_for(int(where.max()) + 1)), np.int32)
        for one in segments:
            arena: DeviceArena = one.cache
            slots, own = one.slots.numpy(), slice(one.start, one.end)
            arena.positions[slots] = where[own]
            places[own] = arena.places[slots]
            _fill(context[own], where[own], one.mask.numpy(), arena)
        return cls(where.astype(np.int32), places, context)

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, end: int) -> Rows:
        """Some of the rows, in a bucket of width of their own."""
        positions = self.positions[start:end]
        width = width_for(int(positions.max()) + 1)
        return Rows(positions, self.places[start:end], self.context[start:end, :width])


def _fill(context: NDArray[np.int32], positions: NDArray[np.int64], mask: NDArray[np.bool_],
          arena: DeviceArena) -> None:
    """What a row reads is a path from the beginning of the text, so of each position one slot. The paths of a request's
    rows begin alike: that part is found once, and only the rest row by row."""
    common: NDArray[np.bool_] = mask.min(axis=0)
    shared = common.nonzero()[0]
    rows, slots = (mask & ~common).nonzero()
    assert (len(shared) + np.bincount(rows, minlength=len(mask)) == positions + 1).all(), "a row reads no whole path"
    line = np.empty(len(shared), np.int32)
    line[arena.positions[shared]] = arena.places[shared]
    context[:, : len(shared)] = line
    context[rows, arena.positions[slots]] = arena.places[slots]
