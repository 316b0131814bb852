"""All stations in this process, run in order of events.

With the virtual clock every station's work is really computed, and its duration (measured, or given)
advances that station's own clock: the tokens are real, the machine is imagined. With the wall clock the
stations take turns on this machine in the order in which equal stations would, and times are what they
are. No torch here: what a station is, it alone knows.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, Protocol

from fullpipe.errors import PipelineError
from fullpipe.messages import Drafted, Event, Flight, Landed, Leg, Ready, Tap
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.links import INSTANT, Link, Links, Wire
from fullpipe.stations.base import DraftLike, StageLike, TapCount, tap_reader, untapped


class Costs(Protocol):
    """How long a station takes, in seconds of the virtual clock.

    station: "stage 0", ..., "draft". rows: those that were still wanted when it began. measured: seconds that
    the work took here. context: tokens in the longest path of the flight.
    """

    def __call__(self, station: str, rows: int, measured: float, context: int) -> float: ...


def unit_costs(station: str, rows: int, measured: float, context: int) -> float:
    """Every stage step and every draft call takes one second; a flight whose rows all died takes none."""
    return 1.0 if rows else 0.0


def measured_costs(station: str, rows: int, measured: float, context: int) -> float:
    """What the work took here, as if every station were a machine like this one."""
    return measured


# Order within one instant: first what ends (and the engine acts on), then what begins.
_ENDS, _BEGINS = 0, 1
_REPLY_ROW_BYTES = 64  # of a row in what travels without hidden states: jobs, drafts, landings


@dataclass(slots=True)
class _Cargo:
    """A flight on its way, with what the stage before made of it and the legs behind it. since: when it came to
    the queue in which it waits."""

    flight: Flight
    hidden: Any
    legs: list[Leg]
    since: float = 0.0


class _Station:
    """wire: by which flights come in. ahead: flights that are on it, or wait here, not yet started. held:
    what the station has finished but may not hand on yet."""

    def __init__(self, name: str, run: Callable[[Flight, Any], Any], device: str, link: Link) -> None:
        self.name = name
        self.run = run
        self.device = device
        self.wire = Wire(link)
        self.queue: deque[_Cargo] = deque()
        self.ahead = 0
        self.held: Callable[[], None] | None = None


class InProcessPipeline(Pipeline):
    """stages: the slices in order. draft: who proposes, or None.

    clock: "virtual" or "wall". costs: durations on the virtual clock. links: what the hops take on the virtual
    clock (None: nothing). message_bytes: size of a flight of so many rows with its hidden states. device_of:
    where a station sits; stations of one device take turns (None: each has its own).

    A stage that has finished keeps the flight, and does nothing else, while as many as `Link.window` says are
    on their way to the next stage or wait there: a slow stage slows those before it.

    Taps leave a stage when it has finished, whether or not it must keep the flight, and travel on links of their own
    (`Links.taps`). A draft that reads none gets none. taps: those that have arrived.
    """

    def __init__(self, stages: Sequence[StageLike], draft: DraftLike | None = None, *,
                 clock: Literal["virtual", "wall"] = "virtual", costs: Costs = unit_costs,
                 links: Links | None = None, message_bytes: Callable[[int], int] = lambda rows: 0,
                 device_of: Callable[[str], str] = lambda station: station) -> None:
        self.num_stages = len(stages)
        self.has_draft = draft is not None
        self._wall = clock == "wall"
        self._costs = unit_costs if self._wall else costs
        if links is None or self._wall:
            links = Links([INSTANT] * (self.num_stages - 1))
        links.check(self.num_stages)
        self._stages = [_Station(f"stage {k}", stage.run, device_of(f"stage {k}"), links.inward(k))
                        for k, stage in enumerate(stages)]
        self._draft = _Station("draft", lambda job, _: draft.run(job), device_of("draft"),
                               links.draft) if draft is not None else None
        self._reader = tap_reader(draft)
        self._jobs: dict[int, _Cargo] = {}  # by id: sent to a draft that reads taps, and not started
        self._tap_wires = [Wire(links.tap(k)) for k in range(self.num_stages)]
        self.taps = TapCount()
        self._back = {"landing": Wire(links.landing), "draft": Wire(links.draft), "ready": Wire(links.to_first)}
        self._message_bytes = message_bytes
        self._busy: set[str] = set()  # devices
        self._time = 0.0
        self._order = count()
        self._agenda: list[tuple[float, int, int, Callable[[], Event | None]]] = []
        self._cancelled: dict[int, float] = {}  # node -> when
        self._under_way: dict[int, list[int]] = {}  # flight -> its nodes; what landed need not stay cancelled
        self._at(0.0, _ENDS, lambda: Ready(self.now()))

    # ---- the promise -------------------------------------------------------------------------------------

    def launch(self, flight: Flight) -> None:
        self.newest_flight = flight.id
        self._under_way[flight.id] = [node for part in flight.parts for node in part.nodes]
        self._travel(self._stages[0], _Cargo(flight, None, []), _REPLY_ROW_BYTES * flight.num_rows)

    def draft(self, job: Flight) -> None:
        assert self._draft is not None, "this pipeline has no draft station"
        self.newest_job = job.id
        cargo = _Cargo(job, None, [])
        if self._reader:
            self._jobs[job.id] = cargo
        self._travel(self._draft, cargo, _REPLY_ROW_BYTES * job.num_rows)

    def cancel(self, nodes: list[int]) -> None:
        flying = {node for rows in self._under_way.values() for node in rows}  # others have nothing to be dropped
        self._cancelled.update((node, self._time) for node in nodes if node in flying)
        if self._reader and self._draft:
            self._at(self._time + self._draft.wire.link.latency_s, _ENDS, lambda: self._forget(nodes))

    def events(self, wait: float | None = None) -> list[Event]:
        happened: list[Event] = []
        while self._agenda:
            moment, kind, _, action = self._agenda[0]
            if happened and (moment > self._time or kind == _BEGINS):
                return happened
            heapq.heappop(self._agenda)
            self._time = moment
            if event := action():
                happened.append(event)
        if happened or wait is not None:  # nothing comes of waiting: whatever will happen is on the agenda
            return happened
        if self._jobs:
            raise PipelineError(f"draft job {next(iter(self._jobs))} waits for hidden states that nobody will send",
                                hint="A draft must be ready for nodes that were never launched, or not be asked.")
        raise PipelineError("nothing is under way in the pipeline, so nothing can be waited for")

    def now(self) -> float:
        return time.monotonic() if self._wall else self._time

    def close(self) -> None:
        self._agenda.clear()
        self._stages.clear()
        self._draft = self._reader = None

    # ---- what happens ------------------------------------------------------------------------------------

    def _at(self, moment: float, kind: int, action: Callable[[], Event | None]) -> None:
        heapq.heappush(self._agenda, (moment, kind, next(self._order), action))

    def _travel(self, station: _Station, cargo: _Cargo, size: int) -> None:
        station.ahead += 1
        self._at(station.wire.arrival(self._time, size), _BEGINS, lambda: self._arrive(station, cargo))

    def _arrive(self, station: _Station, cargo: _Cargo) -> None:
        cargo.since = self._time
        station.queue.append(cargo)
        self._start_next(station)

    def _start(self, station: _Station) -> None:
        """Unless its device is busy or nothing waits: drop what has died, compute the rest, say when it is done."""
        if station.held or station.device in self._busy or not station.queue:
            return
        if station is self._draft and self._reader and not self._reader.ready(station.queue[0].flight):
            return
        cargo = station.queue.popleft()
        station.ahead -= 1
        if station is self._draft:
            self._jobs.pop(cargo.flight.id, None)
        self._busy.add(station.device)
        self._release_before(station)
        flight, hidden = cargo.flight, cargo.hidden
        if station is not self._draft and self._cancelled:
            flight, hidden = drop_rows(flight, hidden, self._heard(station, flight))
        begun, before = self.now(), time.perf_counter()
        result, tap = untapped(flight, station.run(flight, hidden))
        measured = time.perf_counter() - before
        duration = self._costs(station.name, flight.num_rows, measured, _context(flight))
        leg = Leg(station.name, begun, self.now() if self._wall else begun + duration,
                  [node for part in flight.parts for node in part.nodes])
        if tap and self._reader:
            self._at(self._time + duration, _ENDS, lambda: self._send_tap(station, tap))
        finish = self._drafted if station is self._draft else self._done
        self._at(self._time + duration, _ENDS, lambda: finish(station, _Cargo(flight, result, [*cargo.legs, leg])))

    def _heard(self, station: _Station, flight: Flight) -> set[int]:
        """Rows of the flight whose cancelling has reached the station: it overtakes, but takes a latency."""
        sent = self._time - station.wire.link.latency_s
        return {node for part in flight.parts for node in part.nodes if self._cancelled.get(node, math.inf) <= sent}

    def _send_tap(self, station: _Station, tap: Tap) -> None:
        size = len(tap.layers) * self._message_bytes(tap.flight.num_rows)
        arrival = self._tap_wires[self._stages.index(station)].arrival(self._time, size)
        self._at(arrival, _ENDS, lambda: self._take(tap, size))

    def _take(self, tap: Tap, size: int) -> None:
        if self._reader:
            self.taps.add(size)
            self._reader.take(tap)
            self._try_job()

    def _forget(self, nodes: list[int]) -> None:
        """A cancel has reached a draft that reads taps. Jobs still on their way are told too, for it overtakes them."""
        if self._reader:
            dead = set(nodes)
            for cargo in self._jobs.values():
                cargo.flight, _ = drop_rows(cargo.flight, None, dead)
            self._reader.forget(nodes)
            self._try_job()

    def _try_job(self) -> None:
        """What a job has waited for may be here."""
        draft = self._draft
        if draft and draft.queue:
            self._at(self._time, _BEGINS, lambda: self._start_next(draft))

    def _drafted(self, station: _Station, cargo: _Cargo) -> Event | None:
        self._free(station)
        size = _REPLY_ROW_BYTES * sum(len(expansion.tokens) for expansion in cargo.hidden)
        (leg,) = cargo.legs
        return self._reply("draft", size, lambda: Drafted(self.now(), cargo.flight.id, cargo.hidden, leg))

    def _done(self, station: _Station, cargo: _Cargo) -> Event | None:
        """A stage has computed a flight: hand it on, now or when there is room."""
        index = self._stages.index(station)
        if index + 1 == self.num_stages:
            return self._land(station, cargo)
        after, service = self._stages[index + 1], cargo.legs[-1].end - cargo.legs[-1].start

        def hand_on() -> None:
            self._travel(after, cargo, self._message_bytes(cargo.flight.num_rows))

        if after.ahead >= after.wire.link.window(service):
            station.held = hand_on
            self._busy.discard(station.device)  # the device may do other stations' work meanwhile
            self._at(self._time, _BEGINS, lambda: self._start_next(station))
            return None
        hand_on()
        self._free(station)
        return self._ready() if index == 0 else None

    def _release_before(self, station: _Station) -> None:
        """The station has started a flight: the one before may hand on what it holds."""
        if station is self._draft or station is self._stages[0]:
            return
        before = self._stages[self._stages.index(station) - 1]
        if before.held is not None:
            before.held()
            before.held = None
            self._at(self._time, _BEGINS, lambda: self._start_next(before))
            if before is self._stages[0]:
                self._at(self._time, _ENDS, self._ready)

    def _land(self, station: _Station, cargo: _Cargo) -> Event | None:
        assert isinstance(cargo.hidden, Landed)
        self._free(station)
        answer, flight = cargo.hidden, cargo.flight

        def landed() -> Event:
            for node in self._under_way.pop(flight.id):
                self._cancelled.pop(node, None)
            answer.time, answer.legs = self.now(), cargo.legs
            return answer

        if self.num_stages == 1:
            self._at(self._time, _ENDS, self._ready)
        return self._reply("landing", _REPLY_ROW_BYTES * len(answer.nodes), landed)

    def _ready(self) -> Event | None:
        return self._reply("ready", 0, lambda: Ready(self.now()))

    def _reply(self, wire: str, size: int, event: Callable[[], Event]) -> Event | None:
        """The event now, or later where there is a way to travel."""
        arrival = self._back[wire].arrival(self._time, size)
        if arrival <= self._time:
            return event()
        self._at(arrival, _ENDS, event)
        return None

    def _free(self, station: _Station) -> None:
        self._busy.discard(station.device)
        self._at(self._time, _BEGINS, lambda: self._start_next(station))

    def _start_next(self, station: _Station) -> None:
        """If the station's device has time: what has waited there longest goes first; of equals, another station's."""
        stations = [*self._stages, *([self._draft] if self._draft else [])]
        waiting = [one for one in stations if one.device == station.device and one.queue]
        for one in sorted(waiting, key=lambda one: (one.queue[0].since, one is station)):
            self._start(one)


def _context(flight: Flight) -> int:
    return 1 + max((max(part.positions) for part in flight.parts if part.positions), default=-1)


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
    return Flight(flight.id, parts, flight.opens, flight.closes, flight.fanout), \
        hidden if hidden is None else hidden[kept]
