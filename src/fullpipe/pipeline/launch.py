"""Starting worker processes, hearing from them, and ending them without a trace.

A `Fleet` is one process per station on this machine. What it holds has no name anywhere that could be
left behind: workers are reached through socket pairs that they inherit (nobody else can connect, so
there is nothing to authenticate), the workers' meeting point for gloo is an inherited socket listening
on 127.0.0.1, and their logs are files that have no path.

However this process ends, its workers end: they die with the thread that started them (Linux), and
anywhere when their control connection closes.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from fullpipe import errors
from fullpipe.errors import FullpipeError, StationFailed
from fullpipe.pipeline.wire import Channel, Frame, NonsenseError
from fullpipe.stations.spec import StationSpec

_STOP_SEND_S = 0.01  # a stopped worker with a full socket is not waited for
_STOP_S = 1.0  # what a worker gets to leave by itself,
_TERM_S = 0.4  # and then after SIGTERM, before SIGKILL
_LOG_LINES, _LOG_BYTES = 24, 4096
# Caches of all sizes come and go for as long as a server runs; left to itself malloc takes ever larger ones from a heap
# that fragments, and gives nothing back. The user's own settings come first.
_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(2 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20)}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(slots=True)
class Worker:
    """One process as its fleet sees it.

    name: "stage 0", "stage 1", ..., "draft".
    heard: when its last frame arrived, seconds of `time.monotonic`.
    done: id of the last flight or job that it finished; -1 before the first.
    """

    name: str
    process: subprocess.Popen[bytes]
    channel: Channel
    log: IO[bytes]
    heard: float
    done: int = -1

    def epitaph(self) -> str:
        """How a process whose connection closed came to its end, with the tail of what it printed."""
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
    """The worker processes of one pipeline, started and known to be ready.

    stages: one spec per stage, in order. One whose `args` have `taps` sends hidden states to the draft station.
    draft: the draft station's spec, or None for none.
    arounds, paces: of each stage and then of the draft station, the links around it (`emulation.Around`) and its
        curve (`pace.Pace`) or None, as plain values.
    threads: compute threads of each worker.
    beat_s: seconds between the signs of life that each worker sends.
    send_timeout: seconds after which sending to a worker that does not read raises `TimeoutError`.
    start_timeout: seconds that all of this may take, the loading of weights included.

    Raises what a worker raised while building its station, by type when it is one of ours, its message
    beginning with the station's name; `StationFailed` for anything else. Nothing is left behind then.
    """

    def __init__(self, stages: Sequence[StationSpec], draft: StationSpec | None, *,
                 arounds: Sequence[Frame], paces: Sequence[Frame | None], threads: int, beat_s: float,
                 send_timeout: float, start_timeout: float) -> None:
        self.workers: list[Worker] = []
        self._owner = os.getpid()
        self._closing, self._receiving = threading.RLock(), threading.RLock()
        self._closed = False
        self._settled, self._released = threading.Event(), threading.Event()  # of the nursery
        self._settled.set()
        self._selector = selectors.DefaultSelector()
        try:
            settings = [{"around": around, "pace": pace, "threads": threads, "beat_s": beat_s,
                         "start_timeout": start_timeout} for around, pace in zip(arounds, paces)]
            self._spawn(stages, draft, settings)
            self._await_ready(start_timeout)
            self._set_send_timeout(send_timeout)
        except BaseException:
            self.close()
            raise

    def receive(self, timeout: float) -> list[tuple[Worker, Frame | EOFError | NonsenseError]]:
        """Everything that has arrived, after waiting up to `timeout` seconds for the first of it.

        The end of a connection is an `EOFError` in place of a last frame, and bytes that are no frame, behind which
        nothing can be read, are a `NonsenseError`. Returns early when `close` is called.
        """
        received: list[tuple[Worker, Frame | EOFError | NonsenseError]] = []
        with self._receiving:
            while not self._closed and (ready := self._selector.select(0.0 if received else timeout)):
                for key, _ in ready:
                    received += [(key.data, frame) for frame in self._read(key.data)]
        return received

    def _read(self, worker: Worker) -> Sequence[Frame | EOFError | NonsenseError]:
        worker.heard = time.monotonic()
        try:
            return worker.channel.receive()
        except (EOFError, NonsenseError) as error:
            self._selector.unregister(worker.channel)
            return [error]

    def close(self) -> None:
        """End every process and wait until it is gone: at most about two seconds. May be called again,
        and from any thread."""
        with self._closing:
            if self._closed or self._owner != os.getpid():  # a fork does not own the processes
                return
            self._closed = True
            self._settled.wait()
            self._end_processes()
            with self._receiving:  # whoever waits there has been woken by the ends of the processes
                self._selector.close()
                for worker in self.workers:
                    worker.channel.close()
                    worker.log.close()
            self._released.set()

    def _set_send_timeout(self, seconds: float) -> None:
        for worker in self.workers:
            worker.channel.set_timeout(seconds)

    def _end_processes(self) -> None:
        self._set_send_timeout(_STOP_SEND_S)
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.channel.send({"kind": "stop"})
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

    def _spawn(self, stages: Sequence[StationSpec], draft: StationSpec | None, settings: Sequence[Frame]) -> None:
        specs = [*stages, draft] if draft else list(stages)
        meeting = socket.create_server(("127.0.0.1", 0), backlog=128)
        tapping = [rank for rank, spec in enumerate(stages) if draft and spec.args.get("taps")]
        configs = [{"name": "draft" if rank == len(stages) else f"stage {rank}", "rank": rank,
                    "world": len(specs), "stages": len(stages), "tapping": tapping, "spec": spec.to_dict(),
                    "parent": os.getpid(), "port": meeting.getsockname()[1],
                    "listener": meeting.fileno() if rank == 0 else None}
                   | settings[rank] for rank, spec in enumerate(specs)]
        with meeting:  # the first stage has its own copy by the end
            self._start_processes(configs, meeting)
        for worker, config in zip(self.workers, configs):
            with contextlib.suppress(OSError):  # a process that died at once is seen by _await_ready
                worker.channel.send(config)

    def _start_processes(self, configs: list[dict[str, Any]], meeting: socket.socket) -> None:
        """Start all processes from a thread that lives as long as the fleet.

        Linux sends the parent-death signal when the *thread* that started a child ends; a user may well
        build a pipeline in a thread that does not last.
        """
        outcome: list[BaseException] = []

        def nursery() -> None:
            try:
                for config in configs:
                    if not self._closed:  # by a Ctrl-C, say
                        self._start_process(config, [meeting.fileno()] if config["rank"] == 0 else [])
            except BaseException as error:
                outcome.append(error)
            finally:
                self._settled.set()
            self._released.wait()

        self._settled.clear()
        threading.Thread(target=nursery, name="fullpipe-nursery", daemon=True).start()
        self._settled.wait()
        if outcome:
            raise outcome[0]

    def _start_process(self, config: dict[str, Any], pass_fds: list[int]) -> None:
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile(prefix="fullpipe-")  # noqa: SIM115 - closed by `close`
        environment = {**_ALLOCATION, **os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(config["threads"]))}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            process = subprocess.Popen(
                # -P: files in the current folder must not shadow modules of the worker.
                [sys.executable, "-P", "-m", "fullpipe.pipeline.worker"],
                stdin=theirs.fileno(), stdout=log, stderr=log, pass_fds=pass_fds, env=environment,
                start_new_session=True)  # so that Ctrl-C in the terminal reaches the user's process alone
        except BaseException:
            ours.close()
            log.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(config["start_timeout"])
        worker = Worker(config["name"], process, Channel(ours), log, time.monotonic())
        self.workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _await_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        missing = {worker.name for worker in self.workers}
        while missing:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                names = ", ".join(worker.name for worker in self.workers if worker.name in missing)
                raise StationFailed(names, f"not ready after {timeout:g} s",
                                    hint="Loading may just be slow here: give a longer start_timeout.")
            for worker, frame in self.receive(remaining):
                match frame:
                    case {"kind": "up"}:
                        missing.discard(worker.name)
                    case {"kind": "failed", "error": str(error), "message": str(message), "hint": hint}:
                        raise _as_error(worker, error, message, hint)
                    case {"kind": "beat"}:
                        pass  # it lives; that is all one asks of it here
                    case EOFError():
                        raise StationFailed(worker.name, worker.epitaph())
                    case _:
                        raise StationFailed(worker.name, f"answers nonsense: {frame!s:.200}{worker.log_tail()}")


def _as_error(worker: Worker, error: str, message: str, hint: str | None) -> FullpipeError:
    """The error that a worker reported, of the same type when it is one of ours."""
    kind = getattr(errors, error, None)
    if isinstance(kind, type) and issubclass(kind, FullpipeError) and kind is not StationFailed:
        return kind(f"{worker.name}: {message}", hint=hint)
    return StationFailed(worker.name, f"{error}: {message}{worker.log_tail()}")
