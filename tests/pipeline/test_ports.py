"""Each who listens for other hosts has a port of its own, counted from that of its host."""

from __future__ import annotations

import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import Flight, Landed, Opening, Part
from fullpipe.pipeline.links import Link, Links
from fullpipe.pipeline.starting import Hosting, Layout, Place
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import hash_token
from fullpipe.stations.spec import StationSpec

HOSTS = ("head", "beta", "gamma")
TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
READER = StationSpec("fullpipe.stations.drafts.scripted:TapChecker", {"truth": TRUTH, "needs": 2})
INSTANT = Link.of(0.0, None)


def stages(count: int) -> list[StationSpec]:
    return [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                        {"index": index, "num_stages": count, "truth": TRUTH, "taps": [index + 1]})
            for index in range(count)]


def place(host: str, port: int = 5600) -> Place:
    return Place(host, f"127.0.0.{2 + HOSTS.index(host)}", port)


def layout(order: tuple[str, ...], draft: str | None = None) -> Layout:
    return Layout(stages=stages(len(order)), draft=READER if draft else None, links=Links.even(len(order), INSTANT),
                  pace={}, threads=1, beat_s=1.0, silence_s=3.0, start_timeout=1.0,
                  hosting=Hosting([place(host) for host in (*order, *([draft] if draft else []))], place("head")))


def far(endpoints: list[str]) -> list[str]:
    return [one for one in endpoints if one.startswith("tcp:")]


def listening(there: Layout) -> list[str]:
    """Where anybody listens for other hosts: the engine, then the stations."""
    return [*far(there.engine_endpoints),
            *itertools.chain.from_iterable(far(there.listens(rank)) for rank in range(len(there.names)))]


@pytest.mark.parametrize(("order", "draft", "ports"), [
    (("head", "beta"), None, ["2:5600", "3:5600"]),
    (("beta", "head"), None, ["2:5600", "2:5601"]),
    (("beta", "head", "gamma"), "head", ["2:5600", "2:5601", "4:5600", "2:5602"]),
    (("head", "beta"), "head", ["2:5600", "3:5600", "2:5601"]),
    (("head", "beta"), "beta", ["2:5600", "3:5600", "3:5601"]),
    (("head",), "head", [])])
def test_the_engine_has_its_hosts_port_and_who_else_listens_there_the_next(
        order: tuple[str, ...], draft: str | None, ports: list[str]) -> None:
    assert listening(layout(order, draft)) == [f"tcp://127.0.0.{port}" for port in ports]


@given(st.lists(st.sampled_from(HOSTS), min_size=1, max_size=4), st.sampled_from([None, *HOSTS]))
def test_no_two_listen_on_one_port(order: list[str], draft: str | None) -> None:
    found = listening(layout(tuple(order), draft))
    assert len(found) == len(set(found))
    ports = [int(one.rpartition(":")[2]) for one in found]
    assert all(5600 <= port < 5600 + len(found) for port in ports)


def _free_ports() -> int:
    """The first of two."""
    for port in range(20000, 30000, 2):
        try:
            for one in (port, port + 1):
                socket.create_server(("127.0.0.2", one)).close()
        except OSError:
            continue
        return port
    raise AssertionError("there are none")


@pytest.mark.processes
def test_a_later_stage_beside_the_engine_works_with_a_given_port() -> None:
    port = _free_ports()
    hosting = Hosting([place("beta"), place("head", port)], place("head", port))
    with WorkersPipeline(stages(2), hosting=hosting) as pipeline:
        assert pipeline._fleet.endpoints[1:] == [f"tcp://127.0.0.2:{port}"]
        assert pipeline._fleet.workers[1].listens == [f"tcp://127.0.0.2:{port + 1}"]
        pipeline.launch(Flight(0, [Part(0, [0], [0], [7], [0], [0], [[]], [True])], [Opening(0, 1, SamplingParams())]))
        landed: list[Landed] = []
        while not landed:
            landed = [event for event in pipeline.events() if isinstance(event, Landed)]
        assert landed[0].tokens == [hash_token([7], 50, 3)]
