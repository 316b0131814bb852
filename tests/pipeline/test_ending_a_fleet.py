"""A fleet ends whatever happens: one process that cannot be ended keeps nothing else from being closed."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from fullpipe.pipeline import fleet
from fullpipe.pipeline.fleet import Fleet, Worker
from fullpipe.pipeline.frames import Door
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Launcher, Needs, Process
from fullpipe.pipeline.net import Net, local_endpoint


class Noted(Process):
    """Is a process that notes what is done to it. fails: in what it raises instead."""

    def __init__(self, *fails: str) -> None:
        self._fails, self.done = fails, list[str]()
        self._ended, self._end = os.pipe()

    def _do(self, what: str) -> None:
        self.done.append(what)
        if what in self._fails:
            raise ConnectionError("the head is gone")

    def fileno(self) -> int:
        return self._ended

    def alive(self) -> bool:
        return "kill" not in self.done

    def last_words(self) -> str:
        return ""

    def log_tail(self) -> str:
        return ""

    def terminate(self) -> None:
        self._do("terminate")

    def kill(self) -> None:
        self._do("kill")

    def wait(self, seconds: float | None) -> bool:
        self._do("wait")
        return not self.alive()

    def close(self) -> None:
        os.close(self._ended)
        os.close(self._end)
        self._do("close")


class NotedLauncher(Launcher):
    closed = False

    def start(self, door: Door, host: str, needs: Needs) -> Process:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STOP_S", "_TERM_S", "_KILL_S"):
        monkeypatch.setattr(fleet, name, 0.0)


@pytest.mark.parametrize("fails", ["terminate", "kill", "close", "wait"])
def test_what_cannot_be_ended_keeps_nothing_else_from_being_closed(fails: str,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    before = psutil.Process().num_fds()
    launcher = NotedLauncher()
    stubborn, other = Noted(fails), Noted()
    closing = Fleet(Net(RunKeys.new(), 10.0), [local_endpoint()], launcher)
    for number, process in enumerate((stubborn, other)):
        closing.add(Worker(f"stage {number}", process, time.monotonic()))
    closing.close()
    assert stubborn.done[-1] == other.done[-1] == "close" and launcher.closed
    if fails != "wait":  # else nobody knows who is left, and all end for want of an engine
        assert "kill" in stubborn.done and "kill" in other.done
    assert psutil.Process().num_fds() == before and "the head is gone" in caplog.text


def test_ctrl_c_while_processes_end_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Noted, seconds: float | None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Noted, "wait", interrupted)
    before = psutil.Process().num_fds()
    launcher, process = NotedLauncher(), Noted()
    closing = Fleet(Net(RunKeys.new(), 10.0), [local_endpoint()], launcher)
    closing.add(Worker("stage 0", process, time.monotonic()))
    with pytest.raises(KeyboardInterrupt):
        closing.close()
    assert process.done[-1] == "close" and launcher.closed and psutil.Process().num_fds() == before
