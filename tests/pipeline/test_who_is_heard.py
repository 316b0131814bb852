"""Who may connect to whom, and on which addresses anything listens."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import psutil
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from fullpipe.errors import StationFailed, UsageError
from fullpipe.messages import Failed, Flight, Landed, Opening, Part
from fullpipe.pipeline.bell import Socket
from fullpipe.pipeline.frames import Broken, Door, Setup, Up
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Needs
from fullpipe.pipeline.launch.local import LocalLauncher
from fullpipe.pipeline.links import Links, StationLinks
from fullpipe.pipeline.net import Net, local_endpoint, watched
from fullpipe.pipeline.starting import Hosting, Place
from fullpipe.pipeline.wire import Outward, encode
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import hash_token
from fullpipe.stations.spec import StationSpec

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
ENDPOINTS = ["ipc", "tcp"]
UNHEARD_MS = 200  # in which whoever has the key is heard many times over
HEARD_MS = 10_000
FAR = Place("far", "127.0.0.1")


def _stages(count: int) -> list[StationSpec]:
    return [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                        {"index": index, "num_stages": count, "truth": TRUTH, "taps": [index + 1]})
            for index in range(count)]


CHECKER = StationSpec("fullpipe.stations.drafts.scripted:TapChecker", {"truth": TRUTH, "needs": 2})


def _row(number: int) -> Flight:
    """Flight 0 opens request 0 with one prompt token; flight n > 0 is one guess (node n) behind it."""
    if number == 0:
        return Flight(0, [Part(0, [0], [0], [7], [0], [0], [[]], [True])], [Opening(0, 1, SamplingParams())])
    return Flight(number, [Part(0, [], [number], [number], [1], [number], [[number]], [True])])


def _landings(pipeline: WorkersPipeline, count: int) -> list[Landed]:
    landed: list[Landed] = []
    while len(landed) < count:
        events = pipeline.events()
        assert not any(isinstance(event, Failed) for event in events), events
        landed += [event for event in events if isinstance(event, Landed)]
    return landed


# ---- keys ------------------------------------------------------------------------------------------------


Host = tuple[RunKeys, Socket, str]


@pytest.fixture(params=ENDPOINTS)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The keys of a run, a socket that listens, and where."""
    keys = RunKeys.new()
    net = Net(keys, 10.0)
    socket, (endpoint,) = net.bind([local_endpoint() if request.param == "ipc" else "tcp://127.0.0.1:*"])
    yield keys, socket, endpoint
    net.close()


@contextmanager
def _knock(keys: RunKeys, endpoint: str) -> Iterator[None]:
    """Say something at an endpoint, with some keys."""
    net = Net(keys, 10.0)
    way = net.connect(endpoint, "stranger")
    way.send_multipart([b"let me in"])
    yield
    way.close()
    net.close()


def test_who_has_the_key_is_heard(host: Host) -> None:
    keys, socket, endpoint = host
    with _knock(keys, endpoint):
        assert socket.poll(HEARD_MS) and socket.recv_multipart() == [b"stranger", b"let me in"]


@pytest.mark.parametrize("stranger", ["of another run", "with a key of its own", "with the public key alone"])
def test_who_has_not_the_key_is_not_heard(host: Host, stranger: str) -> None:
    keys, socket, endpoint = host
    own = RunKeys.new()
    with zmq.Context() as context, context.socket(zmq.DEALER) as way:
        way.linger = 0
        own.connect(way)
        if stranger != "of another run":  # it knows whom it speaks to
            way.curve_serverkey = keys.public
        if stranger == "with the public key alone":
            way.curve_publickey = keys.public
        way.connect(endpoint)
        way.send_multipart([b"let me in"])
        assert not socket.poll(UNHEARD_MS)


def test_who_has_no_key_is_not_heard(host: Host) -> None:
    _, socket, endpoint = host
    with zmq.Context() as context, context.socket(zmq.DEALER) as way:
        way.linger = 0
        way.connect(endpoint)
        way.send_multipart([b"let me in"])
        assert not socket.poll(UNHEARD_MS)


def test_who_is_turned_away_is_told(host: Host) -> None:
    """By name, so that a worker with a key of yesterday does not wait in silence."""
    keys, _, endpoint = host
    own = RunKeys.new()
    with zmq.Context() as context, context.socket(zmq.DEALER) as way:
        way.linger = 0
        way.curve_publickey, way.curve_secretkey, way.curve_serverkey = own.public, own.secret, keys.public
        with watched(way) as news:
            way.connect(endpoint)
            assert news.poll(HEARD_MS)
            event = int.from_bytes(news.recv_multipart()[0][:2], "little")
            assert event == zmq.Event.HANDSHAKE_FAILED_AUTH
            way.disable_monitor()


def test_a_listener_is_not_believed_without_the_key() -> None:
    """What a worker says reaches nobody but its engine, even where another one has taken the engine's port."""
    thief = Net(RunKeys.new(), 10.0)
    socket, (endpoint,) = thief.bind(["tcp://127.0.0.1:*"])
    with _knock(RunKeys.new(), endpoint):
        assert not socket.poll(UNHEARD_MS)
    thief.close()


def test_every_run_has_keys_of_its_own_and_they_travel_as_text() -> None:
    one, other = RunKeys.new(), RunKeys.new()
    assert len({one.public, one.secret, other.public, other.secret}) == 4
    door = Door("stage 0", 0, "ipc://@x", one, [], 5.0, 5.0, 60.0)
    line = msgspec.json.encode(door)
    assert b"\n" not in line and msgspec.json.decode(line, type=Door) == door


@pytest.mark.processes
@pytest.mark.parametrize("keys", [None, RunKeys.new()], ids=["no key", "another key"])
@pytest.mark.parametrize("frame", [Up(7), Broken("OSError", "I am your stage")], ids=["up", "broken"])
def test_a_stranger_changes_nothing_in_a_pipeline(keys: RunKeys | None, frame: Up | Broken) -> None:
    with WorkersPipeline(_stages(2)) as pipeline, zmq.Context() as context:
        pipeline.launch(_row(0))
        _landings(pipeline, 1)
        (endpoint,) = pipeline._fleet.endpoints
        with context.socket(zmq.DEALER) as hears, context.socket(zmq.DEALER) as says:
            for way, name in ((hears, "stage 0"), (says, "stage 0 says")):
                way.linger = 0
                way.setsockopt_string(zmq.IDENTITY, name)
                if keys:
                    keys.connect(way)
                way.connect(endpoint)
                way.send_multipart(Outward().number([encode(frame)]))
            pipeline.events(UNHEARD_MS / 1e3)
            pipeline.launch(_row(1))
            assert _landings(pipeline, 1)[0].tokens == [hash_token([7, 1], 50, 3)]
        assert all(worker.cache_slots is None for worker in pipeline._fleet.workers)


# ---- too much --------------------------------------------------------------------------------------------

# ZeroMQ's greeting with CURVE, and the head of a command that is so many bytes long.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
LONG_COMMAND = b"\x06"


def _is_cut_off(endpoint: str, size: int) -> bool:
    """Whether whoever listens there hangs up on somebody who is about to send so much."""
    address, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((address, int(port)), timeout=UNHEARD_MS / 1e3) as stranger:
        stranger.sendall(GREETING + LONG_COMMAND + size.to_bytes(8, "big"))
        try:
            while stranger.recv(1 << 12):
                pass
        except TimeoutError:
            return False
        except ConnectionResetError:
            pass
        return True


@pytest.mark.processes
def test_who_sends_too_much_is_cut_off_before_it_is_taken_in() -> None:
    """A stranger's is not judged by his keys before a part of it is whole."""
    places = [Place(), FAR, Place("third", "127.0.0.1")]
    with WorkersPipeline(_stages(2), CHECKER, hosting=Hosting(places, Place("", "127.0.0.1"))) as pipeline:
        engine = pipeline._fleet.endpoints[1]
        stage, draft = (worker.listens[0] for worker in pipeline._fleet.workers[1:])
        for endpoint, most in ((engine, (1 << 26) + (1 << 16)), (stage, 1 << 30), (draft, 1 << 30)):
            assert _is_cut_off(endpoint, most + 1) and not _is_cut_off(endpoint, 1 << 20)


def test_whoever_has_the_key_is_cut_off_too_and_may_come_back() -> None:
    keys = RunKeys.new()
    net = Net(keys, 10.0)
    listening, (endpoint,) = net.bind(["tcp://127.0.0.1:*"], longest=10_000)
    way, news = net.connect_watched(endpoint, "friend")
    way.send(bytes(9_000))
    assert listening.poll(HEARD_MS) and len(listening.recv_multipart()[1]) == 9_000
    way.send(bytes(11_000))
    way.send(b"again")
    assert news.poll(HEARD_MS)
    while recv_monitor_message(news)["event"] != zmq.Event.DISCONNECTED:
        assert news.poll(HEARD_MS)
    way.send(b"and again")
    assert listening.poll(HEARD_MS) and listening.recv_multipart()[1] != bytes(11_000)
    net.close()


# ---- addresses -------------------------------------------------------------------------------------------


def _listening(processes: Sequence[psutil.Process]) -> set[tuple[str, int]]:
    """Addresses and ports on which processes listen, and UDP ones that they have."""
    return {(one.laddr.ip, one.laddr.port) for process in processes for one in process.net_connections("inet")
            if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}


@pytest.mark.processes
def test_a_station_beside_the_engine_is_reached_by_the_engines_address() -> None:
    hosting = Hosting([Place("far", "127.0.0.2"), Place("here")], Place("here", "127.0.0.4"))
    with WorkersPipeline(_stages(2), hosting=hosting) as pipeline:
        pipeline.launch(_row(0))
        _landings(pipeline, 1)
        assert [one.rpartition(":")[0] for one in pipeline._fleet.workers[1].listens] == ["tcp://127.0.0.4"]


def _name(process: psutil.Process) -> str:
    """Of its station: workers start in order."""
    return dict(zip(sorted(one.pid for one in _workers()), ["stage 0", "stage 1", "stage 2", "draft"]))[process.pid]


def _workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "fullpipe.pipeline.worker" in child.cmdline()]


@pytest.mark.processes
def test_nothing_listens_on_the_network_in_a_pipeline_of_one_machine() -> None:
    me, before = psutil.Process(), _listening([psutil.Process()])
    with WorkersPipeline(_stages(2), CHECKER) as pipeline:
        pipeline.launch(_row(0))
        _landings(pipeline, 1)
        assert len(_workers()) == 3
        assert _listening([me]) == before and _listening(_workers()) == set()
        assert all(not process.net_connections("inet") for process in _workers())


@pytest.mark.processes
def test_hosts_listen_on_the_addresses_that_were_asked_for_alone() -> None:
    me, before = psutil.Process(), _listening([psutil.Process()])
    one, two = Place("one", "127.0.0.2"), Place("two", "127.0.0.3")
    hosting = Hosting([one, two, two, one], Place("", "127.0.0.4"))
    with WorkersPipeline(_stages(3), CHECKER, hosting=hosting) as pipeline:
        pipeline.launch(_row(0))
        _landings(pipeline, 1)
        assert [ip for ip, _ in _listening([me]) - before] == ["127.0.0.4"]
        by_name = {_name(process): [ip for ip, _ in _listening([process])] for process in _workers()}
        assert by_name == {"stage 0": [], "stage 1": ["127.0.0.3"], "stage 2": [], "draft": ["127.0.0.2"]}
    assert _listening([me]) == before


def _free_port() -> int:
    net = Net(RunKeys.new(), 10.0)
    _, (endpoint,) = net.bind(["tcp://127.0.0.1:*"])
    net.close()
    return int(endpoint.rpartition(":")[2])


@pytest.mark.processes
def test_a_port_that_was_asked_for_is_the_one() -> None:
    head, stage = _free_port(), _free_port()
    places = [Place(), Place("far", "127.0.0.1", stage)]
    with WorkersPipeline(_stages(2), hosting=Hosting(places, Place("", "127.0.0.1", head))) as pipeline:
        assert pipeline._fleet.endpoints[1:] == [f"tcp://127.0.0.1:{head}"]
        assert pipeline._fleet.workers[1].listens == [f"tcp://127.0.0.1:{stage}"]
        pipeline.launch(_row(0))
        assert _landings(pipeline, 1)[0].tokens == [hash_token([7], 50, 3)]


@pytest.mark.processes
@pytest.mark.parametrize("who", ["head", "station"])
def test_a_port_in_use_is_named_with_the_way_out(who: str) -> None:
    other = Net(RunKeys.new(), 10.0)
    _, (endpoint,) = other.bind(["tcp://127.0.0.1:*"])
    port = int(endpoint.rpartition(":")[2])
    head = Place("", "127.0.0.1", port if who == "head" else 0)
    places = [Place(), Place("far", "127.0.0.1", 0 if who == "head" else port)]
    where = "" if who == "head" else "stage 1 on far: "
    with pytest.raises(UsageError, match=f"^{where}port {port} of 127.0.0.1 is in use") as caught:
        WorkersPipeline(_stages(2), hosting=Hosting(places, head))
    assert caught.value.hint
    assert not _workers()
    other.close()


@pytest.mark.processes
@pytest.mark.parametrize("who", ["head", "station"])
def test_an_address_of_another_machine_is_named_with_the_way_out(who: str) -> None:
    elsewhere = "192.0.2.1"  # reserved for examples
    head = Place("", elsewhere if who == "head" else "127.0.0.1")
    places = [Place(), Place("far", "127.0.0.1" if who == "head" else elsewhere)]
    with pytest.raises(UsageError, match=f"cannot listen on {elsewhere}") as caught:
        WorkersPipeline(_stages(2), hosting=Hosting(places, head))
    assert caught.value.hint and not _workers()


@pytest.mark.processes
def test_an_engine_that_no_host_reaches_is_named_within_the_start_timeout() -> None:
    """Where the engine listens, hosts find somebody else."""
    begun = time.monotonic()
    with pytest.raises(StationFailed) as caught:
        WorkersPipeline(_stages(1), hosting=Hosting([FAR], Place("", "127.0.0.1")), start_timeout=0.05)
    assert time.monotonic() - begun < 5
    assert caught.value.station == "stage 0 on far"
    assert "did not reach the engine at tcp://127.0.0.1:" in str(caught.value)


@pytest.mark.processes
def test_flights_land_alike_whatever_carries_them() -> None:
    landed = []
    for places in ([], [Place(), FAR, Place("third", "127.0.0.1")]):
        with WorkersPipeline(_stages(2), CHECKER, hosting=Hosting(places, Place("", "127.0.0.1"))) as pipeline:
            for number in range(30):
                pipeline.launch(_row(number))
            landed.append([(event.flight, event.nodes, event.tokens) for event in _landings(pipeline, 30)])
    assert landed[0] == landed[1]
    assert landed[0][1] == (1, [1], [hash_token([7, 1], 50, 3)])


@pytest.mark.processes
def test_a_station_of_another_host_that_is_killed_is_named_with_its_host() -> None:
    with WorkersPipeline(_stages(2), hosting=Hosting([Place(), FAR], Place("", "127.0.0.1"))) as pipeline:
        pipeline.launch(_row(0))
        _landings(pipeline, 1)
        pipeline._fleet.workers[1].process.kill()
        failed = pipeline.events(10.0)[-1]
        assert isinstance(failed, Failed) and failed.station == "stage 1 on far" and "SIGKILL" in failed.reason


# ---- without an engine -----------------------------------------------------------------------------------


ENGINE = textwrap.dedent("""
    import sys, time
    import msgspec
    from fullpipe.pipeline.frames import Setup
    from fullpipe.pipeline.keys import RunKeys
    from fullpipe.pipeline.net import Net
    from fullpipe.pipeline.wire import Outward, encode
    keys, setup = msgspec.msgpack.decode(bytes.fromhex(sys.stdin.readline()), type=tuple[RunKeys, Setup])
    socket, (endpoint,) = Net(keys, {silence}).bind(["tcp://127.0.0.1:*"])
    print(endpoint, flush=True)
    name, *_ = socket.recv_multipart()
    if {sets_up}:
        socket.send_multipart([name, *Outward().number([encode(setup)])])
        socket.recv_multipart()
    print("up", flush=True)
    time.sleep(600)
""")


@pytest.mark.processes
@pytest.mark.parametrize("sets_up", [True, False], ids=["at-work", "before-the-setup"])
@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_worker_ends_soon_after_an_engine_that_is_not_its_parent(fate: str, sets_up: bool) -> None:
    """Between hosts no signal tells of the engine's death, and of one that hangs nothing but its silence does."""
    keys, patience = RunKeys.new(), 0.5
    setup = Setup("stage 0", 0, 1, "", [], "", _stages(1)[0], {}, [], StationLinks.of(Links([]), 0, 1), None, 1, 0.1)
    engine = subprocess.Popen([sys.executable, "-c", ENGINE.format(silence=patience, sets_up=sets_up)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    launcher = LocalLauncher()
    assert engine.stdin and engine.stdout
    with engine, engine.stdin, engine.stdout:
        engine.stdin.write(encode((keys, setup)).hex().encode() + b"\n")
        engine.stdin.flush()
        endpoint = engine.stdout.readline().decode().strip()
        worker = launcher.start(Door("stage 0", 0, endpoint, keys, [], patience, patience, 60.0), "far", Needs())
        assert engine.stdout.readline() == b"up\n"
        if fate == "stopped":
            psutil.Process(engine.pid).suspend()
        else:
            engine.kill()
        ended = worker.wait(2 * patience + 2.0)
        words = worker.last_words()
        engine.kill()
        worker.kill()
        worker.wait(5.0)
        worker.close()
        launcher.close()
    assert ended and "exited with code 0" in words
