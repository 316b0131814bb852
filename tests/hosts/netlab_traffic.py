"""Packets pass between two hosts of a lab and are timed; `python tests/hosts/netlab_traffic.py measure` prints figures.

All hosts are on one machine, so one clock is right for all: a packet's way in one direction is measured, not half of a
round trip. The far end answers each packet with the time at which it came.
"""

from __future__ import annotations

import json
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullpipe.cluster.netlab import Netlab

PORT = 4242
_STAMP = struct.Struct("=Id")  # number, seconds
_SILENCE_S = 0.5  # after which what has not come is lost


@dataclass(frozen=True)
class Answer:
    """Tells of one packet: its number, the seconds that it took there, and there and back."""

    number: int
    there_s: float
    round_s: float


def answers(lab: Netlab, a: str, b: str, packets: int, *, burst: int = 1, to: str | None = None) -> list[Answer]:
    """Send packets from a to b, `burst` at a time; those that were answered, in the order in which answers came."""
    address = to or lab.address(b)
    with _far_end(lab, b, "echo", address):
        done = lab.run(a, _argv("ask", address, str(packets), str(burst)), capture_output=True, text=True, check=True)
    return [Answer(*row) for row in json.loads(done.stdout)]


def mbit_per_s(lab: Netlab, a: str, b: str, size: int) -> float:
    """How fast `size` bytes get from a to b in one TCP stream."""
    with _far_end(lab, b, "sink", lab.address(b)):
        done = lab.run(a, _argv("flood", lab.address(b), str(size)), capture_output=True, text=True, check=True)
    return size * 8e-6 / float(done.stdout)


@contextmanager
def _far_end(lab: Netlab, name: str, mode: str, address: str) -> Iterator[subprocess.Popen[Any]]:
    with lab.popen(name, _argv(mode, address), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def _argv(*words: str) -> list[str]:
    return [sys.executable, "-I", "-S", __file__, *words]


def echo(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, PORT))
        print("ready", flush=True)
        while True:
            packet, sender = sock.recvfrom(64)
            now = time.monotonic()
            sock.sendto(_STAMP.pack(_STAMP.unpack(packet)[0], now), sender)


def ask(address: str, packets: str, burst: str) -> None:
    found: list[tuple[int, float, float]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        sock.settimeout(_SILENCE_S)
        for first in range(0, int(packets), int(burst)):
            sent = {}
            for number in range(first, first + int(burst)):
                sent[number] = time.monotonic()
                sock.send(_STAMP.pack(number, sent[number]))
            for _ in sent:
                try:
                    number, came = _STAMP.unpack(sock.recv(64))
                except TimeoutError:
                    break
                found.append((number, came - sent[number], time.monotonic() - sent[number]))
            time.sleep(0.001)
    print(json.dumps(found))


def sink(address: str) -> None:
    with socket.create_server((address, PORT)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        while connection.recv(1 << 20):
            pass
        connection.send(b"!")


def flood(address: str, size: str) -> None:
    block, left = bytes(1 << 20), int(size)
    with socket.create_connection((address, PORT)) as connection:
        start = time.monotonic()
        while left > 0:
            connection.sendall(block[:left])
            left -= len(block)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        print(time.monotonic() - start)


def measure() -> None:
    """Print what a lab of two hosts can do here."""
    from fullpipe.cluster.netlab import PERFECT, Netlab, Shape

    with Netlab(2) as lab:
        for delay_ms in (0.0, 0.1, 1.0, 10.0, 50.0):
            lab.set("h1", "h2", Shape(delay_ms=delay_ms))
            found = answers(lab, "h1", "h2", 400 if delay_ms < 50 else 100)
            late = sorted(1e3 * one.there_s - delay_ms for one in found)
            print(f"{delay_ms:5.1f} ms one way: late by {statistics.median(late):.3f} ms in the median, "
                  f"{late[int(0.99 * len(late))]:.3f} at 99%; round trip "
                  f"{1e3 * statistics.median(one.round_s for one in found):.3f} ms")
        for shape, megabytes in ((PERFECT, 400), (Shape(delay_ms=10), 200), (Shape(mbit=100), 25),
                                 (Shape(mbit=300), 75), (Shape(mbit=300, delay_ms=10), 75)):
            lab.set("h1", "h2", shape)
            print(f"{shape}: {mbit_per_s(lab, 'h1', 'h2', megabytes * 10**6):.0f} Mbit/s")


if __name__ == "__main__":
    {"echo": echo, "ask": ask, "sink": sink, "flood": flood, "measure": measure}[sys.argv[1]](*sys.argv[2:])
