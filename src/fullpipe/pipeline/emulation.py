"""Emulated links and paced devices on the wall clock: what a worker does to make time pass. No torch.

Whoever sends a message to a worker stamps it with `time.monotonic`, which all processes of a machine share;
the worker holds it until `links.Wire` says that it has arrived. What a worker sends to the engine it
holds itself, so that the engine's process has no thread on the token path. Nothing here runs in a
pipeline without links: an instant link is no thread, no queue and no waiting.

Held are flights, jobs, taps, landings, drafts and `Ready`; `cancel` takes a latency (`links.Links.cancel_s`).
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fullpipe.pipeline.links import Link, Links, Wire
from fullpipe.pipeline.wire import Arrival, Frame, frame_size

_PR_SET_TIMERSLACK = 29
_SERVICES = 5  # the newest flights whose median is the sender's service time: one long prompt chunk passes unseen


@dataclass(frozen=True, slots=True)
class Around:
    """The links around one station. inward: by which flights or jobs come. ready: on which stage 0 says that
    it is free. answer: on which landings or drafts go to the engine. cancel_s: seconds that a `cancel` takes.
    taps: by which each stage's hidden states come to the draft station; none elsewhere."""

    inward: Link
    ready: Link
    answer: Link
    cancel_s: float
    taps: Sequence[Link] = ()

    @property
    def instant(self) -> bool:
        links = (self.inward, self.ready, self.answer, *self.taps)
        return not self.cancel_s and all(link.instant for link in links)

    @classmethod
    def of(cls, links: Links, rank: int, num_stages: int) -> Around:
        """Around stage `rank`, or around the draft station, whose rank is the number of stages."""
        if rank == num_stages:
            return cls(links.draft, Link(), links.draft, links.draft.latency_s, links.taps)
        return cls(links.inward(rank), links.to_first, links.landing, links.cancel_s(rank))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {"inward": self.inward.to_dict(), "ready": self.ready.to_dict(), "answer": self.answer.to_dict(),
                "cancel_s": self.cancel_s, "taps": [link.to_dict() for link in self.taps]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Around:
        inward, ready, answer = (Link.from_dict(values[name]) for name in ("inward", "ready", "answer"))
        return cls(inward, ready, answer, values["cancel_s"], [Link.from_dict(one) for one in values["taps"]] or ())

    def tap(self, stage: int) -> Link:
        """By which a stage's hidden states come."""
        return self.taps[stage] if self.taps else Link()


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
    """Frames on their way to the engine. On an instant link they go out when they are sent.

    transmit: really sends a frame; called from a thread of this object's unless the link is instant.
    """

    def __init__(self, transmit: Callable[[Frame], None], link: Link) -> None:
        self._wire = Wire(link)
        self._queue: queue.SimpleQueue[tuple[float, Frame]] = queue.SimpleQueue()
        self.send = transmit if link.instant else self._enqueue
        if not link.instant:
            threading.Thread(target=self._deliver, args=(transmit,), name="outbox", daemon=True).start()

    def _enqueue(self, frame: Frame) -> None:
        self._queue.put((self._wire.arrival(time.monotonic(), frame_size(frame)), frame))

    def _deliver(self, transmit: Callable[[Frame], None]) -> None:
        while True:
            due, frame = self._queue.get()
            sleep_until(due)
            transmit(frame)


class Inbound:
    """Flights from the stage before, over an emulated link, taken in by a thread while they are on their way.

    Back-pressure: no more is let come than `Link.window` allows to be on the link or to wait here. The sender
    stamps one more when it hands it to gloo, before a receive waits for it; that one is counted too. Where
    the link has no latency one flight waits and one is stamped, as on a real hop.

    receive: lets the next flight come, waits for it, returns it; its error is raised by `next`.
    """

    def __init__(self, receive: Callable[[], Arrival], link: Link) -> None:
        self._receive = receive
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
                with self._changed:
                    self._changed.wait_for(lambda: self._unstarted < self._most)
                    self._unstarted += 1
                arrival = self._receive()
                arrival.due = self._wire.arrival(arrival.sent, arrival.size)
                self._note_service(arrival)
                self._arrivals.put(arrival)
        except BaseException as error:
            self._arrivals.put(error)

    def _note_service(self, arrival: Arrival) -> None:
        """Learn from the newest leg how long the sender takes for a flight. Flights that died out tell nothing."""
        _, start, end, nodes = arrival.legs[-1]
        if nodes:
            self._services.append(end - start)
            self._most = max(1, self._wire.link.window(statistics.median(self._services)) - 1)
