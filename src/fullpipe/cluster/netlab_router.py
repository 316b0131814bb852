"""The router of a lab is a process of its own: `python -m fullpipe.cluster.netlab_router`, started by `Netlab`.

It makes the hosts, takes every packet that one of them sends, holds it until it is due, and hands it to another. In a
thread of the user's process it would wait for the interpreter's lock. It sleeps in `select`, whose time-outs have
microseconds, with a timer slack of 1 ns, and reads packets in batches; it never spins.

Standard input is the control connection, a socket that keeps messages apart. When that closes, or the process at its
other end is gone (a fork of it may hold the socket open), the hosts and everything on them are removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import heapq
import os
import random
import select
import signal
import socket
import time

import msgspec

from fullpipe.cluster import netlab_hosts
from fullpipe.cluster.netlab_links import Count, Lane, Shape
from fullpipe.errors import FullpipeError

MOST = 65536  # bytes of a control message

_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29
_BATCH = 16  # packets of one host, before others have their turn
_IPV4, _FROM, _TO = 4, slice(12, 16), slice(16, 20)  # version, and where in a packet the addresses are


class Setup(msgspec.Struct, tag=True, frozen=True):
    """Says which hosts there are, by name with their addresses, and each lane's shape. parent: who started us."""

    hosts: dict[str, list[str]]
    lanes: list[tuple[str, str, Shape]]
    parent: int


class Change(msgspec.Struct, tag=True, frozen=True):
    """Gives lanes another shape, for packets that come from now on."""

    lanes: list[tuple[str, str, Shape]]


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Asks for the counts."""


class Counts(msgspec.Struct, tag=True, frozen=True):
    """Tells what each lane has carried so far; answers every request."""

    lanes: list[tuple[str, str, Count]]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """Tells why there is no lab."""

    message: str
    hint: str | None


class Router:
    """Passes packets from host to host.

    devices: by host, the descriptors of its devices with their addresses.
    """

    def __init__(self, devices: dict[str, dict[int, str]], lanes: list[tuple[str, str, Shape]]) -> None:
        chance = random.Random(1)
        self._lanes = {(a, b): Lane(shape, chance) for a, b, shape in lanes}
        self._hosts = {fd: name for name, own in devices.items() for fd in own}
        self._homes = {socket.inet_aton(address): (name, fd) for name, own in devices.items()
                       for fd, address in own.items()}
        self._held: list[tuple[float, int, int, bytes]] = []  # due, order, descriptor, packet
        self._order = 0

    @property
    def fds(self) -> list[int]:
        return list(self._hosts)

    def change(self, lanes: list[tuple[str, str, Shape]]) -> None:
        for a, b, shape in lanes:
            self._lanes[a, b].shape = shape

    def counts(self) -> Counts:
        return Counts([(a, b, lane.count) for (a, b), lane in self._lanes.items()])

    def take(self, fd: int) -> None:
        """Read what a host has sent, not without end."""
        source, homes, lanes, held = self._hosts[fd], self._homes, self._lanes, self._held
        for _ in range(_BATCH):
            try:
                packet = os.read(fd, netlab_hosts.MTU)
            except BlockingIOError:
                return
            home = homes.get(packet[_TO])
            if packet[0] >> 4 != _IPV4 or home is None or (lane := lanes.get((source, home[0]))) is None:
                continue
            due = lane.due(time.monotonic(), len(packet))
            if due is not None:
                self._order += 1
                heapq.heappush(held, (due, self._order, home[1], packet))

    def deliver(self) -> float | None:
        """Hand over what is due; returns the seconds until the next packet is, None if there is none."""
        held = self._held
        while held:
            remaining = held[0][0] - time.monotonic()
            if remaining > 0:
                return remaining
            _, _, fd, packet = heapq.heappop(held)
            with contextlib.suppress(OSError):  # a host whose device was set down loses it
                os.write(fd, packet)
        return None


def serve(control: socket.socket, router: Router, signalled: int, parent: int) -> None:
    """Route until the other end of the control connection is closed, the parent is gone, or we are told to end.

    signalled: the descriptor that `signals` made.
    """
    asked = control.fileno()
    watched, decoder = [asked, signalled, *router.fds], msgspec.msgpack.Decoder(Change | Ask)
    while True:
        ready, _, _ = select.select(watched, (), (), router.deliver())
        for fd in ready:
            if fd == signalled:
                if _ends(os.read(fd, MOST), parent):
                    return
            elif fd != asked:
                router.take(fd)
            elif request := control.recv(MOST):
                _answer(control, router, decoder.decode(request))
            else:
                return


def _answer(control: socket.socket, router: Router, request: Change | Ask) -> None:
    if isinstance(request, Change):
        router.change(request.lanes)
    control.send(msgspec.msgpack.encode(router.counts()))


def signals(parent: int) -> int:
    """The descriptor from which SIGTERM can be read, and SIGHUP, by which the kernel tells that the parent is gone.

    They come as bytes and not as exceptions, which could tear what removes the hosts.
    """
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(theirs)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != parent:  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGHUP)
    return ours


def _ends(signal_numbers: bytes, parent: int) -> bool:
    """SIGHUP also comes when only the *thread* that started us is gone, which is nothing to us."""
    return signal.SIGTERM in signal_numbers or os.getppid() != parent


def _hurry() -> None:
    """Be woken on time, before those whose packets wait; root may, and where it may not we are as good as others."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    gc.freeze()
    gc.disable()  # nothing here makes cycles


def main() -> None:
    """Make the hosts, route, and remove them, whatever happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=os.dup(0))
    setup = msgspec.msgpack.decode(control.recv(MOST), type=Setup)
    signalled = signals(setup.parent)
    spaces = {name: netlab_hosts.namespace_of(os.getpid(), name) for name in setup.hosts}
    try:
        netlab_hosts.remove_leftovers()
        devices = {name: dict(zip(netlab_hosts.make(spaces[name], own), own)) for name, own in setup.hosts.items()}
        router = Router(devices, setup.lanes)
        control.send(msgspec.msgpack.encode(router.counts()))
        _hurry()
        serve(control, router, signalled, setup.parent)
    except (FullpipeError, OSError) as error:
        hint = error.hint if isinstance(error, FullpipeError) else None
        message = error.message if isinstance(error, FullpipeError) else str(error)
        with contextlib.suppress(OSError):
            control.send(msgspec.msgpack.encode(Refused(message, hint)))
    finally:
        netlab_hosts.remove(spaces.values())


if __name__ == "__main__":
    main()
