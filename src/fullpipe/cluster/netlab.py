"""A lab has several hosts on this one Linux machine, joined by links with delay, jitter, loss and bandwidth.

    with Netlab(3, Shape(delay_ms=10), {("h1", "h3"): Shape(delay_ms=40, mbit=100)}) as lab:
        lab.popen("h2", ["fullpipe", "..."], core=1)
        lab.cut("h1", "h2")

Each host is a network namespace: an address, a loopback and an IP stack of its own. So whatever speaks TCP or UDP can
be tried unchanged, and a wrong interface, a closed port or 127.0.0.1 in the wrong place fails as between real
machines. The kernel need not have netem: a process of ours passes the packets on (`netlab_router`). Hosts share cores,
memory and the file system. No host reaches this machine's own network, nor another lab's.

Seen on two cores with others at work on them (`python tests/hosts/netlab_traffic.py measure`): packets are 0.06 to 0.17
ms late in the median, a round trip without delay takes 0.08 ms, bandwidths are exact to 1% at 100 and 300 Mbit/s, and a
TCP stream over a link without bound makes 2.8 Gbit/s, 1 Gbit/s with 10 ms each way.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Self

import msgspec

from fullpipe.cluster import netlab_hosts
from fullpipe.cluster.netlab_links import PERFECT, Count, Shape
from fullpipe.cluster.netlab_router import MOST, Ask, Change, Counts, Refused, Setup
from fullpipe.errors import FullpipeError, UsageError

__all__ = ["PERFECT", "Count", "Netlab", "Shape", "available"]

_MOST_HOSTS = 16
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
_GLANCE_S = 0.001
_START_S = _ANSWER_S = 20.0  # on a machine that is busy with something else


@functools.cache
def available() -> str | None:
    """Why there can be no lab here; None: there can."""
    if sys.platform != "linux":
        return "hosts of a lab are network namespaces, which only Linux has"
    if os.geteuid():
        return "making network namespaces needs root"
    for program in ("ip", "taskset"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed (apt-get install iproute2 util-linux)"
    if not netlab_hosts.TUN.exists():
        return f"there is no {netlab_hosts.TUN} (a container must be given that device)"
    if missing := [name for name, bit in _CAPABILITIES.items() if not _capabilities() >> bit & 1]:
        return f"this root has no {' and no '.join(missing)} (a container must be privileged)"
    try:
        with Netlab(1):
            return None
    except FullpipeError as error:
        return error.message


def _capabilities() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))


class Netlab:
    """Keeps hosts h1, h2 ... while the context is open.

    shape: of every link. links: those of single pairs, both ways. second: hosts with a second device, eth1, and an
    address there; they reach each other by it, over the same links.

    Raises `UsageError` for hosts that are not there, `FullpipeError` where no lab can be (`available` says why).
    """

    def __init__(self, hosts: int, shape: Shape = PERFECT, links: Mapping[tuple[str, str], Shape] | None = None, *,
                 second: Iterable[str] = ()) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise UsageError(f"a lab has 1 to {_MOST_HOSTS} hosts (got {hosts})", param="hosts")
        self.names = [f"h{number}" for number in range(1, hosts + 1)]
        self._shapes = {(a, b): shape for a in self.names for b in self.names if a != b}
        self._cut: set[tuple[str, str]] = set()
        for (a, b), own in (links or {}).items():
            self._shapes.update(dict.fromkeys(self._lanes(a, b), own))
        self._second = [self._known(name) for name in second]
        self._router: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._log: IO[bytes] | None = None
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        assert self._router is None, "a lab is entered once"
        self._log = tempfile.TemporaryFile(prefix="fullpipe-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._router = subprocess.Popen(
                    [sys.executable, "-P", "-m", netlab_hosts.KEEPER], stdin=theirs.fileno(), stdout=self._log,
                    stderr=self._log, start_new_session=True)  # Ctrl-C in the terminal is not for it
            self._control.settimeout(_START_S)
            self._ask(Setup({name: self._addresses(name) for name in self.names},
                            [(a, b, shape) for (a, b), shape in self._shapes.items()], os.getpid()))
            self._control.settimeout(_ANSWER_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process on the hosts, and remove them."""
        if self._control:
            self._control.close()
        if self._router:
            self._router.wait()
        if self._log:
            self._log.close()

    def address(self, name: str) -> str:
        """By which other hosts reach it, at its eth0."""
        return f"10.77.{self._net}.{self._known(name)[1:]}"

    def second_address(self, name: str) -> str:
        """That of eth1, which hosts named in `second` have."""
        if name not in self._second:
            raise UsageError(f"host {name} has no second address",
                             hint="Those that have one are named when the lab is made.")
        return f"10.78.{self._net}.{name[1:]}"

    def namespace(self, name: str) -> str:
        """As `ip netns` has it."""
        return netlab_hosts.namespace_of(self._keeper.pid, self._known(name))

    def shape(self, a: str, b: str) -> Shape:
        """What the link from a to b was set to, be it cut or not."""
        return self._shapes[self._lanes(a, b)[0]]

    def set(self, a: str, b: str, shape: Shape) -> None:
        """Change a link, both ways, for packets that are sent from now on. A link that is cut stays so."""
        self._shapes.update(dict.fromkeys(self._lanes(a, b), shape))
        self._apply(a, b)

    def cut(self, a: str, b: str) -> None:
        """Lose every packet between two hosts, both ways, from now on."""
        self._cut.update(self._lanes(a, b))
        self._apply(a, b)

    def heal(self, a: str, b: str) -> None:
        """End a cut: the link is again what it was set to."""
        self._cut.difference_update(self._lanes(a, b))
        self._apply(a, b)

    def counts(self) -> dict[tuple[str, str], Count]:
        """What each link has carried and lost so far, from the first host to the second."""
        return {(a, b): count for a, b, count in self._ask(Ask()).lanes}

    def command(self, name: str, argv: Sequence[str], core: int | None = None) -> list[str]:
        """The command line that becomes `argv` on a host, its pid from the start. core: the one to use."""
        pin = [] if core is None else ["taskset", "-c", str(core)]
        return ["ip", "netns", "exec", self.namespace(name), *pin, *argv]

    def popen(self, name: str, argv: Sequence[str], core: int | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start a process on a host, on which it is when this returns. options: those of `subprocess.Popen`."""
        process = subprocess.Popen(self.command(name, argv, core), **options)
        while not netlab_hosts.is_on(process.pid, self.namespace(name)) and process.poll() is None:
            time.sleep(_GLANCE_S)
        return process

    def run(self, name: str, argv: Sequence[str], core: int | None = None,
            **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a process on a host until it ends. options: those of `subprocess.run`."""
        return subprocess.run(self.command(name, argv, core), **options)

    def pids(self, name: str) -> list[int]:
        """The processes on a host."""
        return netlab_hosts.pids(self.namespace(name))

    def kill(self, name: str) -> None:
        """Kill every process on a host, as a power cut would, and wait until they are gone. The host itself stays."""
        netlab_hosts.kill([self.namespace(name)])

    @property
    def _keeper(self) -> subprocess.Popen[bytes]:
        if self._router is None:
            raise UsageError("the lab has not been started", hint="Enter it: `with Netlab(2) as lab`.")
        return self._router

    @property
    def _net(self) -> int:
        """The third number of addresses. Labs do not see each other: it differs so that people can tell them apart."""
        return os.getpid() % 254 + 1

    def _addresses(self, name: str) -> list[str]:
        return [self.address(name), *([self.second_address(name)] if name in self._second else [])]

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise UsageError(f"there is no host {name}", hint=f"There are {', '.join(self.names)}.")
        return name

    def _lanes(self, a: str, b: str) -> tuple[tuple[str, str], tuple[str, str]]:
        if self._known(a) == self._known(b):
            raise UsageError(f"host {a} has no link to itself", hint="Name two hosts.")
        return (a, b), (b, a)

    def _apply(self, a: str, b: str) -> None:
        self._ask(Change([(*lane, Shape(loss=1.0) if lane in self._cut else self._shapes[lane])
                          for lane in self._lanes(a, b)]))

    def _ask(self, request: Setup | Change | Ask) -> Counts:
        """Raises `FullpipeError` if the router refuses or is gone."""
        assert self._control is not None, "the lab was started"
        answer = b""
        with self._turn, contextlib.suppress(ConnectionError):
            self._control.send(msgspec.msgpack.encode(request))
            answer = self._control.recv(MOST)
        if not answer:
            raise FullpipeError(f"the lab's router is gone{self._last_words()}",
                                hint="Its hosts are removed when the next lab starts.")
        match msgspec.msgpack.decode(answer, type=Counts | Refused):
            case Refused(message, hint):
                raise FullpipeError(message, hint=hint)
            case counts:
                return counts

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip()
        return f": {words[-2000:]}" if words else ""
