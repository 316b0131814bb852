"""A watch finds workers that are silent, and flights and jobs that get nowhere."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence

from fullpipe.messages import Flight
from fullpipe.pipeline.checks import Expected, check_beat
from fullpipe.pipeline.fleet import Worker
from fullpipe.pipeline.frames import Beat

log = logging.getLogger(__name__)

_SILENT_S = 1.0  # after which it is told of a station on a host: the way there may be broken
_GRACE_S = 1.0  # between losing a neighbour and that neighbour's own end being seen


class UnderWay:
    """Knows what is on its way through some workers (the stages, or the draft), and since when nothing moved.

    newest: the id of what went out last; -1: nothing has. moved: seconds of `time.monotonic`.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self.expected: deque[Expected] = deque()
        self.newest = -1
        self.moved = 0.0

    def add(self, flight: Flight) -> Expected:
        now = time.monotonic()
        if not self.expected:
            self.moved = now
        self.newest = flight.id
        self.expected.append(Expected.of(flight, now))
        return self.expected[-1]

    def due(self) -> Expected | None:
        """What must come back next."""
        return self.expected[0] if self.expected else None

    def done(self) -> None:
        """What was due has come back."""
        self.expected.popleft()
        self.moved = time.monotonic()

    def deadline(self, timeout: float) -> float:
        """Until when something must move."""
        return self.moved + timeout if self.expected else math.inf

    def holder(self) -> Worker:
        """The worker that has the oldest of what is under way."""
        return next((worker for worker in self.workers if worker.done < self.expected[0].id), self.workers[-1])


class Watch:
    """Watches the workers of a pipeline.

    heartbeat_timeout: seconds without a sign of life after which a process counts as hung. timeout: seconds without
    any progress, while flights or jobs are under way, after which the station that holds the oldest does.
    """

    def __init__(self, flights: UnderWay, jobs: UnderWay, *, heartbeat_timeout: float, timeout: float) -> None:
        self._flights, self._jobs = flights, jobs
        self._heartbeat_timeout, self._timeout = heartbeat_timeout, timeout
        self._silent: dict[str, float] = {}  # stations of which it was told, and when they were heard last
        self._lost: tuple[float, Worker, str] | None = None  # since when, who lost a neighbour, words

    def note_beat(self, worker: Worker, beat: Beat) -> None:
        """Raises `NonsenseError`."""
        under_way = self._jobs if worker in self._jobs.workers else self._flights
        check_beat(beat, under_way.newest)
        if beat.done > worker.done:
            worker.done = beat.done
            under_way.moved = time.monotonic()
        if beat.waits and self._waits_for_a_stage():
            self._jobs.moved = time.monotonic()

    def note_lost(self, worker: Worker, message: str) -> None:
        """It lost a neighbour, whose own end will be seen if it is the neighbour's fault."""
        self._lost = self._lost or (time.monotonic(), worker, message)

    def complaint(self) -> tuple[Worker, str] | None:
        """Who has failed, and what is wrong."""
        now = time.monotonic()
        self._tell_of_silence(now)
        for worker in self._workers:
            if now - worker.heard > self._heartbeat_timeout:
                return worker, f"no sign of life for {self._heartbeat_timeout:g} s"
        for under_way, what in ((self._flights, "flight"), (self._jobs, "job")):
            if now > under_way.deadline(self._timeout):
                return under_way.holder(), (f"no progress for {self._timeout:g} s with {what} "
                                            f"{under_way.expected[0].id}")
        if self._lost and now - self._lost[0] > _GRACE_S:
            return self._culprit(*self._lost, now)
        return None

    def _culprit(self, since: float, worker: Worker, message: str, now: float) -> tuple[Worker, str]:
        """Who is to blame for a broken connection: a station of which nothing was heard since, while others beat."""
        for other in self._workers:
            if other is not worker and other.heard < since:
                return other, f"no sign of life for {now - other.heard:.1f} s, and {worker.label} {message}"
        return worker, message

    def patience(self) -> float:
        """Seconds until there may be a complaint."""
        until = [worker.heard + self._heartbeat_timeout for worker in self._workers]
        until += [worker.heard + _SILENT_S for worker in self._far if worker.name not in self._silent]
        until += [under_way.deadline(self._timeout) for under_way in (self._flights, self._jobs)]
        if self._lost:
            until.append(self._lost[0] + _GRACE_S)
        return max(0.0, min(until) - time.monotonic())

    def _tell_of_silence(self, now: float) -> None:
        for worker in self._far:
            since = self._silent.get(worker.name)
            if since is None and now - worker.heard >= _SILENT_S:
                self._silent[worker.name] = worker.heard
                log.warning("%s has been silent for %.0f s", worker.label, now - worker.heard)
            elif since is not None and worker.heard > since:
                del self._silent[worker.name]
                log.info("%s is heard again, after %.1f s", worker.label, worker.heard - since)

    @property
    def _workers(self) -> list[Worker]:
        return [*self._flights.workers, *self._jobs.workers]

    @property
    def _far(self) -> list[Worker]:
        """Those on hosts. A process of a pipeline on this machine alone is silent when it is busy."""
        return [worker for worker in self._workers if worker.host]

    def _waits_for_a_stage(self) -> bool:
        """Whether what the oldest job waits for may still be with the stages, so that the draft is not to blame.

        It waits for hidden states of the nodes that it asks about, and those of their prompts. So while a flight
        carries some of either, a stage may be slow. Such flights come to an end, as others need not: when the last has
        landed, all that the job may wait for has been sent, and the draft has the time-out to answer.
        """
        if (job := self._jobs.due()) is None:
            return False
        return any(not flight.nodes.isdisjoint(job.wanted) or flight.prompts & job.arenas
                   for flight in self._flights.expected)
