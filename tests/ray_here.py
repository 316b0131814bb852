"""A Ray of one node runs on this machine's loopback address, with a token, for tests that are its driver themselves."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

_UP_S = 30.0
_STARTED = "Ray runtime started"
# Nothing is kept in store, and there is no dashboard: fullpipe_lab.hosts.ray_nodes says what each of these is worth.
_LIGHT = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
_FLAGS = ("--block", "--object-store-memory=80000000", "--disable-usage-stats", "--include-log-monitor=false",
          "--node-ip-address=127.0.0.1")
_HEAD_FLAGS = ("--head", "--include-dashboard=false", "--no-monitor")
# A test run that is killed takes its nodes along: `ray start --block` ends them when it is told to end itself.
_WITH_US = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
_TOKEN = secrets.token_hex(32)  # a process reads it once, however many clusters it joins


@dataclass
class RayHere:
    """Keeps the node, and others beside it. address: of the head."""

    address: str
    folder: Path
    _nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, cpus: int, gpus: int = 0) -> int:
        """Start the head, or another node; returns its number. gpus: that it believes to have."""
        where = self.folder / str(len(self._nodes))
        flags = [f"--port={self.address.rpartition(':')[2]}", *_HEAD_FLAGS] if not self._nodes else [
            f"--address={self.address}"]
        with where.with_suffix(".log").open("wb") as log:
            self._nodes.append(subprocess.Popen(
                [*_WITH_US, str(_program()), "start", *_FLAGS, *flags, f"--num-cpus={cpus}", f"--num-gpus={gpus}",
                 f"--temp-dir={where}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True))
        _await(self._nodes[-1], where.with_suffix(".log"))
        return len(self._nodes) - 1

    def lose(self, number: int) -> None:
        """Kill a node and all that runs on it, as a power cut would."""
        node = psutil.Process(self._nodes[number].pid)
        for one in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        self._nodes[number].wait()

    def stop(self) -> None:
        for node in reversed(self._nodes):
            _end(node)


def missing() -> str | None:
    """Why no Ray can be started; None: it can."""
    there = find_spec("ray") is not None and _program().exists()
    return None if there else "the package ray is not installed (pip install ray)"


@contextmanager
def ray_here(cpus: int = 4, gpus: int = 0, **environment: str) -> Iterator[RayHere]:
    """A node while the context is open; this process has what a driver needs in its environment, and both have more."""
    if reason := missing():
        pytest.skip(f"no Ray here: {reason}")
    here = RayHere(f"127.0.0.1:{_free_port()}", Path(tempfile.mkdtemp(prefix="fpr-")))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in {**_LIGHT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, **environment}.items():
            patch.setenv(name, value)
        try:
            here.start(cpus, gpus)
            yield here
        finally:
            here.stop()
            shutil.rmtree(here.folder, ignore_errors=True)


def _program() -> Path:
    return Path(sys.executable).with_name("ray")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _await(node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _UP_S
    while _STARTED not in (said := log.read_text(errors="replace")):
        assert node.poll() is None and time.monotonic() < deadline, f"Ray does not start: {said[-2000:]}"
        time.sleep(0.02)


def _end(node: subprocess.Popen[bytes]) -> None:
    node.terminate()
    with suppress(subprocess.TimeoutExpired):
        node.wait(5.0)
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()
