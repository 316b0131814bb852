"""Keys keep strangers out: every socket of a run has the run's own pair, and speaks to nobody without it (CURVE)."""

from __future__ import annotations

from typing import Any, Self

import zmq
from msgspec import Struct
from zmq.auth.thread import ThreadAuthenticator


class RunKeys(Struct, frozen=True):
    """Is the key pair of one run, in Z85 text. Whoever has it belongs to the run: the engine makes it, and hands it to
    the processes that it starts, by a way that nobody else can read."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> Self:
        return cls(*zmq.curve_keypair())

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """Let a socket that binds demand the key of those who connect. Who checks it is a `Doorman`."""
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = self.public, self.secret, True

    def connect(self, socket: zmq.Socket[bytes]) -> None:
        """Let a socket that connects show the key, and speak to nobody who has another."""
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = self.public, self.secret, self.public


class Doorman:
    """Turns away, for all sockets of a context that serve, whoever does not have the run's key. Without one ZeroMQ lets
    everybody in who knows the public key. It has a thread, which sleeps."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: RunKeys) -> None:
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _Known(keys))

    def stop(self) -> None:
        self._authenticator.stop()


class _Known:
    """Answers ZeroMQ's question about a key."""

    def __init__(self, keys: RunKeys) -> None:
        self._public = keys.public

    def callback(self, domain: Any, key: bytes) -> bool:
        return key == self._public
