"""A live line of what the pipeline holds, drawn from the event stream."""

from __future__ import annotations

from fullpipe.messages import Died, Emitted, Event, Landed, Launched

_LEVELS = " ▁▂▃▄▅▆▇█"

class PipelineLine:
    """Listens to an engine: live rows per flight in the pipeline, newest first, and how many tokens were in
    flight before they were needed."""

    def __init__(self, stages: int, width: int) -> None:
        self._stages, self._width = stages, width
        self._flights: dict[int, set[int]] = {}
        self._flight_of: dict[int, int] = {}
        self._hits = self._emitted = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Launched():
                self._flights[event.flight] = set(event.nodes)
                self._flight_of |= dict.fromkeys(event.nodes, event.flight)
            case Died():
                for node in event.nodes:
                    if (flight := self._flight_of.pop(node, None)) is not None:
                        self._flights[flight].discard(node)
            case Landed():
                for node in self._flights.pop(event.flight, ()):
                    self._flight_of.pop(node, None)
            case Emitted():
                self._emitted += 1
                self._hits += event.hit

    def line(self) -> str:
        """The line as it stands now."""
        rows = [len(nodes) for nodes in list(self._flights.values())[::-1]][: self._stages]
        rows += [0] * (self._stages - len(rows))
        bars = "".join(_LEVELS[min(8, -(-8 * count // self._width))] for count in rows)
        return (f"stages |{bars}| {sum(rows):>3} live rows in flight   {self._emitted} tokens, "
                f"{self._hits} already in flight when needed")
