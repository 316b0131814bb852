"""A server whose stations sit on the hosts of a lab, and what can be done to these hosts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from fullpipe.cluster.netlab import Netlab, Shape
from fullpipe.errors import StationFailed
from fullpipe_lab.hosts.ray_nodes import RayNodes
from fullpipe_lab.studies.serving.servers import MODEL_NAME

PORT = 8000
_WORKER = "fullpipe.pipeline.worker"
_OURS = ("fullpipe", "ray::Agent", "ray::StationActor")
_LEAVE_S = 30.0
_GONE_S = 10.0
_LOOK_S = 0.1
_CLONE_NEWNET = 0x40000000


@dataclass
class Served:
    """Is `fullpipe serve --hosts ray` on the first host of a lab. log: all that it says."""

    lab: Netlab
    nodes: RayNodes
    options: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    command: list[str] = field(default_factory=list)
    _file: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers whoever is on its host (see `move_thread_to`)."""
        return f"http://127.0.0.1:{PORT}"

    def start(self) -> None:
        self.command = [sys.executable, "-m", "fullpipe", "serve", "--hosts", "ray", "--served-model-name", MODEL_NAME,
                        "--host", "127.0.0.1", "--port", str(PORT), "--log-level", "info", *self.options]
        self._file = self.log.open("ab")
        self.process = self.lab.popen(self.nodes.head, self.command, env=self.nodes.environment(self.nodes.head),
                                      stdin=subprocess.DEVNULL, stdout=self._file, stderr=self._file,
                                      start_new_session=True)

    def check(self) -> None:
        """Raises StationFailed where it has ended, with the end of its log."""
        assert self.process
        if (code := self.process.poll()) is not None:
            raise StationFailed("the server", f"has ended with code {code}: {self.tail()}")

    def tail(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-5:])

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it that signal and wait until it has ended; by force in the end."""
        if self.process is None:
            return
        self.process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_LEAVE_S)
        self.process.kill()
        self.process.wait()
        self.process = None
        assert self._file
        self._file.close()

    # ---- who runs where --------------------------------------------------------------------------------------

    def stations(self, host: str) -> list[int]:
        """The processes of stations on a host, in the order in which they came to be."""
        return [pid for pid in sorted(self.lab.pids(host)) if _WORKER in _command_line(pid)]

    def left(self) -> dict[str, list[str]]:
        """What runs on the hosts and is Fullpipe's, after some seconds if there is anything."""
        until = time.monotonic() + _GONE_S
        while found := self._ours():
            if time.monotonic() > until:
                break
            time.sleep(_LOOK_S)
        return found

    def _ours(self) -> dict[str, list[str]]:
        lines = {host: [f"{pid} {line}" for pid in self.lab.pids(host) if any(
            one in (line := _command_line(pid)) for one in _OURS)] for host in self.lab.names}
        return {host: found for host, found in lines.items() if found}

    # ---- what is done to them --------------------------------------------------------------------------------

    def lose(self, host: str) -> None:
        """Kill everything there."""
        self.lab.kill(host)

    def bring_back(self, host: str) -> None:
        """Have a host that was lost join anew."""
        self.nodes.start(host)

    @contextlib.contextmanager
    def losing(self, a: str, b: str, share: float) -> Iterator[None]:
        """Have a link lose that share of its packets."""
        kept = self.lab.shape(a, b)
        self.lab.set(a, b, Shape(delay_ms=kept.delay_ms, jitter_ms=kept.jitter_ms, loss=share))
        try:
            yield
        finally:
            self.lab.set(a, b, kept)

    @contextlib.contextmanager
    def cut(self, a: str, b: str) -> Iterator[None]:
        """Have a link carry nothing."""
        self.lab.cut(a, b)
        try:
            yield
        finally:
            self.lab.heal(a, b)


def _command_line(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def move_thread_to(lab: Netlab, host: str) -> None:
    """Have the sockets that this thread makes from now on, and those of threads that it starts, be on a host. The
    process itself stays where it is, as far as `Netlab.pids` and `Netlab.kill` are concerned: not in the main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{lab.namespace(host)}", os.O_RDONLY)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")
    finally:
        os.close(fd)
