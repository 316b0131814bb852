"""An agenda holds what will happen on a virtual clock, in order of time. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from fullpipe.messages import Event
from fullpipe.pipeline.links import Wire

Action = Callable[[], Event | None]
"""Something that happens. It returns the event that tells the engine of it, if any."""


class Agenda:
    """Keeps actions in order. time: of what happened last, in seconds.

    Within one instant what ends (and the engine acts on) comes before what begins.
    """

    def __init__(self) -> None:
        self.time = 0.0
        self._order = count()
        self._heap: list[tuple[float, bool, int, Action]] = []

    def at(self, moment: float, action: Action) -> None:
        """Something ends then: a station's work, a message's way."""
        heapq.heappush(self._heap, (moment, False, next(self._order), action))

    def begin_at(self, moment: float, action: Action) -> None:
        """Something may begin then."""
        heapq.heappush(self._heap, (moment, True, next(self._order), action))

    def deliver(self, wire: Wire, size: int, action: Action) -> Event | None:
        """Let it happen when a message of so many bytes, sent now, arrives: at once where it takes no time."""
        arrival = wire.arrival(self.time, size)
        if arrival <= self.time:
            return action()
        self.at(arrival, action)
        return None

    def run(self) -> list[Event]:
        """Let happen what comes next, up to the end of the first instant that has events; these, in order."""
        happened: list[Event] = []
        while self._heap:
            moment, begins, _, action = self._heap[0]
            if happened and (moment > self.time or begins):
                break
            heapq.heappop(self._heap)
            self.time = moment
            if event := action():
                happened.append(event)
        return happened

    def clear(self) -> None:
        self._heap.clear()
