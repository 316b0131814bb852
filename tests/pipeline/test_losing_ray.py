"""What is left of a process's connection with Ray when something goes wrong. The test plays Ray."""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from fullpipe.errors import PipelineError, UsageError
from fullpipe.pipeline.frames import Door
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch import ray as launch_ray
from fullpipe.pipeline.launch.base import Needs
from fullpipe.pipeline.launch.ray import Cluster, RayLauncher

DOOR = Door("stage 0", 0, "ipc://@x", RunKeys(b"", b""), [], 5.0, 5.0, 60.0)


class PlayedRay:
    """Is the library, with one connection at a time."""

    def __init__(self) -> None:
        self.job, self.connected, self.gcs_address = 0, False, "10.0.0.1:6379"

    def init(self, **asked: Any) -> None:
        if self.connected:
            raise RuntimeError("Maybe you called ray.init twice by accident?")
        self.job, self.connected = self.job + 1, True

    def shutdown(self) -> None:
        self.connected = False

    def is_initialized(self) -> bool:
        return self.connected

    def get_runtime_context(self) -> PlayedRay:
        return self

    def get_job_id(self) -> str:
        return str(self.job)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> PlayedRay:
    played = PlayedRay()
    monkeypatch.setattr(launch_ray, "_ray", lambda: played)
    monkeypatch.setattr(launch_ray, "_check_reachable", lambda address: None)
    monkeypatch.setattr(launch_ray._Session, "current", None)
    return played


# ---- the connection ------------------------------------------------------------------------------------------


def test_the_last_who_leaves_ends_the_connection(ray: PlayedRay) -> None:
    first, second = Cluster("head:6379"), Cluster("10.0.0.1:6379")
    assert ray.job == 1, "they share it"
    first.close()
    first.close()
    assert ray.connected and second.ray is ray
    second.close()
    assert not ray.connected
    Cluster("head:6379").close()
    assert ray.job == 2


def test_a_connection_of_somebody_else_is_refused_and_left(ray: PlayedRay) -> None:
    ray.init()
    with pytest.raises(UsageError, match="this process uses Ray already") as caught:
        Cluster("head:6379")
    assert ray.connected and "ray.shutdown()" in str(caught.value.hint)


def test_another_cluster_at_the_same_time_is_refused(ray: PlayedRay) -> None:
    here = Cluster("head:6379")
    with pytest.raises(UsageError, match="in the Ray cluster at head:6379, and can be in no other"):
        Cluster("10.0.0.2:6379")
    here.close()
    assert not ray.connected


def test_who_was_thrown_out_leaves_the_next_ones_connection_alone(ray: PlayedRay) -> None:
    """The user ends Ray under us, and begins one of his own."""
    ours = Cluster("head:6379")
    ray.shutdown()
    with pytest.raises(PipelineError, match="is closed"):
        ours.nodes()
    ray.init()
    with pytest.raises(PipelineError, match="is closed"):
        ours.nodes()
    with pytest.raises(UsageError, match="uses Ray already"):
        Cluster("head:6379")
    ours.close()
    assert ray.connected


# ---- processes -----------------------------------------------------------------------------------------------


class Called:
    """Is a method of an actor."""

    def __init__(self, raises: bool) -> None:
        self._raises = raises

    def remote(self, *_: object) -> object:
        if self._raises:
            raise ConnectionError("the head is gone")
        return object()


class PlayedActor:
    def __init__(self) -> None:
        self.run, self.terminate, self.kill = Called(raises=False), Called(raises=True), Called(raises=True)


class PlayedCluster:
    """Is a cluster whose Ray says nothing, until it is lost."""

    def __init__(self) -> None:
        self.lost = threading.Event()
        self.ended: list[Any] = []

    @property
    def ray(self) -> PlayedCluster:
        return self

    def actor(self, *_: object, **__: object) -> PlayedActor:
        return PlayedActor()

    def wait(self, *_: object, timeout: float, **__: object) -> tuple[list[Any], list[Any]]:
        if self.lost.wait(timeout):
            raise ConnectionError("the head is gone")
        return [], []

    def kill(self, actor: Any) -> None:
        self.ended.append(actor)


@pytest.fixture
def cluster() -> Iterator[PlayedCluster]:
    played = PlayedCluster()
    yield played
    played.lost.set()


def _launcher(cluster: PlayedCluster) -> RayLauncher:
    return RayLauncher(cast(Cluster, cluster), {"here": "1"})


def test_processes_of_a_ray_that_is_lost_count_as_ended(cluster: PlayedCluster,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    launcher = _launcher(cluster)
    first = launcher.start(DOOR, "here", Needs())
    assert not first.wait(0.0)
    cluster.lost.set()
    assert first.wait(5.0) and select.select([first.fileno()], [], [], 1.0)[0]
    assert "Ray says nothing of it any more (ConnectionError)" in first.last_words()
    later = launcher.start(DOOR, "here", Needs())
    assert later.wait(5.0) and later.last_words() == first.last_words(), "nobody would ever say of it that it ended"
    launcher.close()
    assert "nobody watches what Ray runs any more" in caplog.text


def test_what_cannot_be_ended_is_logged_and_that_is_all(cluster: PlayedCluster,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    launcher = _launcher(cluster)
    process = launcher.start(DOOR, "here", Needs())
    process.terminate()
    process.kill()
    launcher.close()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "ending a worker on here failed", "killing a worker on here failed"]


def test_a_process_that_nobody_took_ends_with_its_launcher(cluster: PlayedCluster) -> None:
    """Ctrl-C may come between its start and the moment in which anybody knows of it."""
    launcher = _launcher(cluster)
    kept, forgotten = (launcher.start(DOOR, "here", Needs()) for _ in range(2))
    kept.close()
    assert len(cluster.ended) == 1
    launcher.close()
    assert len(cluster.ended) == 2, forgotten
