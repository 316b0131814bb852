"""Workers that answer nonsense: each is named, by one `Failed`, and nothing is raised in the caller.

The test plays the workers itself, over the connections that real ones would have.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fullpipe.errors import PipelineError, StationFailed
from fullpipe.messages import Drafted, Event, Expansion, Failed, Flight, Landed, Leg, Opening, Part, Ready, Scored
from fullpipe.models.partial import File, Manifest, Source
from fullpipe.pipeline import fleet
from fullpipe.pipeline.bell import Socket
from fullpipe.pipeline.frames import Door, Hop
from fullpipe.pipeline.hops import HIDDEN, Before, Inlet, understood
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Launcher, Needs, Process
from fullpipe.pipeline.links import Link
from fullpipe.pipeline.net import Net, local_endpoint
from fullpipe.pipeline.starting import Hosting
from fullpipe.pipeline.wire import NonsenseError, Outward, pack, unpack
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.spec import StationSpec

STAGE = StationSpec("fullpipe.stations.scripted:ScriptedStage", {"index": 0, "num_stages": 1, "truth": {}})
DRAFT = StationSpec("fullpipe.stations.scripted:EchoDraft")
Frame = dict[str, Any]
encode = msgspec.msgpack.encode

LANDED: Frame = {"kind": "Answered", "stays": [[0.0, 0.25, 0.5, 0, [-1, 1]]], "landed":
                 {"type": "Landed", "time": 0.0, "flight": 0, "nodes": [1], "tokens": [5], "margins": [1.5],
                  "others": [[7]], "logprobs": [[[5, -0.1], [7, -2.5]]],
                  "prompts": [[0, 1, 2, [[8, -1.5], [9, -0.5]]]]}}
DRAFTED: Frame = {"kind": "Guessed", "job": 0, "stay": [0.0, 0.0, 0.25, 0.0, [-1, 1]], "taps": 3, "tap_bytes": 99,
                  "expansions": [{"node": 1, "tokens": [5, 6], "logprobs": [-0.5, -1.0], "parents": [-1, 0]}]}


def _flight(number: int = 0) -> Flight:
    """A prompt of two tokens; the second is node 1, and wanted."""
    part = Part(0, [0, 1], [-1, 1], [7, 8], [0, 1], [0, 1], [[], []], [False, True])
    return Flight(number, [part], [Opening(0, 2, SamplingParams())])


class Played(Process):
    """Is a station that the test plays, by the connections that a real one has."""

    def __init__(self, net: Net, door: Door, first: Frame) -> None:
        self._hears, self._says = net.connect(door.engine, door.name), net.connect(door.engine, f"{door.name} says")
        self._numbers, self._first, self._running = Outward(), first, True
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._begin)
        self._thread.start()

    def _begin(self) -> None:
        """Say hello, and be up once it is told what to be: all while the pipeline is being made."""
        self._hears.send_multipart(Outward().number([encode({"kind": "Hello"})]))
        if self._hears.poll(10_000):
            self._hears.recv_multipart()
            self.say([encode(self._first)])

    def say(self, body: list[bytes]) -> None:
        self.say_raw(self._numbers.number(body))

    def say_raw(self, frames: list[bytes]) -> None:
        self._says.send_multipart(frames)

    def begun(self) -> None:
        """Wait until the sockets are the test's."""
        self._thread.join()

    def fileno(self) -> int:
        return self._end

    def alive(self) -> bool:
        return self._running

    def last_words(self) -> str:
        return "it was played"

    def log_tail(self) -> str:
        return ""

    def terminate(self) -> None:
        self._running = False

    def kill(self) -> None:
        self._running = False

    def wait(self, seconds: float) -> bool:
        self.begun()
        return not self._running

    def close(self) -> None:
        os.close(self._end)
        os.close(self._ended)


class Players(Launcher):
    """Has the test play all stations. first: what each says when it has been told what to be."""

    def __init__(self, first: Frame) -> None:
        self.stations: list[Played] = []
        self._first = first
        self._net: Net | None = None

    def start(self, door: Door, host: str, needs: Needs) -> Process:
        self._net = self._net or Net(door.keys, 10.0)
        self.stations.append(Played(self._net, door, self._first))
        return self.stations[-1]

    def close(self) -> None:
        if self._net:
            self._net.close()


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stations that never leave by themselves."""
    monkeypatch.setattr(fleet, "_STOP_S", 0.0)


def _answer(say: Callable[[Played], None], worker: int = 0) -> list[Event]:
    """What a pipeline with a flight and a job under way makes of what a station says."""
    players = Players({"kind": "Up"})
    with WorkersPipeline([STAGE], DRAFT, hosting=Hosting(launcher=lambda: players)) as pipeline:
        assert isinstance(pipeline.events()[0], Ready)
        pipeline.launch(_flight())
        pipeline.draft(_flight())
        players.stations[worker].begun()
        say(players.stations[worker])
        events = pipeline.events(10.0)
        if isinstance(events[-1], Failed):
            with pytest.raises(PipelineError, match="has failed"):
                pipeline.events()
        return events


def _answer_to(frame: Frame) -> list[Event]:
    """The same for a frame, which the draft says if it is of its kinds."""
    return _answer(lambda station: station.say([encode(frame)]), worker=int(frame.get("kind") == "Guessed"))


def test_sense_is_understood() -> None:
    (landed,) = _answer_to(LANDED)
    assert isinstance(landed, Landed)
    (leg,) = landed.legs
    assert landed == Landed(landed.time, 0, [1], [5], [1.5], [[7]], [[(5, -0.1), (7, -2.5)]],
                            [Leg("stage 0", leg.start, leg.end, [-1, 1])], [Scored(0, 1, 2, [(8, -1.5), (9, -0.5)])])
    assert leg.start <= leg.end <= landed.time
    (drafted,) = _answer_to(DRAFTED)
    assert isinstance(drafted, Drafted)
    leg = drafted.leg
    assert drafted == Drafted(drafted.time, 0, [Expansion(1, [5, 6], [-0.5, -1.0], [-1, 0])],
                              Leg("draft", leg.start, leg.end, [-1, 1]))
    assert leg.start <= leg.end <= drafted.time
    (landed,) = _answer_to(_changed(LANDED, ("landed", "logprobs"), MISSING))
    assert isinstance(landed, Landed) and landed.logprobs == []
    (landed,) = _answer_to(_changed(LANDED, ("landed", "margins"), [None]))
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


@pytest.mark.parametrize("body", [
    b"Traceback (most recent call last):\n", bytes((1 << 26) + 1), b"\x81", b"\xff\xfe", encode([1, 2]),
    b"\x91" * 100_000, b"", encode(None),
    *(encode(one) for one in (
        {"kind": "Answered"}, {}, {"kind": []}, {"kind": "End"}, {"kind": "Up"}, {"kind": "Broken"},
        {"kind": "Broken", "error": "OSError", "message": 3}, {"kind": "Lost", "message": None})),
    b'{"kind": "Free"}',
], ids=range(17))
def test_bytes_that_are_no_message(body: bytes) -> None:
    (failed,) = _answer(lambda station: station.say([body]))
    assert isinstance(failed, Failed) and failed.station == "stage 0"
    assert failed.reason.startswith("answers nonsense: ") and len(failed.reason) < 400


FREE, DUE = encode({"kind": "Free"}), struct.pack("<Q", 1)  # `Up` was message 0


@pytest.mark.parametrize(("frames", "reason"), [
    ([struct.pack("<Q", 2), FREE], "message 2, and 1 is due: the connection has lost some"),
    ([struct.pack("<Q", 0), FREE], "message 0, and 1 is due"),
    ([struct.pack("<Q", (1 << 64) - 1), FREE], "and 1 is due"),
    ([FREE], "which has no number"),
    ([b""], "which has no number"),
    ([DUE], "a message of 0 parts, where there is one"),
    ([DUE, FREE, FREE], "a message of 2 parts, where there is one"),
], ids=["skipped", "repeated", "highest", "none", "empty", "no-part", "two-parts"])
def test_a_message_that_is_not_one_numbered_part(frames: list[bytes], reason: str) -> None:
    (failed,) = _answer(lambda station: station.say_raw(frames))
    assert isinstance(failed, Failed) and failed.station == "stage 0"
    assert failed.reason.startswith("answers nonsense: ") and reason in failed.reason


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
        "prompts": [3, [[0, 1]], [[1, 1, 2, [[8, -1.5]]]], [[0, "1", 2, [[8, -1.5]]]], [[0, 1, 2, [[-8, -1.5]]]]],
        "stuck": [[[2, "x"]], [[1]], 1, [1], [["1", "x"]]], "type": ["Ready", 3], "verdict": [1],
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
def test_a_field_that_makes_no_sense(frame: Frame, path: tuple[str, ...], value: Any) -> None:
    frame = _changed(frame, path, value)
    (failed,) = _answer_to(frame)
    assert isinstance(failed, Failed)
    assert failed.station == ("draft" if frame.get("kind") == "Guessed" else "stage 0")
    assert failed.reason.startswith("answers nonsense: ") and len(failed.reason) < 400


def test_what_comes_before_the_nonsense_counts() -> None:
    players = Players({"kind": "Up"})
    with WorkersPipeline([STAGE], hosting=Hosting(launcher=lambda: players)) as pipeline:
        pipeline.launch(_flight())
        players.stations[0].begun()
        for _ in range(2):
            players.stations[0].say([FREE])
        events = pipeline.events()
        while not isinstance(events[-1], Failed):
            events += pipeline.events()
        assert [type(event) for event in events] == [Ready, Ready, Failed]
        assert isinstance(events[-1], Failed) and "kind Free" in events[-1].reason


@pytest.mark.parametrize(("path", "wanted"), [
    ("/other", [0, 0, 4]), ("/known", [1, 0, 4]), ("/known", [0, 0, 10**9]), ("/known", [0, 4, 0])])
def test_bytes_of_a_model_that_nobody_has(path: str, wanted: list[int], tmp_path: Path) -> None:
    known = tmp_path / "model.gguf"
    known.write_bytes(b"GGUF")
    sources = {"/known": Source(known, Manifest("model.gguf", (File("model.gguf", 4, "0" * 64),)))}
    players = Players({"kind": "Want", "path": path, "range": wanted})
    with pytest.raises(StationFailed, match=f"asks for bytes .* of {path}, file .*, which it has no reason to"):
        WorkersPipeline([STAGE], hosting=Hosting(launcher=lambda: players, sources=sources))


@pytest.mark.parametrize("first", [{"kind": "Free"}, {"kind": "Hello", "listens": 3}, DRAFTED, {}],
                         ids=["too-early", "no-list", "of-a-draft", "nothing"])
def test_nonsense_at_the_start(first: Frame) -> None:
    with pytest.raises(StationFailed, match="answers nonsense") as caught:
        WorkersPipeline([STAGE], hosting=Hosting(launcher=lambda: Players(first)))
    assert caught.value.station == "stage 0"


# ---- between workers -------------------------------------------------------------------------------------


ROWS = np.zeros((2, 4), np.float32)


def _hop(header: Any = None, **tensors: Any) -> Any:
    """What a stage makes of its neighbour's message."""
    message = pack(Hop(_flight(), []) if header is None else header, tensors or {HIDDEN: ROWS})
    return understood(message, Hop)[0]


def test_a_neighbours_sense_is_understood() -> None:
    assert _hop() == _hop(hidden=ROWS, residual=ROWS, positions=np.zeros(2)) == Hop(_flight(), [])


def _uneven() -> Flight:
    flight = _flight()
    flight.parts[0].tokens.pop()
    return flight


NEIGHBOURS: list[tuple[Any, dict[str, Any]]] = [
    (3, {}), ([], {}), ([[], []], {}), ([_flight()], {}), ([_flight(), [[0.0, 0.0, "soon", 0.0, []]]], {}),
    ([[0, [[1, 2]], [], [], "all"], []], {}), (Hop(_uneven(), []), {}), (None, {HIDDEN: np.zeros((3, 4), np.float32)}),
    (None, {HIDDEN: ROWS, "residual": ROWS[:1]}), (None, {HIDDEN: np.zeros((), np.float32)}),
]


@pytest.mark.parametrize(("header", "tensors"), NEIGHBOURS, ids=range(len(NEIGHBOURS)))
def test_a_neighbours_nonsense(header: Any, tensors: dict[str, Any]) -> None:
    with pytest.raises(NonsenseError):
        _hop(header, **tensors)


def test_a_neighbour_that_sends_no_rows() -> None:
    with pytest.raises(NonsenseError, match="no rows"):
        understood(pack(Hop(_flight(), []), {}), Hop)


Road = tuple[Inlet[Hop], Socket]


@pytest.fixture
def road() -> Iterator[Road]:
    """A stage's inlet, and its neighbour's way there."""
    keys, endpoint = RunKeys.new(), local_endpoint()
    stage, neighbour = Net(keys, 10.0), Net(keys, 10.0)
    socket, _ = stage.bind([endpoint])
    way = neighbour.connect(endpoint, "stage 0")
    yield Inlet(socket, Hop), way
    neighbour.close()
    stage.close()


def test_an_inlet_tells_whose_message_it_is(road: Road) -> None:
    inlet, way = road
    numbers, message = Outward(), pack(Hop(_flight(), []), {HIDDEN: ROWS, "residual": ROWS + 1})
    for _ in range(2):
        way.send_multipart(numbers.number(message))
        who, hop, tensors, size = inlet.receive()
        assert (who, hop) == ("stage 0", Hop(_flight(), []))
        assert list(tensors) == [HIDDEN, "residual"] and np.array_equal(tensors["residual"], ROWS + 1)
        assert size == 8 + sum(map(len, message))


def test_a_stage_needs_the_hidden_rows(road: Road) -> None:
    _, way = road
    way.send_multipart(Outward().number(pack(Hop(_flight(), []), {"residual": ROWS})))
    with pytest.raises(NonsenseError, match="a message of stage 0's: 'residual', and no 'hidden'"):
        Before(road[0]._socket).arrivals(Link())()


@pytest.mark.parametrize(("number", "body", "reason"), [
    (1, pack(Hop(_flight(), []), {HIDDEN: ROWS}), "message 1, and 0 is due"),
    (0, pack(Hop(_flight(), []), {}), "no rows"),
    (0, pack(Hop(_flight(), []), {HIDDEN: ROWS})[:1], "0 tensors, and 1 are described"),
    (0, [*pack(Hop(_flight(), []), {HIDDEN: ROWS}), b"more"], "2 tensors, and 1 are described"),
    (0, [], "a message without frames"),
], ids=["skipped", "no-rows", "lacking", "more", "empty"])
def test_an_inlet_names_the_neighbour_that_sends_nonsense(road: Road, number: int, body: list[bytes],
                                                          reason: str) -> None:
    inlet, way = road
    way.send_multipart([struct.pack("<Q", number), *body])
    with pytest.raises(NonsenseError, match=f"a message of stage 0's: {reason}"):
        inlet.receive()


@pytest.mark.parametrize("described", [
    ["rows", "numpy", "|O", [1]], ["rows", "torch", "load", [1]], ["rows", "torch", "float32", [99]], [3],
    ["rows", "jax", "float32", [4]], ["rows", "numpy", "float32"], ["rows", "numpy", "f4", [-2]],
    ["rows", "numpy", "nothing", [4]], [3, "numpy", "f4", [4]], ["rows", "torch", "float64", [4]],
], ids=range(10))
def test_rows_that_cannot_be(described: Any) -> None:
    _, raw = pack([1], {"rows": np.zeros(4, np.float32)})
    with pytest.raises(NonsenseError, match="cannot be read"):
        unpack([encode([[1], [described]]), raw], list[int])


def test_rows_that_are_cut_short() -> None:
    head, raw = pack([1], {"rows": np.zeros(4, np.float32)})
    for length in (0, 7, 8):
        with pytest.raises(NonsenseError, match="cannot be read"):
            unpack([head, raw[:length]], list[int])
