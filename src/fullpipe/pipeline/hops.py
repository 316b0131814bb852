"""Hidden rows hop from one station to the next, over ZeroMQ."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import zmq
from msgspec import Struct

from fullpipe.pipeline.bell import Socket
from fullpipe.pipeline.checks import check_rows
from fullpipe.pipeline.emulation import Arrival, Inbound
from fullpipe.pipeline.frames import Come, Hop, TapHop
from fullpipe.pipeline.links import Link
from fullpipe.pipeline.wire import Frame, Inward, NonsenseError, Outward, Tensors, decode, encode, pack, unpack

Header = TypeVar("Header", bound=Hop | TapHop)
HIDDEN = "hidden"  # the name of the one tensor that every model hands on

_TRIPS, _SERVICES = 64, 5


class Window:
    """Says how many flights may be on the way to the next stage, or wait there, at a time.

    A stage that is ahead waits for its successor instead of piling up flights chosen long ago: one may wait, and as
    many as the successor starts while a flight travels and the news of its start comes back. That trip's length is the
    shortest of the newest ones, for on the others a flight may have waited unseen in a socket.
    """

    def __init__(self) -> None:
        self._trips: deque[float] = deque(maxlen=_TRIPS)
        self._own: deque[float] = deque(maxlen=_SERVICES)
        self._theirs: deque[float] = deque(maxlen=_SERVICES)

    def note_own(self, worked: float) -> None:
        """Seconds that the sender took for a flight."""
        self._own.append(worked)

    def note(self, trip: float, worked: float) -> None:
        """trip: seconds to the other end and back. worked: what it took for a flight."""
        self._trips.append(max(trip, 0.0))
        if worked > 0:
            self._theirs.append(worked)

    @property
    def most(self) -> int:
        service = max(statistics.median(kept) if kept else 0.0 for kept in (self._own, self._theirs))
        return 1 + int(min(self._trips) / service) if self._trips and service > 0 else 1


class Outlet:
    """Sends flights to the next stage, as fast as that lets them come. One thread uses it."""

    def __init__(self, socket: Socket) -> None:
        self._socket, self._numbers = socket, Outward()
        self._window = Window()
        self._sent: deque[float] = deque()  # when those left that have not been started

    def wait_for_room(self, worked: float) -> None:
        """Return when another flight may go. worked: seconds that this stage took for it."""
        self._window.note_own(worked)
        self._take_credits(0)
        while len(self._sent) >= self._window.most:
            self._socket.poll()
            self._take_credits(1)

    def send(self, header: Struct, tensors: Tensors) -> None:
        self._sent.append(time.monotonic())
        send_numbered(self._socket, self._numbers, pack(header, tensors))

    def _take_credits(self, least: int) -> None:
        while self._sent and (least > 0 or self._socket.poll(0)):
            come: Come = decode(self._socket.recv(), Come)
            self._window.note(time.monotonic() - self._sent.popleft() - come.held, come.worked)
            least -= 1


class Inlet(Generic[Header]):
    """Takes in what other stations send. One thread uses it. kind: of its messages' headers."""

    def __init__(self, socket: Socket, kind: type[Header]) -> None:
        self._socket, self._kind = socket, kind
        self._numbers: dict[bytes, Inward] = {}

    def receive(self) -> tuple[str, Header, Mapping[str, Any], int]:
        """Wait for the next message: whose it is, its header, its tensors and its bytes. Raises `NonsenseError`."""
        who, *frames = self._socket.recv_multipart(copy=False)
        name = who.bytes.decode(errors="replace")
        buffers = [frame.buffer for frame in frames]
        try:
            checked = self._numbers.setdefault(who.bytes, Inward()).checked(buffers)
            return name, *understood(checked, self._kind), sum(map(len, buffers))
        except NonsenseError as error:
            raise NonsenseError(f"a message of {name}'s: {error}") from error

    def let_come(self, who: str, come: Come) -> None:
        self._socket.send_multipart([who.encode(), encode(come)])


def understood(frames: list[Frame] | Any, kind: type[Header]) -> tuple[Header, Mapping[str, Any]]:
    """Header and tensors of a whole message. Raises `NonsenseError`."""
    header, tensors = unpack(frames, kind)
    if not tensors:
        raise NonsenseError("no rows")
    for rows in tensors.values():
        check_rows(header.flight, len(rows) if rows.ndim else 0)
    return header, tensors


class Before:
    """Brings a stage the flights of the one before it.

    It lets one flight wait, which travels while the one before it is computed. An emulated link lets more come
    (`emulation.Inbound`).
    """

    def __init__(self, socket: Socket) -> None:
        self._inlet = Inlet(socket, Hop)
        self._came = (0.0, "")  # when the last one did, and from whom
        self.worked = 0.0  # seconds that this stage took for its newest flight

    def arrivals(self, link: Link) -> Callable[[], Arrival]:
        """What waits for the next flight and returns it."""
        if not link.instant:
            return Inbound(self._receive, self._let_come, link).next
        return self._receive_and_let_come

    def _receive_and_let_come(self) -> Arrival:
        arrival = self._receive()
        self._let_come()
        return arrival

    def _receive(self) -> Arrival:
        who, hop, tensors, size = self._inlet.receive()
        if HIDDEN not in tensors:
            raise NonsenseError(f"a message of {who}'s: {', '.join(map(repr, tensors))}, and no {HIDDEN!r}")
        arrival = Arrival.now(hop.flight, hop.stays, tensors[HIDDEN], size)
        self._came = arrival.came, who
        return arrival

    def _let_come(self) -> None:
        came, who = self._came
        self._inlet.let_come(who, Come(time.monotonic() - came, self.worked))


def send_numbered(socket: Socket, numbers: Outward, frames: list[Frame]) -> None:
    socket.send_multipart(numbers.number(frames))


def nothing_came(socket: Socket, seconds: float) -> bool:
    """Whether nothing can be received from a socket after so long."""
    return not socket.poll(round(1e3 * seconds), zmq.POLLIN)
