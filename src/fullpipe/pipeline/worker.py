"""One station's process: `python -m fullpipe.pipeline.worker`, started by `launch.Fleet`.

Standard input is the control connection, a socket; its first frame is the configuration. Three threads:

- the main thread runs flights (at the draft station: jobs), which it gets from the stage before or, at
  the first stage and the draft station, from an inbox;
- the control thread reads what the engine sends: it fills the inbox, it is the side channel on which
  `cancel` overtakes the flights that wait, and it ends the process on "stop" or when the engine is gone;
- the heartbeat thread says that the process lives and which flight it finished last.

A stage that taps has one more, which sends hidden states to the draft station, and that has one for each such
stage, which takes them in (`TapSender`, `receive_taps`). What they take in goes to the main thread (`Desk`).

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
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, NoReturn, cast

from fullpipe.errors import FullpipeError, PipelineError
from fullpipe.messages import Expansion, Flight, Leg, Tap
from fullpipe.pipeline.answers import sensible
from fullpipe.pipeline.emulation import Around, Inbound, Outbox, sleep_until, wake_promptly
from fullpipe.pipeline.inprocess import drop_rows
from fullpipe.pipeline.links import Link, Wire
from fullpipe.pipeline.pace import Pace
from fullpipe.pipeline.wire import (
    Arrival,
    Bytes,
    Channel,
    Frame,
    NonsenseError,
    dump_expansion,
    dump_flight,
    dump_leg,
    frame_size,
    load_flight,
    pack,
    packed_size,
    unpack,
)
from fullpipe.stations.base import DraftLike, StageLike, TapCount, TapReader, tap_reader, untapped
from fullpipe.stations.spec import StationSpec

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


@dataclass(slots=True)
class TapArrival:
    """A tap that has come to the draft station, and its bytes on the link."""

    tap: Tap
    size: int


@dataclass(slots=True)
class Forgotten:
    """Nodes of a cancel, which counts from `due` on, seconds of `time.monotonic`."""

    nodes: list[int]
    due: float


News = Arrival | TapArrival | Forgotten  # what comes to an inbox


class Outgoing:
    """The way to another process over gloo, at its beginning. One thread uses it.

    A message is an opening of fixed size, with as much as it holds, and a second piece if something is left.
    Gloo moves bytes only when a receive of just that size waits for them, so a size that had to be announced
    first would cost another round trip; a decoding step's few rows fit the opening.
    """

    def __init__(self, rank: int, name: str) -> None:
        self._rank, self._name = rank, name
        self._unsent: list[Any] = []  # handles of the sends under way

    def finish(self) -> None:
        """Wait until what was sent has been received. Raises `NeighbourLostError`."""
        with _gone(self._name):
            for handle in self._unsent:
                handle.wait()
        self._unsent.clear()

    def send(self, header: Any, hidden: Any) -> None:
        """Start sending (see `wire.pack`); `finish` comes first. Raises `NeighbourLostError`."""
        import torch
        import torch.distributed as dist

        message = torch.from_numpy(pack(header, hidden, least=_OPENING))
        with _gone(self._name):
            self._unsent = [dist.isend(piece, dst=self._rank)
                            for piece in (message[:_OPENING], message[_OPENING:]) if len(piece)]


class Incoming:
    """The other end of an `Outgoing`. name: whose, for words about it."""

    def __init__(self, rank: int, name: str) -> None:
        self._rank, self.name = rank, name
        self._opening: tuple[Any, Any] | None = None  # handle of the posted receive, and its tensor

    def expect(self) -> None:
        """Let the next message come. Raises `NeighbourLostError`."""
        import torch
        import torch.distributed as dist

        message = torch.empty(_OPENING, dtype=torch.uint8)
        with _gone(self.name):
            self._opening = dist.irecv(message, src=self._rank), message

    def receive(self) -> tuple[Any, Any, int]:
        """Wait for the message that was let come: its header, three values, its hidden rows and its bytes. Raises
        `NeighbourLostError`, and `NonsenseError` for what is no message."""
        import torch
        import torch.distributed as dist

        assert self._opening is not None, "expect() comes first"
        handle, message = self._opening
        with _gone(self.name):
            handle.wait()
            size = packed_size(message.numpy())
            if (missing := size - _OPENING) > 0:
                message = torch.cat([message, torch.empty(missing, dtype=torch.uint8)])
                dist.recv(message[_OPENING:], src=self._rank)
        return *self.understood(message.numpy()), size

    def understood(self, message: Bytes) -> tuple[list[Any], Any]:
        """Header and hidden rows of a whole message. Raises `NonsenseError`."""
        header, rows = unpack(message)
        if type(header) is not list or len(header) != 3 or rows is None:
            raise NonsenseError(f"a message of {self.name}'s that says {header!r:.60}")
        return header, rows


class Neighbours:
    """Point-to-point hops between the stages.

    Each stage lets one flight wait: a receive for it is posted while the one before is computed, so it
    travels meanwhile. A stage that has a flight to hand on first waits until its last one was received.
    So a slow stage slows those before it instead of piling up flights chosen long ago.

    An emulated link lets more come (`emulation.Inbound`).
    """

    def __init__(self, config: Frame) -> None:
        before, after = config["rank"] - 1, config["rank"] + 1
        self._before, self._after = Incoming(before, f"stage {before}"), Outgoing(after, f"stage {after}")
        if config["world"] > 1:
            _join_world(config)

    def arrivals(self, link: Link) -> Callable[[], Arrival]:
        """What waits for the next flight and returns it; others are let come meanwhile. It raises
        `NeighbourLostError`."""
        if not link.instant:
            return Inbound(self._expect_and_receive, link).next
        self._before.expect()
        return self._receive_and_expect

    def _expect_and_receive(self) -> Arrival:
        self._before.expect()
        return self._receive()

    def _receive_and_expect(self) -> Arrival:
        arrival = self._receive()
        self._before.expect()
        return arrival

    def _receive(self) -> Arrival:
        (flight, legs, sent), hidden, size = self._before.receive()
        with sensible(f"a message of {self._before.name}'s"):
            return Arrival(_loaded(flight, hidden), legs, hidden, sent, size, float(sent))

    def finish_sending(self) -> None:
        """Wait until the stage after has received what was sent. Raises `NeighbourLostError`."""
        self._after.finish()

    def send(self, flight: Flight, legs: list[list[Any]], hidden: Any) -> None:
        """Start sending to the stage after; `finish_sending` comes first. Raises `NeighbourLostError`."""
        self._after.send([dump_flight(flight), legs, time.monotonic()], hidden)


class TapSender:
    """A stage's taps on their way to the draft station, from a thread of their own: neither the stage nor the next
    one waits for them. What piles up here is at most what is in flight, for the draft's end takes them in at any time.

    Raises `NeighbourLostError` in that thread, through `host`.
    """

    def __init__(self, host: Host, draft: int) -> None:
        self._way = Outgoing(draft, "draft")
        self._queue: queue.SimpleQueue[tuple[Tap, float]] = queue.SimpleQueue()
        host.start_thread("taps", self._deliver)

    def send(self, tap: Tap) -> None:
        self._queue.put((tap, time.monotonic()))

    def _deliver(self) -> None:
        while True:
            tap, sent = self._queue.get()
            self._way.send([dump_flight(tap.flight), tap.layers, sent], tap.features)
            self._way.finish()


def receive_taps(stage: int, link: Link, deliver: Callable[[TapArrival], None]) -> NoReturn:
    """Take in a stage's taps at the draft station, for ever, and hold each until its link has carried it. The
    stage has stamped it by then, so that holding one makes none behind it late. Raises `NeighbourLostError`."""
    way, wire = Incoming(stage, f"stage {stage}"), Wire(link)
    while True:
        way.expect()
        (flight, layers, sent), features, size = way.receive()
        with sensible(f"a tap of stage {stage}'s"):
            tap, due = Tap(_loaded(flight, features), layers, features), wire.arrival(float(sent), size)
        sleep_until(due)
        deliver(TapArrival(tap, size))


def _loaded(values: list[Any], rows: Any) -> Flight:
    """A neighbour's flight, with as many rows as came along."""
    flight = load_flight(values)
    for part in flight.parts:
        columns = (part.nodes, part.tokens, part.positions, part.slots, part.paths, part.wants)
        if {len(column) for column in columns} != {len(part)}:
            raise ValueError(f"lists of different lengths in flight {flight.id}")
    if len(rows) != flight.num_rows:
        raise ValueError(f"{len(rows)} rows came along with the {flight.num_rows} of flight {flight.id}")
    return flight


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
        self.inbox: queue.SimpleQueue[News] = queue.SimpleQueue()
        self.done = -1
        self.reads_taps = False  # then cancels go to the inbox too
        self.waits = False  # for taps, with a job
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

    def start_thread(self, name: str, work: Callable[[], Any]) -> None:
        threading.Thread(target=self.report, args=(work,), name=name, daemon=True).start()

    def report(self, work: Callable[[], Any]) -> None:
        """Do what is not expected to end, and tell the engine how it ended."""
        try:
            work()
        except NeighbourLostError as error:
            self.lose(error)
        except BaseException as error:
            self.fail(error)

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
                due = frame["sent"] + self.around.cancel_s
                if self.reads_taps:
                    self.inbox.put(Forgotten(frame["nodes"], due))
                else:
                    self.cancelled.add(frame["nodes"], due)
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
        assert isinstance(arrival, Arrival), "the rest is for drafts that read taps"
        sleep_until(arrival.due)
        return arrival

    def _beat(self) -> None:
        while True:
            time.sleep(self._beat_s)
            self.send({"kind": "beat", "done": self.done} | ({"waits": True} if self.waits else {}))


def serve_stage(host: Host, stage: StageLike, neighbours: Neighbours, index: int, num_stages: int,
                taps: TapSender | None) -> None:
    """Run flights for ever. taps: takes what the stage taps; None: nobody reads it. Raises `NeighbourLostError`, and
    what the stage raises."""
    first, last = index == 0, index == num_stages - 1
    next_arrival = host.next if first else neighbours.arrivals(host.around.inward)
    while True:
        arrival = next_arrival()
        host.drop_cancelled(arrival)
        flight = arrival.flight
        answer, leg = host.timed(flight, partial(stage.run, flight, arrival.hidden))
        result, tap = untapped(flight, answer)
        legs = [*arrival.legs, leg]
        if not last:
            neighbours.finish_sending()
        if first:  # said before handing on, so that the answer is on its way meanwhile
            host.send_ready({"kind": "ready"})
        if last:
            told = {"logprobs": result.logprobs} if result.logprobs else {}
            host.send_answer({"kind": "landed", "flight": flight.id, "nodes": result.nodes,
                              "tokens": result.tokens, "margins": result.margins, "others": result.others,
                              "legs": legs} | told)
        else:
            neighbours.send(flight, legs, result)
        if tap and taps:  # last of all, so that it delays nobody
            taps.send(tap)


def serve_draft(host: Host, draft: DraftLike) -> None:
    """Run draft jobs for ever. Raises what the draft raises."""
    while True:
        arrival = host.next()
        host.drop_cancelled(arrival)
        job = arrival.flight
        expansions, leg = host.timed(job, partial(draft.run, job))
        host.send_answer(_drafted(job, leg, expansions))


def serve_reader(host: Host, draft: TapReader) -> None:
    """The same for a draft that reads taps. Its answers tell how many have come."""
    desk = Desk(host, draft)
    while True:
        job = desk.next()
        expansions, leg = host.timed(job, partial(draft.run, job))
        host.send_answer(_drafted(job, leg, expansions) | {"taps": [desk.taps.count, desk.taps.bytes]})


def _drafted(job: Flight, leg: list[Any], expansions: list[Expansion]) -> Frame:
    return {"kind": "drafted", "job": job.id, "leg": leg,
            "expansions": [dump_expansion(expansion) for expansion in expansions]}


class Desk:
    """What has come to a draft station that reads taps: jobs that wait, and what they wait for.

    All of it comes through the host's inbox, and one thread, that which runs the jobs, takes it out: between two jobs
    and while it waits for one. So `take` never runs while `run` does, without a lock, and a draft need know nothing
    of threads; a tap that comes during a job is taken before the next one, and no earlier could it have been of use.
    """

    def __init__(self, host: Host, draft: TapReader) -> None:
        self.taps = TapCount()
        self._host, self._draft = host, draft
        self._jobs: deque[Arrival] = deque()
        self._cancels: deque[Forgotten] = deque()  # not due yet

    def next(self) -> Flight:
        """Wait for the next job that has arrived and for which the draft is ready."""
        while True:
            self._file_all()
            now = time.monotonic()
            self._forget(now)
            here = bool(self._jobs) and self._jobs[0].due <= now
            if here and self._draft.ready(self._jobs[0].flight):
                self._host.waits = False
                return self._jobs.popleft().flight
            self._host.waits = here
            with suppress(queue.Empty):
                self._file(self._host.inbox.get(timeout=self._patience(now)))

    def _file_all(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._file(self._host.inbox.get_nowait())

    def _file(self, news: News) -> None:
        match news:
            case Arrival():
                self._jobs.append(news)
            case Forgotten():
                self._cancels.append(news)
            case TapArrival(tap, size):
                self.taps.add(size)
                self._draft.take(tap)

    def _forget(self, now: float) -> None:
        """Of jobs that are still on their way too: a cancel overtakes them."""
        while self._cancels and self._cancels[0].due <= now:
            nodes = self._cancels.popleft().nodes
            for arrival in self._jobs:
                arrival.flight, _ = drop_rows(arrival.flight, None, set(nodes))
            self._draft.forget(nodes)

    def _patience(self, now: float) -> float | None:
        """Seconds until something is due; None: that nothing is."""
        dues = [held[0].due for held in (self._jobs, self._cancels) if held and held[0].due > now]
        return min(dues) - now if dues else None


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
    host.report(partial(_build_and_serve, host, config))
    threading.Event().wait()  # until the engine says stop, or is gone


def _build_and_serve(host: Host, config: Frame) -> None:
    station = StationSpec.from_dict(config["spec"]).build()
    if torch := sys.modules.get("torch"):  # a station without tensors does not need it loaded
        torch.set_num_threads(config["threads"])
    neighbours = Neighbours(config)
    index, num_stages, tapping = config["rank"], config["stages"], config["tapping"]
    if index < num_stages:
        host.send({"kind": "up"})
        taps = TapSender(host, num_stages) if index in tapping else None
        serve_stage(host, cast(StageLike, station), neighbours, index, num_stages, taps)
    else:
        _serve_station(host, cast(DraftLike, station), tapping)


def _serve_station(host: Host, draft: DraftLike, tapping: list[int]) -> None:
    reader = tap_reader(draft)
    host.reads_taps = reader is not None  # from before the first cancel
    host.send({"kind": "up"})
    for stage in tapping:  # someone must take them in even where nobody reads them
        deliver = host.inbox.put if reader else _ignore
        host.start_thread(f"taps of stage {stage}", partial(receive_taps, stage, host.around.tap(stage), deliver))
    serve_reader(host, reader) if reader else serve_draft(host, draft)


def _ignore(arrival: TapArrival) -> None:
    pass


if __name__ == "__main__":
    main()
