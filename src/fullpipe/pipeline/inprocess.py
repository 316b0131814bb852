"""All stations in this process, run in order of events.

With the virtual clock every station's work is really computed, and its duration (measured, or given)
advances that station's own clock: the tokens are real, the machine is imagined. With the wall clock the
stations take turns on this machine in the order in which equal stations would, and times are what they
are. No torch here: what a station is, it alone knows.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Literal, Protocol

from fullpipe.errors import PipelineError
from fullpipe.messages import Drafted, Event, Flight, Landed, Leg, Ready
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.station import SourceLike, StageLike, Verdict


class Costs(Protocol):
    """How long a station takes, in seconds of the virtual clock."""

    def __call__(self, station: str, rows: int, measured: float) -> float: ...


def unit_costs(station: str, rows: int, measured: float) -> float:
    """Every stage step and every draft call takes one second; a flight whose rows all died takes none."""
    return 1.0 if rows else 0.0


def measured_costs(station: str, rows: int, measured: float) -> float:
    """What the work took here, as if every station were a machine like this one."""
    return measured


# Order within one instant: first what ends (and the engine acts on), then what begins.
_ENDS, _BEGINS = 0, 1


class _Station:
    def __init__(self, name: str, run: Callable[[Flight, Any], Any]) -> None:
        self.name = name
        self.run = run
        self.queue: deque[tuple[Flight, Any, list[Leg]]] = deque()
        self.busy = False


class InProcessPipeline(Pipeline):
    """stages: the slices in order. source: who proposes, or None.

    clock: "virtual" or "wall". costs: durations on the virtual clock. link_s: latency of every hop
    between stages, and between engine and draft, in seconds of the virtual clock.
    """

    def __init__(self, stages: Sequence[StageLike], source: SourceLike | None = None, *,
                 clock: Literal["virtual", "wall"] = "virtual", costs: Costs = unit_costs,
                 link_s: float = 0.0) -> None:
        self.num_stages = len(stages)
        self.has_draft = source is not None
        self._stages = [_Station(f"stage {k}", stage.run) for k, stage in enumerate(stages)]
        self._draft = _Station("draft", lambda job, _: source.run(job)) if source is not None else None
        self._wall = clock == "wall"
        self._costs = unit_costs if self._wall else costs
        self._link = 0.0 if self._wall else link_s
        self._time = 0.0
        self._order = count()
        self._agenda: list[tuple[float, int, int, Callable[[], Event | None]]] = []
        self._cancelled: set[int] = set()
        self._under_way: dict[int, list[int]] = {}  # flight -> its nodes; what landed need not stay cancelled
        self._at(0.0, _ENDS, lambda: Ready(self.now()))

    # ---- the promise -------------------------------------------------------------------------------------

    def launch(self, flight: Flight) -> None:
        self._under_way[flight.id] = [node for part in flight.parts for node in part.nodes]
        self._at(self._time, _BEGINS, lambda: self._arrive(0, flight, None, []))

    def draft(self, job: Flight) -> None:
        assert self._draft is not None, "this pipeline has no draft station"
        self._at(self._time + self._link, _BEGINS, lambda: self._arrive(-1, job, None, []))

    def cancel(self, nodes: list[int]) -> None:
        self._cancelled.update(nodes)

    def events(self) -> list[Event]:
        happened: list[Event] = []
        while self._agenda:
            moment, kind, _, action = self._agenda[0]
            if happened and (moment > self._time or kind == _BEGINS):
                return happened
            heapq.heappop(self._agenda)
            self._time = moment
            if event := action():
                happened.append(event)
        if not happened:
            raise PipelineError("nothing is under way in the pipeline, so nothing can be waited for")
        return happened

    def now(self) -> float:
        return time.monotonic() if self._wall else self._time

    def close(self) -> None:
        self._agenda.clear()
        self._stages.clear()
        self._draft = None

    # ---- what happens ------------------------------------------------------------------------------------

    def _at(self, moment: float, kind: int, action: Callable[[], Event | None]) -> None:
        heapq.heappush(self._agenda, (moment, kind, next(self._order), action))

    def _station(self, index: int) -> _Station:
        if index >= 0:
            return self._stages[index]
        assert self._draft is not None
        return self._draft

    def _arrive(self, index: int, flight: Flight, hidden: Any, legs: list[Leg]) -> None:
        station = self._station(index)
        station.queue.append((flight, hidden, legs))
        self._start(index)

    def _start(self, index: int) -> None:
        """Unless the station is busy or idle: drop what has died, compute the rest, say when it is done."""
        station = self._station(index)
        if station.busy or not station.queue:
            return
        flight, hidden, legs = station.queue.popleft()
        station.busy = True
        if index >= 0 and self._cancelled:
            flight, hidden = drop_rows(flight, hidden, self._cancelled)
        begun, before = self.now(), time.perf_counter()
        result = station.run(flight, hidden)
        measured = time.perf_counter() - before
        duration = self._costs(station.name, flight.num_rows, measured)
        leg = Leg(station.name, begun, self.now() if self._wall else begun + duration,
                  [node for part in flight.parts for node in part.nodes])
        done = self._time + duration
        if index < 0:
            self._at(done + self._link, _ENDS, lambda: Drafted(self.now(), flight.id, result, leg))
            self._at(done, _ENDS, lambda: self._free(index))
            return
        if index == 0:
            self._at(done, _ENDS, lambda: Ready(self.now()))
        self._at(done, _ENDS, lambda: self._leave(index, flight, result, [*legs, leg]))

    def _leave(self, index: int, flight: Flight, result: Any, legs: list[Leg]) -> Event | None:
        self._free(index)
        if index + 1 < self.num_stages:
            self._at(self._time + self._link, _BEGINS, lambda: self._arrive(index + 1, flight, result, legs))
            return None
        assert isinstance(result, Verdict)
        self._cancelled.difference_update(self._under_way.pop(flight.id))
        return Landed(self.now(), flight.id, result.nodes, result.tokens, result.margins, legs)

    def _free(self, index: int) -> None:
        self._station(index).busy = False
        self._at(self._time, _BEGINS, lambda: self._start(index))


def drop_rows(flight: Flight, hidden: Any, dead: set[int]) -> tuple[Flight, Any]:
    """The flight without the rows of `dead` nodes, and the hidden rows [rows, hidden] that go with it."""
    if not any(node in dead for part in flight.parts for node in part.nodes):
        return flight, hidden
    parts, kept, start = [], [], 0
    for part in flight.parts:
        rows = [i for i, node in enumerate(part.nodes) if node not in dead]
        parts.append(part.keep(rows))
        kept += [start + i for i in rows]
        start += len(part)
    return Flight(flight.id, parts, flight.opens, flight.closes, flight.top_k), \
        hidden if hidden is None else hidden[kept]
