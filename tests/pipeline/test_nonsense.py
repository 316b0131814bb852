"""Workers that answer nonsense: each is named, by one `Failed`, and nothing is raised in the caller.

The test plays the workers itself, over the connections that real ones would have.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import msgspec
import numpy as np
import pytest

from fullpipe.errors import PipelineError, StationFailed
from fullpipe.messages import Drafted, Event, Expansion, Failed, Flight, Landed, Leg, Opening, Part, Ready
from fullpipe.pipeline import fleet, launch
from fullpipe.pipeline.fleet import Worker
from fullpipe.pipeline.frames import FromWorker, Hop, Setup
from fullpipe.pipeline.hops import Incoming
from fullpipe.pipeline.wire import Channel, NonsenseError, pack, packed_size, unpack
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.spec import StationSpec

STAGE = StationSpec("fullpipe.stations.scripted:ScriptedStage", {"index": 0, "num_stages": 1, "truth": {}})
DRAFT = StationSpec("fullpipe.stations.scripted:EchoDraft")
Frame = dict[str, Any]
encode = msgspec.msgpack.encode

LANDED: Frame = {"kind": "Answered", "stays": [[0.0, 0.25, 0.5, 0, [-1, 1]]], "landed":
                 {"type": "Landed", "time": 0.0, "flight": 0, "nodes": [1], "tokens": [5], "margins": [1.5],
                  "others": [[7]], "logprobs": [[[5, -0.1], [7, -2.5]]]}}
DRAFTED: Frame = {"kind": "Guessed", "job": 0, "stay": [0.0, 0.0, 0.25, 0.0, [-1, 1]], "taps": 3, "tap_bytes": 99,
                  "expansions": [{"node": 1, "tokens": [5, 6], "logprobs": [-0.5, -1.0], "parents": [-1, 0]}]}


def _flight(number: int = 0) -> Flight:
    """A prompt of two tokens; the second is node 1, and wanted."""
    part = Part(0, [0, 1], [-1, 1], [7, 8], [0, 1], [0, 1], [[], []], [False, True])
    return Flight(number, [part], [Opening(0, 2, SamplingParams())])


def _frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


class Stage:
    """A pipeline whose workers the test plays; `ends` are their ends of the connections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: Frame) -> None:
        self.ends: list[socket.socket] = []
        self._first = first
        monkeypatch.setattr(fleet, "_STOP_S", 0.0)
        monkeypatch.setattr(launch, "start_process", self._start)

    def _start(self, setup: Setup) -> Worker:
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        log = launch.tempfile.TemporaryFile()  # the fleet closes it
        theirs.sendall(_frame(encode(self._first)))
        return Worker(setup.name, subprocess.Popen(["sleep", "60"]), Channel(ours, FromWorker), log, time.monotonic())

    def say(self, frame: Frame | bytes, worker: int = 0) -> None:
        self.ends[worker].sendall(frame if isinstance(frame, bytes) else _frame(encode(frame)))


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
    stage = play({"kind": "Up"})
    with WorkersPipeline([STAGE], DRAFT) as pipeline:
        assert isinstance(pipeline.events()[0], Ready)
        pipeline.launch(_flight())
        pipeline.draft(_flight())
        stage.say(frame, worker=int(isinstance(frame, dict) and frame.get("kind") == "Guessed"))
        events = pipeline.events(10.0)
        if isinstance(events[-1], Failed):
            with pytest.raises(PipelineError, match="has failed"):
                pipeline.events()
        return events


def test_sense_is_understood(play: Play) -> None:
    (landed,) = _answer(play, LANDED)
    assert isinstance(landed, Landed)
    (leg,) = landed.legs
    assert landed == Landed(landed.time, 0, [1], [5], [1.5], [[7]], [[(5, -0.1), (7, -2.5)]],
                            [Leg("stage 0", leg.start, leg.end, [-1, 1])])
    assert leg.start <= leg.end <= landed.time
    (drafted,) = _answer(play, DRAFTED)
    assert isinstance(drafted, Drafted)
    leg = drafted.leg
    assert drafted == Drafted(drafted.time, 0, [Expansion(1, [5, 6], [-0.5, -1.0], [-1, 0])],
                              Leg("draft", leg.start, leg.end, [-1, 1]))
    assert leg.start <= leg.end <= drafted.time
    (landed,) = _answer(play, _changed(LANDED, ("landed", "logprobs"), MISSING))
    assert isinstance(landed, Landed) and landed.logprobs == []
    (landed,) = _answer(play, _changed(LANDED, ("landed", "margins"), [None]))
    assert isinstance(landed, Landed) and landed.margins == [None]


MISSING = object()


def _changed(frame: Frame, path: tuple[str, ...], value: Any) -> Frame:
    """The frame with another value at one place, or without what is there."""
    changed = deepcopy(frame)
    place = changed
    for name in path[:-1]:
        place = place[name]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


@pytest.mark.parametrize("raw", [
    b"Traceback (most recent call last):\n", struct.pack("<I", (1 << 26) + 1), _frame(b"\x81"), _frame(b"\xff\xfe"),
    _frame(encode([1, 2])), _frame(b"\x91" * 100_000), _frame(b""), _frame(encode(None)),
    *(_frame(encode(one)) for one in (
        {"kind": "Answered"}, {}, {"kind": []}, {"kind": "End"}, {"kind": "Up"}, {"kind": "Broken"},
        {"kind": "Broken", "error": "OSError", "message": 3}, {"kind": "Lost", "message": None})),
    _frame(b'{"kind": "Free"}'),
], ids=range(17))
def test_bytes_that_are_no_message(play: Play, raw: bytes) -> None:
    (failed,) = _answer(play, raw)
    assert isinstance(failed, Failed) and failed.station == "stage 0"
    assert failed.reason.startswith("answers nonsense: ")


SAID, GUESS = DRAFTED["expansions"][0], "expansions"
BEAT: Frame = {"kind": "Beat", "done": 0}
CHANGES: list[tuple[Frame, tuple[str, ...], Any]] = [
    *((LANDED, (field,), MISSING) for field in ("landed", "stays")),
    *((LANDED, ("landed", field), MISSING) for field in ("flight", "nodes", "tokens")),
    *((LANDED, ("landed", field), value) for field, values in {
        "flight": [1, "0", False, None], "nodes": [[2], [-1], [True], [], [1, 1], 1, {"1": 1}],
        "tokens": [[-1], [5.0], ["5"], [None], [[5]], [1 << 31], [5, 6], "5"],
        "margins": [["1"], [1.0, 2.0], None], "others": [[7], [[-7]], [[7], [8]]],
        "logprobs": [[[5, -0.1]], [[[5]]], [[[-5, -0.1]]], [[[5, "-0.1"]]], [[], []], 3, [[[5, float("nan")]]]],
        "type": ["Ready", 3], "verdict": [1],
    }.items() for value in values),
    *((LANDED, ("stays",), value) for value in (
        [], [[0.0, 0.0, 1.0, 0.0, [1]]] * 2, [[0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0, 0.0, [3]]],
        [[0.0, 0.0, "1", 0.0, [1]]], [[0.0, -1.0, 1.0, 0.0, [1]]], [[0.0, 0.0, float("nan"), 0.0, [1]]],
        [[0.0, 0.0, 1.0, float("inf"), [1]]], 3)),
    (LANDED, ("carried",), -1.0), (LANDED, ("kind",), "Guessed"),
    *((DRAFTED, (field,), MISSING) for field in ("job", "stay", "expansions")),
    (DRAFTED, ("job",), 1), (DRAFTED, ("stay",), None), (DRAFTED, ("taps",), [1]), (DRAFTED, ("tap_bytes",), "2"),
    (DRAFTED, ("stay",), [0.0, 0.0, 1.0, 0.0, [3]]),
    *((DRAFTED, (GUESS,), [value]) for value in (
        3, {name: SAID[name] for name in ("node", "tokens", "logprobs")}, SAID | {"node": 2}, SAID | {"node": "1"},
        SAID | {"logprobs": [-0.5, -1.0, -2.0]}, SAID | {"parents": [0, 0]}, SAID | {"tokens": [-5, 6]},
        SAID | {"logprobs": [-0.5, float("nan")]}, SAID | {"sources": [1]}, SAID | {"sources": [1, -1]},
        *(SAID | {"computed": computed} for computed in ([2], [-1], [1], [0, 0], ["0"])))),
    (BEAT, ("done",), MISSING), (BEAT, ("done",), "0"), (BEAT, ("done",), 7), (BEAT, ("done",), -2),
    ({"kind": "Free"}, ("kind",), "RFree"),
]


@pytest.mark.parametrize(("frame", "path", "value"), CHANGES,
                         ids=[f"{at}-{path[-1]}" for at, (_, path, _) in enumerate(CHANGES)])
def test_a_field_that_makes_no_sense(play: Play, frame: Frame, path: tuple[str, ...], value: Any) -> None:
    frame = _changed(frame, path, value)
    (failed,) = _answer(play, frame)
    assert isinstance(failed, Failed)
    assert failed.station == ("draft" if frame.get("kind") == "Guessed" else "stage 0")
    assert failed.reason.startswith("answers nonsense: ") and len(failed.reason) < 400


def test_what_comes_before_the_nonsense_counts(play: Play) -> None:
    ready = _frame(encode({"kind": "Free"}))
    first, second = _answer(play, ready + ready)
    assert isinstance(first, Ready) and isinstance(second, Failed)
    assert "kind Free" in second.reason


def test_nonsense_at_the_start(play: Play) -> None:
    play({"kind": "Hello"})
    with pytest.raises(StationFailed, match="answers nonsense"):
        WorkersPipeline([STAGE])


# ---- between workers -------------------------------------------------------------------------------------


def _hop(header: Any = None, rows: Any = None) -> Any:
    """What a stage makes of its neighbour's message."""
    message = pack(Hop(_flight(), []) if header is None else header,
                   np.zeros((2, 4), np.float32) if rows is None else rows)
    return Incoming(0, "stage 0", Hop).understood(message)[0]


def test_a_neighbours_sense_is_understood() -> None:
    assert _hop() == Hop(_flight(), [])


def _uneven() -> Flight:
    flight = _flight()
    flight.parts[0].tokens.pop()
    return flight


@pytest.mark.parametrize(("header", "rows"), [
    (3, None), ([], None), ([[], []], None), ([_flight()], None), ([_flight(), [[0.0, 0.0, "soon", 0.0, []]]], None),
    ([[0, [[1, 2]], [], [], "all"], []], None), (Hop(_uneven(), []), None), (None, np.zeros((3, 4), np.float32)),
], ids=range(8))
def test_a_neighbours_nonsense(header: Any, rows: Any) -> None:
    with pytest.raises(NonsenseError, match="a message of stage 0's"):
        _hop(header, rows)


def test_a_neighbour_that_sends_no_rows() -> None:
    with pytest.raises(NonsenseError, match="a message of stage 0's: no rows"):
        Incoming(0, "stage 0", Hop).understood(pack(Hop(_flight(), []), None))


@pytest.mark.parametrize("sizes", [(1 << 40, 20), (100, 200), (0, 0)])
def test_sizes_that_cannot_be(sizes: tuple[int, int]) -> None:
    message = np.zeros(128, np.uint8)
    struct.pack_into("<QQ", message.data, 0, *sizes)
    with pytest.raises(NonsenseError, match="a message of"):
        packed_size(message)


@pytest.mark.parametrize("described", [["numpy", "|O", [1]], ["torch", "load", [1]], ["torch", "float32", [99]], [3],
                                       ["jax", "float32", [4]], ["numpy", "float32"]])
def test_rows_that_cannot_be(described: Any) -> None:
    message = pack([1], np.zeros(4, np.float32))
    head = encode([[1], described])
    struct.pack_into("<QQ", message.data, 0, len(message), len(head))
    message[16 : 16 + len(head)] = np.frombuffer(head, np.uint8)
    with pytest.raises(NonsenseError, match="cannot be read"):
        unpack(message, list[int])
