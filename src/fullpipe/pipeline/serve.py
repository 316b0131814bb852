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
    Hop,
    Lost,
    Setup,
    Stay,
    Stop,
    ToWorker,
    Work,
)
from fullpipe.pipeline.hops import NeighbourLostError, Neighbours
from fullpipe.pipeline.links import Wire
from fullpipe.pipeline.taps import CancelArrival, News, TapInbox, TapSender
from fullpipe.pipeline.wire import Channel, frame_size
from fullpipe.stations.base import DraftLike, StageLike, TapReader, drop_rows, untapped


class Control:
    """Keeps a worker connected with the engine.

    One thread reads what the engine sends: it fills the inbox, it is the side channel on which `cancel` overtakes the
    flights that wait, and it ends the process on "stop" or when the engine is gone. Another says that the process lives
    and which flight it finished last.
    """

    def __init__(self, channel: Channel[ToWorker], setup: Setup) -> None:
        self.channel, self.links = channel, setup.links
        self.cancelled = Cancelled()
        self.inbox: queue.SimpleQueue[News] = queue.SimpleQueue()
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

    def start_threads(self, unread: list[ToWorker]) -> None:
        """Listen to the engine and send heartbeats from now on. unread: frames that came already."""
        threading.Thread(target=self._listen, args=(unread,), name="control", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def start_thread(self, name: str, work: Callable[[], Any]) -> None:
        threading.Thread(target=self.report, args=(work,), name=name, daemon=True).start()

    def report(self, work: Callable[[], Any]) -> None:
        """Do what is not expected to end, and tell the engine how it ended."""
        try:
            work()
        except NeighbourLostError as error:
            self.send(Lost(str(error)))
        except BaseException as error:
            self._fail(error)

    def send(self, frame: FromWorker) -> None:
        try:
            self.channel.send(frame)
        except OSError:
            leave(0)

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

    def _listen(self, unread: list[ToWorker]) -> None:
        try:
            while True:
                for frame in unread:
                    self._obey(frame)
                unread = self.channel.receive()
        except (EOFError, OSError):
            leave(0)
        except BaseException as error:  # a frame that makes no sense
            self._fail(error)
            leave(1)  # what comes after it cannot be read, "stop" included

    def _obey(self, frame: ToWorker) -> None:
        match frame:
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


def serve_stage(control: Control, stage: StageLike, setup: Setup, taps: TapSender | None) -> None:
    """Run flights for ever. taps: takes what the stage taps; None: nobody reads it. Raises `NeighbourLostError`, and
    what the stage raises."""
    neighbours = Neighbours(setup.rank)
    next_arrival = control.next if setup.is_first else neighbours.arrivals(setup.links.inward)
    while True:
        arrival = next_arrival()
        control.drop_cancelled(arrival)
        flight = arrival.flight
        answer, stay = control.timed(arrival, partial(stage.run, flight, arrival.hidden))
        result, tap = untapped(flight, answer)
        ended = time.monotonic()
        if not setup.is_last:
            neighbours.after.finish()
        stay.held = time.monotonic() - ended
        if setup.is_first:  # said before handing on, so that the engine's answer is on its way meanwhile
            control.send_free(Free())
        stays = [*arrival.stays, stay]
        if setup.is_last:
            control.send_answer(Answered(cast(Landed, result), stays))
        else:
            neighbours.after.send(Hop(flight, stays), result)
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
    threads that sit inside gloo; nothing here needs to be saved."""
    os._exit(code)
