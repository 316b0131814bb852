"""The rows that are under way at this moment, as the events tell it. No torch.

A stage reports its work when the flight lands, and a row may have died while it was computed. How much of a stay was
for nothing is therefore known only with the deaths at hand; who watches an engine while it runs keeps them here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fullpipe.events import Attached, Died, Launched
from fullpipe.messages import Event, Landed, Leg


@dataclass(slots=True)
class Flying:
    """Listens to an engine. flights: those under way, oldest first. owner: the request of each of their nodes that
    lives. died: when those of them died that did."""

    flights: dict[int, Launched] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)
    died: dict[int, float] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        match event:
            case Launched():
                self.flights[event.flight] = event
                self.owner.update(zip(event.nodes, event.requests))
            case Died():
                for node in event.nodes:
                    if self.owner.pop(node, None) is not None:
                        self.died[node] = event.time
            case Landed():
                self._forget(event.flight)
            case Attached():
                self.flights, self.owner, self.died = {}, {}, {}

    def alive(self, leg: Leg) -> float:
        """The share of a stay's rows that were alive when it ended. To be asked before the landing is told here."""
        if not self.died:
            return 1.0
        return sum(self.died.get(node, leg.end) >= leg.end for node in leg.nodes) / len(leg.nodes)

    def _forget(self, flight: int) -> None:
        if launched := self.flights.pop(flight, None):
            for node in launched.nodes:
                self.owner.pop(node, None)
                self.died.pop(node, None)
