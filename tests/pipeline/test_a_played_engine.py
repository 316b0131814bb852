"""What a worker does whose engine, which the test plays, says nonsense, or whose connection with it breaks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import zmq
from msgspec import Struct

from fullpipe.models.ranges import Range
from fullpipe.pipeline import worker
from fullpipe.pipeline.bell import Socket
from fullpipe.pipeline.frames import Beat, Broken, Door, FromWorker, Hello, Lost, Part, Setup, Stop, Up
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Needs, Process
from fullpipe.pipeline.launch.local import LocalLauncher
from fullpipe.pipeline.links import Links, StationLinks
from fullpipe.pipeline.net import Net
from fullpipe.pipeline.wire import Inward, Outward, decode, encode
from fullpipe.stations.spec import StationSpec

SOON_MS = 10_000
STAGE = StationSpec("fullpipe.stations.scripted:ScriptedStage",
                    {"index": 0, "num_stages": 1, "truth": {"kind": "hash", "vocab": 50, "seed": 3}})
SETUP = Setup("stage 0", 0, 1, "", [], "", STAGE, {}, [], StationLinks.of(Links([]), 0, 1), None, 1, 0.2)


@dataclass
class Line:
    """Carries connections to a port, and can cut them."""

    to: int
    _server: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _ends: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=(one, other), daemon=True).start()

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for one in ends:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()


def _carry(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError), one:
        while data := one.recv(1 << 16):
            other.sendall(data)
        other.shutdown(socket.SHUT_RDWR)


@dataclass
class Engine:
    """Hears and tells one worker."""

    socket: Socket
    line: Line
    process: Process
    _inward: Inward = field(default_factory=Inward)
    _outward: Outward = field(default_factory=Outward)

    def tell(self, frame: Struct, *data: bytes) -> None:
        self.socket.send_multipart([b"stage 0", *self._outward.number([encode(frame), *data])])

    def hear(self) -> FromWorker:
        """What it says next that is no beat, or hello."""
        while True:
            assert self.socket.poll(SOON_MS), self.process.last_words()
            name, *frames = self.socket.recv_multipart()
            if name == b"stage 0 says":
                frames = list(self._inward.checked(frames))
            news: FromWorker = decode(frames[-1], FromWorker)
            if not isinstance(news, Beat):
                return news


@pytest.fixture
def engine() -> Iterator[Engine]:
    keys = RunKeys.new()
    net, launcher = Net(keys, 5.0), LocalLauncher()
    bound, (endpoint,) = net.bind(["tcp://127.0.0.1:*"])
    line = Line(int(endpoint.rpartition(":")[2]))
    door = Door("stage 0", 0, f"tcp://127.0.0.1:{line.port}", keys, [], 5.0, 5.0, 60.0)
    process = launcher.start(door, "", Needs())
    engine = Engine(bound, line, process)
    assert engine.hear() == Hello()
    yield engine
    process.kill()
    process.wait(5.0)
    process.close()
    line.close()
    launcher.close()
    net.close()


@pytest.mark.processes
def test_a_connection_that_broke_and_was_made_again_is_told(engine: Engine) -> None:
    """What was said to it meanwhile is lost. Of the last of it nobody would know before the time-out."""
    engine.tell(SETUP)
    assert engine.hear() == Up()
    engine.line.cut()
    assert engine.hear() == Lost("lost its connection to the engine")


@pytest.mark.processes
def test_what_comes_before_the_setup_is_nonsense(engine: Engine) -> None:
    engine.tell(Part(Range(0, 0, 4), b""), b"GGUF")
    assert engine.hear() == Broken("NonsenseError", "a message of kind Part before the setup")
    assert engine.process.wait(5.0) and "exited with code 1" in engine.process.last_words()


@pytest.mark.processes
def test_stop_may_come_before_the_setup(engine: Engine) -> None:
    """Another station could not be started."""
    engine.tell(Stop())
    assert engine.process.wait(5.0) and engine.process.last_words() == "its process exited with code 0"


@pytest.mark.processes
@pytest.mark.parametrize("pieces", [(), (b"GG", b"UF")], ids=["none", "two"])
def test_a_part_of_a_model_comes_in_one_piece(engine: Engine, pieces: tuple[bytes, ...]) -> None:
    engine.tell(SETUP)
    assert engine.hear() == Up()
    engine.tell(Part(Range(0, 0, 4), b""), *pieces)
    told = engine.hear()
    assert told == Broken("NonsenseError", f"a part of a model in {len(pieces)} pieces, where there is one")
    assert engine.process.wait(5.0)


def test_a_worker_that_cannot_watch_its_connections_ends_and_says_so(monkeypatch: pytest.MonkeyPatch,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Else it would outlive its engine."""
    left, codes = threading.Event(), list[int]()

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    monkeypatch.setattr(worker, "leave", leave)
    with zmq.Context() as context, context.socket(zmq.PAIR) as news, context.socket(zmq.PAIR) as teller:
        news.linger = teller.linger = 0
        news.bind("inproc://news")
        teller.connect("inproc://news")
        worker.Connections(news, 5.0)
        teller.send_multipart([b"no event of ZeroMQ's", b"", b""])
        assert left.wait(5.0) and codes == [1]
    told = capsys.readouterr().err
    assert "Traceback" in told and told.endswith("nobody watches the connections any more\n")
