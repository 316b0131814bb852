"""Memory on the stations: how much each sequence has, what is kept of ended ones, and prefixes that are shared."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fullpipe.options import EngineOptions
from fullpipe.request import Request
from fullpipe.sequences.blocks import Kept, Ledger, shared
from fullpipe.sequences.sequence import Sequence

_GROWTH = 256  # slots by which an arena grows
_WORTH_WAITING = 64  # tokens of a prompt that another one is about to have computed


class Memory:
    """Gives sequences slots within the options' bounds. for_guesses: slots of a request beyond prompt and answer.
    close: told of arenas that nobody needs any more."""

    def __init__(self, options: EngineOptions, for_guesses: int, close: Callable[[Kept], None]) -> None:
        self.for_guesses = for_guesses
        self.shares = options.enable_prefix_caching
        self._ledger, self._close = Ledger(options.kv_cache_tokens), close

    @property
    def total(self) -> int | None:
        """Slots of all requests together; None: no bound."""
        return self._ledger.total

    @property
    def used(self) -> int:
        """Slots of the requests that run; what is kept to be shared can be had at any time."""
        return self._ledger.used - sum(kept.capacity for kept in self._ledger.kept)

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and answer together that fit into all of the memory; None: no bound."""
        return None if self.total is None else max(self.total - self.for_guesses, 0)

    def whole(self, request: Request) -> int:
        """Slots that a request will need in the end."""
        return len(request.prompt) + request.params.max_tokens + self.for_guesses

    def take(self, sequence: Sequence) -> int | None:
        """Take the slots with which a sequence begins; None where there are not as many."""
        whole = self.whole(sequence.request)
        capacity = whole if self.total is None else min(whole, whole - sequence.left + _GROWTH)
        if not self._ledger.take(capacity):
            return None
        self._close_dropped()
        return capacity

    def grow(self, sequence: Sequence, least: int) -> bool:
        """Let an arena grow before it is full. False: somebody must give memory back first.

        least: slots with which a sequence can do without growing.
        """
        whole = self.whole(sequence.request)
        while sequence.slots.capacity < whole and sequence.slots.num_free < _GROWTH // 2:
            more = min(_GROWTH, whole - sequence.slots.capacity)
            if not self._ledger.take(more):
                return sequence.slots.num_free + len(sequence.lent) >= least
            sequence.slots.grow(sequence.slots.capacity + more)
            self._close_dropped()
        return True

    def give(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence's slots back. keep: its arena may be of use to others."""
        kept = sequence.kept
        if keep and self.shares and kept.in_stages:
            self._ledger.keep(kept)
        else:
            self._ledger.give(kept.capacity)
            self._close(kept)

    def forget(self) -> None:
        """There are other stations now, and they hold nothing."""
        self._ledger = Ledger(self.total)

    def give_up_kept(self) -> None:
        """Close the arenas of requests that have finished."""
        self._ledger.clear()
        self._close_dropped()

    def _close_dropped(self) -> None:
        for kept in self._ledger.dropped():
            self._close(kept)

    # ---- prefixes ----------------------------------------------------------------------------------------

    def source(self, sequence: Sequence, running: Collection[Sequence]) -> Kept | None:
        """Find the arena, of a request that runs or has ended, that shares the longest beginning with its tokens."""
        found = [one.kept for one in running if one.stages.opened]
        if kept := self._ledger.best(sequence.tokens):
            found.append(kept)
        return max(found, key=lambda kept: shared(kept.tokens, sequence.tokens, kept.stages), default=None)

    @staticmethod
    def soon_shared(sequence: Sequence, source: Kept | None, running: Collection[Sequence]) -> bool:
        """Whether a prompt that is on its way to the stations begins so much alike that it is worth waiting for: all
        that come with one long prompt would else compute it, each for itself."""
        now = shared(source.tokens, sequence.tokens, source.stages) if source else 0
        return any(shared(one.tokens, sequence.tokens, len(one.tokens)) >= now + _WORTH_WAITING
                   for one in running if one.stages.rows < one.num_prompt - 1)

    @staticmethod
    def share(sequence: Sequence, source: Kept) -> None:
        """Let a sequence begin with the rows of another arena."""
        length = shared(source.tokens, sequence.tokens, source.stages)
        sequence.stages.take_over(source.arena, source.slots[:length])
        drafted = shared(source.tokens, sequence.tokens, source.draft)
        sequence.draft.take_over(source.arena, source.slots[:drafted])
        sequence.cached = min(length, sequence.num_prompt)

    def check(self, running: Collection[Sequence]) -> None:
        """Raise AssertionError unless every slot is accounted for."""
        held = [one.slots.capacity for one in running] + [one.capacity for one in self._ledger.kept]
        assert self._ledger.used == sum(held), "cache slots are miscounted"
