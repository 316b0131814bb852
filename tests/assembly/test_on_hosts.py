"""Pipelines are started on hosts, and what is known of the newest one is exchanged as a whole. Nothing is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fullpipe.assembly import hosts
from fullpipe.assembly.hosts import OnHosts, given_plan, said_of_head
from fullpipe.assembly.prepare import Prepared
from fullpipe.cluster.placing import Placing
from fullpipe.cluster.plan import Plan, StagePlan
from fullpipe.costs import CostCurve, Machine
from fullpipe.errors import DamagedModel, UsageError
from fullpipe.live_costs import LiveMachine
from fullpipe.options import Options, PipelineOptions

PLAN = Plan(model="m", stage=(StagePlan(host="a", first=0, last=20), StagePlan(host="b", first=20, last=28)))
OTHER = Plan(model="m", stage=(StagePlan(host="a", first=0, last=28),))


def machine(*stages: float) -> Machine:
    return Machine(len(stages), stages=[CostCurve({1: seconds, 32: seconds}) for seconds in stages])


class Imagined:
    """Is a placing with one plan after another. lost: whether a host of the newest is. fails: what breaks."""

    def __init__(self, *plans: Plan, fails: str = "") -> None:
        self.plans, self.fails, self.lost = list(plans), fails, False
        self.say = lambda line: None
        self.wanted = SimpleNamespace(describe=lambda plan: (["stage"] * len(plan.stages), None))

    def decide(self) -> Plan:
        return self.plans.pop(0)

    def decide_again(self, *, newcomers: bool) -> Plan:
        return self.decide()

    def machine(self, plan: Plan) -> Machine:
        return self._or_fail("machine", machine(*[1e-2] * len(plan.stages)))

    def hosting(self, plan: Plan) -> str:
        return self._or_fail("hosting", "hosting")

    def _or_fail(self, what: str, found: Any) -> Any:
        if self.fails == what:
            raise DamagedModel("m.gguf has been changed")
        return found

    def take_for(self, host: str, factor: float, plan: Plan) -> Machine | None:
        return None if self.lost else machine(1e-2, factor * 1e-2)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that were."""
    made: list[Any] = []

    def start(stages: list[Any], draft: Any, **how: Any) -> Any:
        made.append(SimpleNamespace(num_stages=len(stages), **how))
        return made[-1]

    monkeypatch.setattr(hosts, "WorkersPipeline", start)
    return made


def on_hosts(placing: Imagined) -> OnHosts:
    def method(machine: Machine, name: str, width: int | None) -> Any:
        return placing._or_fail("method", (name, machine))

    prepared = SimpleNamespace(options=Options.of(model="m", hosts="ray", method="pp"), method=method)
    return OnHosts(cast(Prepared, prepared), cast(Placing, placing), auto=False)


def test_a_method_has_the_costs_of_the_pipeline_that_it_fills(started: list[Any]) -> None:
    there = on_hosts(Imagined(PLAN, OTHER))
    assert there.machine is None and there.slower() == {}
    for count, (pipeline, method) in ((2, there.first()), (1, there.again())):
        name, costs = cast(Any, method)
        assert name == "pp" and pipeline.num_stages == len(costs.stages) == count
    assert isinstance(there.machine, LiveMachine) and len(there.machine.stages) == 1


@pytest.mark.parametrize("what", ["machine", "method", "hosting"])
def test_no_pipeline_is_left_where_what_belongs_to_it_cannot_be_made(what: str, started: list[Any]) -> None:
    there = on_hosts(Imagined(PLAN, fails=what))
    with pytest.raises(DamagedModel):
        there.first()
    assert started == [] and there.machine is None


def slowed(there: OnHosts, seconds: float) -> None:
    """Have the second stage take so long."""
    running = there._running
    assert running
    there._running = hosts._Running(running.plan, LiveMachine(machine(1e-2, seconds)), running.planned)


def test_a_host_that_takes_longer_is_told_until_it_is_planned_with_that(started: list[Any]) -> None:
    there = on_hosts(Imagined(PLAN))
    there.first()
    assert there.slower() == {}
    slowed(there, 3e-2)
    assert there.slower() == {"b": pytest.approx(3.0)}
    there.take_for("b", 3.0)
    assert there.slower() == {}


def test_a_host_that_is_lost_meanwhile_is_not_planned_with(started: list[Any]) -> None:
    placing = Imagined(PLAN)
    there = on_hosts(placing)
    there.first()
    slowed(there, 3e-2)
    placing.lost = True
    there.take_for("b", 3.0)
    assert there.slower() == {"b": pytest.approx(3.0)}


def test_what_was_found_of_a_pipeline_is_not_said_of_the_next_one(started: list[Any]) -> None:
    """The engine's thread exchanges it at any moment."""
    placing = Imagined(PLAN, OTHER)
    there = on_hosts(placing)
    there.first()

    def while_it_is_exchanged(host: str, factor: float, plan: Plan) -> Machine:
        there.again()
        return machine(1e-2, 3e-2)

    placing.take_for = while_it_is_exchanged  # type: ignore[method-assign]
    there.take_for("b", 3.0)
    assert there._running and len(there._running.planned.stages) == 1


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    PLAN.save(tmp_path / "plan.toml")
    return str(tmp_path / "plan.toml")


@pytest.mark.parametrize("said", [{"stages": 2}, {"width": 3}])
def test_what_a_plan_says_is_not_said_once_more(said: dict[str, int], plan_file: str) -> None:
    (name, value), = said.items()
    with pytest.raises(UsageError, match=f"says what `{name}={value}` does") as caught:
        given_plan(Options.of(model="m", hosts="ray", plan=plan_file, **said))
    assert caught.value.hint and caught.value.param == name


def test_a_plan_is_for_its_model(plan_file: str) -> None:
    assert given_plan(Options.of(model="m", hosts="ray", plan=plan_file)) == PLAN
    assert given_plan(Options.of(model="m", hosts="ray")) is None
    with pytest.raises(UsageError, match="is for m, not n"):
        given_plan(Options.of(model="n", hosts="ray", plan=plan_file))


def test_what_is_said_of_the_head_is_what_a_hosts_file_may_say() -> None:
    asked = PipelineOptions(hosts="ray", interface="eth1", host_ip="10.1.0.1", data_port=5600)
    assert said_of_head(asked) == {"interface": "eth1", "host_ip": "10.1.0.1", "port": 5600}
    assert said_of_head(PipelineOptions(hosts="ray")) == {}
