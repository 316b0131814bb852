"""Two hosts learn what lies between them, over the transport that the pipeline uses: ZeroMQ with the keys of the run.

    with Echo("10.0.0.2", 5600, keys) as echo:                  on one host
        pair = measure("10.0.0.2", echo.port, keys)             on another

Latency is half of the median round trip of an empty message. For bandwidth, trains of equal pieces are sent, each twice
as long as the one before, until one takes long enough; the other end tells the gaps between its pieces. TCP spends the
first round trips on opening its window: gaps in which it only waits for that are left out (`bandwidth_of`). What is
found is what TCP gives to messages as large as flights; on a long line a download would get more in the end.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from fullpipe.cluster.addresses import require_own
from fullpipe.cluster.links import Pair
from fullpipe.errors import PipelineError
from fullpipe.pipeline.bell import Bell, Context, Socket
from fullpipe.pipeline.keys import Doorman, RunKeys
from fullpipe.pipeline.net import connect_to, listen_at, tcp_endpoint

PIECE = 1 << 14
"""Bytes of a piece of a train."""

_PING, _MORE, _LAST = b"ping", b"more", b"last"
_PINGS_S, _FEWEST, _MOST_PINGS = 0.15, 4, 40
_ENOUGH_S = 0.08  # a train that takes so long is long enough
_TRAINS_S, _TRAINS_TURNS = 0.25, 2  # no train begins after so many seconds, or so many round trips if that is later
_FIRST_TRAIN, _LONGEST_TRAIN = 8, 1 << 11  # pieces
_MOST_PIECES = 2 * _LONGEST_TRAIN
_STALL = 4.0  # a gap so many times longer than the usual one is one
_LONG_LINE_S = 4e-3  # a round trip
_SHORTEST_S = 1e-7  # between two pieces; less is no time that a clock tells


class Echo:
    """Answers those who measure the way to this host; in a thread of its own, from here to `close`.

    address: of this machine; it listens there and nowhere else. port: 0 takes any that is free; then see `port`.

    Raises UsageError when the address is none of this machine, or the port is in use or may not be taken.
    """

    def __init__(self, address: str, port: int, keys: RunKeys) -> None:
        self.address = require_own(address)
        self._context: Context = zmq.Context()
        self._doorman = Doorman(self._context, keys)
        socket = self._context.socket(zmq.ROUTER)
        try:
            socket.linger = 0
            socket.setsockopt(zmq.MAXMSGSIZE, 2 * PIECE)  # encrypted, a piece is some bytes longer
            keys.serve(socket)
            self._doorman.start()
            self.port = int(listen_at(socket, tcp_endpoint(self.address, port)).rpartition(":")[2])
        except BaseException:
            socket.close()
            self._doorman.stop()
            self._context.term()
            raise
        self._bell = Bell(self._context)
        self._thread = threading.Thread(target=_answer, args=(socket, self._bell.socket), name="fullpipe-echo",
                                        daemon=True)
        self._thread.start()

    def close(self) -> None:
        """From here on the port is free."""
        if not self._context.closed:
            self._bell.ring()
            self._thread.join()
            self._doorman.stop()
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(address: str, port: int, keys: RunKeys, *, name: str | None = None, timeout_s: float = 10.0,
            quick: bool = False) -> Pair:
    """The way from here to an `Echo`. It takes less than half a second, or some twelve round trips where those take
    longer.

    name: of the host, for errors. timeout_s: for the first answer, and for each one after it. quick: the bandwidth is
    not measured, and 1.

    Raises PipelineError when there is no answer, with what is known of why.
    """
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.SNDHWM, 0)
        keys.connect(socket)
        asked = _Asked(socket, f"{name or 'the host'} at {address}, port {port}", timeout_s)
        with asked.monitor:
            connect_to(socket, tcp_endpoint(address, port))
            round_trip = _round_trip(asked)
            return Pair(round_trip / 2, 1.0 if quick else _bandwidth(asked, round_trip))


def bandwidth_of(gaps: Sequence[float], round_trip: float) -> float:
    """Bytes per second of a train. gaps: seconds between its pieces. round_trip: of an empty message, in seconds.

    A gap is left out that is far longer than usual and at least half a round trip: the sender's window was full, and it
    waited for word from here. Not so one after which pieces come all at once: then it was this end that was late. Nor
    any on a short line, where the window is open at once.
    """
    usual = statistics.median(gaps)
    counted = [gap for gap, following in zip(gaps, (*gaps[1:], math.inf))
               if round_trip < _LONG_LINE_S or gap < max(round_trip / 2, _STALL * usual) or following < usual / _STALL]
    return PIECE * len(counted) / max(sum(counted), _SHORTEST_S * len(counted))


# ---- the end that answers --------------------------------------------------------------------------------------------


def _answer(socket: Socket, bell: Socket) -> None:
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(bell, zmq.POLLIN)
    arrived: dict[bytes, list[float]] = {}  # of each that sends a train
    with socket, bell:
        while bell not in dict(poller.poll()):
            sender, *frames = socket.recv_multipart()
            if frames == [_PING]:
                socket.send_multipart([sender, _PING])
            elif frames[:1] in ([_MORE], [_LAST]):
                times = arrived.setdefault(sender, [])
                if len(times) < _MOST_PIECES:
                    times.append(time.perf_counter())
                if frames[0] == _LAST:
                    gaps = [after - before for before, after in pairwise(times)]
                    socket.send_multipart([sender, msgspec.msgpack.encode(gaps)])
                    del arrived[sender]


# ---- the end that asks -----------------------------------------------------------------------------------------------

_REFUSED = {zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL}


class _Asked:
    """Is the other end, with what its connection went through. `monitor`: where that is told."""

    def __init__(self, socket: Socket, where: str, timeout_s: float) -> None:
        self._socket, self._where, self._timeout_s = socket, where, timeout_s
        self.monitor = socket.get_monitor_socket()
        self._events: set[int] = set()

    def tell(self, word: bytes, *more: bytes) -> None:
        self._socket.send_multipart([word, *more], copy=not more)

    def answer(self) -> bytes:
        """The next one. Raises PipelineError where none comes."""
        end = time.monotonic() + self._timeout_s
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self.monitor, zmq.POLLIN)
        while (left := end - time.monotonic()) > 0:
            ready = dict(poller.poll(int(left * 1e3) + 1))
            if self._socket in ready:
                return self._socket.recv()
            if self.monitor in ready:
                self._events.add(int(recv_monitor_message(self.monitor)["event"]))
            if self._events & _REFUSED:
                break
        raise self._error()

    def _error(self) -> PipelineError:
        if self._events & _REFUSED:
            return PipelineError(f"{self._where}, does not have the keys of this run",
                                 hint="Another run listens there, or something else: give the host another data port.")
        if zmq.EVENT_HANDSHAKE_SUCCEEDED in self._events:
            return PipelineError(f"{self._where}, answered first and is now silent for {self._timeout_s:g} s",
                                 hint="Look whether the host and its network are up.")
        if zmq.EVENT_CONNECTED in self._events:
            return PipelineError(f"{self._where}, takes connections and says nothing for {self._timeout_s:g} s",
                                 hint="Something else listens there, or hangs: give the host another data port.")
        if zmq.EVENT_CLOSED in self._events:
            return PipelineError(f"{self._where}, refuses connections: nothing listens there",
                                 hint="Look whether Fullpipe runs on the host, and at this address.")
        return PipelineError(f"{self._where}, does not answer within {self._timeout_s:g} s",
                             hint="Look whether the host is up, whether a firewall lets this port through, and whether "
                                  "the address is that by which it is reached from here (`host_ip`, `interface`).")


def _round_trip(asked: _Asked) -> float:
    """Seconds. The first makes the connection and does not count."""
    samples, end = list[float](), 0.0
    while len(samples) < _FEWEST or (len(samples) < _MOST_PINGS and time.monotonic() < end):
        begun = time.perf_counter()
        asked.tell(_PING)
        asked.answer()
        samples.append(time.perf_counter() - begun)
        end = end or time.monotonic() + _PINGS_S
    return statistics.median(samples[1:])


def _bandwidth(asked: _Asked, round_trip: float) -> float:
    """Bytes per second, of the longest train that there was time for."""
    pieces, piece = _FIRST_TRAIN, bytes(PIECE)
    end = time.monotonic() + max(_TRAINS_S, _TRAINS_TURNS * round_trip)
    while True:
        for left in reversed(range(pieces)):
            asked.tell(_MORE if left else _LAST, piece)
        gaps = msgspec.msgpack.decode(asked.answer(), type=list[float])
        if sum(gaps) >= _ENOUGH_S + round_trip or 2 * pieces > _LONGEST_TRAIN or time.monotonic() > end:
            return bandwidth_of(gaps, round_trip)
        pieces *= 2
