"""Flights over links that lose packets, break and come back; heads that die. The stations are on other hosts."""

from __future__ import annotations

import ipaddress
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transport_head import Asked

from fullpipe.cluster.netlab import PERFECT, Netlab, Shape
from fullpipe.stations.scripted import hash_token

pytestmark = [pytest.mark.usefixtures("hosts_can_be_made"), pytest.mark.processes]

HEAD, STAGES = "h1", ["h2", "h3"]
LINKS = [("h1", "h2"), ("h1", "h3"), ("h2", "h3")]
SCRIPT = Path(__file__).with_name("transport_head.py")
LISTENS = "0A"  # as /proc/net/tcp has it


@pytest.fixture(scope="module")
def shared(hosts_can_be_made: None) -> Iterator[Netlab]:
    with Netlab(3) as lab:
        yield lab


@pytest.fixture
def lab(shared: Netlab) -> Iterator[Netlab]:
    """Three hosts with perfect links. Nobody is left on them by any test."""
    yield shared
    for a, b in LINKS:
        shared.heal(a, b)
        shared.set(a, b, PERFECT)
    left = {name: shared.pids(name) for name in shared.names}
    for name in shared.names:
        shared.kill(name)
    assert left == {name: [] for name in shared.names}


class Head:
    """Is a head on h1 that runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def hear(self) -> dict[str, Any]:
        """What it says next; {} when it has ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        return msgspec.json.decode(line) if line else {}

    def landings(self, count: int) -> list[tuple[int, list[int]]]:
        heard = [self.hear() for _ in range(count)]
        assert all("flight" in one for one in heard), heard
        return [(one["flight"], one["tokens"]) for one in heard]


    def has_closed(self) -> None:
        """Promptly, whatever the links are like."""
        assert self.hear()["closed_s"] < 2.5
        assert self.hear() == {} and self.process.wait(5) == 0


@contextmanager
def head(lab: Netlab, flights: int, heartbeat_timeout: float = 10.0, log: Path | None = None) -> Iterator[Head]:
    """One whose pipeline is up."""
    asked = Asked(HEAD, STAGES, {name: lab.address(name) for name in lab.names},
                  {name: lab.command(name, []) for name in STAGES}, heartbeat_timeout, flights)
    with (log or Path("/dev/null")).open("wb") as told, lab.popen(
            HEAD, [sys.executable, str(SCRIPT), msgspec.json.encode(asked).decode()], stdout=subprocess.PIPE,
            stderr=told) as process:
        try:
            one = Head(process)
            assert one.hear() == {"up": True}
            yield one
        finally:
            process.kill()


def truth(first: int, count: int) -> list[tuple[int, list[int]]]:
    return [(number, [hash_token([7, number] if number else [7], 50, 3)]) for number in range(first, first + count)]


def test_lost_packets_change_nothing(lab: Netlab) -> None:
    for a, b in LINKS:
        lab.set(a, b, Shape(delay_ms=1, loss=0.05))
    with head(lab, 60) as one:
        assert one.landings(60) == truth(0, 60)
        one.has_closed()
    assert sum(count.dropped for count in lab.counts().values()) > 5, "there was something to bear"


@pytest.mark.parametrize("link", LINKS, ids="-".join)
def test_a_link_that_breaks_and_comes_back_delays_flights_and_changes_none(
        lab: Netlab, link: tuple[str, str], tmp_path: Path) -> None:
    with head(lab, 60, log=tmp_path / "log") as one:
        assert one.landings(20) == truth(0, 20)
        lab.cut(*link)
        time.sleep(2.0)
        lab.heal(*link)
        assert one.landings(40) == truth(20, 40)
        one.has_closed()
    if HEAD in link:
        told = (tmp_path / "log").read_text()
        where = f"stage {STAGES.index(link[1])} on {link[1]}"
        assert f"WARNING:fullpipe.pipeline.watch:{where} has been silent for 1 s" in told
        assert f"{where} is heard again" in told


@pytest.mark.parametrize("link", LINKS, ids="-".join)
def test_a_link_that_stays_broken_is_reported_with_station_and_host(lab: Netlab, link: tuple[str, str]) -> None:
    timeout = 1.5
    with head(lab, 10_000, timeout) as one:
        assert one.landings(20) == truth(0, 20)
        lab.cut(*link)
        cut = time.monotonic()
        while "flight" in (heard := one.hear()):
            pass
        seconds = time.monotonic() - cut
        if HEAD in link:
            assert heard == {"station": f"stage {STAGES.index(link[1])} on {link[1]}",
                             "reason": f"no sign of life for {timeout:g} s"}
        else:
            assert heard["station"] in ("stage 0 on h2", "stage 1 on h3")
            assert "lost its connection to stage" in heard["reason"]
        assert timeout - 0.5 < seconds < timeout + 2.0
        one.has_closed()


def listening(lab: Netlab, name: str) -> list[str]:
    """Addresses on which something listens on a host."""
    table = lab.run(name, ["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()[1:]]
    return [str(ipaddress.ip_address(bytes.fromhex(row[1].partition(":")[0])[::-1])) for row in rows
            if row[3] == LISTENS]


def test_nothing_listens_but_where_it_was_asked_to(lab: Netlab) -> None:
    with head(lab, 10_000) as one:
        one.landings(1)
        assert [listening(lab, name) for name in lab.names] == [[lab.address("h1")], [], [lab.address("h3")]]
        for name in lab.names:
            other = lab.run(name, ["cat", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6"], capture_output=True,
                            text=True, check=True).stdout
            assert len(other.splitlines()) == 3, "a headline each, and nothing under it"
    _gone(lab)


def test_a_head_that_is_killed_leaves_nobody_on_any_host(lab: Netlab) -> None:
    with head(lab, 10_000) as one:
        one.landings(5)
        assert all(lab.pids(name) for name in lab.names)
        one.process.send_signal(signal.SIGKILL)
        _gone(lab)


def _gone(lab: Netlab) -> None:
    deadline = time.monotonic() + 10
    while any(lab.pids(name) for name in lab.names):
        assert time.monotonic() < deadline, "somebody is left"
        time.sleep(0.05)
