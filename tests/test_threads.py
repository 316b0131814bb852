"""Cores that may be used, and work beside the main thread."""

from __future__ import annotations

import _thread
import os
from typing import NoReturn

import pytest

from fullpipe.threads import beside, cores


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()  # as on macOS


def test_nobody_waits_for_a_thread_that_could_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    stopped: list[None] = []
    with pytest.raises(RuntimeError, match="can't start"):
        beside(lambda: 1, stop=lambda: stopped.append(None), every_s=0.01)
    assert stopped
