"""How many cache slots all arenas may have together, and which arenas are kept after their request's end.

A slot is counted alike on every station, so one number bounds the memory of all of them. Arenas of finished requests
stay while nobody needs their slots: the next turn of a conversation, or another request that begins alike, takes their
rows over instead of computing them again. No torch here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fullpipe.messages import ArenaId

_LEAST_SHARED = 16  # tokens; fewer are computed as fast as copied


class SlotAllocator:
    """Hands out the lowest free slot, so that the used part of an arena stays short: attention looks at
    slots up to the highest one in use."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._fresh = 0  # slots from here on have never been used
        self._returned: list[int] = []  # a heap

    @property
    def num_free(self) -> int:
        return self.capacity - self._fresh + len(self._returned)

    def grow(self, capacity: int) -> None:
        """More slots, behind those that there are."""
        assert capacity >= self.capacity
        self.capacity = capacity

    def take(self) -> int | None:
        """The lowest free slot, or None when the arena is full."""
        if self._returned:
            return heapq.heappop(self._returned)
        if self._fresh == self.capacity:
            return None
        self._fresh += 1
        return self._fresh - 1

    def give(self, slot: int) -> None:
        heapq.heappush(self._returned, slot)

    def check(self, owned: Iterable[int]) -> None:
        """Raise AssertionError unless every slot is either free or owned once: free + owned = all."""
        taken = list(owned)
        assert len(taken) == len(set(taken)), "a slot has two live owners"
        assert len(self._returned) == len(set(self._returned)), "a slot was returned twice"
        free = set(self._returned) | set(range(self._fresh, self.capacity))
        assert not free & set(taken), "a free slot has an owner"
        assert len(free) + len(taken) == self.capacity, "a slot was lost"


@dataclass(slots=True)
class Kept:
    """The arena of a finished request.

    tokens, slots: the committed path by position. stages, draft: positions below have been computed there. in_stages,
    in_draft: the arena exists there.
    """

    arena: ArenaId
    capacity: int
    tokens: list[int]
    slots: list[int]
    stages: int
    draft: int
    in_stages: bool
    in_draft: bool


class Ledger:
    """total: slots of all arenas together; None: no bound, and then nothing is kept."""

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self.used = 0  # by running requests and kept arenas
        self.kept: list[Kept] = []  # the one that was used longest ago first
        self._dropped: list[Kept] = []

    def has(self, slots: int) -> bool:
        """Whether so many can be taken now, from kept arenas if need be."""
        return self.total is None or slots <= self.total - self.used + sum(kept.capacity for kept in self.kept)

    def take(self, slots: int) -> bool:
        """Take slots, from kept arenas if need be. False, and nothing changed, when there are not as many."""
        if self.total is not None:
            if not self.has(slots):
                return False
            while slots > self.total - self.used:
                self._drop(self.kept.pop(0))
        self.used += slots
        return True

    def give(self, slots: int) -> None:
        self.used -= slots

    def keep(self, kept: Kept) -> None:
        """Slots stay taken, until others need them."""
        self.kept.append(kept)

    def dropped(self) -> list[Kept]:
        """Arenas that were given up since this was last asked: they are to be closed."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def clear(self) -> None:
        """Give up all that is kept."""
        while self.kept:
            self._drop(self.kept.pop())

    def best(self, tokens: Sequence[int]) -> Kept | None:
        """The kept arena that shares the longest beginning with `tokens`; it counts as used now."""
        lengths = [shared(kept.tokens, tokens, kept.stages) for kept in self.kept]
        if not lengths or max(lengths) == 0:
            return None
        found = self.kept.pop(lengths.index(max(lengths)))
        self.kept.append(found)
        return found

    def _drop(self, kept: Kept) -> None:
        self.used -= kept.capacity
        self._dropped.append(kept)


def shared(known: Sequence[int], tokens: Sequence[int], computed: int) -> int:
    """How many positions of `tokens` can be taken over: 0 where it is not worth it. The last one is never, for what
    follows it must be computed."""
    limit = min(len(known), len(tokens) - 1, computed)
    if limit < _LEAST_SHARED or known[0] != tokens[0]:
        return 0
    low, high = 0, limit
    while low < high:  # the longest equal beginning, by halves
        middle = (low + high + 1) // 2
        low, high = (middle, high) if known[:middle] == tokens[:middle] else (low, middle - 1)
    return low if low >= _LEAST_SHARED else 0
