"""Workers that neither speak nor hear: they hold nobody up."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil
import pytest
from test_workers import _stages

from fullpipe.errors import StationFailed
from fullpipe.pipeline import fleet, starting
from fullpipe.pipeline.fleet import Worker
from fullpipe.pipeline.frames import Setup
from fullpipe.pipeline.launch.local import LocalProcess
from fullpipe.pipeline.starting import Hosting, Layout, Place
from fullpipe.pipeline.workers import WorkersPipeline

pytestmark = pytest.mark.processes


def test_a_pipeline_of_which_a_host_is_out_of_reach_closes_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there cannot be ended from here. It ends by itself."""
    monkeypatch.setattr(fleet, "_SILENT_S", 0.5)
    monkeypatch.setattr(fleet, "_CUT_OFF_S", 0.1)
    hosting = Hosting([Place(), Place("far", "127.0.0.1")], Place("", "127.0.0.1"))
    pipeline = WorkersPipeline(_stages(2), hosting=hosting)
    far = pipeline._fleet.workers[1].process
    assert isinstance(far, LocalProcess)
    process = psutil.Process(far.pid)
    process.suspend()
    monkeypatch.setattr(far, "kill", lambda: None)
    time.sleep(0.7)
    begun = time.monotonic()
    pipeline.close()
    assert time.monotonic() - begun < 1.5
    process.kill()
    far._process.wait()


def test_who_hangs_is_killed_at_once_when_the_pipeline_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_SILENT_S", 0.5)
    pipeline = WorkersPipeline(_stages(2))
    workers = [psutil.Process(worker.process.pid) for worker in pipeline._fleet.workers]  # type: ignore[attr-defined]
    workers[-1].suspend()
    time.sleep(0.7)
    begun = time.monotonic()
    pipeline.close()
    assert time.monotonic() - begun < fleet._STOP_S
    assert not any(worker.is_running() for worker in workers)


def test_who_falls_silent_while_it_is_started_is_named_long_before_the_start_timeout(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_SILENT_S", 1.0)
    monkeypatch.setattr(starting, "_LOOK_S", 0.1)
    told = Layout.setup

    def setup(layout: Layout, rank: int, workers: Sequence[Worker]) -> Setup:
        if rank == 1:
            psutil.Process(workers[1].process.pid).suspend()  # type: ignore[attr-defined]
        return told(layout, rank, workers)

    monkeypatch.setattr(Layout, "setup", setup)
    begun = time.monotonic()
    with pytest.raises(StationFailed, match="no sign of life for 1 s while it was started") as caught:
        WorkersPipeline(_stages(2), heartbeat_timeout=0.3, start_timeout=60)
    assert caught.value.station == "stage 1" and time.monotonic() - begun < 20


def test_a_host_that_never_says_hello_is_given_up_long_before_the_start_timeout(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading may take minutes, but not coming to be."""
    monkeypatch.setattr(starting, "_HELLO_S", 0.05)
    with pytest.raises(StationFailed, match=r"did not reach the engine at \S+ within 0.05 s"):
        WorkersPipeline(_stages(1), hosting=Hosting([Place("far", "127.0.0.1")], Place("", "127.0.0.1")))
