"""A lab's hosts are told apart, its links do what they are told, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from netlab_traffic import answers, mbit_per_s

from fullpipe.cluster import netlab, netlab_hosts
from fullpipe.cluster.netlab import PERFECT, Netlab, Shape
from fullpipe.errors import FullpipeError, UsageError

pytestmark = pytest.mark.usefixtures("hosts_can_be_made")

SPACES = Path("/run/netns")


@pytest.fixture(scope="module")
def shared(hosts_can_be_made: None) -> Iterator[Netlab]:
    with Netlab(3, links={("h1", "h3"): Shape(delay_ms=20)}, second=("h1", "h2")) as lab:
        yield lab


@pytest.fixture
def lab(shared: Netlab) -> Netlab:
    """Three hosts; h1 and h2 have second addresses, h3 is far from h1."""
    for a, b, shape in (("h1", "h2", PERFECT), ("h2", "h3", PERFECT), ("h1", "h3", Shape(delay_ms=20))):
        shared.heal(a, b)
        shared.set(a, b, shape)
    return shared


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_way_without_delay_takes_next_to_nothing(lab: Netlab) -> None:
    found = answers(lab, "h1", "h2", 200)
    assert [one.number for one in found] == list(range(200))
    assert statistics.median(one.round_s for one in found) < 1e-3  # 0.08 ms where nobody else computes


def test_each_direction_has_its_delay(lab: Netlab) -> None:
    found = answers(lab, "h1", "h3", 20)
    assert all(one.there_s >= 0.020 and one.round_s >= 0.040 for one in found)
    assert statistics.median(one.there_s for one in found) < 0.022
    assert statistics.median(one.round_s for one in found) < 0.044


def test_a_link_changes_while_packets_pass(lab: Netlab) -> None:
    lab.set("h2", "h1", Shape(delay_ms=5))
    assert lab.shape("h1", "h2") == Shape(delay_ms=5)
    assert all(one.there_s >= 0.005 for one in answers(lab, "h1", "h2", 5))
    lab.set("h1", "h2", PERFECT)
    assert statistics.median(one.there_s for one in answers(lab, "h1", "h2", 5)) < 0.005


def test_jitter_spreads_packets_and_keeps_their_order(lab: Netlab) -> None:
    lab.set("h1", "h2", Shape(delay_ms=5, jitter_ms=4))
    found = answers(lab, "h1", "h2", 60, burst=2)
    assert [one.number for one in found] == list(range(60))
    ways = [one.there_s for one in found]
    assert min(ways) >= 0.001 and max(ways) - min(ways) > 0.003


def test_loss_loses_about_its_share(lab: Netlab) -> None:
    before = lab.counts()["h1", "h2"]
    lab.set("h1", "h2", Shape(loss=0.3))
    found = answers(lab, "h1", "h2", 300, burst=300)
    lab.set("h1", "h2", PERFECT)
    after = lab.counts()["h1", "h2"]
    assert 90 < len(found) < 210  # 147 expected: both ways lose
    assert 50 < after.dropped - before.dropped < 130


def test_a_cut_link_carries_nothing_until_it_is_healed(lab: Netlab) -> None:
    lab.cut("h2", "h1")
    lab.set("h1", "h2", Shape(delay_ms=1))  # does not heal it
    assert answers(lab, "h1", "h2", 3, burst=3) == []
    assert len(answers(lab, "h3", "h2", 3)) == 3
    lab.heal("h1", "h2")
    assert all(one.there_s >= 0.001 for one in answers(lab, "h1", "h2", 3))


@pytest.mark.parametrize("mbit", [100, 300])
def test_a_bandwidth_is_reached_and_not_passed(lab: Netlab, mbit: int) -> None:
    lab.set("h1", "h2", Shape(mbit=mbit))
    assert 0.6 * mbit < mbit_per_s(lab, "h1", "h2", mbit * 25_000) <= 1.02 * mbit


def test_what_passes_is_counted_by_direction(lab: Netlab) -> None:
    before = lab.counts()
    mbit_per_s(lab, "h1", "h2", 10**6)
    after = lab.counts()
    carried = {way: after[way].bytes - before[way].bytes for way in after}
    assert carried["h1", "h2"] > 10**6 > 10 * carried["h2", "h1"] > 0
    assert {way for way, count in carried.items() if count} == {("h1", "h2"), ("h2", "h1")}


def test_hosts_have_a_loopback_of_their_own(lab: Netlab) -> None:
    """What listens on 127.0.0.1 of one host is not there for another, nor for this machine."""
    code = ("import socket\n"
            "with socket.create_server(('127.0.0.1', 4343)): print('ready', flush=True); input()")
    connect = python("import socket; socket.create_connection(('127.0.0.1', 4343), 2)")
    with lab.popen("h1", python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None and listener.stdout.readline() == b"ready\n"
        assert lab.run("h1", connect).returncode == 0
        assert b"ConnectionRefusedError" in lab.run("h2", connect, capture_output=True).stderr
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", 4343), 2)
        listener.communicate(b"\n")


def test_hosts_named_so_have_a_second_address(lab: Netlab) -> None:
    assert len(answers(lab, "h1", "h2", 3, to=lab.second_address("h2"))) == 3
    seen = lab.run("h3", python(f"import socket; socket.create_connection(('{lab.second_address('h2')}', 1), 2)"),
                   capture_output=True).stderr
    assert b"Network is unreachable" in seen
    with pytest.raises(UsageError, match="h3 has no second address"):
        lab.second_address("h3")


def test_a_command_is_bound_to_its_core(lab: Netlab) -> None:
    core = min(os.sched_getaffinity(0))
    told = lab.run("h1", python("import os; print(os.getpid(), os.sched_getaffinity(0))"), core=core,
                   capture_output=True, text=True).stdout
    assert told.endswith(f"{{{core}}}\n")


def test_a_killed_host_has_no_process_left_and_others_theirs(lab: Netlab) -> None:
    forks = python("import os, time\nfor _ in range(3): os.fork()\ntime.sleep(100)")
    with lab.popen("h1", forks) as strong, lab.popen("h2", forks) as other:
        until(lambda: len(lab.pids("h1")) == len(lab.pids("h2")) == 8)
        assert strong.pid in lab.pids("h1")
        lab.kill("h1")
        assert lab.pids("h1") == []
        assert strong.wait() == -signal.SIGKILL
        assert len(lab.pids("h2")) == 8
        lab.kill("h2")
        other.wait()
    assert len(answers(lab, "h1", "h2", 3)) == 3  # the hosts are still there


def test_the_router_sleeps_when_nothing_passes(lab: Netlab) -> None:
    def ticks() -> int:
        assert lab._router is not None
        return sum(map(int, Path(f"/proc/{lab._router.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    before = ticks()
    time.sleep(0.5)
    assert ticks() - before <= 1


def test_two_labs_do_not_see_each_other(lab: Netlab) -> None:
    with Netlab(2) as other:
        assert {lab.namespace(name) for name in lab.names}.isdisjoint(map(other.namespace, other.names))
        assert len(answers(other, "h1", "h2", 3)) == 3
        before = lab.counts()
        answers(other, "h1", "h2", 3)
        assert lab.counts() == before


def test_nothing_of_a_lab_is_left_when_it_ends() -> None:
    with Netlab(2) as lab:
        spaces = [lab.namespace(name) for name in lab.names]
        process = lab.popen("h1", ["sleep", "100"])
        assert all((SPACES / space).exists() for space in spaces)
    assert process.wait(5) == -signal.SIGKILL
    assert not any((SPACES / space).exists() for space in spaces)


def test_a_lab_outlives_the_thread_that_made_it() -> None:
    with ExitStack() as stack:
        made: list[Netlab] = []
        thread = threading.Thread(target=lambda: made.append(stack.enter_context(Netlab(2))))
        thread.start()
        thread.join()
        assert len(answers(made[0], "h1", "h2", 3)) == 3


ENTER = ("import os, time\nfrom fullpipe.cluster.netlab import Netlab\n"
         "lab = Netlab(2).__enter__(); lab.popen('h1', ['sleep', '100'])\n{more}"
         "print(lab.namespace('h1'), lab._router.pid, lab.pids('h1')[0], flush=True)\ntime.sleep(100)")


def started(more: str = "") -> tuple[subprocess.Popen[str], str, int, int]:
    """A process with a lab; its first namespace, its router, and somebody on a host."""
    process = subprocess.Popen([sys.executable, "-c", ENTER.format(more=more)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    space, router, resident = process.stdout.readline().split()
    return process, space, int(router), int(resident)


@pytest.mark.parametrize("more", ["", "os.fork()\n"], ids=["alone", "with a fork that holds the connection"])
def test_a_lab_ends_with_its_process_however_that_ends(more: str) -> None:
    process, space, router, resident = started("if os.fork() == 0: time.sleep(100)\n" if more else "")
    with process:
        forked = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.kill()
        until(lambda: not (SPACES / space).exists() and not alive(router) and not alive(resident))
        for pid in forked:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_hosts_of_a_dead_router_are_removed_when_the_next_lab_starts() -> None:
    process, space, router, resident = started()
    with process:
        os.kill(router, signal.SIGKILL)
        until(lambda: not alive(router))
        assert (SPACES / space).exists()
        with Netlab(1):
            assert not (SPACES / space).exists() and not alive(resident)
        process.kill()


def test_a_lab_whose_router_is_gone_says_so() -> None:
    with Netlab(2) as lab:
        assert lab._router is not None
        lab._router.kill()
        with pytest.raises(FullpipeError, match="the lab's router is gone"):
            lab.set("h1", "h2", PERFECT)
        spaces = [lab.namespace(name) for name in lab.names]
    netlab_hosts.remove_leftovers()
    assert not any((SPACES / space).exists() for space in spaces)


def test_a_lab_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ip").write_text("#!/bin/sh\necho out of namespaces >&2; exit 1\n")
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(FullpipeError, match="out of namespaces"):
        Netlab(1).__enter__()


@pytest.mark.parametrize(("act", "words"), [
    (lambda lab: lab.address("h9"), "There are h1, h2, h3"), (lambda lab: lab.kill("h9"), "no host h9"),
    (lambda lab: lab.cut("h1", "h1"), "no link to itself"), (lambda lab: lab.set("h1", "h9", PERFECT), "no host h9"),
    (lambda lab: Netlab(2, second=("h3",)), "no host h3"), (lambda lab: Netlab(0), "1 to 16 hosts"),
    (lambda lab: Netlab(2, links={("h1", "h3"): PERFECT}), "no host h3"),
    (lambda lab: Netlab(2).pids("h1"), "not been started")])
def test_what_is_not_there_is_refused(lab: Netlab, act: Callable[[Netlab], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        act(lab)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("geteuid", lambda: 1000, "needs root"), ("which", lambda program: None, "ip is not installed"),
    ("TUN", Path("/nowhere"), "there is no /nowhere"), ("_capabilities", lambda: 0, "no CAP_NET_ADMIN"),
    ("platform", "darwin", "only Linux")])
def test_what_a_lab_lacks_is_told(monkeypatch: pytest.MonkeyPatch, name: str, value: object, words: str) -> None:
    owner = next(owner for owner in (netlab, netlab_hosts, os, sys, netlab.shutil) if hasattr(owner, name))
    monkeypatch.setattr(owner, name, value)
    assert words in str(netlab.available.__wrapped__())
