"""A row is wanted when somebody waits for what follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fullpipe.messages import Part
from fullpipe.stations.sampling import RowContext
from fullpipe.stations.structure import Place, Structures
from fullpipe.stations.table import SlotTable


@dataclass(slots=True)
class Wanted:
    """Is such a row: its index in the flight, and where it stands."""

    index: int
    part: Part
    row: int
    table: SlotTable
    structures: Structures

    @property
    def node(self) -> int:
        return self.part.nodes[self.row]

    def context(self) -> RowContext:
        table, position = self.table, self.part.positions[self.row] + 1
        if not table.params.restricted:
            return RowContext(table.params, position, self._history())
        return RowContext(table.params, position, self._history(), Place.of(table, self.part, self.row), table.ends,
                          self.structures.walk(table))

    def _history(self) -> Callable[[], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        def read() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            path = np.asarray(self.table.path(self.part, self.row), np.int64)
            return path[: self.table.prompt_len], path[self.table.prompt_len :]

        return read
