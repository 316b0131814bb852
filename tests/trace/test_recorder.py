"""Events survive the way to a file and back, and a failing disk does not stop a run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from fullpipe import events
from fullpipe.errors import UsageError
from fullpipe.events import (
    Admitted,
    Asked,
    Attached,
    Died,
    Emitted,
    Finished,
    Launched,
    Preempted,
    PromptScored,
    Submitted,
)
from fullpipe.messages import Drafted, Event, Expansion, Failed, Landed, Leg, Ready, Scored, Woken
from fullpipe.trace.recorder import JsonlRecorder, Recorder, read_events

EVENTS: list[Event] = [
    Ready(0.0),
    Submitted(0.0, 0, 5, -0.25),
    Admitted(0.1, 0, 3),
    Launched(0.125, 3, [7, 8], [-1, 7], [11, 12], [4, 5], [0, 1], {0: 3}),
    Asked(0.125, 1, {0: 2}),
    Drafted(0.1 + 0.2, 1, [Expansion(7, [1, 2], [-0.5, -3.25], [-1, 0]), Expansion(8, [], [], [])],
            Leg("draft", 0.1, 0.2, [7, 8])),
    Landed(1e-9, 3, [7], [42], [None], [[41, 43]], [[(42, -0.5)]],
           [Leg("stage 0", 0.0, 0.5, [7, 8]), Leg("stage 1", 0.5, 1.0, [7])],
           [Scored(3, 1, 2, [(9, -1.5), (8, -0.5)])]),
    Emitted(2.0, 0, 7, 42, 4, "hit"),
    Emitted(2.0, 0, 9, 43, 5, "miss", 0.75),
    Emitted(2.0, 0, 9, 44, 6, "last", None, logprobs=[(44, -1.5), (45, -2.0)]),
    Died(2.5, 0, [8]),
    Woken(2.75),
    Preempted(2.75, 0),
    Attached(2.875),
    Failed(3.0, "stage 3", 'said "no"\nand\u2028died'),
    Finished(4.0, 0, "stop", {"token": 2, "texts": ["a", None]}),
    PromptScored(1.0, 0, [Scored(3, 1, 2, [(9, -1.5), (8, -0.5)])]),
]


def record(path: Path, events: list[Event]) -> None:
    with JsonlRecorder(path) as recorder:
        for event in events:
            recorder(event)


def test_every_kind_of_event_comes_back_equal(tmp_path: Path) -> None:
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)}
    assert {type(event) for event in EVENTS} == kinds - {Event}
    record(tmp_path / "trace.jsonl", EVENTS)
    assert list(read_events(tmp_path / "trace.jsonl")) == EVENTS


def test_one_line_per_event_with_its_type(tmp_path: Path) -> None:
    record(tmp_path / "trace.jsonl", EVENTS)
    lines = (tmp_path / "trace.jsonl").read_bytes().splitlines()
    assert len(lines) == len(EVENTS)
    assert json.loads(lines[7]) == {"type": "Emitted", "time": 2.0, "request": 0, "node": 7, "token": 42,
                                    "position": 4, "fate": "hit", "margin": None, "altered": False, "logprobs": []}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    """Which knows no infinity: in details, where one may be, it becomes nothing."""
    odd = Finished(4.0, 0, "stop", {"worst": math.inf, "best": (np.float32("inf"), {"x": -math.inf})})
    record(tmp_path / "trace.jsonl", [*EVENTS, odd])
    for line in (tmp_path / "trace.jsonl").read_bytes().splitlines():
        json.loads(line, parse_constant=refuse)
    *_, finished = read_events(tmp_path / "trace.jsonl")
    assert isinstance(finished, Finished)
    assert finished.detail == {"worst": None, "best": [None, {"x": None}]}


def test_details_are_kept_as_far_as_json_goes(tmp_path: Path) -> None:
    record(tmp_path / "t", [Finished(0.0, 0, "error", {"n": np.int64(3), "at": Path("x"), "pair": (1, 2)})])
    [event] = read_events(tmp_path / "t")
    assert isinstance(event, Finished)
    assert event.detail == {"n": 3, "at": repr(Path("x")), "pair": [1, 2]}


def test_is_buffered_and_complete_after_close(tmp_path: Path) -> None:
    path = tmp_path / "t"
    recorder = JsonlRecorder(path)
    recorder(Ready(1.0))
    assert path.read_bytes() == b""
    recorder.close()
    recorder.close()
    recorder(Ready(2.0))
    assert list(read_events(path)) == [Ready(1.0)]


def test_a_list_is_a_recorder() -> None:
    events: list[Event] = []
    recorder: Recorder = events.append
    recorder(Ready(0.0))
    assert events == [Ready(0.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("count", [1, 5000])
def test_a_full_disk_is_reported_once_and_stops_nothing(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """One event fails in `close`, five thousand fail while the run goes on."""
    with caplog.at_level(logging.WARNING):
        record(Path("/dev/full"), [Ready(float(i)) for i in range(count)])
    [message] = caplog.messages
    assert "/dev/full" in message
    assert "No space left" in message


def test_a_file_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the trace"):
        JsonlRecorder(tmp_path / "nowhere" / "t")


def test_a_line_cut_short_by_a_kill_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "t"
    record(path, EVENTS)
    path.write_bytes(path.read_bytes()[:-5])
    assert list(read_events(path)) == EVENTS[:-1]


@pytest.mark.parametrize("line", ["{", "[1]", '{"time": 1.0}', '{"type": "Nonsense", "time": 1.0}',
                                  '{"type": "Ready", "time": 1.0, "extra": 1}',
                                  '{"type": "Landed", "time": 1.0}', '{"type": "Ready", "time": "soon"}'])
def test_damage_is_reported_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t"
    record(path, [Ready(0.0)])
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match="line 2 is not an event"):
        list(read_events(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the trace"):
        list(read_events(tmp_path / "none"))
