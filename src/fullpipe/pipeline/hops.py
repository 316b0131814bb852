"""Hidden rows hop from one worker to the next, over gloo, point to point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar

from msgspec import Struct

from fullpipe.pipeline.checks import check_rows
from fullpipe.pipeline.emulation import Arrival, Inbound
from fullpipe.pipeline.frames import Hop, Setup, TapHop
from fullpipe.pipeline.links import Link
from fullpipe.pipeline.wire import Bytes, NonsenseError, pack, packed_size, unpack

_OPENING = 1 << 15  # bytes: 8 rows of 1536 bf16 numbers, and what describes them, fit

Header = TypeVar("Header", bound=Hop | TapHop)


class NeighbourLostError(Exception):
    """The connection to the stage before or after broke."""


class Outgoing:
    """Sends to another process over gloo. One thread uses it.

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

    def send(self, header: Struct, hidden: Any) -> None:
        """Start sending (see `wire.pack`); `finish` comes first. Raises `NeighbourLostError`."""
        import torch
        import torch.distributed as dist

        message = torch.from_numpy(pack(header, hidden, least=_OPENING))
        with _gone(self._name):
            self._unsent = [dist.isend(piece, dst=self._rank)
                            for piece in (message[:_OPENING], message[_OPENING:]) if len(piece)]


class Incoming(Generic[Header]):
    """Receives what an `Outgoing` sends. name: whose, for words about it. kind: of its messages' headers."""

    def __init__(self, rank: int, name: str, kind: type[Header]) -> None:
        self._rank, self.name, self._kind = rank, name, kind
        self._opening: tuple[Any, Any] | None = None  # handle of the posted receive, and its tensor

    def expect(self) -> None:
        """Let the next message come. Raises `NeighbourLostError`."""
        import torch
        import torch.distributed as dist

        message = torch.empty(_OPENING, dtype=torch.uint8)
        with _gone(self.name):
            self._opening = dist.irecv(message, src=self._rank), message

    def receive(self) -> tuple[Header, Any, int]:
        """Wait for the message that was let come: its header, its hidden rows and its bytes. Raises
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

    def understood(self, message: Bytes) -> tuple[Header, Any]:
        """Header and hidden rows of a whole message. Raises `NonsenseError`."""
        try:
            header, rows = unpack(message, self._kind)
            if rows is None:
                raise NonsenseError("no rows")
            check_rows(header.flight, len(rows))
        except NonsenseError as error:
            raise NonsenseError(f"a message of {self.name}'s: {error}") from error
        return header, rows


class Neighbours:
    """Connects a stage with those before and after it.

    Each stage lets one flight wait: a receive for it is posted while the one before is computed, so it
    travels meanwhile. A stage that has a flight to hand on first waits until its last one was received.
    So a slow stage slows those before it instead of piling up flights chosen long ago.

    An emulated link lets more come (`emulation.Inbound`).
    """

    def __init__(self, rank: int) -> None:
        self._before = Incoming(rank - 1, f"stage {rank - 1}", Hop)
        self.after = Outgoing(rank + 1, f"stage {rank + 1}")

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
        hop, hidden, size = self._before.receive()
        return Arrival.now(hop.flight, hop.stays, hidden, size)


@contextmanager
def _gone(neighbour: str) -> Iterator[None]:
    """Gloo reports a broken connection as a `RuntimeError` like any other."""
    try:
        yield
    except RuntimeError as error:
        raise NeighbourLostError(f"lost its connection to {neighbour}") from error


def join_world(setup: Setup) -> None:
    """Meet the other workers. The first stage serves the meeting point on a socket it inherited."""
    import torch.distributed as dist

    first = setup.listener is not None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", setup.port, is_master=first, timeout=timedelta(seconds=setup.start_timeout),
        wait_for_workers=False, master_listen_fd=setup.listener)
    # Gloo's timeout also bounds how long a receive may wait, and a pipeline may be idle for days.
    dist.init_process_group("gloo", store=store, rank=setup.rank, world_size=setup.world,
                            timeout=timedelta(days=365))
