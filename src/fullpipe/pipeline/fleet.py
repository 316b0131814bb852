"""A fleet is the worker processes of one pipeline: it speaks with them, and ends them without a trace."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq
from msgspec import Struct

from fullpipe.pipeline.frames import FromWorker, Stop
from fullpipe.pipeline.guarded import guarded
from fullpipe.pipeline.launch.base import Launcher, Process
from fullpipe.pipeline.net import HEADERS, Net
from fullpipe.pipeline.wire import Inward, NonsenseError, Outward, decode, encode

_STOP_S = 1.0  # what a worker gets to leave by itself,
_TERM_S = 0.4  # and then after SIGTERM, before SIGKILL
_KILL_S = 2.0  # for a host that is far to have done so
_SILENT_S = 2.0  # who has said nothing for so long does not hear us either: it gets SIGKILL at once,
_CUT_OFF_S = 1.0  # and if it outlives that, its host cannot be reached: it ends by itself, for want of an engine
_SAYS = b" says"

News = FromWorker | EOFError | NonsenseError


@dataclass(slots=True)
class Worker:
    """Is one process as its fleet sees it.

    name: "stage 0", "stage 1", ..., "draft". host: where it is; "" for this one.
    heard: when its last frame arrived, seconds of `time.monotonic`.
    done: id of the last flight or job that it finished; -1 before the first.
    listens: where the other stations reach it. cache_slots: what it said of its room when it was ready.
    """

    name: str
    process: Process
    heard: float
    host: str = ""
    done: int = -1
    listens: list[str] = field(default_factory=list)
    cache_slots: int | None = None
    greeted: bool = False
    ended: bool = False
    inward: Inward = field(default_factory=Inward)
    outward: Outward = field(default_factory=Outward)

    @property
    def label(self) -> str:
        """By what people know it."""
        return f"{self.name} on {self.host}" if self.host else self.name

    def how_it_ended(self) -> str:
        """With the tail of what it printed."""
        return self.process.last_words()

    def log_tail(self) -> str:
        return self.process.log_tail()


class Fleet:
    """Holds the worker processes of one pipeline; `starting.start_fleet` starts them.

    net: this side's sockets. endpoints: at which workers call. launcher: starts processes. All are closed with it.
    """

    def __init__(self, net: Net, endpoints: list[str], launcher: Launcher) -> None:
        self.workers: list[Worker] = []
        self.closed = False
        self._net, self._launcher = net, launcher
        try:
            self._socket, self.endpoints = net.bind(endpoints, HEADERS)
        except BaseException:
            net.close()
            launcher.close()
            raise
        self._owner = os.getpid()
        self._closing, self._using = threading.RLock(), threading.RLock()
        self._woken, self._wake = os.pipe()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)
        self._by_name: dict[bytes, Worker] = {}

    def add(self, worker: Worker) -> None:
        self.workers.append(worker)
        self._by_name[worker.name.encode()] = worker
        self._poller.register(worker.process.fileno(), zmq.POLLIN)

    def send(self, worker: Worker, frame: Struct, *data: bytes | memoryview) -> None:
        """Have it sent to a worker that has said hello, with bytes behind it. Never waits."""
        with self._using:
            if not self.closed:
                self._send(worker, frame, *data)

    def _send(self, worker: Worker, frame: Struct, *data: bytes | memoryview) -> None:
        self._socket.send_multipart([worker.name.encode(), *worker.outward.number([encode(frame), *data])])

    def receive(self, timeout: float) -> list[tuple[Worker, News]]:
        """Everything that has arrived, after waiting up to `timeout` seconds for the first of it.

        The end of a process is an `EOFError` in place of a last frame, and what is no frame is a `NonsenseError`.
        Returns early when `close` is called.
        """
        received: list[tuple[Worker, News]] = []
        with self._using:
            if self.closed:
                return received
            ready = {one for one, _ in self._poller.poll(math.ceil(1e3 * timeout))}
            if self._socket in ready:
                received += self._read()
            if len(ready) > (self._socket in ready):
                received += self._ends(ready)
        return received

    def _read(self) -> Iterator[tuple[Worker, News]]:
        while True:
            try:
                name, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if worker := self._by_name.get(name.removesuffix(_SAYS)):
                worker.heard, worker.greeted = time.monotonic(), True
                yield worker, self._understood(worker, frames, said=name.endswith(_SAYS))

    def _understood(self, worker: Worker, frames: list[bytes], said: bool) -> News:
        try:
            checked = worker.inward.checked(frames) if said else frames[1:]  # the other way it only says hello
            if len(checked) != 1:
                raise NonsenseError(f"a message of {len(checked)} parts, where there is one")
            news: FromWorker = decode(checked[0], FromWorker)
            return news
        except NonsenseError as error:
            return error

    def _ends(self, ready: set[object]) -> Iterator[tuple[Worker, News]]:
        for worker in self.workers:
            if not worker.ended and worker.process.fileno() in ready:
                worker.ended = True
                self._poller.unregister(worker.process.fileno())
                yield from self._read()  # what it said last
                yield worker, EOFError()

    def close(self) -> None:
        """End every process and wait until it is gone, or cannot be reached: at most about two seconds where they are
        near, or silent already. One that cannot be ended keeps nothing else from being closed. May be called again, and
        from any thread."""
        with self._closing:
            if self.closed or self._owner != os.getpid():  # a fork does not own the processes
                return
            os.write(self._wake, b"!")  # whoever waits for news
            with self._using, contextlib.ExitStack() as last:  # Ctrl-C, too, leaves nothing open
                last.callback(guarded, "closing a launcher", self._launcher.close)
                for worker in self.workers:
                    last.callback(guarded, f"letting go of {worker.label}", worker.process.close)
                for pipe in (self._woken, self._wake):
                    last.callback(os.close, pipe)
                last.callback(guarded, "closing sockets", self._net.close)
                self.closed = True
                for worker in self.workers:
                    guarded(f"telling {worker.label} to stop", self._send, worker, Stop())
                guarded("ending processes", self._end_processes)

    def _end_processes(self) -> None:
        silent = self._silent()
        hearing = [worker for worker in self._running() if worker not in silent]
        _kill(silent)
        _terminate([worker for worker in hearing if not worker.greeted])  # they cannot hear us
        hearing = self._left(hearing, _STOP_S)
        _terminate(hearing)
        hearing = self._left(hearing, _TERM_S)
        _kill(hearing)
        self._left(hearing, _KILL_S)
        self._left(silent, _CUT_OFF_S)

    def _running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.process.alive()]

    def _silent(self) -> list[Worker]:
        """Who spoke once and does not any more."""
        now = time.monotonic()
        return [worker for worker in self._running() if worker.greeted and now - worker.heard > _SILENT_S]

    def _left(self, workers: list[Worker], seconds: float) -> list[Worker]:
        """Who of them still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        return [worker for worker in workers if not worker.process.wait(max(0.0, deadline - time.monotonic()))]


def _terminate(workers: list[Worker]) -> None:
    for worker in workers:
        guarded(f"ending {worker.label}", worker.process.terminate)


def _kill(workers: list[Worker]) -> None:
    for worker in workers:
        guarded(f"killing {worker.label}", worker.process.kill)
