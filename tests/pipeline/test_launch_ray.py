"""What Ray alone does: it refuses, has no room, or loses a node. What all launchers promise is in the contracts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from fullpipe.errors import MissingExtra, PipelineError, StationFailed, UsageError
from fullpipe.messages import Failed, Flight, Landed, Opening, Part
from fullpipe.pipeline.frames import Door
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch import ray as launch_ray
from fullpipe.pipeline.launch.base import Needs, Process
from fullpipe.pipeline.launch.ray import Cluster, RayLauncher, RayProcess, StationActor
from fullpipe.pipeline.net import Net
from fullpipe.pipeline.starting import Hosting, Place
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import hash_token
from fullpipe.stations.spec import StationSpec
from ray_here import RayHere, ray_here

pytestmark = pytest.mark.processes

CPUS = 4
GPUS, VISIBLE = 2, "5,7"  # Ray believes so
TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
HEAD = Place("head", "127.0.0.1")


@pytest.fixture(scope="module")
def here() -> Iterator[RayHere]:
    with ray_here(CPUS, GPUS, CUDA_VISIBLE_DEVICES=VISIBLE) as here:
        yield here


@pytest.fixture(scope="module")
def cluster(here: RayHere) -> Iterator[Cluster]:
    cluster = Cluster(here.address)
    yield cluster
    cluster.close()


def _stages(count: int) -> list[StationSpec]:
    return [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                        {"index": index, "num_stages": count, "truth": TRUTH}) for index in range(count)]


def _hosting(cluster: Cluster, *places: Place) -> Hosting:
    nodes = {place.host: node.id for place, node in zip(
        [HEAD, *(place for place in places if place.host != "head")],
        sorted(cluster.nodes(), key=lambda node: not node.here))}
    return Hosting(places, HEAD, lambda: RayLauncher(cluster, nodes))


def _pid(cluster: Cluster, process: Process) -> int:
    assert isinstance(process, RayProcess)
    return int(cluster.ray.get(process._actor.pid.remote()))


def _prompt() -> Flight:
    return Flight(0, [Part(0, [0], [0], [7], [0], [0], [[]], [True])], [Opening(0, 1, SamplingParams())])


# ---- connecting --------------------------------------------------------------------------------------------------


CONNECT = """
import sys, time
from fullpipe.errors import UsageError
from fullpipe.pipeline.launch.ray import Cluster
print("now", flush=True)
begun = time.monotonic()
try:
    Cluster(sys.argv[1])
except UsageError as error:
    print(time.monotonic() - begun, error)
"""


def _connecting(address: str, **environment: str) -> subprocess.Popen[str]:
    """A process that connects; in this one Ray has read its token already."""
    return subprocess.Popen([sys.executable, "-c", CONNECT, address], env={**os.environ, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_wrong_token_is_told_soon(here: RayHere) -> None:
    said, _ = _connecting(here.address, RAY_AUTH_TOKEN="0" * 64).communicate(timeout=30)
    _, answer = said.split("\n", 1)
    seconds, _, words = answer.partition(" ")
    assert float(seconds) < 8, "Ray asks for 20 s"
    assert words.startswith(f"the Ray at {here.address} does not take us") and "RAY_AUTH_TOKEN" in words


def test_ctrl_c_while_connecting_ends_it(here: RayHere) -> None:
    process = _connecting(here.address, RAY_AUTH_TOKEN="0" * 64)
    assert process.stdout and process.stdout.readline() == "now\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=10)
    assert told.rstrip().endswith("KeyboardInterrupt") and process.returncode in (1, -signal.SIGINT)


@pytest.mark.parametrize(("address", "words"), [
    ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1: Connection refused"),
    ("127.0.0.1:ray", "'127.0.0.1:ray' is no address of a Ray head"),
])
def test_an_address_where_no_ray_is(address: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Cluster(address)
    assert caught.value.hint


def test_a_ray_of_this_machine_that_is_gone_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda folder: "127.0.0.1:1")
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # the other tests' runs here
    with pytest.raises(UsageError, match=r"no Ray answers at .*:1: Connection refused"):
        Cluster()


def test_a_ray_that_is_not_installed_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match="need Ray, which is not installed") as told:
        Cluster("127.0.0.1:6379")
    assert told.value.hint and "pip install 'fullpipe[ray]'" in told.value.hint and told.value.exit_code == 6


@pytest.mark.parametrize(("said", "words", "way_out"), [
    ("Could not find any running Ray instance.", "no Ray runs at h:1", "ray start --head"),
    ("Found multiple active Ray instances: {...}", "several Rays run at h:1", "ray_address"),
    ("Version mismatch: The cluster was started with:\n    Ray: 2.9", "of another version: Version mismatch",
     "one version of Ray"),
    ("Failed to connect to Ray cluster at h:1", "does not take us: Failed to connect", "RAY_AUTH_TOKEN"),
])
def test_what_ray_says_becomes_words_with_a_way_out(said: str, words: str, way_out: str) -> None:
    error = launch_ray._refusal("h:1", said)
    assert words in error.message and error.hint and way_out in error.hint


SHARING = """
import sys
import ray
from fullpipe.errors import UsageError
from fullpipe.pipeline.launch.ray import Cluster
ray.init(sys.argv[1], log_to_driver=False, configure_logging=False)
try:
    Cluster(sys.argv[1])
except UsageError as error:
    print(ray.is_initialized(), error)
"""


def test_a_ray_that_somebody_else_uses_in_this_process_is_left_alone(here: RayHere) -> None:
    done = subprocess.run([sys.executable, "-c", SHARING, here.address], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("True this process uses Ray already"), done.stderr


def test_who_leaves_takes_his_actors_along_and_nobody_elses(here: RayHere, cluster: Cluster) -> None:
    """As a second `LLM` of a process does."""
    other = Cluster(here.address)
    (node,) = (one.id for one in cluster.nodes() if one.here)
    ours, theirs = (one.actor(StationActor, node) for one in (cluster, other))
    assert other.ray.get([ours.pid.remote(), theirs.pid.remote()], timeout=20) == [0, 0]
    other.close()
    other.close()
    with pytest.raises(PipelineError, match="the connection with Ray is closed"):
        other.nodes()
    assert cluster.ray.get(ours.pid.remote(), timeout=20) == 0
    with pytest.raises(Exception) as caught:
        cluster.ray.get(theirs.pid.remote(), timeout=20)
    assert cluster.is_dead(caught.value) and other.is_dead(caught.value)
    with pytest.raises(UsageError, match="and can be in no other"):
        Cluster("127.0.0.1:1")
    cluster.ray.kill(ours)


# ---- placing -----------------------------------------------------------------------------------------------------


def test_a_pipeline_runs_behind_actors(cluster: Cluster) -> None:
    with WorkersPipeline(_stages(2), hosting=_hosting(cluster, HEAD, HEAD)) as pipeline:
        pipeline.launch(_prompt())
        events = pipeline.events()
        while not isinstance(landed := events[-1], Landed):
            events = pipeline.events()
        assert landed.tokens == [hash_token([7], 50, 3)]
        pids = [_pid(cluster, worker.process) for worker in pipeline._fleet.workers]
        assert all(map(psutil.pid_exists, pids))
    deadline = time.monotonic() + 5.0
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.02)


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_station_sees_the_gpus_that_its_hosts_agent_sees(cluster: Cluster, gpus: int) -> None:
    """Else it would not find the one that it is told by its name there: Ray would show it one, as the first."""
    places = [Place("head", "127.0.0.1", needs=Needs(1, gpus=gpus))]
    with WorkersPipeline(_stages(1), hosting=_hosting(cluster, *places)) as pipeline:
        (worker,) = pipeline._fleet.workers
        assert psutil.Process(_pid(cluster, worker.process)).environ()["CUDA_VISIBLE_DEVICES"] == VISIBLE


def test_what_no_host_of_ours_has_is_told_at_once(cluster: Cluster) -> None:
    places = [HEAD, Place("head", "127.0.0.1", needs=Needs(1, cpus=CPUS + 60, gpus=2))]
    with pytest.raises(StationFailed) as caught:
        WorkersPipeline(_stages(2), hosting=_hosting(cluster, *places), start_timeout=30.0)
    assert caught.value.station == "stage 1 on head"
    assert "head does not have what it asks for: 64 CPU, 2 GPU" in caught.value.reason


def test_what_others_have_taken_is_told_while_a_station_waits_for_it(cluster: Cluster) -> None:
    keys = RunKeys.new()
    net = Net(keys, 10.0)
    socket, (endpoint,) = net.bind(["tcp://127.0.0.1:*"])
    door = Door("stage 0", 0, endpoint, keys, [], 10.0, 10.0, 60.0)
    launcher = _hosting(cluster, HEAD).launcher()
    first = launcher.start(door, "head", Needs(1, cpus=CPUS - 1))
    assert socket.poll(10_000) and first.log_tail() == ""
    second = launcher.start(door, "head", Needs(1, cpus=2))
    assert "Ray has not started it yet" in second.log_tail() and "it asks for 2 CPU there" in second.log_tail()
    second.kill()
    assert second.wait(3.0), "it never began"
    first.kill()
    assert first.wait(5.0)
    for process in (first, second):
        process.close()
    launcher.close()
    net.close()


def test_a_host_that_ray_does_not_know_is_named(cluster: Cluster) -> None:
    hosting = Hosting([Place("moon", "127.0.0.1")], HEAD, lambda: RayLauncher(cluster, {"head": "x"}))
    with pytest.raises(StationFailed, match="Ray has no host 'moon'") as caught:
        WorkersPipeline(_stages(1), hosting=hosting)
    assert caught.value.hint == "It has: head."


# ---- losing ------------------------------------------------------------------------------------------------------


def test_a_node_that_is_lost_ends_its_processes_soon(here: RayHere, cluster: Cluster) -> None:
    number = here.start(CPUS)
    with WorkersPipeline(_stages(2), hosting=_hosting(cluster, HEAD, Place("other", "127.0.0.1"))) as pipeline:
        here.lose(number)
        lost = time.monotonic()
        failed = pipeline.events(10.0)[-1]
        while not isinstance(failed, Failed):
            failed = pipeline.events(10.0)[-1]
        assert failed.station == "stage 1 on other" and time.monotonic() - lost < 5
        assert "Ray lost it or other" in failed.reason or "no sign of life" in failed.reason, "whoever sees it first"
        closing = time.monotonic()
    assert time.monotonic() - closing < 2.5


def test_a_worker_whose_actor_is_out_of_reach_is_not_waited_for(cluster: Cluster) -> None:
    """Ray says nothing for a minute when a host falls silent."""
    keys = RunKeys.new()
    net = Net(keys, 10.0)
    socket, (endpoint,) = net.bind(["tcp://127.0.0.1:*"])
    launcher = _hosting(cluster, HEAD).launcher()
    process = launcher.start(Door("stage 0", 0, endpoint, keys, [], 0.5, 0.5, 60.0), "head", Needs())
    assert socket.poll(10_000)
    worker = psutil.Process(_pid(cluster, process))
    actor = worker.parent()
    assert actor
    actor.suspend()
    process.terminate()
    assert not process.wait(0.2)
    assert "cannot reach head" in process.log_tail()
    process.kill()
    assert process.wait(3.0), "its actor is ended instead"
    assert "Ray lost it or head" in process.last_words()
    process.close()
    launcher.close()
    net.close()
    deadline = time.monotonic() + 5.0
    while worker.status() != psutil.STATUS_ZOMBIE:  # it has ended by itself, without an engine
        assert time.monotonic() < deadline
        time.sleep(0.02)
    actor.resume()
