"""A process's sockets are made here, all of them with the keys of the run.

The engine binds one socket for what its workers say and hear; a station that takes in hidden states binds one for
these. On one host they are named in a name space that leaves no files (`ipc://@...`); between hosts they have an
address and a port that somebody asked for.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Sequence

import zmq
from zmq.constants import Event as Happening

from fullpipe.errors import UsageError
from fullpipe.pipeline.bell import Context, Socket
from fullpipe.pipeline.keys import Doorman, RunKeys
from fullpipe.pipeline.wire import LONGEST_HEADER

HEADERS = LONGEST_HEADER + (1 << 16)
"""Bytes of the longest part of a message where no tensors come; what is only just too long is told as nonsense."""

ROWS = 1 << 30
"""The same where they do."""

_DRAIN_S = 0.2
_BEATS = 4  # of ZeroMQ's own, in the time after which a silent connection counts as lost


def local_endpoint() -> str:
    """A new name for a socket that only processes of this host can reach."""
    return f"ipc://@fullpipe-{secrets.token_hex(16)}"


class Net:
    """Makes the sockets of one process, and closes them.

    keys: of the run. silence_s: after so long without a sign of life from the other end's process a connection between
    hosts counts as lost (ZeroMQ's own heartbeats, which no thread of ours delays).
    """

    def __init__(self, keys: RunKeys, silence_s: float) -> None:
        self._keys, self._silence_ms = keys, max(100, round(1e3 * silence_s))
        self._context: Context = zmq.Context()
        self._doorman: Doorman | None = None

    def bind(self, endpoints: Sequence[str], longest: int = ROWS) -> tuple[Socket, list[str]]:
        """A socket that many may connect to, and where it listens: port 0 has become a real one.

        longest: bytes of a part of a message. Who sends a longer one loses his connection, strangers included: they
        are heard up to the point at which they have to show their keys.

        Raises UsageError for a port in use and for what is no address of this host.
        """
        if self._doorman is None:
            self._doorman = Doorman(self._context, self._keys)
            self._doorman.start()
        socket = self._context.socket(zmq.ROUTER)
        self._prepare(socket)
        self._keys.serve(socket)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # one who comes back after his connection broke has the same name
        socket.setsockopt(zmq.MAXMSGSIZE, longest)
        try:
            return socket, [listen_at(socket, endpoint) for endpoint in endpoints]
        except UsageError:
            socket.close()
            raise

    def connect(self, endpoint: str, name: str) -> Socket:
        """A socket to one other. name: by which that one knows us, and answers."""
        socket = self._dealer(name)
        connect_to(socket, endpoint)
        return socket

    def connect_watched(self, endpoint: str, name: str) -> tuple[Socket, Socket]:
        """The same, and a socket that tells from the beginning when the connection is made, refused and lost."""
        socket = self._dealer(name)
        news = watched(socket)
        connect_to(socket, endpoint)
        return socket, news

    def _dealer(self, name: str) -> Socket:
        socket = self._context.socket(zmq.DEALER)
        self._prepare(socket)
        self._keys.connect(socket)
        socket.setsockopt_string(zmq.IDENTITY, name)
        return socket

    def _prepare(self, socket: Socket) -> None:
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)  # who may send how much is said by credits (`hops`), not by blocking
        socket.setsockopt(zmq.HEARTBEAT_IVL, self._silence_ms // _BEATS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, self._silence_ms)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)

    def drain(self) -> None:
        """Return when what sockets that were closed still had to send is sent, or their time is over. The process is
        about to end: nothing else can be sent any more."""
        threading.Thread(target=self._context.term, daemon=True).start()
        time.sleep(_DRAIN_S)

    def close(self) -> None:
        """Close everything. No other thread may be using a socket."""
        if self._doorman:
            self._doorman.stop()
        self._context.destroy(linger=0)


def watched(socket: Socket) -> Socket:
    """A socket that tells when the connection of another is made, refused and lost."""
    return socket.get_monitor_socket(Happening.HANDSHAKE_SUCCEEDED | Happening.DISCONNECTED
                                     | Happening.HANDSHAKE_FAILED_AUTH | Happening.HANDSHAKE_FAILED_NO_DETAIL)


def tcp_endpoint(address: str, port: int) -> str:
    """How ZeroMQ spells an address and a port of it; 0: any that is free."""
    return f"tcp://{f'[{address}]' if ':' in address else address}:{port or '*'}"


def connect_to(socket: Socket, endpoint: str) -> None:
    _choose_family(socket, endpoint)
    socket.connect(endpoint)


def listen_at(socket: Socket, endpoint: str) -> str:
    """Bind it, and return where it listens: port 0 has become a real one. Raises UsageError, with the way out."""
    _choose_family(socket, endpoint)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise _cannot_listen(endpoint, error) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT) if endpoint.startswith("tcp:") else endpoint


def _choose_family(socket: Socket, endpoint: str) -> None:
    """An IPv4 address stays one: taken for both families, it would be called [::ffff:10.0.0.1] in all that is told."""
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))


def _cannot_listen(endpoint: str, error: zmq.ZMQError) -> UsageError:
    where = endpoint.removeprefix("tcp://")
    address, _, port = where.rpartition(":")
    if error.errno == zmq.EADDRINUSE:
        return UsageError(f"port {port} of {address.strip('[]')} is in use",
                          hint="End what listens there, or give the host another data port; 0 takes any that is free.")
    if error.errno == errno.EACCES:
        return UsageError(f"port {port} of {address.strip('[]')} may not be taken by you",
                          hint="Give the host a data port above 1023; 0 takes any that is free.")
    return UsageError(f"cannot listen on {where.removesuffix(':*')}: {error.strerror}",
                      hint="The address must be one of this host's own; `ip addr` lists them. `host_ip` and "
                           "`interface` choose another one.")
