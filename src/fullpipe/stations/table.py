"""A station knows this of the requests that run: what stands in each slot, and each request's committed path.

A slot is an index into the pool of cache memory, the same on every station. The engine says who has which. Stations are
first-in-first-out, so a later owner's write always follows the dead one's. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fullpipe.messages import ArenaId, Opening, Part

_LEAST = 256


class Slots:
    """Knows the token and the position of what was written last into each slot, of all requests. int64 arrays; they
    grow with the slots that are named."""

    def __init__(self) -> None:
        self.token = np.zeros(0, np.int64)
        self.position = np.zeros(0, np.int64)

    def write(self, part: Part) -> None:
        slots = np.asarray(part.slots, np.int64)
        if (highest := int(slots.max())) >= len(self.token):
            more = max(highest + 1, 2 * len(self.token), _LEAST) - len(self.token)
            self.token, self.position = np.pad(self.token, (0, more)), np.pad(self.position, (0, more))
        self.token[slots] = part.tokens
        self.position[slots] = part.positions


class SlotTable:
    """Knows the committed path of one request, and reads its tokens in the slots of the station.

    Filled from the parts that arrive, in order; `apply` comes before anything is asked about a part.
    """

    def __init__(self, opening: Opening, slots: Slots) -> None:
        self.params, self.request = opening.params, opening.request
        self.prompt_len, self.ends, self.scored = opening.prompt_len, tuple(opening.ends), opening.scored
        self._slots = slots
        self._order = np.asarray(opening.path, np.int32)  # committed slots by position, and room behind them
        self.num_committed = len(opening.path)

    def apply(self, part: Part) -> None:
        """Take over the part's rows and commits."""
        if part.slots:
            self._slots.write(part)
        if part.commits:
            end = self.num_committed + len(part.commits)
            if end > len(self._order):
                self._order = np.pad(self._order, (0, max(end, 2 * len(self._order), _LEAST) - len(self._order)))
            self._order[self.num_committed : end] = part.commits
            self.num_committed = end

    def shared(self, part: Part, row: int) -> int:
        """How many slots of the committed path a row reads; behind them it reads those that it names."""
        count = part.positions[row] + 1 - len(part.paths[row])
        assert count <= self.num_committed, "a row's path begins beyond what is committed"
        return count

    def committed_tokens(self) -> NDArray[np.int64]:
        """The committed path's tokens in order, prompt included."""
        return self._slots.token[self.committed_slots()]

    def committed_slots(self) -> NDArray[np.int32]:
        """The committed path's slots in order; a view."""
        return self._order[: self.num_committed]

    def is_committed(self, slot: int, position: int) -> bool:
        """Whether what stands in a slot at a position is of the committed path."""
        return position < self.num_committed and bool(self._order[position] == slot)

    def standing(self, slots: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens in these slots, and their positions."""
        return self._slots.token[slots], self._slots.position[slots]

    def path(self, part: Part, row: int) -> list[int]:
        """All tokens on the path of a row of `part`, in order, its own last."""
        return self.tail(part, row, part.positions[row] + 1)

    def tail(self, part: Part, row: int, count: int) -> list[int]:
        """The last `count` tokens of that path; fewer where it is shorter. Costs as much as it returns."""
        branch, end = part.paths[row][-count:], part.positions[row] + 1 - len(part.paths[row])
        end = min(end, self.num_committed)
        shared = self._order[max(0, end - (count - len(branch))) : max(0, end)]
        tokens: list[int] = self._slots.token[shared].tolist()
        return tokens + [int(self._slots.token[slot]) for slot in branch]


class Tables:
    """Holds the table of each open request of a station."""

    def __init__(self) -> None:
        self._slots = Slots()
        self._tables: dict[ArenaId, SlotTable] = {}

    def __getitem__(self, arena: ArenaId) -> SlotTable:
        return self._tables[arena]

    def open(self, openings: Iterable[Opening]) -> None:
        for opening in openings:
            self._tables[opening.arena] = SlotTable(opening, self._slots)

    def close(self, arenas: Iterable[ArenaId]) -> None:
        """Forget requests; of one that was never opened here there is nothing to forget."""
        for arena in arenas:
            self._tables.pop(arena, None)
