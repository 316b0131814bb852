"""A step is what a slice computes at once: flat arrays of rows, and nothing of requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """Rows, where each puts its key and value, and what each reads.

    A slot is an index into the pool of cache memory that a slice has. A row reads a text from its beginning to its own
    token, one slot a position. Rows of a request share the beginning of that, so it stands in two runs of `reads`.

    x: token ids, int64 [rows], or hidden states [rows, hidden].
    positions: int64 [rows], each row's place in its text. slots: int32 [rows], where rows write; two write to one slot
        only where they are the same token of the same text.
    reads: int32 [n], slots in order of position.
    spans: int64 [rows, 4], first and end of a row's two runs in `reads`. Its own slot is the last of them, and together
        they have as many as its position and one.

    Rows come after their ancestors, and those that share their first run stand together.
    """

    x: Tensor
    positions: NDArray[np.int64]
    slots: NDArray[np.int32]
    reads: NDArray[np.int32]
    spans: NDArray[np.int64]

    @classmethod
    def of_text(cls, x: Tensor, slots: NDArray[np.int32], first: int = 0) -> Step:
        """Rows of one text at positions first, first + 1, ... slots: int32 [first + rows], of the whole text so far."""
        positions = np.arange(first, first + len(x), dtype=np.int64)
        spans = np.zeros((len(x), 4), np.int64)
        spans[:, 1] = positions + 1
        return cls(x, positions, slots[first:], slots, spans)

    def __len__(self) -> int:
        return len(self.positions)

    def with_x(self, x: Tensor) -> Step:
        """The same rows at the next slice."""
        return replace(self, x=x)

    def check(self, slots: int) -> None:
        """Raise AssertionError unless each row reads a whole path in a pool of so many slots."""
        spans = self.spans
        counts = spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2]
        assert (self.positions >= 0).all() and (counts == self.positions + 1).all(), "a row reads no whole path"
        last = np.where(spans[:, 3] > spans[:, 2], spans[:, 3], spans[:, 1]) - 1
        assert (self.reads[last] == self.slots).all(), "a row does not read itself last"
        assert not len(self.reads) or (self.reads.min() >= 0 and self.reads.max() < slots), "a slot beyond the pool"
