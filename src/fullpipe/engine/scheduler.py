"""Who runs: admission, priorities, memory on the stations, preemption, and prefixes that are shared."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from fullpipe.errors import PromptError, UsageError
from fullpipe.messages import ArenaId
from fullpipe.options import EngineOptions
from fullpipe.request import Request
from fullpipe.sequences.blocks import Kept, Ledger, shared
from fullpipe.sequences.sequence import Sequence

_GROWTH = 256  # slots by which an arena grows
_MOST_PRIORITY = 10  # better and worse count alike, or ageing would not be for anybody's lifetime
_WORTH_WAITING = 64  # tokens of a prompt that another one is about to have computed
_AGEING_S = 30.0  # a request that has waited so long goes as if its priority were one better


class Scheduler:
    """Decides which sequences run, within the options' bounds, and what memory each has on the stations.

    for_guesses: slots of a request beyond prompt and answer. close: told of arenas that nobody needs any more.

    Raises UsageError for prefix caching without a bound of memory.
    """

    def __init__(self, options: EngineOptions, for_guesses: int, close: Callable[[Kept], None]) -> None:
        if options.enable_prefix_caching and options.kv_cache_tokens is None:
            raise UsageError("prefixes can be shared only within a bound of cache memory",
                             hint="Say how many slots there are (kv_cache_tokens).")
        self.ledger = Ledger(options.kv_cache_tokens)
        self.running: dict[int, Sequence] = {}
        self.waiting: dict[int, Sequence] = {}
        self.only: int | None = None  # the one request that is let in, while it is on trial
        self._most, self._shares = options.max_num_seqs, options.enable_prefix_caching
        self.for_guesses, self._close = for_guesses, close
        self._arenas = count()
        self._node_ids = count()

    # ---- what fits ---------------------------------------------------------------------------------------

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and answer together that fit into all of the cache memory; None: no bound."""
        return None if self.ledger.total is None else max(self.ledger.total - self.for_guesses, 0)

    def check_fits(self, request: Request) -> None:
        """Raise PromptError for a request that would need more than all of the cache memory. From any thread."""
        whole = self._whole(request)
        if not self.ledger.fits(whole):
            raise PromptError(f"prompt, answer and guesses need {whole} cache slots, and there are {self.ledger.total}",
                              hint="Shorten the prompt, ask for fewer tokens, or give the server more cache memory.")

    def _whole(self, request: Request) -> int:
        """Slots that a request will need in the end."""
        return len(request.prompt) + request.params.max_tokens + self.for_guesses

    # ---- in ----------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Let it wait until it can run. Raises PromptError for one that never could."""
        self.check_fits(sequence.request)
        self.waiting[sequence.request.id] = sequence

    def admit(self, now: float) -> list[Sequence]:
        """Let those in that have waited longest, in order: one that does not fit holds up those behind it, or it might
        wait for ever."""
        admitted = []
        while (sequence := self._next(now)) and self._take_in(sequence):
            admitted.append(sequence)
        return admitted

    def _next(self, now: float) -> Sequence | None:
        if not self.waiting or (self._most is not None and len(self.running) >= self._most):
            return None
        if self.only is not None:
            return self.waiting.get(self.only)
        return min(self.waiting.values(), key=lambda one: _rank(one, now))

    def _take_in(self, sequence: Sequence) -> bool:
        whole = self._whole(sequence.request)
        capacity = whole if self.ledger.total is None else min(whole, whole - sequence.left + _GROWTH)
        if not self.ledger.has(capacity):
            return False
        source = self._source(sequence) if self._shares else None
        if self._shares and self._soon_shared(sequence, source):
            return False
        self.ledger.take(capacity)
        del self.waiting[sequence.request.id]
        sequence.enter(ArenaId(next(self._arenas)), capacity, self._node_ids)
        if source is not None:
            _share(sequence, source)
        self.running[sequence.request.id] = sequence
        self._close_dropped()
        return True

    def _source(self, sequence: Sequence) -> Kept | None:
        """Find the arena, of a request that runs or has ended, that shares the longest beginning with its tokens."""
        found = [one.kept for one in self.running.values() if one.stages.opened]
        if kept := self.ledger.best(sequence.tokens):
            found.append(kept)
        return max(found, key=lambda kept: shared(kept.tokens, sequence.tokens, kept.stages), default=None)

    def _soon_shared(self, sequence: Sequence, source: Kept | None) -> bool:
        """Whether a prompt that is on its way to the stations begins so much alike that it is worth waiting for: all
        that come with one long prompt would else compute it, each for itself."""
        now = shared(source.tokens, sequence.tokens, source.stages) if source else 0
        return any(shared(one.tokens, sequence.tokens, len(one.tokens)) >= now + _WORTH_WAITING
                   for one in self.running.values() if one.stages.rows < one.num_prompt - 1)

    # ---- memory of those that run ------------------------------------------------------------------------

    def grow(self, sequence: Sequence, least: int) -> Sequence | None:
        """Let an arena grow before it is full. Returns who must give memory back first, if nothing is left to grow
        into: the youngest. least: slots with which a sequence can do without growing."""
        whole = self._whole(sequence.request)
        while sequence.slots.capacity < whole and sequence.slots.num_free < _GROWTH // 2:
            more = min(_GROWTH, whole - sequence.slots.capacity)
            if self.ledger.take(more):
                sequence.slots.grow(sequence.slots.capacity + more)
                self._close_dropped()
            elif sequence.slots.num_free >= least:
                return None
            else:
                return max(self.running.values(), key=_age)
        return None

    def remove(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence out; if it runs, its memory comes back. keep: its arena may be of use to others."""
        if self.waiting.pop(sequence.request.id, None):
            return
        del self.running[sequence.request.id]
        kept = sequence.kept
        if keep and self._shares and kept.in_stages:
            self.ledger.keep(kept)
        else:
            self.ledger.give(kept.capacity)
            self._close(kept)

    def send_back(self, sequence: Sequence) -> None:
        """Let a sequence that runs give all of its memory back and wait; it is computed again from its committed
        tokens."""
        self.remove(sequence, keep=False)
        sequence.leave()
        self.waiting[sequence.request.id] = sequence

    def forget_stations(self) -> None:
        """There are other stations now, and they hold nothing: all wait, and nothing is to be closed."""
        for sequence in self.running.values():
            sequence.leave()
        self.waiting |= self.running
        self.running.clear()
        self.ledger = Ledger(self.ledger.total)

    def give_up_kept(self) -> None:
        """Close the arenas of requests that have finished."""
        self.ledger.clear()
        self._close_dropped()

    def _close_dropped(self) -> None:
        for kept in self.ledger.dropped():
            self._close(kept)

    def overdue(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed."""
        return [one for some in (self.running, self.waiting) for one in some.values() if one.request.deadline <= now]

    def unfinished(self) -> list[Sequence]:
        """All sequences, in the order in which they came."""
        return sorted([*self.running.values(), *self.waiting.values()], key=_age)

    def check(self) -> None:
        """Raise AssertionError unless every slot is accounted for."""
        held = [one.slots.capacity for one in self.running.values()] + [one.capacity for one in self.ledger.kept]
        assert self.ledger.used == sum(held), "cache slots are miscounted"
        for sequence in self.running.values():
            sequence.check()


def _share(sequence: Sequence, source: Kept) -> None:
    length = shared(source.tokens, sequence.tokens, source.stages)
    sequence.stages.take_over(source.arena, source.slots[:length])
    drafted = shared(source.tokens, sequence.tokens, source.draft)
    sequence.draft.take_over(source.arena, source.slots[:drafted])
    sequence.cached = min(length, sequence.num_prompt)


def _age(sequence: Sequence) -> tuple[float, int]:
    """The oldest is the least."""
    return sequence.arrived, sequence.request.id


def _rank(sequence: Sequence, now: float) -> tuple[float, float, int]:
    """Who is admitted first is the least."""
    waited = max(now - sequence.arrived, 0.0)
    priority = min(max(sequence.request.priority, -_MOST_PRIORITY), _MOST_PRIORITY)
    return (priority - waited // _AGEING_S, *_age(sequence))
