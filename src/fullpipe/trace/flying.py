"""Which rows are under way, and which of them die, is heard here from the events. No torch.

A stage reports its work when the flight lands, and a row may have died while it was computed. How much of a stay was
for nothing is therefore known only with the deaths at hand: `Flying` keeps them while an engine runs, and `alive_rows`
counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fullpipe.events import Attached, Died, Launched
from fullpipe.messages import Event, Landed, Leg


def alive_rows(leg: Leg, died: Mapping[int, float]) -> int:
    """How many of a stay's rows were alive when it ended. died: when which node did; prompt rows never do."""
    return sum(died.get(node, leg.end) >= leg.end for node in leg.nodes)


@dataclass(slots=True)
class Flying:
    """Listens to an engine, and knows what is under way.

    flights: those under way, oldest first. owner: the request of each of their nodes that lives. died: when those of
    them died that did.
    """

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
        return alive_rows(leg, self.died) / len(leg.nodes)

    def _forget(self, flight: int) -> None:
        if launched := self.flights.pop(flight, None):
            for node in launched.nodes:
                self.owner.pop(node, None)
                self.died.pop(node, None)
