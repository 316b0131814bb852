"""All stations run in this process, in order of events.

With the virtual clock every station's work is really computed, and its duration (measured, or given)
advances that station's own clock: the tokens are real, the machine is imagined. With the wall clock the
stations take turns on this machine in the order in which equal stations would, and times are what they
are. No torch here: what a station is, it alone knows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fullpipe.costs import Machine
from fullpipe.errors import PipelineError
from fullpipe.messages import Drafted, Event, Flight, Landed, Leg, Ready, Woken, steps
from fullpipe.pipeline.agenda import Agenda
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.cancelled import CancelTimes
from fullpipe.pipeline.durations import Costs, unit_costs
from fullpipe.pipeline.inprocess_taps import TapWay
from fullpipe.pipeline.links import INSTANT, Link, Links, Wire
from fullpipe.stations.base import DraftLike, StageLike, TapCount, drop_rows, least_slots, tap_reader, untapped

_HERE = "this process"  # the one device on the wall clock
_REPLY_ROW_BYTES = 64  # of a row in what travels without hidden states: jobs, drafts, landings


@dataclass(slots=True)
class _Cargo:
    """Carries a flight, with what the stage before made of it and the legs behind it. since: when it came to
    the queue in which it waits."""

    flight: Flight
    hidden: Any
    legs: list[Leg]
    since: float = 0.0


class _Station:
    """Works through a queue. wire: by which flights come in. ahead: flights that are on it, or wait here, not yet
    started. held: what the station has finished but may not hand on yet."""

    def __init__(self, name: str, run: Callable[[Flight, Any], Any], device: str, link: Link) -> None:
        self.name = name
        self.run = run
        self.device = device
        self.wire = Wire(link)
        self.queue: deque[_Cargo] = deque()
        self.ahead = 0
        self.held: Callable[[], None] | None = None


class InProcessPipeline(Pipeline):
    """Runs its stations itself.

    stages: the slices in order. draft: who proposes, or None. clock: "virtual" or "wall". costs: durations on the
    virtual clock. links: what the hops take there (None: nothing). message_bytes: size of a flight of so many rows with
    its hidden states. device_of: where a station sits; stations of one device take turns.

    A stage that has finished keeps the flight, and does nothing else, while as many as `Link.window` says are
    on their way to the next stage or wait there: a slow stage slows those before it.

    Taps leave a stage when it has finished, whether or not it must keep the flight (`inprocess_taps`).
    seconds_inside: processor time spent in `events`, stations included.
    """

    def __init__(self, stages: Sequence[StageLike], draft: DraftLike | None = None, *,
                 clock: Literal["virtual", "wall"] = "virtual", costs: Costs = unit_costs,
                 links: Links | None = None, message_bytes: Callable[[int], int] = lambda rows: 0,
                 device_of: Callable[[str], str] = lambda station: station) -> None:
        self.num_stages = len(stages)
        self.has_draft = draft is not None
        self.cache_slots = least_slots([*stages, draft])
        self.seconds_inside = 0.0
        self._wall = clock == "wall"
        self._costs = unit_costs if self._wall else costs
        if links is None or self._wall:
            links = Links([INSTANT] * (self.num_stages - 1))
        links.check(self.num_stages)
        self._links = links
        self._agenda = Agenda()
        self._stages = [_Station(f"stage {k}", stage.run, device_of(f"stage {k}"), links.inward(k))
                        for k, stage in enumerate(stages)]
        self._draft = _Station("draft", lambda job, _: draft.run(job), device_of("draft"),
                               links.draft) if draft is not None else None
        reader = tap_reader(draft)
        self._taps = TapWay(self._agenda, reader, links, self.num_stages, message_bytes, self._try_job) \
            if reader else None
        self._back = {"landing": Wire(links.landing), "draft": Wire(links.draft), "ready": Wire(links.to_first)}
        self._message_bytes = message_bytes
        self._busy: set[str] = set()  # devices
        self._cancelled = CancelTimes()
        self._agenda.at(0.0, lambda: Ready(self.now()))

    # ---- the promise -------------------------------------------------------------------------------------

    def launch(self, flight: Flight) -> None:
        self.newest_flight = flight.id
        self._cancelled.launch(flight)
        self._travel(self._stages[0], _Cargo(flight, None, []), _REPLY_ROW_BYTES * flight.num_rows)

    def draft(self, job: Flight) -> None:
        assert self._draft is not None, "this pipeline has no draft station"
        self.newest_job = job.id
        cargo = _Cargo(job, None, [])
        if self._taps:
            self._taps.expect(cargo)
        self._travel(self._draft, cargo, _REPLY_ROW_BYTES * job.num_rows)

    def cancel(self, nodes: list[int]) -> None:
        self._cancelled.add(nodes, self._agenda.time)
        if self._taps:
            self._taps.cancel(nodes)

    def events(self, wait: float | None = None) -> list[Event]:
        begun = time.thread_time()
        happened = self._agenda.run()
        self.seconds_inside += time.thread_time() - begun
        if happened:
            return happened
        if self._taps and (job := self._taps.waiting) is not None:
            raise PipelineError(f"draft job {job} waits for hidden states that nobody will send",
                                hint="A draft must be ready for nodes that were never launched, or not be asked.")
        if wait is not None:  # nothing comes of waiting: whatever will happen is on the agenda
            return []
        raise PipelineError("nothing is under way in the pipeline, so nothing can be waited for")

    def now(self) -> float:
        return time.monotonic() if self._wall else self._agenda.time

    def machine(self) -> Machine:
        devices = [_HERE if self._wall else stage.device for stage in self._stages]
        shared = self._draft is not None and (self._wall or self._draft.device == devices[0])
        return Machine(self.num_stages, link_s=self._links.traversal_s, draft_link_s=self._links.draft_s, shared=shared,
                       devices=devices, reads_taps=self._taps is not None)

    def close(self) -> None:
        self._agenda.clear()
        self._stages.clear()
        self._draft = self._taps = None

    # ---- besides -----------------------------------------------------------------------------------------

    def wake(self, moment: float) -> None:
        """Have `events` return a `Woken` at this moment of the virtual clock, whether or not anything is under way."""
        self._agenda.at(moment, lambda: Woken(self.now()))

    @property
    def taps(self) -> TapCount:
        """Those that have reached the draft station."""
        return self._taps.arrived if self._taps else TapCount()

    # ---- what happens ------------------------------------------------------------------------------------

    def _travel(self, station: _Station, cargo: _Cargo, size: int) -> None:
        station.ahead += 1
        self._agenda.begin_at(station.wire.arrival(self._agenda.time, size), lambda: self._arrive(station, cargo))

    def _arrive(self, station: _Station, cargo: _Cargo) -> None:
        cargo.since = self._agenda.time
        station.queue.append(cargo)
        self._start_next(station)

    def _start(self, station: _Station) -> None:
        """Unless its device is busy or nothing waits: drop what has died, compute the rest, say when it is done."""
        if station.held or station.device in self._busy or not station.queue:
            return
        if station is self._draft and self._taps:
            if not self._taps.ready(station.queue[0].flight):
                return
            self._taps.starts(station.queue[0].flight)
        cargo = station.queue.popleft()
        station.ahead -= 1
        self._busy.add(station.device)
        self._release_before(station)
        if station is not self._draft:  # a cancel overtakes, but takes a latency
            heard = self._cancelled.heard(cargo.flight, self._agenda.time - station.wire.link.latency_s)
            cargo.flight, cargo.hidden = drop_rows(cargo.flight, cargo.hidden, heard)
        self._compute(station, cargo)

    def _compute(self, station: _Station, cargo: _Cargo) -> None:
        flight = cargo.flight
        begun, before = self.now(), time.perf_counter()
        result, tap = untapped(flight, station.run(flight, cargo.hidden))
        duration = self._costs(station.name, flight.num_rows, time.perf_counter() - before, _context(flight))
        if alone := steps(result):
            duration += alone * self._costs(station.name, 1, 0.0, _context(flight))
        ends = self._agenda.time + duration
        leg = Leg(station.name, begun, self.now() if self._wall else ends, flight.nodes)
        if tap and (taps := self._taps):
            index = self._stages.index(station)
            self._agenda.at(ends, lambda: taps.send(index, tap))
        done = _Cargo(flight, result, [*cargo.legs, leg])
        finish = self._drafted if station is self._draft else self._done
        self._agenda.at(ends, lambda: finish(station, done))

    def _try_job(self) -> None:
        """What a job has waited for may be here."""
        draft = self._draft
        if draft and draft.queue:
            self._agenda.begin_at(self._agenda.time, lambda: self._start_next(draft))

    def _drafted(self, station: _Station, cargo: _Cargo) -> Event | None:
        self._free(station)
        size = _REPLY_ROW_BYTES * sum(len(expansion.tokens) for expansion in cargo.hidden)
        (leg,) = cargo.legs
        return self._agenda.deliver(self._back["draft"], size,
                                    lambda: Drafted(self.now(), cargo.flight.id, cargo.hidden, leg))

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
            self._free(station)  # the device may do other stations' work meanwhile
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
            self._agenda.begin_at(self._agenda.time, lambda: self._start_next(before))
            if before is self._stages[0]:
                self._agenda.at(self._agenda.time, self._ready)

    def _land(self, station: _Station, cargo: _Cargo) -> Event | None:
        assert isinstance(cargo.hidden, Landed)
        self._free(station)
        answer, flight = cargo.hidden, cargo.flight

        def landed() -> Event:
            self._cancelled.land(flight.id)
            answer.time, answer.legs = self.now(), cargo.legs
            return answer

        if self.num_stages == 1:
            self._agenda.at(self._agenda.time, self._ready)
        return self._agenda.deliver(self._back["landing"], _REPLY_ROW_BYTES * len(answer.nodes), landed)

    def _ready(self) -> Event | None:
        return self._agenda.deliver(self._back["ready"], 0, lambda: Ready(self.now()))

    def _free(self, station: _Station) -> None:
        self._busy.discard(station.device)
        self._agenda.begin_at(self._agenda.time, lambda: self._start_next(station))

    def _start_next(self, station: _Station) -> None:
        """If the station's device has time: what has waited there longest goes first; of equals, another station's."""
        stations = [*self._stages, *([self._draft] if self._draft else [])]
        waiting = [one for one in stations if one.device == station.device and one.queue]
        for one in sorted(waiting, key=lambda one: (one.queue[0].since, one is station)):
            self._start(one)


def _context(flight: Flight) -> int:
    return 1 + max((max(part.positions) for part in flight.parts if part.positions), default=-1)
