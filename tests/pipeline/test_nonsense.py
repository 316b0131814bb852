"""Workers that answer nonsense: each is named, by one `Failed`, and nothing is raised in the caller.

The test plays the workers itself, over the connections that real ones would have.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fullpipe.errors import PipelineError, StationFailed
from fullpipe.messages import Drafted, Event, Expansion, Failed, Flight, Landed, Leg, Opening, Part, Ready
from fullpipe.pipeline import launch
from fullpipe.pipeline.launch import Fleet, Worker
from fullpipe.pipeline.wire import Channel, NonsenseError, dump_flight, load_flight, pack, packed_size, unpack
from fullpipe.pipeline.worker import Neighbours
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.spec import StationSpec

STAGE = StationSpec("fullpipe.stations.scripted:ScriptedStage", {"index": 0, "num_stages": 1, "truth": {}})
DRAFT = StationSpec("fullpipe.stations.scripted:EchoDraft")
Frame = dict[str, Any]

LANDED: Frame = {"kind": "landed", "flight": 0, "nodes": [1], "tokens": [5], "margins": [1.5], "others": [[7]],
                 "legs": [["stage 0", 1.0, 2, [-1, 1]]], "logprobs": [[[5, -0.1], [7, -2.5]]]}
DRAFTED: Frame = {"kind": "drafted", "job": 0, "leg": ["draft", 1.0, 2.0, [-1, 1]], "taps": [3, 99],
                  "expansions": [[1, [5, 6], [-0.5, -1.0], [-1, 0]]]}


def _flight(number: int = 0) -> Flight:
    """A prompt of two tokens; the second is node 1, and wanted."""
    part = Part(0, [0, 1], [-1, 1], [7, 8], [0, 1], [0, 1], [[], []], [False, True])
    return Flight(number, [part], [Opening(0, 64, 2, SamplingParams())])


def _frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


class Stage:
    """A pipeline whose workers the test plays; `ends` are their ends of the connections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: Frame) -> None:
        self.ends: list[socket.socket] = []
        monkeypatch.setattr(launch, "_STOP_S", 0.0)
        monkeypatch.setattr(Fleet, "_start_process", lambda fleet, config, fds: self._start(fleet, config, first))

    def _start(self, fleet: Fleet, config: Frame, first: Frame) -> None:
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        log = launch.tempfile.TemporaryFile()  # the fleet closes it
        process = subprocess.Popen(["sleep", "60"])
        worker = Worker(config["name"], process, Channel(ours), log, time.monotonic())
        fleet.workers.append(worker)
        fleet._selector.register(worker.channel, launch.selectors.EVENT_READ, worker)
        Channel(theirs).send(first)

    def say(self, frame: Frame | bytes, worker: int = 0) -> None:
        self.ends[worker].sendall(frame if isinstance(frame, bytes) else _frame(json.dumps(frame).encode()))


Play = Callable[[Frame], Stage]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    made: list[Stage] = []

    def begin(first: Frame) -> Stage:
        made.append(Stage(monkeypatch, first))
        return made[-1]

    yield begin
    for stage in made:
        for end in stage.ends:
            end.close()


def _answer(play: Play, frame: Frame | bytes) -> list[Event]:
    """What a pipeline with a flight and a job under way makes of it."""
    stage = play({"kind": "up"})
    with WorkersPipeline([STAGE], DRAFT) as pipeline:
        assert isinstance(pipeline.events()[0], Ready)
        pipeline.launch(_flight())
        pipeline.draft(_flight())
        stage.say(frame, worker=int(isinstance(frame, dict) and frame.get("kind") == "drafted"))
        events = pipeline.events(10.0)
        if isinstance(events[-1], Failed):
            with pytest.raises(PipelineError, match="has failed"):
                pipeline.events()
        return events


def test_sense_is_understood(play: Play) -> None:
    (landed,) = _answer(play, LANDED)
    assert landed == Landed(landed.time, 0, [1], [5], [1.5], [Leg("stage 0", 1.0, 2, [-1, 1])], [[7]],
                            [[(5, -0.1), (7, -2.5)]])
    (drafted,) = _answer(play, DRAFTED)
    assert drafted == Drafted(drafted.time, 0, [Expansion(1, [5, 6], [-0.5, -1.0], [-1, 0])],
                              Leg("draft", 1.0, 2.0, [-1, 1]))
    short = {key: value for key, value in LANDED.items() if key != "logprobs"} | {"margins": [], "others": []}
    (landed,) = _answer(play, short)
    assert isinstance(landed, Landed) and landed.logprobs == []


@pytest.mark.parametrize("raw", [
    b"Traceback (most recent call last):\n", struct.pack("<I", (1 << 26) + 1), _frame(b"{"), _frame(b"\xff\xfe"),
    _frame(b"[1, 2]"), _frame(b"[" * 100_000), _frame(b""), _frame(b"null"), _frame(b'{"kind": "landed"}'),
    _frame(b"{}"), _frame(b'{"kind": []}'), _frame(b'{"kind": "end"}'), _frame(b'{"kind": "up"}'),
    _frame(b'{"kind": "failed"}'), _frame(b'{"kind": "failed", "error": "OSError", "message": 3}'),
    _frame(b'{"kind": "lost", "message": null}'),
], ids=range(16))
def test_bytes_that_are_no_message(play: Play, raw: bytes) -> None:
    (failed,) = _answer(play, raw)
    assert isinstance(failed, Failed) and failed.station == "stage 0"
    assert failed.reason.startswith("answers nonsense: ")


MISSING = object()
CHANGES: list[tuple[Frame, str, Any]] = [
    *((LANDED, field, MISSING) for field in ("flight", "nodes", "tokens", "margins", "others", "legs")),
    (LANDED, "flight", 1), (LANDED, "flight", "0"), (LANDED, "flight", False), (LANDED, "flight", None),
    (LANDED, "nodes", [2]), (LANDED, "nodes", [-1]), (LANDED, "nodes", [True]), (LANDED, "nodes", []),
    (LANDED, "nodes", [1, 1]), (LANDED, "nodes", 1), (LANDED, "nodes", {"1": 1}),
    (LANDED, "tokens", [-1]), (LANDED, "tokens", [5.0]), (LANDED, "tokens", ["5"]), (LANDED, "tokens", [None]),
    (LANDED, "tokens", [[5]]), (LANDED, "tokens", [1 << 31]), (LANDED, "tokens", [5, 6]), (LANDED, "tokens", "5"),
    (LANDED, "margins", ["1"]), (LANDED, "margins", [1.0, 2.0]), (LANDED, "margins", None),
    (LANDED, "others", [7]), (LANDED, "others", [[-7]]), (LANDED, "others", [[7], [8]]),
    (LANDED, "logprobs", [[5, -0.1]]), (LANDED, "logprobs", [[[5]]]), (LANDED, "logprobs", [[[-5, -0.1]]]),
    (LANDED, "logprobs", [[[5, "-0.1"]]]), (LANDED, "logprobs", [[], []]), (LANDED, "logprobs", 3),
    (LANDED, "legs", []), (LANDED, "legs", [["stage 1", 1.0, 2.0, [1]]]), (LANDED, "legs", [["stage 0", 1.0, 2.0]]),
    (LANDED, "legs", [["stage 0", 1.0, 2.0, [3]]]), (LANDED, "legs", [["stage 0", "1", 2.0, [1]]]),
    (LANDED, "legs", [[["stage 0"], 1.0, 2.0, [1]]]), (LANDED, "kind", "drafted"),
    *((DRAFTED, field, MISSING) for field in ("job", "leg", "expansions")),
    (DRAFTED, "job", 1), (DRAFTED, "leg", None), (DRAFTED, "taps", [1]), (DRAFTED, "taps", [1, "2"]),
    (DRAFTED, "expansions", [[1, [5], [-0.5]]]), (DRAFTED, "expansions", [[2, [5], [-0.5], [-1]]]),
    (DRAFTED, "expansions", [[1, [5], [-0.5, -1.0], [-1]]]), (DRAFTED, "expansions", [[1, [5], [-0.5], [0]]]),
    (DRAFTED, "expansions", [[1, [-5], [-0.5], [-1]]]), (DRAFTED, "expansions", [[1, [5], [float("nan")], [-1]]]),
    (DRAFTED, "expansions", [["1", [5], [-0.5], [-1]]]), (DRAFTED, "expansions", [3]),
    ({"kind": "beat", "done": 0}, "done", MISSING), ({"kind": "beat", "done": 0}, "done", "0"),
    ({"kind": "beat", "done": 0}, "done", 7), ({"kind": "ready"}, "kind", "rready"),
]


@pytest.mark.parametrize(("frame", "field", "value"), CHANGES,
                         ids=[f"{at}-{field}" for at, (_, field, _) in enumerate(CHANGES)])
def test_a_field_that_makes_no_sense(play: Play, frame: Frame, field: str, value: Any) -> None:
    frame = {key: given for key, given in frame.items() if key != field} | ({} if value is MISSING else {field: value})
    (failed,) = _answer(play, frame)
    assert isinstance(failed, Failed)
    assert failed.station == ("draft" if frame.get("kind") == "drafted" else "stage 0")
    assert failed.reason.startswith("answers nonsense: ") and len(failed.reason) < 300


def test_what_comes_before_the_nonsense_counts(play: Play) -> None:
    ready = _frame(b'{"kind": "ready"}')
    first, second = _answer(play, ready + ready)
    assert isinstance(first, Ready) and isinstance(second, Failed)
    assert "kind 'ready'" in second.reason


def test_nonsense_at_the_start(play: Play) -> None:
    play({"kind": "hello"})
    with pytest.raises(StationFailed, match="answers nonsense"):
        WorkersPipeline([STAGE])


# ---- between workers -------------------------------------------------------------------------------------


def _hop(header: Any = None, rows: Any = None) -> Any:
    """What a stage makes of its neighbour's message."""
    message = pack([dump_flight(_flight()), [], 0.0] if header is None else header,
                   np.zeros((2, 4), np.float32) if rows is None else rows)
    neighbours = Neighbours({"rank": 1, "world": 1})
    neighbours._before.receive = lambda: (*neighbours._before.understood(message), len(message))  # type: ignore
    return neighbours._receive()


def test_a_neighbours_sense_is_understood() -> None:
    assert _hop().flight == _flight()


@pytest.mark.parametrize(("header", "rows"), [
    (3, None), ([], None), ([[], [], 0.0], None), ([dump_flight(_flight()), []], None),
    ([dump_flight(_flight()), [], "soon"], None), ([[0, [[1, 2]], [], [], 0], [], 0.0], None),
    ([[0, [[0, [], [1], [], [], [], [], []]], [], [], 0], [], 0.0], None), (None, np.zeros((3, 4), np.float32)),
], ids=range(8))
def test_a_neighbours_nonsense(header: Any, rows: Any) -> None:
    with pytest.raises(NonsenseError, match="a message of stage 0's"):
        _hop(header, rows)


@pytest.mark.parametrize("sizes", [(1 << 40, 20), (100, 200), (0, 0)])
def test_sizes_that_cannot_be(sizes: tuple[int, int]) -> None:
    message = np.zeros(128, np.uint8)
    struct.pack_into("<QQ", message.data, 0, *sizes)
    with pytest.raises(NonsenseError, match="a message of"):
        packed_size(message)


@pytest.mark.parametrize("described", [["numpy", "|O", [1]], ["torch", "load", [1]], ["torch", "float32", [99]], [3]])
def test_rows_that_cannot_be(described: Any) -> None:
    message = pack([1], np.zeros(4, np.float32))
    head = json.dumps([[1], described]).encode()
    struct.pack_into("<QQ", message.data, 0, len(message), len(head))
    message[16 : 16 + len(head)] = np.frombuffer(head, np.uint8)
    with pytest.raises(NonsenseError, match="cannot be read"):
        unpack(message)


def test_an_opening_keeps_what_it_copies() -> None:
    flight = Flight(0, opens=[Opening(3, 64, 2, SamplingParams(logprobs=2), copy_from=1, copied=[4, 0, 9])])
    assert load_flight(json.loads(json.dumps(dump_flight(flight)))) == flight
