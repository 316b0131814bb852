"""Hosts are surveyed by agents, here on this machine: no command leads elsewhere."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.cluster.agent import Answer, Measure, Ping, Reach
from fullpipe.cluster.contact import CommandContact
from fullpipe.cluster.hosts import HostEntry
from fullpipe.cluster.links import Pair
from fullpipe.cluster.surveying import Known, look_at, measure_costs, measure_links, rounds
from fullpipe.errors import ModelNotFound, PipelineError, UsageError
from fullpipe.hub import resolve
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.local import LocalLauncher

MODEL = "smollm2-135m"


@given(st.integers(1, 12))
def test_every_ordered_pair_has_one_round_and_nobody_two_places_in_it(count: int) -> None:
    hosts = [f"h{number}" for number in range(count)]
    found = list(rounds(hosts))
    pairs = [pair for one in found for pair in one]
    assert sorted(pairs) == sorted((a, b) for a in hosts for b in hosts if a != b)
    for one in found:
        busy = [host for pair in one for host in pair]
        assert len(busy) == len(set(busy)), "they would disturb each other"
    assert len(found) <= 2 * max(0, count + count % 2 - 1), "as few as there can be"


# ---- agents ------------------------------------------------------------------------------------------------------


def _agents() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "fullpipe.cluster.agent" in child.cmdline()]


@pytest.fixture
def contact() -> Iterator[CommandContact]:
    """Two hosts that are this machine, at two of its addresses. No process of theirs is left by any test."""
    entries = [HostEntry(name=name, address=address, host_ip=address)
               for name, address in (("a", "127.0.0.1"), ("b", "127.0.0.2"))]
    contact = CommandContact("a", entries, {})
    assert contact.answering(60.0) == ["a", "b"] and len(_agents()) == 2
    yield contact
    contact.close()
    assert not _agents()


@pytest.mark.processes
def test_hosts_are_looked_at_and_what_lies_between_them_is_measured(contact: CommandContact) -> None:
    known = Known()
    look_at(contact, [], known, alone=True)  # or loopback addresses would not do
    assert {name: report.address for name, report in known.reports.items()} == {"a": "127.0.0.1", "b": "127.0.0.2"}
    assert known.processors["a"] == known.processors["b"], "they share the cores"
    measure_links(contact, known)
    assert set(known.pairs) == {("a", "b"), ("b", "a")}
    assert all(0 < pair.latency_s < 0.1 for pair in known.pairs.values())
    assert [known.reports[name].reaches for name in "ab"] == [{"b": None}, {"a": None}]
    before = dict(known.pairs)
    measure_links(contact, known, quick=True)
    assert known.pairs == before, "it was only tried"
    known.forget("b")
    assert set(known.reports) == {"a"} and not known.pairs


@pytest.mark.processes
def test_a_host_whose_data_port_a_pipeline_has_is_measured_the_other_way(contact: CommandContact) -> None:
    known = Known()
    look_at(contact, [], known, alone=True)
    with socket.create_server(("127.0.0.1", 0)) as pipeline:
        known.entries["a"] = known.entries["a"].model_copy(update={"port": pipeline.getsockname()[1]})
        with pytest.raises(UsageError, match="in use"):
            measure_links(contact, known)
        measure_links(contact, known, deaf=["a"])
    assert set(known.pairs) == {("a", "b"), ("b", "a")} and known.pairs["b", "a"] == known.pairs["a", "b"]
    assert [known.reports[name].reaches for name in "ab"] == [{"b": None}, {}]


@pytest.mark.processes
def test_what_is_known_is_not_even_tried_where_only_what_is_missing_is_wanted(contact: CommandContact) -> None:
    known = Known()
    look_at(contact, [], known, alone=True)
    known.pairs = {("a", "b"): Pair(1.0, 2.0)}
    measure_links(contact, known, missing=True)
    assert known.pairs["a", "b"] == Pair(1.0, 2.0) and known.pairs["b", "a"].latency_s < 0.1
    contact.close()
    measure_links(contact, known, missing=True)  # so nobody is asked


@pytest.mark.processes
@pytest.mark.weights
def test_costs_are_measured_once_where_hosts_are_one_machine(contact: CommandContact) -> None:
    known, said = Known(), list[str]()
    asked = Measure(models=[str(resolve(MODEL))], threads=1, dtype="auto", quantization=None, device="cpu")
    look_at(contact, [MODEL], known, alone=False)
    assert all(report.model(MODEL).path for report in known.reports.values())
    measure_costs(contact, known, lambda host: asked, said.append)
    assert known.profiles["a"] == known.profiles["b"], "the second host finds what the first has kept"
    assert known.profiles["a"].num_layers == 30 and known.profiles["a"].threads == 1
    assert said == ["measuring what stations cost on a, b, unless it is kept there"]
    measure_costs(contact, known, lambda host: asked, said.append)
    assert len(said) == 1


@pytest.mark.processes
def test_an_agent_that_dies_is_lost_until_it_is_started_again(contact: CommandContact) -> None:
    assert contact.answering(60.0) == ["a", "b"]
    victim = sorted(_agents(), key=lambda process: process.pid)[1]
    victim.kill()
    found = contact.try_all({"a": Ping(), "b": Ping()}, 10.0)
    assert isinstance(found["a"], Answer)
    lost = found["b"]
    assert isinstance(lost, PipelineError) and lost.message.startswith("b is lost: its agent has ended")
    begun = time.monotonic()
    assert contact.answering(10.0) == ["a"] and time.monotonic() - begun < 5, "that it has ended is known at once"
    while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    contact.refresh()
    assert contact.answering(60.0) == ["a", "b"] and set(contact.entries) == {"a", "b"}


@pytest.mark.processes
def test_an_agent_answers_while_it_measures(contact: CommandContact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        way = Reach("nobody", "127.0.0.1", mute.getsockname()[1], RunKeys.new(), 5.0, False)
        measured = contact.begin("b", msgspec.msgpack.encode(way))
        assert contact.answering(4.0) == ["a", "b"]
        assert not measured.done()


@pytest.mark.processes
def test_what_an_agent_was_asked_for_when_it_died_is_lost_at_once(contact: CommandContact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        way = Reach("nobody", "127.0.0.1", mute.getsockname()[1], RunKeys.new(), 30.0, False)
        measured = contact.begin("b", msgspec.msgpack.encode(way))
        assert contact.answering(60.0) == ["a", "b"]
        sorted(_agents(), key=lambda process: process.pid)[1].kill()
        with pytest.raises(ConnectionError, match="its agent has ended"):
            measured.result(5.0)


@pytest.mark.processes
def test_an_agent_that_hangs_is_told_in_time(contact: CommandContact) -> None:
    assert contact.answering(60.0) == ["a", "b"]
    sorted(_agents(), key=lambda process: process.pid)[1].suspend()
    begun = time.monotonic()
    with pytest.raises(PipelineError, match=r"^b has not answered within 0\.2 s") as caught:
        contact.ask("b", Ping(), 0.2)
    assert caught.value.hint and time.monotonic() - begun < 2


@pytest.mark.processes
def test_what_goes_wrong_on_a_host_is_told_with_its_name(contact: CommandContact) -> None:
    asked = Measure(models=["/no/model.gguf"], threads=1, dtype="auto", quantization=None, device="cpu")
    with pytest.raises(ModelNotFound, match=r"^b: ") as caught:
        contact.ask("b", asked, 60.0)
    assert caught.value.hint
    launcher = contact.launcher()
    assert isinstance(launcher, LocalLauncher)
    launcher.close()


