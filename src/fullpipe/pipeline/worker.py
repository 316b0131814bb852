"""One station's process: `python -m fullpipe.pipeline.worker`, started by `launch.Fleet`.

Standard input is the control connection, a socket; its first frame is the configuration. Three threads:

- the main thread runs flights (at the draft station: jobs), which it gets from the stage before or, at
  the first stage and the draft station, from an inbox;
- the control thread reads what the engine sends: it fills the inbox, it is the side channel on which
  `cancel` overtakes the flights that wait, and it ends the process on "stop" or when the engine is gone;
- the heartbeat thread says that the process lives and which flight it finished last.

Emulated links add a thread per link that has latency or a bandwidth (see `emulation`).

A worker whose neighbour is gone says so, and then waits to be ended: which station is to blame is the
engine's to judge, and it sees the true culprit's connection close.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, NoReturn, cast

from fullpipe.errors import FullpipeError, PipelineError
from fullpipe.messages import Flight, Leg
from fullpipe.pipeline.emulation import Around, Inbound, Outbox, sleep_until, wake_promptly
from fullpipe.pipeline.inprocess import drop_rows
from fullpipe.pipeline.links import Link, Wire
from fullpipe.pipeline.pace import Pace
from fullpipe.pipeline.spec import StationSpec
from fullpipe.pipeline.station import SourceLike, StageLike
from fullpipe.pipeline.wire import (
    Arrival,
    Channel,
    Frame,
    dump_expansion,
    dump_flight,
    dump_leg,
    frame_size,
    load_flight,
    pack,
    packed_size,
    unpack,
)

_PR_SET_PDEATHSIG = 1
_SWITCH_S = 0.0005  # longest wait for the interpreter lock, so that the side threads are prompt
_MOST_CANCELLED = 1 << 16
_OPENING = 1 << 15  # bytes: 8 rows of 1536 bf16 numbers, and what describes them, fit
_PROMPT = -1  # the node id of every prompt row: not an id, so nobody can mean it


class NeighbourLostError(Exception):
    """The connection to the stage before or after broke."""


class Cancelled:
    """Ids of nodes that nobody needs, as far as this station has heard. Safe between threads.

    A node passes a station once at most, so an id is forgotten when its row is dropped. An id whose row
    has been computed here already is never met again; so only the newest `most` ids are kept.
    Forgetting one too early costs a row of work and nothing else.

    An id counts from the moment at which its `cancel` arrives here, in seconds of `time.monotonic`.
    """

    def __init__(self, most: int = _MOST_CANCELLED) -> None:
        self._most = most
        self._ids: dict[int, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, nodes: Collection[int], due: float = 0.0) -> None:
        with self._lock:
            self._ids.update((node, due) for node in nodes if node != _PROMPT)
            for node in list(islice(self._ids, max(0, len(self._ids) - self._most))):
                del self._ids[node]

    def take(self, nodes: Collection[int]) -> set[int]:
        """Which of these nodes are cancelled by now; they are forgotten."""
        now = time.monotonic()
        with self._lock:
            found = {node for node in nodes if self._ids.get(node, math.inf) <= now}
            for node in found:
                del self._ids[node]
        return found


class Neighbours:
    """Point-to-point hops between the stages, over gloo.

    Each stage lets one flight wait: a receive for it is posted while the one before is computed, so it
    travels meanwhile. A stage that has a flight to hand on first waits until its last one was received.
    So a slow stage slows those before it instead of piling up flights chosen long ago.

    A hop is an opening message of fixed size, with as much of the hop as it holds, and a second one if
    something is left. Gloo moves bytes only when a receive of just that size waits for them, so a size
    that had to be announced first would cost another round trip; a decoding step's few rows fit the
    opening.

    An emulated link lets more come (`emulation.Inbound`).
    """

    def __init__(self, config: Frame) -> None:
        self._rank: int = config["rank"]
        self._before, self._after = f"stage {self._rank - 1}", f"stage {self._rank + 1}"
        self._opening: tuple[Any, Any] | None = None  # handle of the posted receive, and its tensor
        self._unsent: list[Any] = []  # handles of the sends under way
        if config["world"] > 1:
            _join_world(config)

    def arrivals(self, link: Link) -> Callable[[], Arrival]:
        """What waits for the next flight and returns it; others are let come meanwhile. It raises
        `NeighbourLostError`."""
        if not link.instant:
            return Inbound(self._expect_and_receive, link).next
        self.expect()
        return self._receive_and_expect

    def _expect_and_receive(self) -> Arrival:
        self.expect()
        return self.receive()

    def _receive_and_expect(self) -> Arrival:
        arrival = self.receive()
        self.expect()
        return arrival

    def expect(self) -> None:
        """Let the next flight come. Raises `NeighbourLostError`."""
        import torch
        import torch.distributed as dist

        message = torch.empty(_OPENING, dtype=torch.uint8)
        with _gone(self._before):
            self._opening = dist.irecv(message, src=self._rank - 1), message

    def receive(self) -> Arrival:
        """Wait for the flight that was let come. Raises `NeighbourLostError`."""
        import torch
        import torch.distributed as dist

        assert self._opening is not None, "expect() comes first"
        handle, message = self._opening
        with _gone(self._before):
            handle.wait()
            size = packed_size(message.numpy())
            if (missing := size - _OPENING) > 0:
                message = torch.cat([message, torch.empty(missing, dtype=torch.uint8)])
                dist.recv(message[_OPENING:], src=self._rank - 1)
        (flight, legs, sent), hidden = unpack(message.numpy())
        return Arrival(load_flight(flight), legs, hidden, sent, size, sent)

    def finish_sending(self) -> None:
        """Wait until the stage after has received what was sent. Raises `NeighbourLostError`."""
        with _gone(self._after):
            for handle in self._unsent:
                handle.wait()
        self._unsent.clear()

    def send(self, flight: Flight, legs: list[list[Any]], hidden: Any) -> None:
        """Start sending to the stage after; `finish_sending` comes first. Raises `NeighbourLostError`."""
        import torch
        import torch.distributed as dist

        header = [dump_flight(flight), legs, time.monotonic()]
        message = torch.from_numpy(pack(header, hidden, least=_OPENING))
        with _gone(self._after):
            self._unsent = [dist.isend(piece, dst=self._rank + 1)
                            for piece in (message[:_OPENING], message[_OPENING:]) if len(piece)]


@contextmanager
def _gone(neighbour: str) -> Iterator[None]:
    """Gloo reports a broken connection as a `RuntimeError` like any other."""
    try:
        yield
    except RuntimeError as error:
        raise NeighbourLostError(f"lost its connection to {neighbour}") from error


def _join_world(config: Frame) -> None:
    """Meet the other workers. The first stage serves the meeting point on a socket it inherited."""
    import torch.distributed as dist

    first = config["listener"] is not None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", config["port"], is_master=first, timeout=timedelta(seconds=config["start_timeout"]),
        wait_for_workers=False, master_listen_fd=config["listener"] if first else None)
    # Gloo's timeout also bounds how long a receive may wait, and a pipeline may be idle for days.
    dist.init_process_group("gloo", store=store, rank=config["rank"], world_size=config["world"],
                            timeout=timedelta(days=365))


class Host:
    """The parts that every station's process has: control connection, inbox, heartbeat."""

    def __init__(self, channel: Channel, config: Frame) -> None:
        self.name: str = config["name"]
        self.channel = channel
        self.cancelled = Cancelled()
        self.inbox: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self.done = -1
        self._beat_s: float = config["beat_s"]
        self.around = Around.from_dict(config["around"])
        self._wire = Wire(self.around.inward)
        self._pace = Pace(config["pace"]) if config["pace"] else None
        if self._pace or not self.around.instant:
            wake_promptly()
        self.send_ready = Outbox(self.send, self.around.ready).send
        self.send_answer = Outbox(self.send, self.around.answer).send

    def start_threads(self, unread: list[Frame]) -> None:
        """Listen to the engine and send heartbeats from now on. unread: frames that came already."""
        threading.Thread(target=self._listen, args=(unread,), name="control", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self, frame: Frame) -> None:
        try:
            self.channel.send(frame)
        except OSError:
            leave(0)

    def fail(self, error: BaseException) -> None:
        """Report an error that ends this station; its traceback goes to the log."""
        traceback.print_exception(error)
        sys.stderr.flush()
        message = error.message if isinstance(error, FullpipeError) else str(error)
        self.send({"kind": "failed", "error": type(error).__name__, "message": message,
                   "hint": getattr(error, "hint", None)})

    def lose(self, error: NeighbourLostError) -> None:
        """Report that a neighbouring stage is gone."""
        self.send({"kind": "lost", "message": str(error)})

    def drop_cancelled(self, arrival: Arrival) -> None:
        """Take out the rows that nobody needs any more, just before they would be computed."""
        nodes = [node for part in arrival.flight.parts for node in part.nodes]
        if dead := self.cancelled.take(nodes):
            arrival.flight, arrival.hidden = drop_rows(arrival.flight, arrival.hidden, dead)

    def timed(self, flight: Flight, work: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """Do the station's work on a flight; its result, and the leg as plain values."""
        start = time.monotonic()
        result = work()
        if self._pace:
            sleep_until(start + self._pace.seconds(flight.num_rows))
        nodes = [node for part in flight.parts for node in part.nodes]
        leg = dump_leg(Leg(self.name, start, time.monotonic(), nodes))
        self.done = flight.id
        return result, leg

    def _listen(self, unread: list[Frame]) -> None:
        try:
            while True:
                for frame in unread:
                    self._obey(frame)
                unread = self.channel.receive()
        except (EOFError, OSError):
            leave(0)
        except BaseException as error:  # a frame that makes no sense
            self.fail(error)
            leave(1)  # what comes after it cannot be read, "stop" included

    def _obey(self, frame: Frame) -> None:
        match frame["kind"]:
            case "flight":
                self.inbox.put(self._arrival(frame))
            case "cancel":
                self.cancelled.add(frame["nodes"], frame["sent"] + self.around.cancel_s)
            case "stop":
                leave(0)
            case kind:
                raise PipelineError(f"no such kind of frame: {kind!r}",
                                    hint="Engine and workers must be of one version of Fullpipe.")

    def _arrival(self, frame: Frame) -> Arrival:
        sent, size = frame["sent"], 0 if self._wire.link.instant else frame_size(frame)
        return Arrival(load_flight(frame["flight"]), [], None, sent, size, self._wire.arrival(sent, size))

    def next(self) -> Arrival:
        """Wait for the next flight or job from the engine, until it has arrived."""
        arrival = self.inbox.get()
        sleep_until(arrival.due)
        return arrival

    def _beat(self) -> None:
        while True:
            time.sleep(self._beat_s)
            self.send({"kind": "beat", "done": self.done})


def serve_stage(host: Host, stage: StageLike, neighbours: Neighbours, index: int, num_stages: int) -> None:
    """Run flights for ever. Raises `NeighbourLostError`, and what the stage raises."""
    first, last = index == 0, index == num_stages - 1
    next_arrival = host.next if first else neighbours.arrivals(host.around.inward)
    while True:
        arrival = next_arrival()
        host.drop_cancelled(arrival)
        flight = arrival.flight
        result, leg = host.timed(flight, partial(stage.run, flight, arrival.hidden))
        legs = [*arrival.legs, leg]
        if not last:
            neighbours.finish_sending()
        if first:  # said before handing on, so that the answer is on its way meanwhile
            host.send_ready({"kind": "ready"})
        if last:
            host.send_answer({"kind": "landed", "flight": flight.id, "nodes": result.nodes,
                              "tokens": result.tokens, "margins": result.margins, "legs": legs})
        else:
            neighbours.send(flight, legs, result)


def serve_draft(host: Host, source: SourceLike) -> None:
    """Run draft jobs for ever. Raises what the source raises."""
    while True:
        arrival = host.next()
        host.drop_cancelled(arrival)
        job = arrival.flight
        expansions, leg = host.timed(job, partial(source.run, job))
        host.send_answer({"kind": "drafted", "job": job.id, "leg": leg,
                          "expansions": [dump_expansion(expansion) for expansion in expansions]})


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


def control_connection() -> Channel:
    """The socket that standard input is; standard input becomes empty, so that nothing else reads it."""
    sock = socket.socket(fileno=os.dup(0))
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return Channel(sock)


def main() -> None:
    """Take the configuration, build the station, serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = control_connection()
    frames: list[Frame] = []
    try:
        while not frames:
            frames = channel.receive()
    except EOFError:
        leave(0)
    config, *unread = frames
    die_with_parent(config["parent"])
    sys.setswitchinterval(_SWITCH_S)
    host = Host(channel, config)
    host.start_threads(unread)
    try:
        _build_and_serve(host, config)
    except NeighbourLostError as error:
        host.lose(error)
    except BaseException as error:
        host.fail(error)
    threading.Event().wait()  # until the engine says stop, or is gone


def _build_and_serve(host: Host, config: Frame) -> None:
    station = StationSpec.from_dict(config["spec"]).build()
    if torch := sys.modules.get("torch"):  # a station without tensors does not need it loaded
        torch.set_num_threads(config["threads"])
    neighbours = Neighbours(config)
    index, num_stages = config["rank"], config["stages"]
    host.send({"kind": "up"})
    if index == num_stages:
        serve_draft(host, cast(SourceLike, station))
    else:
        serve_stage(host, cast(StageLike, station), neighbours, index, num_stages)


if __name__ == "__main__":
    main()
