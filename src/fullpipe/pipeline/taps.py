"""Hidden states go from the stages' processes to the draft's, beside the way of the flights.

A stage that taps has a thread that sends them, and the draft has one that takes them in. What that takes in goes to
the draft's one thread through its inbox (`TapInbox`).
"""

from __future__ import annotations

import heapq
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NoReturn

from fullpipe.messages import Tap
from fullpipe.pipeline.bell import Socket
from fullpipe.pipeline.emulation import Arrival
from fullpipe.pipeline.frames import TapHop
from fullpipe.pipeline.hops import Inlet, send_numbered
from fullpipe.pipeline.links import Link, Wire
from fullpipe.pipeline.wire import NonsenseError, Outward, pack
from fullpipe.stations.base import TapCount, TapReader, drop_rows

if TYPE_CHECKING:
    from fullpipe.pipeline.serve import Control


FEATURES = "features"  # the name of the tensor that a tap is


@dataclass(slots=True)
class TapArrival:
    """Brings a tap to the draft station, with its bytes. It counts as arrived from `due` on, seconds of
    `time.monotonic`, when its link has carried it."""

    tap: Tap
    size: int
    due: float


@dataclass(slots=True)
class CancelArrival:
    """Brings the nodes of a cancel, which counts from `due` on."""

    nodes: list[int]
    due: float


News = Arrival | TapArrival | CancelArrival  # what comes to an inbox


class TapSender:
    """Sends a stage's taps to the draft station from a thread of its own: neither the stage nor the next one waits
    for them. What piles up is at most what is in flight, for the draft's end takes them in at any time."""

    def __init__(self, control: Control, way: Socket) -> None:
        self._way, self._numbers = way, Outward()
        self._queue: queue.SimpleQueue[Tap] = queue.SimpleQueue()
        self.send = self._queue.put
        control.start_thread("taps", self._deliver)

    def _deliver(self) -> None:
        while True:
            tap = self._queue.get()
            send_numbered(self._way, self._numbers, pack(TapHop(tap.flight, tap.layers), {FEATURES: tap.features}))


def receive_taps(socket: Socket, links: Callable[[int], Link], deliver: Callable[[TapArrival], None]) -> NoReturn:
    """Take in the stages' taps at the draft station, for ever. links: by which each stage's come."""
    inlet, wires = Inlet(socket, TapHop), dict[str, Wire]()
    while True:
        who, header, tensors, size = inlet.receive()
        if who not in wires:
            wires[who] = Wire(links(_rank(who)))
        due = wires[who].arrival(time.monotonic(), size)
        deliver(TapArrival(Tap(header.flight, header.layers, tensors[FEATURES]), size, due))


def _rank(stage: str) -> int:
    """Of a stage by its name. Raises `NonsenseError`."""
    _, _, number = stage.rpartition(" ")
    if not number.isdigit():
        raise NonsenseError(f"taps of {stage!r}, which is no stage")
    return int(number)


class TapInbox:
    """Holds what has come to a draft station that reads taps: jobs that wait, and what they wait for.

    All of it comes through the worker's inbox, and one thread, that which runs the jobs, takes it out: between two jobs
    and while it waits for one. So `take` never runs while `run` does, without a lock, and a draft need know nothing
    of threads; a tap that comes during a job is taken before the next one, and no earlier could it have been of use.
    """

    def __init__(self, control: Control, draft: TapReader) -> None:
        self.taps = TapCount()
        self._control, self._draft = control, draft
        self._jobs: deque[Arrival] = deque()
        self._held: list[tuple[float, int, TapArrival | CancelArrival]] = []  # a heap: by due
        self._order = count()

    def next(self) -> Arrival:
        """Wait for the next job that has arrived and for which the draft is ready."""
        while True:
            self._empty_inbox()
            now = time.monotonic()
            self._take_due(now)
            here = bool(self._jobs) and self._jobs[0].due <= now
            if here and self._draft.ready(self._jobs[0].flight):
                self._control.waits = False
                return self._jobs.popleft()
            self._control.waits = here
            with suppress(queue.Empty):
                self._put_by(self._control.inbox.get(timeout=self._patience(now)))

    def _empty_inbox(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._put_by(self._control.inbox.get_nowait())

    def _put_by(self, news: News) -> None:
        if isinstance(news, Arrival):
            self._jobs.append(news)
        else:
            heapq.heappush(self._held, (news.due, next(self._order), news))

    def _take_due(self, now: float) -> None:
        while self._held and self._held[0][0] <= now:
            match heapq.heappop(self._held)[2]:
                case TapArrival(tap, size):
                    self.taps.add(size)
                    self._draft.take(tap)
                case CancelArrival(nodes):
                    self._forget(nodes)

    def _forget(self, nodes: list[int]) -> None:
        """Of jobs that are still on their way too: a cancel overtakes them."""
        for job in self._jobs:
            job.flight, _ = drop_rows(job.flight, None, set(nodes))
        self._draft.forget(nodes)

    def _patience(self, now: float) -> float | None:
        """Seconds until something is due; None: that nothing is."""
        dues = [self._jobs[0].due] if self._jobs and self._jobs[0].due > now else []
        dues += [self._held[0][0]] if self._held else []
        return max(0.0, min(dues) - now) if dues else None
