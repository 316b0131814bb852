"""Cache memory is handed out here: blocks of slots, the same on every station, and the slots of a sequence in them.

A block belongs to as many as refer to it. A sequence writes only into blocks that it has taken itself; what it shares
with others it reads. (A draft that lags behind may be sent shared tokens once more, which are written as they stand.)
No torch here.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LEAST_SHARED = 16  # tokens; fewer are not worth holding on to another's block
_STRIDE = 64  # tokens that are compared at once


class BlockPool:
    """Knows which blocks are free, and how many refer to each of the others.

    size: slots of a block. total: blocks that there are; None: no bound.
    """

    def __init__(self, size: int, total: int | None) -> None:
        self.size, self.total = size, total
        self._fresh = 0  # blocks from here on have never been used
        self._returned: list[int] = []  # a heap: of the free ones the lowest comes first, for its memory is there
        self.references: Counter[int] = Counter()

    @property
    def num_used(self) -> int:
        return self._fresh - len(self._returned)

    def has(self, blocks: int) -> bool:
        return self.total is None or blocks <= self.total - self.num_used

    def take(self, blocks: int) -> list[int]:
        """Blocks that nobody had; there must be as many."""
        assert self.has(blocks)
        taken = [self._take() for _ in range(blocks)]
        self.hold(taken)
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """One more refers to these blocks."""
        self.references.update(blocks)

    def let_go(self, blocks: Iterable[int]) -> None:
        """One less refers to these blocks; those to which nobody does are free."""
        for block in blocks:
            if self.references[block] > 1:
                self.references[block] -= 1
            else:
                del self.references[block]
                heapq.heappush(self._returned, block)

    def _take(self) -> int:
        if self._returned:
            return heapq.heappop(self._returned)
        self._fresh += 1
        return self._fresh - 1

    def check(self, held: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless these, who hold blocks, are all that refer to them, and the rest is free."""
        assert Counter(block for blocks in held for block in blocks) == self.references, "blocks are miscounted"
        used = self.references.keys()
        assert len(set(self._returned)) == len(self._returned), "a block was returned twice"
        assert set(self._returned) | used == set(range(self._fresh)), "a block was lost"
        assert not set(self._returned) & used, "a free block has an owner"


class SlotAllocator:
    """Hands out the slots of one sequence, those first that lie in front.

    blocks: all to which the sequence refers. shared: slots of others' that it reads, its text's beginning.
    """

    def __init__(self, size: int, own: Sequence[int], shared: Sequence[int] = (), held: Iterable[int] = (),
                 most: int = sys.maxsize) -> None:
        """own: blocks of `size` slots that nobody else writes. held: others' blocks, in which `shared` lie.

        most: slots that are handed out, those that are shared among them; the last block may have more.
        """
        self._size, self._own, self.shared = size, list[int](), list(shared)
        self._held, self._most = list(held), most - len(self.shared)
        self._room = 0  # slots that may be handed out
        self._fresh = 0  # slots of own blocks, counted in order, from here on have never been used
        self._returned: list[int] = []
        self.grow(own)

    @property
    def blocks(self) -> list[int]:
        return self._held + self._own

    @property
    def capacity(self) -> int:
        """Slots, those that are shared among them."""
        return len(self.shared) + self._room

    @property
    def num_free(self) -> int:
        return self._room - self._fresh + len(self._returned)

    def grow(self, blocks: Iterable[int]) -> None:
        """More slots, behind those that there are."""
        self._own += blocks
        self._room = min(len(self._own) * self._size, self._most)

    def take(self) -> int | None:
        """A free slot, or None where there is none."""
        if self._returned:
            return self._returned.pop()
        if self._fresh == self._room:
            return None
        block, slot = divmod(self._fresh, self._size)
        self._fresh += 1
        return self._own[block] * self._size + slot

    def give(self, slot: int) -> None:
        self._returned.append(slot)

    def check(self, owned: Iterable[int]) -> None:
        """Raise AssertionError unless every slot is either free or owned once: free + owned = all."""
        taken = list(owned)
        assert len(taken) == len(set(taken)), "a slot has two live owners"
        assert len(self._returned) == len(set(self._returned)), "a slot was returned twice"
        fresh = range(self._fresh, self._room)
        free = set(self._returned) | {self._own[i // self._size] * self._size + i % self._size for i in fresh}
        assert not free & set(taken), "a free slot has an owner"
        assert len(free) + len(taken) == self.capacity, "a slot was lost"
        blocks = set(self.blocks)
        assert all(slot // self._size in blocks for slot in taken), "a slot lies in a block of somebody else"


@dataclass(frozen=True, slots=True)
class Room:
    """What a sequence begins with. stages, draft: positions below are there already, on stages and draft."""

    slots: SlotAllocator
    stages: int = 0
    draft: int = 0


@dataclass(slots=True)
class Kept:
    """What others may share of a sequence, one that runs or one that has ended.

    tokens, slots: the committed path by position. stages, draft: positions below have been computed there, and are
    known there as committed. blocks: those in which the slots lie.
    """

    tokens: list[int]
    slots: list[int]
    stages: int
    draft: int
    blocks: list[int]


class KeptPaths:
    """Holds on to the blocks of sequences that have ended, while nobody needs them: the next turn of a conversation, or
    another request that begins alike, reads their rows instead of computing them again."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.kept: list[Kept] = []  # the one that was used longest ago first

    def keep(self, kept: Kept) -> None:
        """Whoever had the blocks hands them on."""
        self.kept.append(kept)

    @property
    def num_blocks(self) -> int:
        """Blocks to which nobody else refers."""
        own = Counter(block for kept in self.kept for block in kept.blocks)
        return sum(count == self._pool.references[block] for block, count in own.items())

    def make_room(self, blocks: int) -> bool:
        """Give up what is kept until so many blocks are free. False, and nothing changed, where they never would be."""
        if self._pool.has(blocks):
            return True
        if not self._pool.has(blocks - self.num_blocks):
            return False
        while not self._pool.has(blocks):
            self._pool.let_go(self.kept.pop(0).blocks)
        return True

    def clear(self) -> None:
        """Give up all that is kept."""
        while self.kept:
            self._pool.let_go(self.kept.pop().blocks)

    def best(self, tokens: Sequence[int]) -> Kept | None:
        """What shares the longest beginning with `tokens`; it counts as used now."""
        lengths = [shared(kept.tokens, tokens, kept.stages) for kept in self.kept]
        if not lengths or max(lengths) == 0:
            return None
        found = self.kept.pop(lengths.index(max(lengths)))
        self.kept.append(found)
        return found


def shared(known: Sequence[int], tokens: Sequence[int], computed: int) -> int:
    """How many positions of `tokens` can be taken over: 0 where it is not worth it. The last one is never, for what
    follows it must be computed."""
    limit = min(len(known), len(tokens) - 1, computed)
    if limit < _LEAST_SHARED or known[0] != tokens[0]:
        return 0
    equal = 0
    while equal < limit and known[equal : (end := min(equal + _STRIDE, limit))] == tokens[equal:end]:
        equal = end
    while equal < limit and known[equal] == tokens[equal]:
        equal += 1
    return equal if equal >= _LEAST_SHARED else 0
