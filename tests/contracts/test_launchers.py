"""One contract for every launcher: what `fullpipe.pipeline.launch.base` promises of the processes that it starts.

The test is the engine: a socket with the run's keys, which workers call.
"""

from __future__ import annotations

import gc
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import pytest

from fullpipe.pipeline.frames import Door, FromWorker, Hello, Setup, Stop, Up
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Launcher, Needs, Process
from fullpipe.pipeline.launch.local import LocalLauncher, LocalProcess
from fullpipe.pipeline.launch.ray import Cluster, RayLauncher, RayProcess
from fullpipe.pipeline.links import Links, StationLinks
from fullpipe.pipeline.net import Net, Socket, local_endpoint
from fullpipe.pipeline.wire import Outward, decode, encode
from fullpipe.stations.spec import StationSpec
from ray_here import ray_here

pytestmark = pytest.mark.processes

STAGE = StationSpec("fullpipe.stations.scripted:ScriptedStage",
                    {"index": 0, "num_stages": 1, "truth": {"kind": "hash", "vocab": 50, "seed": 3}})
SOON = 10.0  # seconds within which anything happens, on a busy machine too
AT_ONCE = 5.0


@dataclass(frozen=True)
class Kind:
    """Is a launcher, and how to look at what it started behind its back.

    host: on which it starts. pid: of a process, on this machine.
    """

    make: Callable[[], Launcher]
    host: str
    pid: Callable[[Process], int]


def _local_pid(process: Process) -> int:
    assert isinstance(process, LocalProcess)
    return process.pid


def _ray_pid(process: Process) -> int:
    assert isinstance(process, RayProcess)
    return int(process._cluster.ray.get(process._actor.pid.remote(), timeout=SOON))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_here() as ray:
        ours = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        cluster = Cluster(ray.address)
        yield cluster
        cluster.close()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == ours


@pytest.fixture(params=["local", "ray"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "local":
        return Kind(LocalLauncher, "", _local_pid)
    cluster: Cluster = request.getfixturevalue("cluster")
    (node,) = cluster.nodes()
    return Kind(lambda: RayLauncher(cluster, {"here": node.id}), "here", _ray_pid)


@dataclass
class Run:
    """Is an engine that waits for workers, and the launcher that starts them."""

    kind: Kind
    launcher: Launcher
    keys: RunKeys
    net: Net
    socket: Socket
    endpoint: str

    def door(self, engine: str = "", start_timeout: float = 60.0, rank: int = 0) -> Door:
        return Door(f"stage {rank}", rank, engine or self.endpoint, self.keys, [], 5.0, 5.0, start_timeout)

    def start(self, door: Door) -> Process:
        return self.launcher.start(door, self.kind.host, Needs(1))

    def receive(self) -> FromWorker:
        assert self.socket.poll(1e3 * SOON), "nobody calls"
        news: FromWorker = decode(self.socket.recv_multipart()[-1], FromWorker)
        return news


@pytest.fixture
def run(kind: Kind) -> Iterator[Run]:
    keys = RunKeys.new()
    net = Net(keys, 10.0)
    socket, (endpoint,) = net.bind([local_endpoint()])
    launcher = kind.make()
    yield Run(kind, launcher, keys, net, socket, endpoint)
    launcher.close()
    net.close()


@pytest.fixture
def process(run: Run) -> Iterator[Process]:
    """One that has called the engine, and waits to be told what to be."""
    started = run.start(run.door())
    assert run.receive() == Hello()
    yield started
    started.kill()
    assert started.wait(SOON)
    started.close()


def _readable(process: Process, seconds: float) -> bool:
    return bool(select.select([process.fileno()], [], [], seconds)[0])


def _gone(pid: int, within: float) -> bool:
    """Whether nothing is left of it; one that nobody has asked after counts as gone."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_a_process_that_runs_is_alive_and_has_not_ended(run: Run, process: Process) -> None:
    assert process.alive() and psutil.pid_exists(run.kind.pid(process))
    assert not _readable(process, 0.0) and not process.wait(0.05)
    assert process.log_tail() == ""
    assert "still runs" in process.last_words()


def test_terminate_ends_it_and_its_descriptor_says_so_for_ever(run: Run, process: Process) -> None:
    process.terminate()
    assert _readable(process, AT_ONCE) and process.wait(AT_ONCE)
    assert not process.alive() and _gone(run.kind.pid(process), AT_ONCE)
    assert all(_readable(process, 0.0) for _ in range(3))
    assert "SIGTERM" in process.last_words()


def test_kill_ends_one_that_takes_no_signals(run: Run, process: Process) -> None:
    worker = psutil.Process(run.kind.pid(process))
    worker.suspend()
    while worker.status() != psutil.STATUS_STOPPED:  # else SIGTERM would overtake SIGSTOP
        time.sleep(0.001)
    process.terminate()
    assert not process.wait(0.1)
    process.kill()
    assert process.wait(AT_ONCE) and _readable(process, AT_ONCE)
    assert "SIGKILL" in process.last_words() and "memory runs out" in process.last_words()


def test_what_has_ended_may_be_ended_again(process: Process) -> None:
    process.kill()
    assert process.wait(AT_ONCE)
    process.terminate()
    process.kill()
    assert process.wait(0.0) and not process.alive()


def test_a_worker_that_nobody_answers_ends_by_itself_with_words(run: Run) -> None:
    process = run.start(run.door("ipc://@nobody-listens-here", start_timeout=0.3))
    assert _readable(process, SOON) and process.wait(AT_ONCE)
    assert "exited with code 1" in process.last_words()
    assert "nobody at ipc://@nobody-listens-here answered for 0.3 s" in process.log_tail()
    assert process.log_tail() in process.last_words()
    process.close()


@pytest.mark.parametrize("which", ["ours", "the engine's"])
def test_a_worker_with_another_key_is_not_heard_and_ends_with_words(run: Run, which: str) -> None:
    """Both ends refuse: the engine one whose key it does not know, the worker an engine that has another."""
    other, door = RunKeys.new(), run.door()
    door.keys = other if which == "ours" else RunKeys(other.public, run.keys.secret)
    process = run.start(door)
    assert _readable(process, SOON) and not run.socket.poll(0)
    assert "exited with code 1" in process.last_words() and "does not have our key" in process.last_words()
    process.close()


def test_a_worker_ends_when_whoever_started_it_lets_go(run: Run) -> None:
    process = run.start(run.door())
    assert run.receive() == Hello()
    pid = run.kind.pid(process)
    process.close()
    assert process.wait(AT_ONCE) and _gone(pid, AT_ONCE)


def test_a_worker_is_told_what_to_be_and_stops_when_told(run: Run, process: Process) -> None:
    links = StationLinks.of(Links([]), 0, 1)
    outward = Outward()
    setup = Setup("stage 0", 0, 1, "", [], "", STAGE, {}, [], links, None, 1, 10.0)
    run.socket.send_multipart([b"stage 0", *outward.number([encode(setup)])])
    assert run.receive() == Up()
    assert psutil.Process(run.kind.pid(process)).environ()["OMP_NUM_THREADS"] == "1"
    run.socket.send_multipart([b"stage 0", *outward.number([encode(Stop())])])
    assert process.wait(AT_ONCE) and _readable(process, AT_ONCE)
    assert process.last_words() == "its process exited with code 0"


def test_threads_may_start_processes_at_once_and_end(run: Run) -> None:
    """No process ends with the thread in which it was asked for."""
    started: list[Process] = []
    threads = [threading.Thread(target=lambda rank=rank: started.append(run.start(run.door(rank=rank))))
               for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.receive() for _ in started] == [Hello()] * 3
    assert all(process.alive() for process in started)
    assert len({run.kind.pid(process) for process in started}) == 3
    for process in started:
        process.kill()
        assert process.wait(AT_ONCE)
        process.close()


def test_nothing_is_left_when_all_is_closed(kind: Kind) -> None:
    gc.collect()
    descriptors, threads = psutil.Process().num_fds(), threading.active_count()
    launcher = kind.make()
    door = Door("stage 0", 0, local_endpoint(), RunKeys.new(), [], 5.0, 5.0, 60.0)
    process = launcher.start(door, kind.host, Needs(1))
    pid = kind.pid(process)
    process.kill()
    assert process.wait(SOON)
    process.close()
    launcher.close()
    assert not psutil.pid_exists(pid)
    deadline = time.monotonic() + AT_ONCE
    while psutil.Process().num_fds() > descriptors or threading.active_count() > threads:
        assert time.monotonic() < deadline, "a descriptor or a thread is left"
        time.sleep(0.01)
