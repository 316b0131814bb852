"""A bell wakes a thread that waits at sockets."""

from __future__ import annotations

from itertools import count

import zmq

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

_numbers = count()


class Bell:
    """Is heard at `socket`, which belongs to the thread that waits; anybody may ring. Whoever waits closes `socket`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._name = f"inproc://fullpipe-bell-{next(_numbers)}"
        self.socket = context.socket(zmq.PULL)
        self.socket.linger = 0
        self.socket.bind(self._name)

    def ring(self) -> None:
        """Without effect when the context has ended: so have all who waited."""
        if self._context.closed:
            return
        with self._context.socket(zmq.PUSH) as socket:
            socket.linger = 0  # it is connected at once, so the word is over there when `send` returns
            socket.connect(self._name)
            socket.send(b"")
