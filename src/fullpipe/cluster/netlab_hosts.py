"""A lab's hosts are network namespaces: here they are made, listed and removed.

They are named after the process that keeps them, which is how those of a dead one are told from those in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fullpipe.errors import FullpipeError

KEEPER = "fullpipe.cluster.netlab_router"  # the module that a keeper of hosts runs
MTU = 9000

_NAMESPACES, TUN = Path("/run/netns"), Path("/dev/net/tun")
_OURS = re.compile(r"fp(\d+)-h\d+")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_END_S = 5.0  # until processes that were killed are gone


def namespace_of(keeper: int, name: str) -> str:
    return f"fp{keeper}-{name}"


def make(namespace: str, addresses: Sequence[str]) -> list[int]:
    """Make a host with one device for each address, eth0, eth1 ...; returns their descriptors, where packets that it
    sends come out and those for it go in."""
    ip(f"netns add {namespace}")
    devices = [f"{namespace}{'' if number == 0 else chr(ord('a') + number)}" for number in range(len(addresses))]
    fds = [_tun(device) for device in devices]
    ip(*(f"link set {device} netns {namespace}" for device in devices))  # the descriptors stay with us
    within = ["link set lo up"]
    for number, (device, address) in enumerate(zip(devices, addresses)):
        within += [f"link set {device} name eth{number}", f"link set eth{number} addrgenmode none",
                   f"addr add {address}/24 dev eth{number}", f"link set eth{number} mtu {MTU} txqueuelen 10000 up"]
    ip(*within, namespace=namespace)
    return fds


def _tun(device: str) -> int:
    fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def pids(namespace: str) -> list[int]:
    """The processes of a host; none of a host that is gone."""
    if not (_NAMESPACES / namespace).exists():
        return []
    return [int(pid) for pid in ip_answer("netns", "pids", namespace).split()]


def is_on(pid: int, namespace: str) -> bool:
    """Whether this process is on that host by now."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), os.stat(_NAMESPACES / namespace))
    except OSError:
        return False


def kill(namespaces: Iterable[str]) -> None:
    """Kill every process of these hosts, those that they start meanwhile too, and wait until all are gone."""
    deadline = time.monotonic() + _END_S
    left = list(namespaces)
    while left := [namespace for namespace in left if _killed(namespace)]:
        if time.monotonic() > deadline:
            raise FullpipeError(f"processes of {', '.join(left)} outlive SIGKILL",
                                hint="They hang in the kernel; `ps -eo pid,stat,args` shows them in state D.")
        time.sleep(0.005)


def _killed(namespace: str) -> bool:
    """Whether there was anybody to kill."""
    found = pids(namespace)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(found)


def remove(namespaces: Iterable[str]) -> None:
    """Remove hosts and their processes, as far as they are there."""
    here = [namespace for namespace in namespaces if (_NAMESPACES / namespace).exists()]
    kill(here)
    for namespace in here:
        with contextlib.suppress(FullpipeError):  # somebody else cleaned up at the same time
            ip(f"netns del {namespace}")


def remove_leftovers() -> None:
    """Remove the hosts of keepers that are gone."""
    remove(namespace for namespace in _listed() if not _kept(namespace))


def _listed() -> list[str]:
    return sorted(path.name for path in _NAMESPACES.glob("fp*-h*") if _OURS.fullmatch(path.name))


def _kept(namespace: str) -> bool:
    """Whether its keeper lives; another process may have been given the number since."""
    found = _OURS.fullmatch(namespace)
    assert found, "it is one of ours"
    try:
        return KEEPER.encode() in Path(f"/proc/{found[1]}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def ip(*commands: str, namespace: str | None = None) -> None:
    """Have `ip` do some things, one after the other, on this machine or on one of the hosts."""
    where = () if namespace is None else ("-n", namespace)
    ip_answer(*where, "-batch", "-", given="\n".join(commands))


def ip_answer(*words: str, given: str = "") -> str:
    done = subprocess.run(["ip", *words], input=given, capture_output=True, text=True)
    if done.returncode:
        raise FullpipeError(f"ip {' '.join(words)} failed: {done.stderr.strip()}",
                            hint=f"It was asked for: {given}" if given else None)
    return done.stdout
