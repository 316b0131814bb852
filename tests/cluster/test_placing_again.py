"""A model is placed again when hosts have gone or come. The hosts' agents are imagined."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from host_reports import MODEL
from host_reports import host as report
from imagined import profile

from fullpipe.cluster.agent import Answer, Deafen, DoLook, Failed, Listen, Measure, Ping, Reach, Request
from fullpipe.cluster.contact import Contact
from fullpipe.cluster.hosts import HostEntry
from fullpipe.cluster.links import Pair
from fullpipe.cluster.placing import Placing
from fullpipe.cluster.plan import Plan
from fullpipe.cluster.planner import Pins
from fullpipe.cluster.wanted import Wanted
from fullpipe.errors import PipelineError
from fullpipe.pipeline.launch.base import Launcher


@dataclass
class Imagined(Contact):
    """Agents answer at once, or never. silent: hosts whose agents do not answer. cut: pairs that do not reach each
    other. falling: those that become silent when they are asked that. in_use: hosts whose port is. asked: what
    was, by host."""

    head: str = "a"
    silent: set[str] = field(default_factory=set)
    cut: set[frozenset[str]] = field(default_factory=set)
    falling: dict[str, type] = field(default_factory=dict)
    in_use: set[str] = field(default_factory=set)
    other_code: set[str] = field(default_factory=set)
    asked: list[tuple[str, type]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = {}
        self.have("a", "b", "c")

    def have(self, *names: str) -> None:
        self.there = {name: HostEntry(name=name, address=f"10.0.0.{'abc'.index(name) + 1}") for name in names}

    def refresh(self) -> None:
        self.entries = dict(self.there)

    def begin(self, host: str, request: bytes) -> Future[bytes]:
        asked, answer = msgspec.msgpack.decode(request, type=Request), Future[bytes]()
        self.asked.append((host, type(asked)))
        if self.falling.get(host) is type(asked):
            self.silent.add(host)
        if host in self.silent:
            answer.set_exception(ConnectionError("gone"))
        else:
            answer.set_result(msgspec.msgpack.encode(self._answer(host, asked)))
        return answer

    def _answer(self, host: str, asked: Request) -> Answer:
        match asked:
            case DoLook():
                code = "other" if host in self.other_code else "0123456789ab"
                seen = report(host, address=self.entries[host].address, code=code)
                return Answer(report=seen, processor=f"id {host}")
            case Listen(port=port):
                if port and host in self.in_use:
                    return Answer(Failed("UsageError", f"something else listens on {port} already", None))
                return Answer(port=port or 5000)
            case Reach(name):
                if frozenset((host, name)) in self.cut:
                    return Answer(Failed("PipelineError", "no answer", None))
                return Answer(pair=Pair(1e-4, 1e9))
            case Measure():
                return Answer(profile=profile(30, draft=None).model_dump_json())
            case Ping() | Deafen():
                return Answer()

    def note_lost(self, host: str, error: Exception) -> None:
        self.lost.append(host)

    def launcher(self) -> Launcher:
        raise NotImplementedError

    def close(self) -> None:
        pass


class WithoutFile(Placing):
    """Weighs nothing: the model is imagined, too."""

    def _weights(self, plan: Plan) -> dict[str, dict[str, int]]:
        return {}


def placed(stages: int | None = 3) -> tuple[Placing, Imagined, list[str]]:
    """On three hosts, with what was said."""
    contact, said = Imagined(), list[str]()
    contact.refresh()
    wanted = Wanted(MODEL, "none", (MODEL,), (Path("m.gguf"),), None, lambda plan: ([], None))
    placing = WithoutFile(contact, wanted, Pins(method="pp", stages=stages), say=said.append)
    placing.decide()
    return placing, contact, said


def hosts(plan: Plan | None) -> Sequence[str]:
    assert plan
    return sorted(stage.host for stage in plan.stages)


def test_a_host_that_does_not_answer_is_left_out_and_the_others_have_as_many_stages_as_they_can() -> None:
    placing, contact, said = placed()
    assert hosts(placing.plan) == ["a", "b", "c"]
    contact.silent.add("c")
    assert hosts(placing.decide_again()) == ["a", "b"]
    assert said[-1] == "going on without c: it does not answer" and placing.lost == {"c": "it does not answer"}


def test_a_host_that_stops_answering_while_it_is_planned_for_is_left_out() -> None:
    placing, contact, _ = placed()
    contact.falling["c"] = Listen
    assert hosts(placing.decide_again()) == ["a", "b"]


def test_what_goes_wrong_on_hosts_that_answer_is_told() -> None:
    placing, contact, _ = placed()
    contact.falling["b"], contact.silent = Listen, _Once()
    with pytest.raises(PipelineError, match="b is lost"):
        placing.decide_again()


class _Once(set[str]):
    """Forgets who is silent when asked."""

    def __contains__(self, host: object) -> bool:
        found = super().__contains__(host)
        self.discard(str(host))
        return found


def test_of_two_hosts_that_do_not_reach_each_other_one_is_left_out() -> None:
    placing, contact, said = placed()
    contact.cut.add(frozenset("bc"))
    assert hosts(placing.decide_again()) in (["a", "b"], ["a", "c"])
    assert "cannot be reached" in said[-1]


def test_the_head_must_answer() -> None:
    placing, contact, _ = placed()
    contact.silent.add("a")
    with pytest.raises(PipelineError, match="agent on this host"):
        placing.decide_again()


def test_a_host_that_comes_back_waits_for_its_turn_unless_it_is_needed() -> None:
    """After a failure nobody waits for a look at a newcomer."""
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.asked.clear()
    assert hosts(placing.decide_again(newcomers=False)) == ["a", "b"]
    assert ("c", DoLook) not in contact.asked
    assert hosts(placing.decide_again()) == ["a", "b", "c"]


def test_a_plan_with_the_stages_that_were_asked_for_is_better_whatever_it_promises() -> None:
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    assert placing.better(0.95) is None
    contact.silent.clear()
    assert placing.better(0.95) == "c can be had: 3 stages, as asked for"
    assert hosts(placing.decide_again(newcomers=False)) == ["a", "b", "c"]
    assert placing.better(0.95) is None


def test_a_host_that_does_not_fit_is_left_out_and_why_is_said_once() -> None:
    placing, contact, said = placed()
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.other_code.add("c")
    said.clear()
    assert placing.better(0.95) is None and placing.better(0.95) is None
    (line,) = said
    assert line.startswith("going on without c: its Fullpipe 0.1.0 has other sources")


def test_ports_that_the_pipeline_has_do_not_keep_a_host_from_coming_back() -> None:
    """Nobody can listen there to be measured; the way from there must do."""
    placing, contact, _ = placed()
    contact.there = {name: entry.model_copy(update={"port": 5600}) for name, entry in contact.there.items()}
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.in_use |= {"a", "b"}
    assert placing.better(0.95) == "c can be had: 3 stages, as asked for"
    assert ("c", "a") in placing.known.pairs and ("a", "c") in placing.known.pairs


def test_an_agent_that_is_gone_is_told_to_the_contact() -> None:
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    assert contact.lost == ["c"]
