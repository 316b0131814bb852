"""A watch tells of silence, on a clock that the test sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from fullpipe.pipeline import watch as module
from fullpipe.pipeline.fleet import Worker
from fullpipe.pipeline.launch.base import Process
from fullpipe.pipeline.watch import UnderWay, Watch


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def _worker(name: str, host: str) -> Worker:
    return Worker(name, cast(Process, None), heard=100.0, host=host)


def _watch(*stages: Worker, draft: Worker | None = None) -> Watch:
    return Watch(UnderWay(stages), UnderWay([draft] if draft else []), heartbeat_timeout=5.0, timeout=60.0)


def test_silence_on_a_host_is_told_once_and_so_is_its_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fullpipe.pipeline")
    near, far = _worker("stage 0", "h1"), _worker("stage 1", "h2")
    watch = _watch(near, far)
    assert watch.patience() == 1.0
    for moment in (100.9, 101.0, 101.6, 103.0):
        clock.now = near.heard = moment
        assert watch.complaint() is None
    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("WARNING", "stage 1 on h2 has been silent for 1 s")]
    assert watch.patience() == 1.0, "of the other one"
    far.heard = 103.2
    clock.now = 103.3
    assert watch.complaint() is None
    assert [(one.levelname, one.message) for one in caplog.records[1:]] == [
        ("INFO", "stage 1 on h2 is heard again, after 3.2 s")]
    clock.now = near.heard = 104.5
    watch.complaint()
    assert caplog.records[-1].message == "stage 1 on h2 has been silent for 1 s"


def test_a_draft_on_a_host_is_told_of_too_before_it_is_given_up(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    draft = _worker("draft", "h3")
    watch = _watch(_worker("stage 0", ""), draft=draft)
    clock.now = 102.0
    assert watch.complaint() is None and caplog.messages == ["draft on h3 has been silent for 2 s"]
    watch._flights.workers[0].heard = clock.now = 105.5
    assert watch.complaint() == (draft, "no sign of life for 5 s")
    assert watch.patience() == 0.0


def test_nothing_is_told_of_a_pipeline_on_this_machine(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A process that computes on all cores may be silent for a while."""
    watch = _watch(_worker("stage 0", ""))
    clock.now = 104.0
    assert watch.complaint() is None and not caplog.records
    assert watch.patience() == 1.0


@pytest.mark.parametrize("silent", [True, False])
def test_a_neighbour_that_is_silent_is_to_blame_for_a_lost_connection(clock: Clock, silent: bool) -> None:
    """One that is not, on the other side of a link that broke, is no more to blame than the one that says so."""
    first, second = _worker("stage 0", "h1"), _worker("stage 1", "h2")
    watch = _watch(first, second)
    clock.now = 100.5
    watch.note_lost(first, "lost its connection to stage 1")
    first.heard = clock.now = 101.6
    if not silent:
        second.heard = 101.3
    expected = (second, "no sign of life for 1.6 s, and stage 0 on h1 lost its connection to stage 1")
    assert watch.complaint() == (expected if silent else (first, "lost its connection to stage 1"))
