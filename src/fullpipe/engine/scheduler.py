"""Who runs: admission by age and priority, and who goes back to waiting when memory runs out."""

from __future__ import annotations

from itertools import count

from fullpipe.engine.memory import Memory
from fullpipe.errors import PromptError
from fullpipe.messages import ArenaId
from fullpipe.options import EngineOptions
from fullpipe.request import Request
from fullpipe.sequences.sequence import Sequence

_MOST_PRIORITY = 10  # better and worse count alike, or ageing would not be for anybody's lifetime
_AGEING_S = 30.0  # a request that has waited so long goes as if its priority were one better


class Scheduler:
    """Decides which sequences run, within the options' bounds and the memory that there is."""

    def __init__(self, options: EngineOptions, memory: Memory) -> None:
        self.memory = memory
        self.running: dict[int, Sequence] = {}
        self.waiting: dict[int, Sequence] = {}
        self.only: int | None = None  # the one request that is let in, while it is on trial
        self._most = options.max_num_seqs
        self._arenas, self._node_ids = count(), count()

    def check_fits(self, request: Request) -> None:
        """Raise PromptError for a request that would need more than all of the cache memory. From any thread."""
        whole, total = self.memory.whole(request), self.memory.total
        if total is not None and whole > total:
            raise PromptError(f"prompt, answer and guesses need {whole} cache slots, and there are {total}",
                              hint="Shorten the prompt, or ask for fewer tokens. More cache is "
                                   f"`{self.memory.bound_by}`.")

    def add(self, sequence: Sequence) -> None:
        """Let it wait until it can run. Raises PromptError for one that never could."""
        self.check_fits(sequence.request)
        self.waiting[sequence.request.id] = sequence

    def admit(self, now: float) -> list[Sequence]:
        """Let those in that have waited longest, in order: one that does not fit holds up those behind it, or it might
        wait for ever."""
        admitted = []
        while (sequence := self._next(now)) and self._let_in(sequence):
            admitted.append(sequence)
        return admitted

    def _next(self, now: float) -> Sequence | None:
        if not self.waiting or (self._most is not None and len(self.running) >= self._most):
            return None
        if self.only is not None:
            return self.waiting.get(self.only)
        return min(self.waiting.values(), key=lambda one: _rank(one, now))

    def _let_in(self, sequence: Sequence) -> bool:
        memory, running = self.memory, self.running.values()
        shares = memory.shares and not sequence.scored  # for that every row of its prompt must be computed
        source = memory.source(sequence, running) if shares else None
        if shares and memory.soon_shared(sequence, source, running):
            return False
        if (room := memory.take(sequence, source)) is None:
            return False
        del self.waiting[sequence.request.id]
        sequence.enter(ArenaId(next(self._arenas)), room, self._node_ids)
        self.running[sequence.request.id] = sequence
        return True

    def make_room(self, sequence: Sequence, least: int) -> Sequence | None:
        """Let a sequence's memory grow before it is full. Returns who must give its memory back first, if nothing is
        left to grow into: the youngest."""
        return None if self.memory.grow(sequence, least) else max(self.running.values(), key=_age)

    def remove(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence out; if it runs, its memory comes back. keep: what it has computed may serve others."""
        if not self.waiting.pop(sequence.request.id, None):
            del self.running[sequence.request.id]
            self.memory.give(sequence, keep=keep)

    def send_back(self, sequence: Sequence) -> None:
        """Let a sequence that runs give all of its memory back and wait; it is computed again from its committed
        tokens."""
        self.remove(sequence, keep=False)
        sequence.leave()
        self.waiting[sequence.request.id] = sequence

    def forget_stations(self, station_slots: int | None) -> None:
        """There are other stations now, with room for so many slots each, and they hold nothing: all wait."""
        self.memory.forget(station_slots)
        for sequence in self.running.values():
            sequence.leave()
        self.waiting |= self.running
        self.running.clear()

    def overdue(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed."""
        return [one for some in (self.running, self.waiting) for one in some.values() if one.request.deadline <= now]

    def unfinished(self) -> list[Sequence]:
        """All sequences, in the order in which they came."""
        return sorted([*self.running.values(), *self.waiting.values()], key=_age)

    def check(self) -> None:
        """Raise AssertionError unless every tree and every slot is as it must be."""
        self.memory.check(self.running.values())
        for sequence in self.running.values():
            sequence.check()


def _age(sequence: Sequence) -> tuple[float, int]:
    """The oldest is the least."""
    return sequence.arrived, sequence.request.id


def _rank(sequence: Sequence, now: float) -> tuple[float, float, int]:
    """Who is admitted first is the least."""
    waited = max(now - sequence.arrived, 0.0)
    priority = min(max(sequence.request.priority, -_MOST_PRIORITY), _MOST_PRIORITY)
    return (priority - waited // _AGEING_S, *_age(sequence))
