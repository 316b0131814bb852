"""The stations are processes on one host or many, on wall-clock time.

Flights go to the first stage, and jobs to the draft station, over their connections with this process; from stage
to stage they travel with their hidden states, unseen by this process; landings and drafts come back
over the connections. There is no thread on this side's token path: `events` itself waits on the
connections, so a message is one wake-up away from the engine.

See `serve` for the other end of the connections, `launch`, `starting` and `fleet` for the processes, `watch` for
failures.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Mapping, Sequence

from fullpipe.costs import CostCurve, Machine
from fullpipe.errors import PipelineError, UsageError
from fullpipe.messages import Drafted, Event, Failed, Flight, Ready
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.checks import check_answered, check_guessed
from fullpipe.pipeline.fleet import News, Worker
from fullpipe.pipeline.frames import Answered, Beat, Broken, Cancel, Free, Guessed, Lost, Work
from fullpipe.pipeline.legs import Legs
from fullpipe.pipeline.links import Link, Links
from fullpipe.pipeline.starting import Hosting, Layout, start_fleet
from fullpipe.pipeline.watch import UnderWay, Watch
from fullpipe.pipeline.wire import NonsenseError
from fullpipe.stations.base import TapCount, least
from fullpipe.stations.spec import StationSpec

_BEAT_S = 0.4
_BEATS = 4  # per time-out at least, so that a late one does not count as none


class WorkersPipeline(Pipeline):
    """Starts one process per station and returns when all are ready.

    stages: one spec per stage, in order, at least one. One with `taps` among its arguments is expected to tap, and
        what it taps goes from its process to the draft station's; without such stages there is no such way.
    draft: the draft station's spec; None for a pipeline without one.
    links: emulated links; None: what connects processes here. Each message is held by the process that gets
        it (for the engine: that sends it) until it would have arrived. See `emulation`.
    pace: paced devices: {station: {rows: seconds}}, stations called "stage 0", ..., "draft". Such a station
        takes at least so long for a flight: it computes, and sleeps for the rest (`CostCurve`).
    threads: compute threads of each process.
    hosting: where the stations run, and who starts them there; None: on this machine.
    heartbeat_timeout: seconds without a sign of life after which a process counts as hung.
    timeout: seconds without any progress, while flights or jobs are under way, after which the station
        that holds the oldest counts as hung.
    start_timeout: seconds that starting may take, the loading of weights included.

    taps: those that had reached the draft station when it began its newest answer.

    Times of events and legs are seconds of `time.monotonic` in this process; an event's time is that of its arrival
    here (for legs see `legs`). The pipeline closes itself when it is garbage-collected and when the interpreter exits.

    Raises `UsageError` for arguments out of range, what a station raised while it was built (the message
    begins with the station's name), and `StationFailed` when a process died or did not start in time.
    """

    def __init__(self, stages: Sequence[StationSpec], draft: StationSpec | None = None, *,
                 links: Links | None = None, pace: Mapping[str, Mapping[int, float]] | None = None,
                 threads: int = 1, hosting: Hosting | None = None, heartbeat_timeout: float = 10.0,
                 timeout: float = 60.0, start_timeout: float = 300.0) -> None:
        if not stages:
            raise UsageError("a pipeline needs at least one stage")
        if threads < 1 or min(heartbeat_timeout, timeout, start_timeout) <= 0:
            raise UsageError("threads and all time-outs must be above 0")
        self.num_stages, self.has_draft = len(stages), draft is not None
        self.taps = TapCount()
        self._links = _checked(links, self.num_stages, timeout)
        layout = Layout(stages=stages, draft=draft, links=self._links,
                        pace={name: CostCurve(curve).points for name, curve in (pace or {}).items()}, threads=threads,
                        beat_s=min(_BEAT_S, heartbeat_timeout / _BEATS, timeout / _BEATS), silence_s=heartbeat_timeout,
                        start_timeout=start_timeout, hosting=hosting or Hosting())
        self._reads_taps = bool(layout.tapping)
        self._devices, self._hosting = layout.devices, layout.hosting
        if unknown := [name for name in layout.pace if name not in layout.names]:
            raise UsageError(f"there is no station {unknown[0]!r} to pace",
                             hint=f"There are: {', '.join(layout.names)}.")
        self._fleet = start_fleet(layout)
        self.cache_slots = least(worker.cache_slots for worker in self._fleet.workers)
        self._finalizer = weakref.finalize(self, self._fleet.close)
        self._flights = UnderWay(self._fleet.workers[:self.num_stages])
        self._jobs = UnderWay(self._fleet.workers[self.num_stages:])
        self._watch = Watch(self._flights, self._jobs, heartbeat_timeout=heartbeat_timeout, timeout=timeout)
        self._legs, self._draft_legs = Legs(layout.names[:self.num_stages]), Legs(["draft"])
        self._newest_node = -1
        self._ready_owed = 0
        self._happened: list[Event] = [Ready(self.now())]
        self._failure: Failed | None = None

    def launch(self, flight: Flight) -> None:
        self._check_open()
        self.newest_flight = flight.id
        self._ready_owed += 1
        self._send_work(self._flights, flight)

    def draft(self, job: Flight) -> None:
        assert self.has_draft, "this pipeline has no draft station"
        self._check_open()
        self.newest_job = job.id
        self._send_work(self._jobs, job)

    def cancel(self, nodes: list[int]) -> None:
        if nodes and self._finalizer.alive and not self._failure:  # else nobody is left to drop anything
            for worker in self._fleet.workers:
                self._fleet.send(worker, Cancel(nodes))

    def events(self, wait: float | None = None) -> list[Event]:
        self._check_open()
        until = math.inf if wait is None else self.now() + wait
        self._collect(0.0)
        while not self._happened:
            if wait is None and not (self._flights.expected or self._jobs.expected or self._ready_owed):
                raise PipelineError("nothing is under way in the pipeline, so nothing can be waited for")
            if (left := until - self.now()) <= 0:
                return []
            self._collect(min(left, self._watch.patience()))
        happened, self._happened = self._happened, []
        return happened

    def now(self) -> float:
        return time.monotonic()

    def machine(self) -> Machine:
        return Machine(self.num_stages, link_s=self._links.traversal_s + self._hosting.link_s,
                       draft_link_s=self._links.draft_s + self._hosting.draft_link_s,
                       reads_taps=self._reads_taps, devices=self._devices[: self.num_stages],
                       shared=self.has_draft and self._devices[-1] == self._devices[0])

    def close(self) -> None:
        self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise PipelineError("the pipeline is closed", hint="Make a new one.")
        if self._failure and not self._happened:  # it has been told
            raise PipelineError(f"the pipeline has failed: {self._failure.station}", hint="Make a new one.")

    def _send_work(self, under_way: UnderWay, flight: Flight) -> None:
        expected = under_way.add(flight)
        self._newest_node = max(self._newest_node, max(expected.nodes, default=-1))
        self._fleet.send(under_way.workers[0], Work(flight))

    def _collect(self, wait: float) -> None:
        """Take in what has arrived after waiting for up to `wait` seconds, then look for who is silent."""
        received = self._fleet.receive(wait)
        if not self._finalizer.alive:
            raise PipelineError("the pipeline was closed")
        for worker, news in received:
            try:
                self._take(worker, news)
            except NonsenseError as error:
                self._fail(worker, f"answers nonsense: {error}{worker.log_tail()}")
            if self._failure:
                return
        if complaint := self._watch.complaint():
            self._fail(*complaint)

    def _take(self, worker: Worker, news: News) -> None:
        """Raises `NonsenseError`."""
        now = self.now()
        match news:
            case Free() if worker is self._flights.workers[0] and self._ready_owed:
                self._ready_owed -= 1
                self._happened.append(Ready(now))
            case Answered() if worker is self._flights.workers[-1]:
                self._land(news, now)
            case Guessed() if worker in self._jobs.workers:
                self._take_guesses(news, now)
            case Beat():
                self._watch.note_beat(worker, news)
            case Lost(message):
                self._watch.note_lost(worker, message)
            case Broken(error, message, hint):
                self._fail(worker, f"{error}: {message}{worker.log_tail()}", hint)
            case EOFError():
                self._fail(worker, worker.how_it_ended())
            case NonsenseError():
                raise news
            case _:
                raise NonsenseError(f"a message of kind {type(news).__name__}, which it has no reason to send")

    def _land(self, news: Answered, now: float) -> None:
        due = check_answered(news, self._flights.due(), self.num_stages)
        landed = news.landed
        landed.time, landed.legs = now, self._legs.place(due.sent, now, news.stays, news.carried)
        self._happened.append(landed)
        self._flights.done()

    def _take_guesses(self, news: Guessed, now: float) -> None:
        due = check_guessed(news, self._jobs.due(), self._newest_node)
        (leg,) = self._draft_legs.place(due.sent, now, [news.stay], news.carried)
        self.taps = TapCount(news.taps, news.tap_bytes)
        self._happened.append(Drafted(now, news.job, news.expansions, leg))
        self._jobs.done()

    def _fail(self, worker: Worker, reason: str, hint: str | None = None) -> None:
        if not self._failure:
            self._failure = Failed(self.now(), worker.label, reason, hint)
            self._happened.append(self._failure)


def _checked(links: Links | None, num_stages: int, timeout: float) -> Links:
    links = links or Links([Link()] * (num_stages - 1))
    links.check(num_stages)
    if links.longest_s >= timeout:
        raise UsageError(f"a message would take {links.longest_s:g} s, and {timeout:g} s without progress "
                         "count as failure", hint="Give a longer `timeout`, or a shorter latency.")
    return links
