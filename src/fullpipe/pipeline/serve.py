"""A station's process works here: flights come in, are computed, and go on.

The main thread runs flights (at the draft station: jobs), which it gets from the stage before or, at the first stage
and the draft station, from an inbox. Two more serve the connection with the engine (`Control`). There are others where
stages tap (`taps`) and where links are emulated (`emulation`).

A worker whose neighbour is gone says so, and then waits to be ended: which station is to blame the engine decides, for
it sees the true culprit's connection close.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, cast

from fullpipe.costs import CostCurve
from fullpipe.errors import FullpipeError, PipelineError
from fullpipe.messages import Landed, steps
from fullpipe.pipeline.cancelled import Cancelled
from fullpipe.pipeline.emulation import Arrival, Outbox, sleep_until, wake_promptly
from fullpipe.pipeline.frames import (
    Answered,
    Beat,
    Broken,
    Cancel,
    Free,
    FromWorker,
    Guessed,
    Hello,
    Hop,
    Lost,
    Part,
    Setup,
    Stay,
    Stop,
    ToWorker,
    Work,
)
from fullpipe.pipeline.hops import HIDDEN, Before, Outlet
from fullpipe.pipeline.links import Wire
from fullpipe.pipeline.net import Net
from fullpipe.pipeline.taps import CancelArrival, News, TapInbox, TapSender
from fullpipe.pipeline.wire import Inward, NonsenseError, Outward, decode, encode, frame_size
from fullpipe.stations.base import DraftLike, StageLike, TapReader, drop_rows, untapped

_LAST_WORDS_MS = 500


class Lines:
    """Is a worker's connections with the engine: one for what it hears, one for what it says, since a socket must not
    be read and written at the same time by two threads.

    news: of the first one (`Net.connect_watched`).

    Raises `NonsenseError` for what is no message.
    """

    def __init__(self, net: Net, endpoint: str, name: str) -> None:
        self.net = net
        self.heard, self.news = net.connect_watched(endpoint, name)
        self._said = net.connect(endpoint, f"{name} says")
        self._in, self._out = Inward(), Outward()
        self._lock = threading.Lock()

    def greet(self, hello: Hello) -> None:
        """Let the engine know by which name it can speak to us."""
        self.heard.send_multipart(Outward().number([encode(hello)]))

    def receive(self) -> tuple[ToWorker, list[bytes]]:
        """Wait for the next frame, with the bytes behind it."""
        body, *data = self._in.checked(self.heard.recv_multipart())
        frame: ToWorker = decode(body, ToWorker)
        return frame, data

    def send(self, frame: FromWorker) -> None:
        with self._lock:
            self._said.send_multipart(self._out.number([encode(frame)]))

    def close(self) -> None:
        """Let what was said arrive, if it can in a moment."""
        with self._lock:
            self._said.close(linger=_LAST_WORDS_MS)
        self.net.drain()


class Control:
    """Keeps a worker connected with the engine.

    One thread reads what the engine sends: it fills the inbox, it is the side channel on which `cancel` overtakes the
    flights that wait, and it ends the process on "stop" or when the engine is gone. Another says that the process lives
    and which flight it finished last.
    """

    def __init__(self, lines: Lines, setup: Setup) -> None:
        self._lines, self.links = lines, setup.links
        self.cancelled = Cancelled()
        self.inbox: queue.SimpleQueue[News] = queue.SimpleQueue()
        self.parts: queue.SimpleQueue[tuple[Part, bytes]] = queue.SimpleQueue()  # of models that come from the engine
        self.reads_taps = False  # then cancels go to the inbox too
        self.waits = False  # for taps, with a job
        self._done = -1
        self._beat_s = setup.beat_s
        self._wire = Wire(self.links.inward)
        self._pace = CostCurve(setup.pace) if setup.pace else None
        if self._pace or not self.links.instant:
            wake_promptly()
        self.send_free = Outbox(self.send, self.links.ready).send
        self.send_answer = Outbox(self.send, self.links.answer).send

    def start_threads(self) -> None:
        """Listen to the engine and send heartbeats from now on."""
        threading.Thread(target=self._listen, name="control", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def start_thread(self, name: str, work: Callable[[], Any]) -> None:
        threading.Thread(target=self.report, args=(work,), name=name, daemon=True).start()

    def report(self, work: Callable[[], Any]) -> None:
        """Do what is not expected to end, and tell the engine how it ended."""
        try:
            work()
        except BaseException as error:
            self._fail(error)

    def send(self, frame: FromWorker) -> None:
        self._lines.send(frame)

    def lost(self, neighbour: str) -> None:
        """Say that the connection to a neighbour broke."""
        self.send(Lost(f"lost its connection to {neighbour}"))

    def next(self) -> Arrival:
        """Wait for the next flight or job from the engine, until it has arrived."""
        arrival = self.inbox.get()
        assert isinstance(arrival, Arrival), "the rest is for drafts that read taps"
        sleep_until(arrival.due)
        return arrival

    def drop_cancelled(self, arrival: Arrival) -> None:
        """Take out the rows that nobody needs any more, just before they would be computed."""
        if dead := self.cancelled.take(arrival.flight.nodes):
            arrival.flight, arrival.hidden = drop_rows(arrival.flight, arrival.hidden, dead)

    def timed(self, arrival: Arrival, work: Callable[[], Any]) -> tuple[Any, Stay]:
        """Do the station's work on a flight; its result, and the stay so far. Where it goes at the pace of a curve,
        each step of a chain that a draft takes by itself is a call of one row."""
        start, flight = time.monotonic(), arrival.flight
        result = work()
        if self._pace:
            sleep_until(start + self._pace(flight.num_rows) + steps(result) * self._pace(1))
        self._done = flight.id
        return result, Stay(arrival.due - arrival.came, max(0.0, start - arrival.due), time.monotonic() - start, 0.0,
                            flight.nodes)

    def _fail(self, error: BaseException) -> None:
        """Report an error that ends this station; its traceback goes to the log."""
        traceback.print_exception(error)
        sys.stderr.flush()
        message = error.message if isinstance(error, FullpipeError) else str(error)
        self.send(Broken(type(error).__name__, message, getattr(error, "hint", None)))

    def _listen(self) -> None:
        try:
            while True:
                self._obey(*self._lines.receive())
        except BaseException as error:  # a frame that makes no sense
            self._fail(error)
            self._lines.close()
            leave(1)  # what comes after it cannot be read, "stop" included

    def _obey(self, frame: ToWorker, data: list[bytes]) -> None:
        match frame:
            case Part():
                if len(data) != 1:
                    raise NonsenseError(f"a part of a model in {len(data)} pieces, where there is one")
                self.parts.put((frame, data[0]))
            case Work(flight):
                arrival = Arrival.now(flight, [], None, 0 if self._wire.link.instant else frame_size(frame))
                arrival.due = self._wire.arrival(arrival.came, arrival.size)
                self.inbox.put(arrival)
            case Cancel(nodes):
                due = time.monotonic() + self.links.cancel_s
                if self.reads_taps:
                    self.inbox.put(CancelArrival(nodes, due))
                else:
                    self.cancelled.add(nodes, due)
            case Stop():
                leave(0)
            case _:
                raise PipelineError("a second setup", hint="Engine and workers must be of one version of Fullpipe.")

    def _beat(self) -> None:
        while True:
            time.sleep(self._beat_s)
            self.send(Beat(self._done, self.waits))


def serve_stage(control: Control, stage: StageLike, setup: Setup, before: Before | None, after: Outlet | None,
                taps: TapSender | None) -> None:
    """Run flights for ever. before: brings those of the stage before; None at the first. after: takes them to the next;
    None at the last. taps: takes what the stage taps; None: nobody reads it. Raises what the stage raises."""
    next_arrival = before.arrivals(setup.links.inward) if before else control.next
    while True:
        arrival = next_arrival()
        control.drop_cancelled(arrival)
        flight = arrival.flight
        answer, stay = control.timed(arrival, partial(stage.run, flight, arrival.hidden))
        result, tap = untapped(flight, answer)
        if before:
            before.worked = stay.worked
        if after:
            ended = time.monotonic()
            after.wait_for_room(stay.worked)
            stay.held = time.monotonic() - ended
        if before is None:  # said before handing on, so that the engine's answer is on its way meanwhile
            control.send_free(Free())
        stays = [*arrival.stays, stay]
        if after:
            after.send(Hop(flight, stays), {HIDDEN: result})
        else:
            control.send_answer(Answered(cast(Landed, result), stays))
        if tap and taps:  # last of all, so that it delays nobody
            taps.send(tap)


def serve_draft(control: Control, draft: DraftLike) -> None:
    """Run draft jobs for ever. Raises what the draft raises."""
    while True:
        arrival = control.next()
        control.drop_cancelled(arrival)
        expansions, stay = control.timed(arrival, partial(draft.run, arrival.flight))
        control.send_answer(Guessed(arrival.flight.id, expansions, stay))


def serve_reader(control: Control, draft: TapReader) -> None:
    """The same for a draft that reads taps. Its answers tell how many have come."""
    inbox = TapInbox(control, draft)
    while True:
        arrival = inbox.next()
        expansions, stay = control.timed(arrival, partial(draft.run, arrival.flight))
        control.send_answer(Guessed(arrival.flight.id, expansions, stay, inbox.taps.count, inbox.taps.bytes))


def leave(code: int) -> NoReturn:
    """End the process at once, from any thread. Python's own way out would wait for, or trip over,
    threads that sit inside a socket; nothing here needs to be saved."""
    os._exit(code)
