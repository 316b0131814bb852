"""What a step's rows read is laid out here, on the host, as a device wants it: a line of places for each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fullpipe.models.gpu.pool import SCRATCH
from fullpipe.models.step import Step

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
    def of(cls, step: Step) -> Rows:
        context = np.zeros((len(step), width_for(int(step.positions.max()) + 1)), np.int32)
        reads = step.reads + np.int32(SCRATCH)
        for row, (first, end, branch, last) in enumerate(step.spans.tolist()):
            context[row, : end - first] = reads[first:end]
            context[row, end - first : end - first + last - branch] = reads[branch:last]
        return cls(step.positions.astype(np.int32), step.slots + np.int32(SCRATCH), context)

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, end: int) -> Rows:
        """Some of the rows, in a bucket of width of their own."""
        positions = self.positions[start:end]
        width = width_for(int(positions.max()) + 1)
        return Rows(positions, self.places[start:end], self.context[start:end, :width])

