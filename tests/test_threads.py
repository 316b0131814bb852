"""Cores that may be used."""

from __future__ import annotations

import os

import pytest

from fullpipe.threads import cores


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()  # as on macOS
