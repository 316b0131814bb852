"""One station's process begins: `python -m fullpipe.pipeline.worker`, started by a launcher.

Standard input is its `Door`, on one line, and ends with whoever started it. It calls the engine, is told what to be
(`Setup`), builds the station, and serves.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import NoReturn, cast

import msgspec
import zmq
from zmq.constants import Event as Happening
from zmq.utils.monitor import recv_monitor_message

from fullpipe.errors import UsageError
from fullpipe.pipeline.bell import Socket
from fullpipe.pipeline.fetching import localised
from fullpipe.pipeline.frames import Broken, Door, Hello, Setup, Stop, Up
from fullpipe.pipeline.hops import Before, Outlet, nothing_came
from fullpipe.pipeline.net import Net
from fullpipe.pipeline.serve import Control, Lines, leave, serve_draft, serve_reader, serve_stage
from fullpipe.pipeline.taps import TapSender, receive_taps
from fullpipe.pipeline.wire import NonsenseError
from fullpipe.stations.base import DraftLike, StageLike, cache_slots, tap_reader

_PR_SET_PDEATHSIG = 1
_REFUSALS = 3
_SWITCH_S = 0.0005  # longest wait for the interpreter lock, so that the side threads are prompt


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent is gone, even if it is stopped or cannot listen.
    Where there is no such service the end of standard input must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked
        leave(0)


def main() -> None:
    """Take the setup, build the station, serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    door = _door()
    die_with_parent(door.parent)
    threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()
    net = Net(door.keys, door.silence_s)
    lines = Lines(net, door.engine, door.name)
    inlet, listens = _listen(net, lines, door)
    connections = Connections(lines.news, door.patience_s)
    lines.greet(Hello(listens))
    if nothing_came(lines.heard, door.start_timeout):
        _say_and_leave(f"nobody at {door.engine} answered for {door.start_timeout:g} s")
    setup = _setup(lines)
    sys.setswitchinterval(_SWITCH_S)
    control = Control(lines, setup)
    connections.back = partial(control.lost, "the engine")
    control.start_threads()
    control.report(partial(_build_and_serve, control, setup, net, inlet, connections))
    threading.Event().wait()  # until the engine says stop, or is gone


def _door() -> Door:
    """What the launcher wrote into standard input."""
    line = sys.stdin.buffer.readline()
    if not line:
        leave(0)
    return msgspec.json.decode(line, type=Door)


def _leave_with_parent() -> None:
    """Standard input ends with the process that holds its other end."""
    while sys.stdin.buffer.read(1):
        pass
    leave(0)


def _listen(net: Net, lines: Lines, door: Door) -> tuple[Socket | None, list[str]]:
    if not door.listen:
        return None, []
    try:
        return net.bind(door.listen)
    except UsageError as error:  # without a hello: it comes by another road, and might be the first to arrive
        _give_up(lines, Broken("UsageError", error.message, error.hint))


def _setup(lines: Lines) -> Setup:
    """The first thing that the engine says, if it is not that this is over already."""
    try:
        setup, _ = lines.receive()
        if isinstance(setup, Stop):
            leave(0)
        if not isinstance(setup, Setup):
            raise NonsenseError(f"a message of kind {type(setup).__name__} before the setup")
    except NonsenseError as error:
        _give_up(lines, Broken("NonsenseError", str(error)))
    return setup


def _give_up(lines: Lines, why: Broken) -> NoReturn:
    lines.send(why)
    lines.close()
    leave(1)


class Connections:
    """Watches a worker's connections, from a thread of its own. It ends the process when the engine will not have it,
    or is gone for `patience_s` seconds, or if it cannot watch any more, and tells when a neighbour is gone.

    engine: news of the connection with it. back: called when that broke and has been made again.
    """

    def __init__(self, engine: Socket, patience_s: float) -> None:
        self._engine, self._patience_s = engine, patience_s
        self._fresh: queue.SimpleQueue[tuple[Socket, Callable[[], None]]] = queue.SimpleQueue()
        self._gone: float | None = None  # since when the engine is
        self._refusals = 0  # in a row
        self.back: Callable[[], None] = _ignore
        threading.Thread(target=self._watch_or_leave, name="connections", daemon=True).start()

    def add(self, news: Socket, lost: Callable[[], None]) -> None:
        """Watch the connection to a neighbour too. lost: called when it breaks."""
        self._fresh.put((news, lost))

    def _watch_or_leave(self) -> None:
        try:
            self._watch()
        except zmq.ContextTerminated:
            pass  # whoever does that ends the process, when what was said is sent
        except BaseException:
            traceback.print_exc()
            _say_and_leave("nobody watches the connections any more")

    def _watch(self) -> None:
        poller = zmq.Poller()
        poller.register(self._engine, zmq.POLLIN)
        neighbours: dict[Socket, Callable[[], None]] = {}
        while True:
            while not self._fresh.empty():
                news, lost = self._fresh.get()
                poller.register(news, zmq.POLLIN)
                neighbours[news] = lost
            for socket, _ in poller.poll(self._patience()):
                event = recv_monitor_message(socket)["event"]
                if socket is self._engine:
                    self._note_engine(event)
                elif event == Happening.DISCONNECTED:
                    neighbours[socket]()
            if self._gone is not None and time.monotonic() - self._gone >= self._patience_s:
                leave(0)

    def _note_engine(self, event: int) -> None:
        match event:
            case Happening.DISCONNECTED:
                self._gone = self._gone or time.monotonic()
            case Happening.HANDSHAKE_SUCCEEDED:
                broke, self._gone, self._refusals = self._gone is not None, None, 0
                if broke:  # what it said to us meanwhile is lost: the last of it nothing else would tell
                    self.back()
            case Happening.HANDSHAKE_FAILED_AUTH:
                _say_and_leave("the engine does not know our key")
            case Happening.HANDSHAKE_FAILED_NO_DETAIL:  # whoever listens hung up; once, it may just have ended
                self._refusals += 1
                if self._refusals == _REFUSALS:
                    _say_and_leave("whoever listens where the engine should be does not have our key")

    def _patience(self) -> int:
        """Milliseconds until there may be something to do."""
        return 1000 if self._gone is None else 50


def _say_and_leave(words: str) -> NoReturn:
    print(words, file=sys.stderr, flush=True)
    leave(1)


def _build_and_serve(control: Control, setup: Setup, net: Net, inlet: Socket | None, connections: Connections) -> None:
    station = localised(setup, control.send, control.parts).build()
    if torch := sys.modules.get("torch"):  # a station without tensors does not need it loaded
        torch.set_num_threads(setup.threads)
    if setup.rank < setup.stages:
        _serve_stage(control, cast(StageLike, station), setup, net, inlet, connections)
    else:
        _serve_draft_station(control, cast(DraftLike, station), inlet)


def _serve_stage(control: Control, stage: StageLike, setup: Setup, net: Net, inlet: Socket | None,
                 connections: Connections) -> None:
    def way(endpoint: str, neighbour: str) -> Socket:
        socket, news = net.connect_watched(endpoint, setup.name)
        connections.add(news, partial(control.lost, neighbour))
        return socket

    after = Outlet(way(setup.next, f"stage {setup.rank + 1}")) if setup.next else None
    taps = TapSender(control, way(setup.taps, "draft")) if setup.taps else None
    control.send(Up(cache_slots(stage)))
    serve_stage(control, stage, setup, Before(inlet) if inlet else None, after, taps)


def _serve_draft_station(control: Control, draft: DraftLike, inlet: Socket | None) -> None:
    reader = tap_reader(draft)
    control.reads_taps = reader is not None  # from before the first cancel
    control.send(Up(cache_slots(draft)))
    if inlet:  # someone must take them in even where nobody reads them
        deliver = control.inbox.put if reader else _ignore
        control.start_thread("taps", partial(receive_taps, inlet, control.links.tap, deliver))
    serve_reader(control, reader) if reader else serve_draft(control, draft)


def _ignore(*_: object) -> None:
    pass


if __name__ == "__main__":
    main()
