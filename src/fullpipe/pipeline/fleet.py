"""A fleet is the worker processes of one pipeline: it hears from them, and ends them without a trace."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from fullpipe.pipeline.frames import FromWorker, Stop
from fullpipe.pipeline.wire import Channel, NonsenseError

_STOP_SEND_S = 0.01  # a stopped worker with a full socket is not waited for
_STOP_S = 1.0  # what a worker gets to leave by itself,
_TERM_S = 0.4  # and then after SIGTERM, before SIGKILL
_LOG_LINES, _LOG_BYTES = 24, 4096

News = FromWorker | EOFError | NonsenseError


@dataclass(slots=True)
class Worker:
    """Is one process as its fleet sees it.

    name: "stage 0", "stage 1", ..., "draft".
    heard: when its last frame arrived, seconds of `time.monotonic`.
    done: id of the last flight or job that it finished; -1 before the first.
    cache_slots: what it said of its room when it was ready.
    """

    name: str
    process: subprocess.Popen[bytes]
    channel: Channel[FromWorker]
    log: IO[bytes]
    heard: float
    done: int = -1
    cache_slots: int | None = None

    def how_it_ended(self) -> str:
        """Of a process whose connection closed, with the tail of what it printed."""
        try:
            code = self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return "closed its connection but still runs" + self.log_tail()
        if code >= 0:
            return f"its process exited with code {code}" + self.log_tail()
        name = signal.Signals(-code).name
        memory = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}" + self.log_tail()

    def log_tail(self) -> str:
        """The last lines that the process printed, ready to be appended to a reason; "" if none."""
        size = os.fstat(self.log.fileno()).st_size
        text = os.pread(self.log.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES)).decode(errors="replace")
        lines = text.strip().splitlines()[-_LOG_LINES:]
        return "\n".join(["; it printed:", *(f"    {line}" for line in lines)]) if lines else ""


class Fleet:
    """Holds the worker processes of one pipeline; `launch.start_fleet` starts them.

    starting_done: not set while processes are being started; `close` waits for it. ended: set when all are gone.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.starting_done, self.ended = threading.Event(), threading.Event()
        self.starting_done.set()
        self.closed = False
        self._owner = os.getpid()
        self._closing, self._receiving = threading.RLock(), threading.RLock()
        self._selector = selectors.DefaultSelector()

    def add(self, worker: Worker) -> None:
        self.workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def receive(self, timeout: float) -> list[tuple[Worker, News]]:
        """Everything that has arrived, after waiting up to `timeout` seconds for the first of it.

        The end of a connection is an `EOFError` in place of a last frame, and bytes that are no frame, behind which
        nothing can be read, are a `NonsenseError`. Returns early when `close` is called.
        """
        received: list[tuple[Worker, News]] = []
        with self._receiving:
            while not self.closed and (ready := self._selector.select(0.0 if received else timeout)):
                for key, _ in ready:
                    received += [(key.data, frame) for frame in self._read(key.data)]
        return received

    def _read(self, worker: Worker) -> Sequence[News]:
        worker.heard = time.monotonic()
        try:
            return worker.channel.receive()
        except (EOFError, NonsenseError) as error:
            self._selector.unregister(worker.channel)
            return [error]

    def set_send_timeout(self, seconds: float) -> None:
        """After so long, sending to a worker that does not read raises `TimeoutError`."""
        for worker in self.workers:
            worker.channel.set_timeout(seconds)

    def close(self) -> None:
        """End every process and wait until it is gone: at most about two seconds. May be called again,
        and from any thread."""
        with self._closing:
            if self.closed or self._owner != os.getpid():  # a fork does not own the processes
                return
            self.closed = True
            self.starting_done.wait()
            self._end_processes()
            with self._receiving:  # whoever waits there has been woken by the ends of the processes
                self._selector.close()
                for worker in self.workers:
                    worker.channel.close()
                    worker.log.close()
            self.ended.set()

    def _end_processes(self) -> None:
        self.set_send_timeout(_STOP_SEND_S)
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.channel.send(Stop())
        self._wait(_STOP_S)
        for worker in self._running():
            worker.process.terminate()
        self._wait(_TERM_S)
        for worker in self._running():
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()

    def _running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.process.poll() is None]

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
