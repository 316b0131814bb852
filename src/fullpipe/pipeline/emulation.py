"""A worker makes time pass here, for emulated links and paced devices on the wall clock. No torch.

A worker holds a message until `links.Wire` says that it has arrived, counted from the moment at which it really came,
by its own clock. (So an emulated link comes on top of the real one, which takes a fraction of a millisecond.) What a
worker sends to the engine it holds itself, so that the engine's process has no thread on the token path. Nothing here
runs in a pipeline without links: an instant link is no thread, no queue and no waiting.

Held are flights, jobs, taps, landings, drafts and `Free`; `cancel` takes a latency (`links.Links.cancel_s`).
Signs of life, failures and "stop" are the machinery's own and are not held.
"""

from __future__ import annotations

import ctypes
import queue
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fullpipe.messages import Flight
from fullpipe.pipeline.frames import Answered, Free, Guessed, Stay
from fullpipe.pipeline.links import Link, Wire
from fullpipe.pipeline.wire import frame_size

_PR_SET_TIMERSLACK = 29
_SERVICES = 5  # the newest flights whose median is the sender's service time: one long prompt chunk passes unseen

Reply = Free | Answered | Guessed


@dataclass(slots=True)
class Arrival:
    """Reaches a station: a flight or job, its stays so far, and its hidden rows.

    size: its bytes on the link. came: when it really came; due: when it counts as arrived. Both by this process's
    `time.monotonic`.
    """

    flight: Flight
    stays: list[Stay]
    hidden: Any
    size: int
    came: float
    due: float

    @classmethod
    def now(cls, flight: Flight, stays: list[Stay], hidden: Any, size: int) -> Arrival:
        """One that has just come, on a link that takes no time."""
        moment = time.monotonic()
        return cls(flight, stays, hidden, size, moment, moment)


def sleep_until(moment: float) -> None:
    """Return at `moment` (seconds of `time.monotonic`), at once when it has passed. Sleeps, never spins."""
    while (left := moment - time.monotonic()) > 0:
        time.sleep(left)


def wake_promptly() -> None:
    """Have the kernel wake this thread, and those that it starts from now on, when their sleep is over and
    not 50 us later. (Linux; measured: 26 us late instead of 73.)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


class Outbox:
    """Sends frames to the engine when their link has carried them; on an instant link at once.

    transmit: really sends a frame; called from a thread of this object's unless the link is instant.
    """

    def __init__(self, transmit: Callable[[Reply], None], link: Link) -> None:
        self._wire = Wire(link)
        self._queue: queue.SimpleQueue[tuple[float, float, Reply]] = queue.SimpleQueue()
        self.send = transmit if link.instant else self._enqueue
        if not link.instant:
            threading.Thread(target=self._deliver, args=(transmit,), name="outbox", daemon=True).start()

    def _enqueue(self, frame: Reply) -> None:
        now = time.monotonic()
        self._queue.put((now, self._wire.arrival(now, frame_size(frame)), frame))

    def _deliver(self, transmit: Callable[[Reply], None]) -> None:
        while True:
            sent, due, frame = self._queue.get()
            sleep_until(due)
            if not isinstance(frame, Free):
                frame.carried = time.monotonic() - sent
            transmit(frame)


class Inbound:
    """Takes in flights from the stage before, by a thread, while they are on an emulated link.

    Back-pressure: no more is let come than `Link.window` allows to be on the link or to wait here. Where the link has
    no latency one flight waits, as on a real hop.

    receive: waits for the next flight and returns it; its error is raised by `next`. let_come: has the sender send
    another.
    """

    def __init__(self, receive: Callable[[], Arrival], let_come: Callable[[], None], link: Link) -> None:
        self._receive, self._let_come = receive, let_come
        self._wire = Wire(link)
        self._most, self._unstarted = 1, 0  # let come at a time; let come and not started
        self._changed = threading.Condition()
        self._services: deque[float] = deque(maxlen=_SERVICES)
        self._arrivals: queue.SimpleQueue[Arrival | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._take_in, name="inbound", daemon=True).start()

    def next(self) -> Arrival:
        """Wait until the next flight has arrived; it counts as started then."""
        arrival = self._arrivals.get()
        if isinstance(arrival, BaseException):
            raise arrival
        sleep_until(arrival.due)
        with self._changed:
            self._unstarted -= 1
            self._changed.notify()
        return arrival

    def _take_in(self) -> None:
        try:
            while True:
                arrival = self._receive()
                arrival.due = self._wire.arrival(arrival.came, arrival.size)
                self._note_service(arrival.stays[-1])
                with self._changed:
                    self._unstarted += 1
                self._arrivals.put(arrival)
                with self._changed:
                    self._changed.wait_for(lambda: self._unstarted < self._most)
                self._let_come()
        except BaseException as error:
            self._arrivals.put(error)

    def _note_service(self, stay: Stay) -> None:
        """Learn how long the sender takes for a flight. Flights that died out tell nothing."""
        if stay.nodes:
            self._services.append(stay.worked)
            self._most = self._wire.link.window(statistics.median(self._services))
