"""Keys decide who may talk to the sockets of a run: one pair, made for it, which all its processes have.

CURVE encrypts what travels, and a `Doorman` lets in whoever proves that it has the secret key. A socket that serves
while its context has no doorman lets nobody in.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Self

import msgspec
import zmq
from zmq.utils import z85

from fullpipe.errors import MissingExtra
from fullpipe.pipeline.bell import Bell, Context, Socket

_DOMAIN = b"fullpipe"
_DOOR = "inproc://zeromq.zap.01"  # libzmq asks there about everyone who knocks (RFC 27, ZAP)
_VERSION = b"1.0"


class RunKeys(msgspec.Struct, frozen=True):
    """Are the keys of one run, as 40 letters each (Z85). Whoever has the secret one belongs to the run."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> Self:
        """Raises MissingExtra where pyzmq was built without CURVE."""
        if not zmq.has("curve"):
            raise MissingExtra("this machine's ZeroMQ cannot encrypt: it was built without CURVE",
                               hint="Install a wheel of it: `pip install --force-reinstall --only-binary :all: pyzmq`.")
        return cls(*zmq.curve_keypair())

    def serve(self, socket: Socket) -> None:
        """Before the socket is bound: who connects must have these keys. Its context needs a `Doorman`."""
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        # Without this, a context without doorman would let in everyone who has the public key.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.CURVE_SERVER, 1)

    def connect(self, socket: Socket) -> None:
        """Before the socket is connected: it shows these keys, and talks to nobody who does not have them."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)

    def __repr__(self) -> str:
        return f"RunKeys({self.public.decode()})"  # the secret one goes into no log


class Doorman:
    """Lets in who has the keys of the run, on all sockets of a context that serve with them; nobody else.

    A context has one: a second one's `start` raises ZMQError. It waits without using the processor, and ends with
    `stop`, or with its context.
    """

    def __init__(self, context: Context, keys: RunKeys) -> None:
        self._context = context
        self._known = z85.decode(keys.public)
        self._bell: Bell | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on those who knock are heard. Call it before the first socket that serves is bound."""
        assert self._thread is None, "it is there already"
        door = self._context.socket(zmq.REP)
        door.linger = 0
        try:
            door.bind(_DOOR)
        except zmq.ZMQError:
            door.close()
            raise
        self._bell = Bell(self._context)
        self._thread = threading.Thread(target=self._answer, args=(door, self._bell.socket), name="fullpipe-doorman",
                                        daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on nobody is let in; those who are in stay. Without effect when it has not been started."""
        if self._thread is None or self._bell is None:
            return
        self._bell.ring()
        self._thread.join()
        self._thread = self._bell = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answer(self, door: Socket, bell: Socket) -> None:
        poller = zmq.Poller()
        poller.register(door, zmq.POLLIN)
        poller.register(bell, zmq.POLLIN)
        with door, bell, suppress(zmq.ContextTerminated):
            while bell not in dict(poller.poll()):
                door.send_multipart(self._reply(door.recv_multipart()))
            door.unbind(_DOOR)  # at once; `close` frees the name some time later

    def _reply(self, asked: list[bytes]) -> list[bytes]:
        """asked: version, request, domain, address, routing id, mechanism, and for CURVE the key, whose owner will
        have to prove that it has the secret one too."""
        known = asked[0] == _VERSION and asked[5:] == [b"CURVE", self._known]
        return [_VERSION, *asked[1:2], *((b"200", b"OK") if known else (b"400", b"keys of another run")), b"", b""]
