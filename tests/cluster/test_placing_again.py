"""A model is placed again when hosts have gone or come. The hosts' agents are imagined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
from fullpipe.errors import PipelineError, UsageError
from fullpipe.pipeline.launch.base import Launcher


@dataclass
class Imagined(Contact):
    """Agents answer at once, or never. silent: hosts whose agents do not answer. cut: pairs that do not reach each
    other. falling: those that become silent when they are asked that. in_use: hosts whose port is. asked: what
    was, by host. meanwhile: is done, once, when somebody is asked that. now: the time. lives: how often hosts came."""

    head: str = "a"
    silent: set[str] = field(default_factory=set)
    cut: set[frozenset[str]] = field(default_factory=set)
    falling: dict[str, type] = field(default_factory=dict)
    in_use: set[str] = field(default_factory=set)
    other_code: set[str] = field(default_factory=set)
    asked: list[tuple[str, type]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    meanwhile: dict[type, Callable[[], object]] = field(default_factory=dict)
    now: float = 0.0
    lives: Counter[str] = field(default_factory=Counter)

    def clock(self) -> float:
        return self.now

    def life(self, host: str) -> str:
        return f"{host} {self.lives[host]}"

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
        if act := self.meanwhile.pop(type(asked), None):
            act()
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


def placed(stages: int | None = 3, port: int = 0) -> tuple[Placing, Imagined, list[str]]:
    """On three hosts, with what was said."""
    contact, said = Imagined(), list[str]()
    contact.there = {name: entry.model_copy(update={"port": port}) for name, entry in contact.there.items()}
    contact.refresh()
    wanted = Wanted(MODEL, "none", (MODEL,), (Path("m.gguf"),), None, lambda plan: ([], None))
    placing = WithoutFile(contact, wanted, Pins(method="pp", stages=stages), say=said.append, clock=contact.clock)
    placing.decide()
    return placing, contact, said


def asked_in(contact: Imagined, placing: Placing) -> list[tuple[str, type]]:
    """What a look for something better asks for, beside pings."""
    contact.asked.clear()
    placing.better(0.95)
    return [one for one in contact.asked if one[1] is not Ping]


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
    placing, contact, _ = placed(port=5600)
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


# ---- looking for something better --------------------------------------------------------------------------------


def test_a_host_that_does_not_fit_is_looked_at_ever_less_often() -> None:
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.other_code.add("c")
    looked = []
    for contact.now in range(0, 300, 3):
        if asked := asked_in(contact, placing):
            assert asked == [("c", DoLook)], "no link is measured for it"
            looked.append(contact.now)
    assert looked == [0, 3, 9, 21, 45, 93, 153, 213, 273]


def test_a_host_that_did_not_fit_is_looked_at_when_it_has_come_anew() -> None:
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.other_code.add("c")
    assert asked_in(contact, placing) and not asked_in(contact, placing)
    contact.other_code.clear()
    contact.lives["c"] += 1
    assert placing.better(0.95) == "c can be had: 3 stages, as asked for"


def test_a_host_that_cannot_be_reached_does_not_cost_a_pipeline_one_of_its_own() -> None:
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.cut.add(frozenset("bc"))
    assert placing.better(0.95) is None
    assert set(placing.known.reports) == {"a", "b"} and "cannot be reached" in placing.lost["c"]
    assert not asked_in(contact, placing)
    contact.now += 60
    contact.cut.clear()
    assert placing.better(0.95) == "c can be had: 3 stages, as asked for"


def test_a_host_that_cannot_be_measured_is_told_of_and_not_asked_again_at_once() -> None:
    placing, contact, _ = placed(port=5600)
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.in_use |= {"a", "b", "c"}
    with pytest.raises(UsageError, match="c: something else listens on 5600"):
        placing.better(0.95)
    assert not asked_in(contact, placing) and set(placing.known.reports) == {"a", "b"}
    contact.now, contact.in_use = 3.0, {"a", "b"}
    assert placing.better(0.95) == "c can be had: 3 stages, as asked for"


def test_only_ways_that_are_not_known_are_measured() -> None:
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    asked = asked_in(contact, placing)
    assert Counter(asked)["a", Reach] == Counter(asked)["b", Reach] == 1 and Counter(asked)["c", Reach] == 2
    assert not asked_in(contact, placing)


def test_nobody_is_asked_for_more_than_a_sign_of_life_while_nothing_changes() -> None:
    placing, contact, _ = placed()
    assert asked_in(contact, placing) == []


def test_a_host_that_nobody_needs_is_forgotten_when_it_has_gone() -> None:
    placing, contact, said = placed(stages=None)
    assert placing.plan and placing.plan.hosts == ("a",), "one is quickest"
    contact.have("a", "b")
    assert placing.better(0.95) is None
    assert set(placing.known.reports) == {"a", "b"} and said[-1] == "going on without c: it does not answer"
    assert placing.take_for("a", 2.0, placing.plan) is not None
    placing.better(0.95)  # asks nobody who is not there


def test_a_pipeline_that_has_lost_a_host_is_not_planned_for() -> None:
    placing, contact, _ = placed(stages=2)
    assert placing.plan
    contact.silent.add(next(host for host in placing.plan.hosts if host != "a"))
    assert asked_in(contact, placing) == []
    assert set(placing.known.reports) == {"a", "b", "c"}, "that is for who decides anew"


@pytest.mark.parametrize("step", [Ping, DoLook, Listen, Reach, Measure])
def test_whoever_looks_for_something_better_gives_way_to_who_decides_anew(step: type) -> None:
    placing, contact, _ = placed()
    contact.silent.add("c")
    placing.decide_again()
    contact.silent.clear()
    contact.meanwhile[step] = lambda: placing.decide_again(newcomers=False)
    assert placing.better(0.95) is None
    assert step not in contact.meanwhile, "it has happened"
    assert set(placing.known.reports) == {"a", "b"}, "as was decided"
    following = contact.asked[max(at for at, one in enumerate(contact.asked) if one[1] is step):]
    if step is not Measure:
        assert ("c", Measure) not in following
    assert placing.better(0.95) == "c can be had: 3 stages, as asked for"


def test_a_host_that_takes_longer_is_planned_for_until_that_was_done() -> None:
    """A look that fails, or gives way, is made up for."""
    placing, contact, _ = placed(stages=None)
    plan = placing.plan
    assert plan and plan.hosts == ("a",)
    assert placing.take_for("a", 5.0, plan)
    contact.meanwhile[Ping] = lambda: placing.decide_again(newcomers=False)
    assert placing.better(0.95) is None
    placing.plan = plan
    said = placing.better(0.95)
    assert said and said.startswith("hosts take other times than planned")


def test_a_factor_of_a_host_that_is_lost_meanwhile_changes_nothing() -> None:
    placing, contact, _ = placed()
    before = placing.plan
    assert before
    contact.silent.add("c")
    after = placing.decide_again()
    assert placing.take_for("c", 2.0, before) is placing.take_for("a", 2.0, before) is None
    machine = placing.take_for("a", 2.0, after)
    assert machine and len(machine.stages) == 2
