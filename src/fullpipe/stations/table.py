"""A station knows this of one request's cache slots: token, position, and the committed path.

A slot is an index into a request's arena, the same on every station. Stations are first-in-first-out, so a later
owner's write always follows the dead one's. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fullpipe.messages import ArenaId, Opening, Part


class SlotTable:
    """Knows each slot of one request: token, position, and the committed path.

    Filled from the parts that arrive, in order; `apply` comes before anything is asked about a part.
    """

    def __init__(self, opening: Opening) -> None:
        self.params, self.request = opening.params, opening.request
        self.prompt_len = opening.prompt_len
        self.capacity = opening.capacity
        self.width = 0  # highest slot in use, plus one
        self._token = np.zeros(opening.capacity, np.int64)
        self._position = np.zeros(opening.capacity, np.int64)
        self._committed = np.zeros(opening.capacity, np.bool_)
        self._order = np.zeros(opening.capacity, np.int64)  # committed slots by position
        self.num_committed = 0

    def enlarge(self, capacity: int) -> None:
        """Make room for `capacity` slots, if there is less. What stands in the others stays."""
        if (more := capacity - self.capacity) > 0:
            for name in ("_token", "_position", "_committed", "_order"):
                setattr(self, name, np.pad(getattr(self, name), (0, more)))
            self.capacity = capacity

    def begin_with(self, other: SlotTable, slots: list[int]) -> None:
        """Take over what stands in committed slots of another table, those of positions 0, 1, ... in order: it stands,
        committed, in slots 0, 1, ... of this one, which is empty before."""
        (tokens, positions), count = other.standing(np.asarray(slots, np.int64)), len(slots)
        places = np.arange(count)
        assert other._committed[slots].all() and (positions == places).all(), "only the committed path can be copied"
        self._token[:count], self._position[:count], self._order[:count] = tokens, places, places
        self._committed[:count] = True
        self.width = self.num_committed = count

    def apply(self, part: Part) -> None:
        """Take over the part's rows and commits."""
        if part.slots:
            slots = np.asarray(part.slots, np.int64)
            self._token[slots] = part.tokens
            self._position[slots] = part.positions
            self.width = max(self.width, int(slots.max()) + 1)
        if part.commits:
            end = self.num_committed + len(part.commits)
            self._order[self.num_committed : end] = part.commits
            self._committed[part.commits] = True
            self.num_committed = end

    def mask(self, part: Part) -> NDArray[np.bool_]:
        """Which slots each row attends to: bool [rows, width], True = attend, own slot included."""
        positions = np.asarray(part.positions, np.int64)
        mask = self._committed[: self.width] & (self._position[: self.width] <= positions[:, None])
        lengths = [len(path) for path in part.paths]
        rows = np.repeat(np.arange(len(part)), lengths)
        columns = [slot for path in part.paths for slot in path]
        mask[rows, columns] = True
        return mask

    def committed_tokens(self) -> NDArray[np.int64]:
        """The committed path's tokens in order, prompt included."""
        return self._token[self._order[: self.num_committed]]

    def committed_slots(self) -> NDArray[np.int64]:
        """The committed path's slots in order; a view."""
        return self._order[: self.num_committed]

    def is_committed(self, slot: int) -> bool:
        return bool(self._committed[slot])

    def standing(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens in these slots, and their positions."""
        return self._token[slots], self._position[slots]

    def path(self, part: Part, row: int) -> list[int]:
        """All tokens on the path of a row of `part`, in order, its own last."""
        return self.tail(part, row, self.capacity)

    def tail(self, part: Part, row: int, count: int) -> list[int]:
        """The last `count` tokens of that path; fewer where it is shorter. Costs as much as it returns."""
        branch = part.paths[row][-count:]
        end = min(self.num_committed, part.positions[row] + 1)
        shared = self._order[max(0, end - (count - len(branch))) : end]
        tokens: list[int] = self._token[shared].tolist()
        return tokens + [int(self._token[slot]) for slot in branch]


def open_table(tables: Mapping[ArenaId, SlotTable], opening: Opening) -> SlotTable:
    """What a station with these tables has of the request from now on: the table that is there, enlarged, or a new
    one, which begins with what the opening says."""
    if (table := tables.get(opening.arena)) is not None:
        table.enlarge(opening.capacity)
        return table
    table = SlotTable(opening)
    if opening.copy_from >= 0:
        table.begin_with(tables[ArenaId(opening.copy_from)], opening.copied)
    return table
