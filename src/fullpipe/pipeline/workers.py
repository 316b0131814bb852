"""The pipeline whose stations are processes on this machine, on wall-clock time.

Flights go to the first stage, and jobs to the draft station, over their control connections; from stage
to stage they travel with their hidden states, unseen by this process; landings and drafts come back
over the control connections. There is no thread on this side's token path: `events` itself waits on the
connections, so a message is one wake-up away from the engine.

See `worker` for the other end of the connections and `launch` for the processes' birth and death.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from fullpipe.errors import PipelineError, UsageError
from fullpipe.messages import Event, Failed, Flight, Ready
from fullpipe.pipeline.answers import Expected, read_done, read_drafted, read_landed, read_taps, read_words
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.emulation import Around
from fullpipe.pipeline.launch import Fleet, Worker
from fullpipe.pipeline.links import Link, Links
from fullpipe.pipeline.pace import Pace
from fullpipe.pipeline.wire import Frame, NonsenseError, dump_flight
from fullpipe.stations.base import TapCount
from fullpipe.stations.spec import StationSpec

_BEAT_S = 1.0
_BEATS = 4  # per time-out at least, so that a late one does not count as none
_GRACE_S = 1.0  # between losing a neighbour and that neighbour's own end being seen


class _Road:
    """What is under way on one road (the stages, or the draft station), and since when nothing moved. newest: the id of
    what went out last; -1: nothing has."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self.under_way: deque[Expected] = deque()
        self.newest = -1
        self.moved = 0.0  # seconds of `time.monotonic`

    def enter(self, flight: Flight) -> None:
        if not self.under_way:
            self.moved = time.monotonic()
        self.newest = flight.id
        self.under_way.append(Expected.of(flight))

    def due(self) -> Expected | None:
        """What must come back next."""
        return self.under_way[0] if self.under_way else None

    def leave(self) -> None:
        self.under_way.popleft()
        self.moved = time.monotonic()

    def overdue(self, timeout: float) -> bool:
        return bool(self.under_way) and time.monotonic() - self.moved > timeout

    def holder(self) -> Worker:
        """The worker that has the oldest of what is under way."""
        return next((worker for worker in self.workers if worker.done < self.under_way[0].id), self.workers[-1])


class WorkersPipeline(Pipeline):
    """Starts one process per station and returns when all are ready.

    stages: one spec per stage, in order, at least one. One with `taps` among its arguments is expected to tap, and
        what it taps goes from its process to the draft station's; without such stages there is no such road.
    draft: the draft station's spec; None for a pipeline without one.
    links: emulated links; None: what connects processes here. Each message is held by the process that gets
        it (for the engine: that sends it) until it would have arrived. See `emulation`.
    pace: paced devices: {station: {rows: seconds}}, stations called "stage 0", ..., "draft". Such a station
        takes at least so long for a flight: it computes, and sleeps for the rest.
    threads: compute threads of each process.
    heartbeat_timeout: seconds without a sign of life after which a process counts as hung.
    timeout: seconds without any progress, while flights or jobs are under way, after which the station
        that holds the oldest counts as hung.
    start_timeout: seconds that starting may take, the loading of weights included.

    taps: those that had reached the draft station when it began its newest answer.

    Times of events and legs are seconds of `time.monotonic`; an event's time is that of its arrival here.
    The pipeline closes itself when it is garbage-collected and when the interpreter exits.

    Raises `UsageError` for arguments out of range, what a station raised while it was built (the message
    begins with the station's name), and `StationFailed` when a process died or did not start in time.
    """

    def __init__(self, stages: Sequence[StationSpec], draft: StationSpec | None = None, *,
                 links: Links | None = None, pace: Mapping[str, Mapping[Any, float]] | None = None,
                 threads: int = 1, heartbeat_timeout: float = 10.0, timeout: float = 60.0,
                 start_timeout: float = 300.0) -> None:
        if not stages:
            raise UsageError("a pipeline needs at least one stage")
        if threads < 1 or min(heartbeat_timeout, timeout, start_timeout) <= 0:
            raise UsageError("threads and all time-outs must be above 0")
        self.num_stages, self.has_draft = len(stages), draft is not None
        self.taps = TapCount()
        links = links or Links([Link()] * (self.num_stages - 1))
        links.check(self.num_stages)
        if links.longest_s >= timeout:
            raise UsageError(f"a message would take {links.longest_s:g} s, and {timeout:g} s without progress "
                             "count as failure", hint="Give a longer timeout, or a shorter latency.")
        self._heartbeat_timeout, self._timeout = heartbeat_timeout, timeout
        arounds = [Around.of(links, rank, self.num_stages).to_dict() for rank in range(self.num_stages + 1)]
        self._fleet = Fleet(stages, draft, arounds=arounds, paces=_paces(pace or {}, self.num_stages, self.has_draft),
                            threads=threads, send_timeout=heartbeat_timeout,
                            beat_s=min(_BEAT_S, heartbeat_timeout / _BEATS, timeout / _BEATS),
                            start_timeout=start_timeout)
        self._finalizer = weakref.finalize(self, self._fleet.close)
        self._flights = _Road(self._fleet.workers[:self.num_stages])
        self._jobs = _Road(self._fleet.workers[self.num_stages:])
        self._names = [worker.name for worker in self._flights.workers]
        self._newest_node = -1
        self._ready_owed = 0
        self._happened: list[Event] = [Ready(self.now())]
        self._failure: Failed | None = None
        self._bereft: tuple[float, Worker, str] | None = None  # since when, who lost a neighbour, words

    def launch(self, flight: Flight) -> None:
        self._check_open()
        self.newest_flight = flight.id
        self._enter(self._flights, flight)
        self._ready_owed += 1
        self._send(self._flights.workers[0], _flight_frame(flight))

    def draft(self, job: Flight) -> None:
        assert self.has_draft, "this pipeline has no draft station"
        self._check_open()
        self.newest_job = job.id
        self._enter(self._jobs, job)
        self._send(self._jobs.workers[0], _flight_frame(job))

    def cancel(self, nodes: list[int]) -> None:
        if nodes and self._finalizer.alive and not self._failure:  # else nobody is left to drop anything
            frame = {"kind": "cancel", "nodes": nodes, "sent": self.now()}
            for worker in self._fleet.workers:
                self._send(worker, frame)

    def events(self, wait: float | None = None) -> list[Event]:
        self._check_open()
        until = math.inf if wait is None else self.now() + wait
        self._collect(0.0)
        while not self._happened:
            if wait is None and not (self._flights.under_way or self._jobs.under_way or self._ready_owed):
                raise PipelineError("nothing is under way in the pipeline, so nothing can be waited for")
            if (left := until - self.now()) <= 0:
                return []
            self._collect(min(left, self._patience()))
        happened, self._happened = self._happened, []
        return happened

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise PipelineError("the pipeline is closed", hint="Make a new one.")
        if self._failure and not self._happened:  # it has been told
            raise PipelineError(f"the pipeline has failed: {self._failure.station}", hint="Make a new one.")

    def _enter(self, road: _Road, flight: Flight) -> None:
        road.enter(flight)
        self._newest_node = max(self._newest_node, max(road.under_way[-1].nodes, default=-1))

    def _send(self, worker: Worker, frame: Frame) -> None:
        try:
            worker.channel.send(frame)
        except TimeoutError:
            self._fail(worker, f"it has read no message for {self._heartbeat_timeout:g} s")
        except OSError:
            pass  # it died; `events` meets the end of its connection and says so

    def _collect(self, wait: float) -> None:
        """Take in what has arrived after waiting for up to `wait` seconds, then look for who is silent."""
        received = self._fleet.receive(wait)
        if not self._finalizer.alive:
            raise PipelineError("the pipeline was closed")
        for worker, frame in received:
            try:
                self._take(worker, frame)
            except NonsenseError as error:
                self._fail(worker, f"answers nonsense: {error}{worker.log_tail()}")
            if self._failure:
                return
        self._judge()

    def _take(self, worker: Worker, frame: Frame | EOFError | NonsenseError) -> None:
        """Raises `NonsenseError`."""
        if isinstance(frame, NonsenseError):
            raise frame
        if isinstance(frame, EOFError):
            return self._fail(worker, worker.epitaph())
        now = self.now()
        match frame.get("kind"):
            case "ready" if worker is self._flights.workers[0] and self._ready_owed:
                self._ready_owed -= 1
                self._happened.append(Ready(now))
            case "landed" if worker is self._flights.workers[-1]:
                self._happened.append(read_landed(frame, now, self._flights.due(), self._names))
                self._flights.leave()
            case "drafted" if worker in self._jobs.workers:
                drafted = read_drafted(frame, now, self._jobs.due(), self._newest_node)
                self.taps = TapCount(*read_taps(frame))
                self._happened.append(drafted)
                self._jobs.leave()
            case "beat":
                self._note_beat(worker, frame)
                if frame.get("waits") and self._flights.under_way:
                    self._jobs.moved = now  # a job that waits for taps is no fault of the draft's, but of a stage
            case "lost":
                (message,) = read_words(frame, "message")
                self._bereft = self._bereft or (now, worker, message)
            case "failed":
                error, message = read_words(frame, "error", "message")
                hint = frame.get("hint")
                self._fail(worker, f"{error}: {message}{worker.log_tail()}", hint if isinstance(hint, str) else None)
            case kind:
                raise NonsenseError(f"a message of kind {kind!r:.60}, which it has no reason to send")
        return None

    def _note_beat(self, worker: Worker, frame: Frame) -> None:
        road = self._jobs if worker in self._jobs.workers else self._flights
        if (done := read_done(frame, road.newest)) > worker.done:
            worker.done = done
            road.moved = self.now()

    def _judge(self) -> None:
        now = self.now()
        for worker in self._fleet.workers:
            if now - worker.heard > self._heartbeat_timeout:
                return self._fail(worker, f"no sign of life for {self._heartbeat_timeout:g} s")
        for track, what in ((self._flights, "flight"), (self._jobs, "job")):
            if track.overdue(self._timeout):
                return self._fail(track.holder(), f"no progress for {self._timeout:g} s "
                                                  f"with {what} {track.under_way[0].id}")
        if self._bereft and now - self._bereft[0] > _GRACE_S:
            _, worker, reason = self._bereft
            return self._fail(worker, reason)
        return None

    def _patience(self) -> float:
        """Seconds until `_judge` may have something to say."""
        until = [worker.heard + self._heartbeat_timeout for worker in self._fleet.workers]
        until += [track.moved + self._timeout for track in (self._flights, self._jobs) if track.under_way]
        if self._bereft:
            until.append(self._bereft[0] + _GRACE_S)
        return max(0.0, min(until) - self.now())

    def _fail(self, worker: Worker, reason: str, hint: str | None = None) -> None:
        if not self._failure:
            self._failure = Failed(self.now(), worker.name, reason, hint)
            self._happened.append(self._failure)


def _flight_frame(flight: Flight) -> Frame:
    """sent: from when on it is on its way, for links."""
    return {"kind": "flight", "flight": dump_flight(flight), "sent": time.monotonic()}


def _paces(pace: Mapping[str, Mapping[Any, float]], num_stages: int, has_draft: bool) -> list[dict[str, float] | None]:
    """The curve of each stage and of the draft station, checked; None for a device that is not paced."""
    names = [*(f"stage {index}" for index in range(num_stages)), "draft"]
    if unknown := [name for name in pace if name not in names[: num_stages + has_draft]]:
        raise UsageError(f"there is no station {unknown[0]!r} to pace",
                         hint=f"There are: {', '.join(names[: num_stages + has_draft])}.")
    return [Pace(pace[name]).to_dict() if name in pace else None for name in names]
