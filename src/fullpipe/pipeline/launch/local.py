"""Worker processes are started here on this machine, one per station.

However this process ends, its workers end: they die with the thread that started them (Linux), and anywhere when their
standard input ends. Their logs are files that have no path.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import IO

import msgspec

from fullpipe.pipeline.frames import Door
from fullpipe.pipeline.launch.base import Launcher, Needs, Process

# Hidden states of all sizes come and go for as long as a server runs; left to itself malloc takes ever larger ones from
# a heap that fragments, and gives nothing back. The user's own settings come first.
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(2 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20)}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LOG_LINES, _LOG_BYTES = 24, 4096
_WORDS_S = 0.5


class LocalProcess(Process):
    """Is a child of this process."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self._process, self._log = process, log
        self._ended = os.pidfd_open(process.pid)
        self.pid = process.pid

    def fileno(self) -> int:
        return self._ended

    def alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        try:
            code = self._process.wait(timeout=_WORDS_S)
        except subprocess.TimeoutExpired:
            return "closed its connection but still runs" + self.log_tail()
        if code >= 0:
            return f"its process exited with code {code}" + self.log_tail()
        name = signal.Signals(-code).name
        memory = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}" + self.log_tail()

    def log_tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES)).decode(errors="replace")
        lines = text.strip().splitlines()[-_LOG_LINES:]
        return "\n".join(["; it printed:", *(f"    {line}" for line in lines)]) if lines else ""

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float | None) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.alive()

    def close(self) -> None:
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        os.close(self._ended)
        self._log.close()


_Order = tuple[Door, Sequence[str], int, "Future[Process]"]


class LocalLauncher(Launcher):
    """Starts processes of this machine.

    It starts all of them from a thread that lives as long as it does: Linux sends the parent-death signal when the
    *thread* that started a child ends, and a user may well build a pipeline in a thread that does not last.

    prefixes: by host, the command that becomes another one there, as `ip netns exec` does; hosts without one are this
    machine.
    """

    def __init__(self, prefixes: Mapping[str, Sequence[str]] | None = None) -> None:
        self._prefixes = prefixes or {}
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="fullpipe-starter", daemon=True).start()

    def start(self, door: Door, host: str, needs: Needs) -> Process:
        started: Future[Process] = Future()
        self._orders.put((door, self._prefixes.get(host, ()), needs.threads, started))
        return started.result()

    def close(self) -> None:
        self._orders.put(None)

    def _work(self) -> None:
        while order := self._orders.get():
            door, prefix, threads, started = order
            try:
                started.set_result(_start(door, prefix, threads))
            except BaseException as error:
                started.set_exception(error)


def _start(door: Door, prefix: Sequence[str], threads: int) -> LocalProcess:
    log = tempfile.TemporaryFile(prefix="fullpipe-")  # noqa: SIM115 - the process object closes it
    environment = {**ALLOCATION, **os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
    try:
        process = subprocess.Popen(
            # -P: files in the current folder must not shadow modules of the worker.
            [*prefix, sys.executable, "-P", "-m", "fullpipe.pipeline.worker"], stdin=subprocess.PIPE, stdout=log,
            stderr=log, env=environment,
            start_new_session=True)  # so that Ctrl-C in the terminal reaches the user's process alone
    except BaseException:
        log.close()
        raise
    assert process.stdin
    with contextlib.suppress(OSError):  # one that died at once is told by `last_words`
        process.stdin.write(msgspec.json.encode(msgspec.structs.replace(door, parent=os.getpid())) + b"\n")
        process.stdin.flush()
    return LocalProcess(process, log)
