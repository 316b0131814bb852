"""Ray nodes are started on the hosts of a lab as they are on machines: `ray start --head` on the first and
`ray start --address` on the others, with a token.

What keeps them light, each tried on its own (Ray 2.60, two busy cores): a node is up in 2 to 3 seconds instead of 3.5,
all nodes but the head start at once, and three idle ones together use 1% to 3% of a core.

- `RAY_enable_worker_prestart=0`, `RAY_prestart_worker_first_driver=0`: no workers in store, which hardly anybody here
  would use. `ray.init` takes 0.04 s instead of 0.6 to 1.1.
- `--include-log-monitor=false`, `--no-monitor` (the autoscaler's): a process less on each node, two less on the head.
- `--include-dashboard=false`: the dashboard's process is there all the same, but loads next to nothing.
- `--object-store-memory`: the least that Ray takes is 75 MiB.

Nothing is gained by switching off metrics, event statistics, OpenTelemetry, or the memory monitor. The dashboard's and
the runtime environment's agent, 0.7 s of a core on each node, cannot be done without.

Ray knows a host by its address: a task or an actor that asks for the resource `node:ADDRESS` runs there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

import fullpipe
from fullpipe.cluster.netlab import Netlab
from fullpipe.hub import cache

PORT = 6379
_START_S, _END_S, _GLANCE_S = 30.0, 5.0, 0.02
_STARTED = "Ray runtime started"
_LIGHT = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
_FLAGS = ("--block", "--object-store-memory=80000000", "--disable-usage-stats", "--include-log-monitor=false")
_HEAD_FLAGS = ("--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor")


def missing() -> str | None:
    """Why no Ray can be started; None: it can."""
    if find_spec("ray") is None or not _program().exists():
        return "the package ray is not installed (pip install ray)"
    return None


def _program() -> Path:
    return Path(sys.executable).with_name("ray")


class RayNodes:
    """Keeps a Ray node on each host of a lab while the context is open; the first host is the head.

    names: hosts that have one, in the order in which they start; None: all. models: hosts that have this machine's
    models in their cache; None: all. Each host has its own `FULLPIPE_HOME`. cpus: what each node says it has.
    """

    def __init__(self, lab: Netlab, *, names: Iterable[str] | None = None, models: Iterable[str] | None = None,
                 cpus: int = 4) -> None:
        self.lab, self.cpus = lab, cpus
        self.head, *self.others = lab.names if names is None else list(names)
        self.token = secrets.token_hex(32)
        # Ray's sockets have paths within it, which must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="fpr-"))
        self._with_models = set(lab.names if models is None else models)
        self._nodes: dict[str, subprocess.Popen[Any]] = {}
        self._logs: dict[str, IO[bytes]] = {}
        self._starts = 0

    def __enter__(self) -> Self:
        try:
            self.start(self.head)
            self.start(*self.others)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(*reversed(self._nodes))
        shutil.rmtree(self.folder)

    @property
    def address(self) -> str:
        """Where the head listens, for `RAY_ADDRESS` and `--address`."""
        return f"{self.lab.address(self.head)}:{PORT}"

    def home(self, name: str) -> Path:
        """A host's `FULLPIPE_HOME`."""
        home = self.folder / f"{name}-home"
        home.mkdir(exist_ok=True)
        if name in self._with_models and (models := cache.home() / "models").exists():
            with contextlib.suppress(FileExistsError):
                (home / "models").symlink_to(models.resolve())
        return home

    def environment(self, name: str) -> dict[str, str]:
        """For whatever runs on a host: the token, where the head is, the host's own cache, this very Fullpipe."""
        source = str(Path(fullpipe.__file__).parents[1])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, **_LIGHT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token,
                "RAY_ADDRESS": self.address, cache.HOME_VARIABLE: str(self.home(name)), "PYTHONPATH": path}

    def start(self, *names: str) -> None:
        """Start nodes on these hosts, all at once, also where one was lost before; returns when all are up."""
        self.stop(*names)
        for name in names:
            self._starts += 1
            where = self.folder / f"{name}-{self._starts}"
            self._logs[name] = (self.folder / f"{where.name}.log").open("w+b")
            self._nodes[name] = self.lab.popen(
                name, [str(_program()), "start", *_FLAGS, f"--num-cpus={self.cpus}", f"--temp-dir={where}",
                       f"--node-ip-address={self.lab.address(name)}",
                       *(_HEAD_FLAGS if name == self.head else [f"--address={self.address}"])],
                env=self._node_environment(name), stdin=subprocess.DEVNULL, stdout=self._logs[name],
                stderr=subprocess.STDOUT, start_new_session=True)
        for name in names:
            self._await(name)

    def _node_environment(self, name: str) -> dict[str, str]:
        """`ray start --head` would take `RAY_ADDRESS` for another cluster's."""
        return {key: value for key, value in self.environment(name).items() if key != "RAY_ADDRESS"}

    def stop(self, *names: str) -> None:
        """End the nodes of these hosts in good order, as far as they are there, by force what does not."""
        for name in names:
            if name in self._nodes:
                self._nodes[name].terminate()
        deadline = time.monotonic() + _END_S
        for name in names:
            if (node := self._nodes.pop(name, None)) is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.wait(max(0.0, deadline - time.monotonic()))
                with contextlib.suppress(ProcessLookupError):  # all of the group have ended
                    os.killpg(node.pid, signal.SIGKILL)
                node.wait()
                self._logs.pop(name).close()

    def log(self, name: str) -> str:
        """What `ray start` on a host has said so far."""
        return Path(self._logs[name].name).read_text(errors="replace")

    def _await(self, name: str) -> None:
        deadline = time.monotonic() + _START_S
        while _STARTED not in (said := self.log(name)):
            ended = self._nodes[name].poll()
            if ended is not None or time.monotonic() > deadline:
                what = "ended" if ended is not None else f"is not up after {_START_S:g} s"
                raise RuntimeError(f"Ray's node on {name} {what}: {said[-2000:]}")
            time.sleep(_GLANCE_S)
