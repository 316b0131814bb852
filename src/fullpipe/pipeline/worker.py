"""One station's process: `python -m fullpipe.pipeline.worker`, started by `launch`.

Standard input is the control connection, a socket; its first message is the `Setup`. Three threads:

- the main thread runs flights (at the draft station: jobs), which it gets from the stage before or, at
  the first stage and the draft station, from an inbox;
- the control thread reads what the engine sends: it fills the inbox, it is the side channel on which
  `cancel` overtakes the flights that wait, and it ends the process on "stop" or when the engine is gone;
- the heartbeat thread says that the process lives and which flight it finished last.

There are more where stages tap (`taps`) and where links are emulated (`emulation`).

A worker whose neighbour is gone says so, and then waits to be ended: which station is to blame the engine decides, for
it sees the true culprit's connection close.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, cast

from fullpipe.costs import CostCurve
from fullpipe.errors import FullpipeError, PipelineError
from fullpipe.messages import Flight, Landed
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
    Up,
    Work,
)
from fullpipe.pipeline.hops import NeighbourLostError, Neighbours, join_world
from fullpipe.pipeline.links import Wire
from fullpipe.pipeline.taps import CancelArrival, News, TapArrival, TapInbox, TapSender, receive_taps
from fullpipe.pipeline.wire import Channel, frame_size
from fullpipe.stations.base import DraftLike, StageLike, TapReader, drop_rows, tap_reader, untapped

_PR_SET_PDEATHSIG = 1
_SWITCH_S = 0.0005  # longest wait for the interpreter lock, so that the side threads are prompt


class Control:
    """The connection with the engine, and what every station's process has besides: inbox, heartbeat, pace."""

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
        """Do the station's work on a flight; its result, and the stay so far."""
        start, flight = time.monotonic(), arrival.flight
        result = work()
        if self._pace:
            sleep_until(start + self._pace(flight.num_rows))
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
                self.inbox.put(self._arrival(flight, 0 if self._wire.link.instant else frame_size(frame)))
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

    def _arrival(self, flight: Flight, size: int) -> Arrival:
        arrival = Arrival.now(flight, [], None, size)
        arrival.due = self._wire.arrival(arrival.came, size)
        return arrival

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


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent is gone, even if it is stopped or cannot listen.
    Where there is no such service the closing of the control connection must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked
        leave(0)


def control_connection() -> Channel[ToWorker]:
    """The socket that standard input is; standard input becomes empty, so that nothing else reads it."""
    sock = socket.socket(fileno=os.dup(0))
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return Channel(sock, ToWorker)


def main() -> None:
    """Take the setup, build the station, serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = control_connection()
    frames: list[ToWorker] = []
    try:
        while not frames:
            frames = channel.receive()
    except EOFError:
        leave(0)
    setup, *unread = frames
    assert isinstance(setup, Setup)
    die_with_parent(setup.parent)
    sys.setswitchinterval(_SWITCH_S)
    control = Control(channel, setup)
    control.start_threads(unread)
    control.report(partial(_build_and_serve, control, setup))
    threading.Event().wait()  # until the engine says stop, or is gone


def _build_and_serve(control: Control, setup: Setup) -> None:
    station = setup.spec.build()
    if torch := sys.modules.get("torch"):  # a station without tensors does not need it loaded
        torch.set_num_threads(setup.threads)
    if setup.world > 1:
        join_world(setup)
    if setup.rank < setup.stages:
        control.send(Up())
        taps = TapSender(control, setup.stages) if setup.rank in setup.tapping else None
        serve_stage(control, cast(StageLike, station), setup, taps)
    else:
        _serve_draft_station(control, cast(DraftLike, station), setup.tapping)


def _serve_draft_station(control: Control, draft: DraftLike, tapping: list[int]) -> None:
    reader = tap_reader(draft)
    control.reads_taps = reader is not None  # from before the first cancel
    control.send(Up())
    for stage in tapping:  # someone must take them in even where nobody reads them
        deliver = control.inbox.put if reader else _ignore
        control.start_thread(f"taps of stage {stage}", partial(receive_taps, stage, control.links.tap(stage), deliver))
    serve_reader(control, reader) if reader else serve_draft(control, draft)


def _ignore(arrival: TapArrival) -> None:
    pass


if __name__ == "__main__":
    main()
