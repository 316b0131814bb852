"""Memory on the stations: how much each sequence has, what is kept of ended ones, and prefixes that are shared."""

from __future__ import annotations

import logging
from collections.abc import Collection

from fullpipe.errors import UsageError
from fullpipe.options import EngineOptions
from fullpipe.request import Request
from fullpipe.sequences.blocks import BlockPool, Kept, KeptPaths, Room, SlotAllocator, shared
from fullpipe.sequences.sequence import Sequence

log = logging.getLogger(__name__)

_AHEAD = 128  # free slots that a sequence has, as long as there are blocks
_WORTH_WAITING = 64  # tokens of a prompt that another one is about to have computed


class Memory:
    """Gives sequences slots within a bound. for_guesses: slots of a request beyond prompt and answer.

    station_slots: room of the station that has least; None: nobody sets a bound.

    Raises UsageError where there is no room for a block, or prefixes are to be shared without a bound.
    """

    def __init__(self, options: EngineOptions, for_guesses: int, station_slots: int | None) -> None:
        self.for_guesses = for_guesses
        self._asked, self._size = options.kv_cache_tokens, options.block_size
        self.shares = options.enable_prefix_caching
        self.forget(station_slots)
        if self.shares and self.total is None:
            raise UsageError("prefixes can be shared only within a bound of cache memory",
                             hint="Say how many slots there are (`kv_cache_tokens`).")

    def forget(self, station_slots: int | None) -> None:
        """There are other stations now, with room for so many slots each, and they hold nothing."""
        slots = min((bound for bound in (self._asked, station_slots) if bound is not None), default=None)
        if self._asked is not None and slots is not None and slots < self._asked:
            log.warning("%d cache slots were asked for, and the stations have room for %d (kv_pool_mib)", self._asked,
                        slots)
        if slots is not None and slots < self._size:
            raise UsageError(f"{slots} cache slots are less than a block of {self._size}",
                             hint=f"Give more `{'kv_cache_tokens' if slots == self._asked else 'kv_pool_mib'}`.")
        self._pool = BlockPool(self._size, None if slots is None else slots // self._size)
        self._paths = KeptPaths(self._pool)

    @property
    def total(self) -> int | None:
        """Slots of all requests together; None: no bound."""
        return None if self._pool.total is None else self._pool.total * self._size

    @property
    def bound_by(self) -> str:
        """The option that a larger cache needs."""
        return "kv_cache_tokens" if self._asked is not None and self.total == self._fits(self._asked) else "kv_pool_mib"

    @property
    def used(self) -> int:
        """Slots of the requests that run; what is kept to be shared can be had at any time."""
        return (self._pool.num_used - self._paths.num_blocks) * self._size

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and answer together that fit into all of the memory; None: no bound."""
        return None if self.total is None else max(self.total - self.for_guesses, 0)

    def whole(self, request: Request) -> int:
        """Slots that a request will need in the end."""
        return len(request.prompt) + request.params.max_tokens + self.for_guesses

    def take(self, sequence: Sequence, source: Kept | None) -> Room | None:
        """Take the blocks with which a sequence begins; None where there are not as many.

        source: what it may share the beginning with.
        """
        whole = self.whole(sequence.request)
        length, held = self._shareable(source, sequence) if source else (0, [])
        if not self._pool_fits(len(held) + self._blocks(whole - length)):
            source, length, held = None, 0, []  # alone it must fit, whatever it shares
        self._pool.hold(held)
        blocks = self._blocks(min(whole, whole - sequence.left + _AHEAD) - length)
        if not self._paths.make_room(blocks):
            self._pool.let_go(held)
            return None
        own = self._pool.take(blocks)
        if source is None:
            return Room(SlotAllocator(self._size, own, most=whole))
        drafted = min(length, shared(source.tokens, sequence.tokens, source.draft))
        return Room(SlotAllocator(self._size, own, source.slots[:length], held, whole), length, drafted)

    def grow(self, sequence: Sequence, least: int) -> bool:
        """Give a sequence more blocks before its own are full. False: somebody must give memory back first.

        least: slots with which a sequence can do without growing.
        """
        slots, whole = sequence.slots, self.whole(sequence.request)
        while slots.capacity < whole and slots.num_free < _AHEAD:
            if not self._paths.make_room(1):
                return slots.num_free + len(sequence.lent) >= least
            slots.grow(self._pool.take(1))
        return True

    def give(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence's blocks back. keep: what it has computed may be of use to others."""
        blocks = sequence.slots.blocks
        if keep and self.shares and sequence.stages.opened:
            kept = sequence.kept
            kept.blocks = sorted(self._blocks_of(kept.slots[: kept.stages]))
            self._paths.keep(kept)
            blocks = [block for block in blocks if block not in kept.blocks]
        self._pool.let_go(blocks)

    def give_up_kept(self) -> None:
        """Keep nothing of requests that have ended."""
        self._paths.clear()

    def _fits(self, slots: int) -> int:
        return slots // self._size * self._size

    def _blocks(self, slots: int) -> int:
        return -(-slots // self._size)

    def _shareable(self, source: Kept, sequence: Sequence) -> tuple[int, list[int]]:
        """How much of a path may be shared, and the blocks in which that lies: at most two more than it would fill, for
        what others have left free in them is lost while somebody reads there."""
        length, held = shared(source.tokens, sequence.tokens, source.stages), dict[int, None]()
        for position, slot in enumerate(source.slots[:length]):
            if len(held) > position // self._size + 1 and slot // self._size not in held:
                return position, list(held)
            held[slot // self._size] = None
        return length, list(held)

    def _blocks_of(self, slots: list[int]) -> set[int]:
        return {slot // self._size for slot in slots}

    def _pool_fits(self, blocks: int) -> bool:
        return self._pool.total is None or blocks <= self._pool.total

    # ---- prefixes ----------------------------------------------------------------------------------------

    def source(self, sequence: Sequence, running: Collection[Sequence]) -> Kept | None:
        """Find who shares the longest beginning with its tokens, of the requests that run or have ended."""
        found = [one.kept for one in running if one.stages.opened]
        if kept := self._paths.best(sequence.tokens):
            found.append(kept)
        return max(found, key=lambda kept: shared(kept.tokens, sequence.tokens, kept.stages), default=None)

    @staticmethod
    def soon_shared(sequence: Sequence, source: Kept | None, running: Collection[Sequence]) -> bool:
        """Whether a prompt that is on its way to the stations begins so much alike that it is worth waiting for: all
        that come with one long prompt would else compute it, each for itself."""
        now = shared(source.tokens, sequence.tokens, source.stages) if source else 0
        return any(shared(one.tokens, sequence.tokens, len(one.tokens)) >= now + _WORTH_WAITING
                   for one in running if one.stages.rows < one.num_prompt - 1)

    def check(self, running: Collection[Sequence]) -> None:
        """Raise AssertionError unless every block is accounted for."""
        self._pool.check([*(one.slots.blocks for one in running), *(kept.blocks for kept in self._paths.kept)])
