"""What a method knows of its stations follows the legs that come back, on every pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from driving import TellingEngine
from fullpipe.costs import CostCurve, Machine
from fullpipe.live_costs import LiveMachine
from fullpipe.messages import Drafted, Landed
from fullpipe.methods import FullPipe, make_method
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage
from fullpipe.stations.spec import StationSpec

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
STAGE = CostCurve({1: 0.010, 2: 0.0115, 4: 0.0145, 8: 0.022, 16: 0.042})
DRAFT = CostCurve({1: 0.012, 4: 0.016, 8: 0.024})
LINKS = Links([Link(0.25), Link(0.25)], to_first=Link(0.125), landing=Link(0.5), draft=Link(0.0625))


def virtual(slower: float = 1.0, **options: object) -> InProcessPipeline:
    """Three stages, the last of them `slower` than the curve."""
    def costs(station: str, rows: int, measured: float, context: int) -> float:
        curve = DRAFT if station == "draft" else STAGE
        return curve(rows) * (slower if station == "stage 2" else 1.0)

    return InProcessPipeline([ScriptedStage(k, 3, TRUTH) for k in range(3)], ScriptedDraft(TRUTH, accuracy=0.7),
                             costs=costs, **options)  # type: ignore[arg-type]


def answered(pipeline: Pipeline, method: FullPipe, tokens: int = 60) -> TellingEngine:
    engine = TellingEngine(pipeline, method)
    engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=tokens)))
    while engine.busy:
        engine.step()
    return engine


def fullpipe(machine: Machine | None = None) -> FullPipe:
    method = make_method("fullpipe", width=8, machine=machine)
    assert isinstance(method, FullPipe)
    return method


# ---- what a pipeline says of itself ------------------------------------------------------------------------


@pytest.mark.parametrize(("device_of", "shared", "devices"), [
    (lambda station: station, False, ["stage 0", "stage 1", "stage 2"]), (lambda station: "a", True, ["a", "a", "a"]),
    (lambda station: "ab"["stage" in station], False, ["b", "b", "b"]),
    (lambda station: station[-1].replace("t", "0"), True, ["0", "1", "2"])],
    ids=["each its own", "all together", "the draft apart", "the draft with stage 0"])
def test_an_imagined_pipeline_knows_its_devices_and_links(device_of: Callable[[str], str], shared: bool,
                                                          devices: list[str]) -> None:
    machine = virtual(links=LINKS, device_of=device_of).machine()
    assert machine == Machine(3, link_s=1.125, shared=shared, draft_link_s=0.125, devices=devices)


def test_on_the_wall_clock_all_stations_of_a_process_share_it() -> None:
    machine = virtual(clock="wall", links=LINKS).machine()
    assert (machine.shared, len(set(machine.devices)), machine.link_s, machine.draft_link_s) == (True, 1, 0.0, 0.0)
    alone = InProcessPipeline([ScriptedStage(0, 1, TRUTH)], clock="wall").machine()
    assert not alone.shared, "nobody is there to wait for"


# ---- in virtual time ---------------------------------------------------------------------------------------


def test_where_legs_take_what_is_known_nothing_changes_and_runs_stay_as_they_are() -> None:
    live = LiveMachine(Machine(3, STAGE, DRAFT))
    engines = [answered(virtual(links=LINKS), fullpipe(machine)) for machine in (live, Machine(3, STAGE, DRAFT))]
    assert live.stage is STAGE and live.draft is DRAFT
    first, second = (engine.figures[0] for engine in engines)
    assert first == second


def test_a_stage_that_is_slower_than_it_was_is_noticed() -> None:
    live = LiveMachine(Machine(3, STAGE, DRAFT))
    answered(virtual(slower=1.5), fullpipe(live), 200)
    assert live.stages[0] is live.stages[1] is STAGE and live.draft is DRAFT
    assert live.stage is not None and live.stage(1) == pytest.approx(1.5 * STAGE(1), rel=0.06)
    assert live.stage(8) > 1.2 * STAGE(8), "drawn along: few rows come that far"


def test_begun_from_nothing_a_machine_is_known_after_some_flights() -> None:
    method = fullpipe()
    pipeline = virtual(slower=2.0, links=LINKS, device_of=lambda station: station[-1].replace("t", "0"))
    engine = TellingEngine(pipeline, method)
    machine = method.machine
    assert machine is not None and machine.stage is None
    assert (machine.num_stages, machine.link_s, machine.shared) == (3, 1.125, True)
    engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=60)))
    while machine.stage is None or machine.draft is None:
        engine.step()
    assert engine.figures[0].num_emitted < 5
    while engine.busy:
        engine.step()
    assert machine.stage(1) == pytest.approx(2 * STAGE(1), rel=0.1)
    assert machine.stages[0](1) == pytest.approx(STAGE(1), rel=0.1)
    assert method.machine is machine


@pytest.mark.parametrize(("requests", "accuracy", "most"), [(1, 0.7, 1.35), (4, 0.4, 1.25)])
def test_four_stages_of_one_device_are_no_pipeline(requests: int, accuracy: float, most: float) -> None:
    """They take turns, so that a traversal takes no longer than a flight. most: times as long as with one stage that
    does all of their work; what is left is that stage 0 begins what others then wait for."""
    def seconds(count: int) -> float:
        curves = {"draft": CostCurve.of(lambda rows: 0.14 + 0.06 * rows),
                  "stage": CostCurve.of(lambda rows: (0.9 + 0.1 * rows) / count)}
        pipeline = InProcessPipeline(
            [ScriptedStage(k, count, TRUTH) for k in range(count)], ScriptedDraft(TRUTH, accuracy=accuracy),
            costs=lambda station, rows, measured, context: curves[station.split()[0]](rows),
            device_of=lambda station: "a")
        machine = Machine(count, curves["stage"], curves["draft"], shared=True, devices=["a"] * count)
        engine = TellingEngine(pipeline, make_method("fullpipe", machine=machine))
        for id in range(requests):
            engine.submit(Request(id, (id, 8, 15), SamplingParams(max_tokens=120)))
        while engine.busy:
            engine.step()
        return pipeline.now()

    assert seconds(4) < most * seconds(1)


@pytest.mark.parametrize("given", [None, Machine(3), Machine(3, STAGE), LiveMachine(Machine(3))],
                         ids=["none", "without curves", "with curves", "learning"])
def test_an_engine_leaves_a_machine_that_has_curves_or_learns_them(given: Machine | None) -> None:
    method = fullpipe(given)
    TellingEngine(virtual(links=LINKS), method)
    assert method.machine is not None
    if given is not None and (given.stage or isinstance(given, LiveMachine)):
        assert method.machine is given
    else:
        assert isinstance(method.machine, LiveMachine)


def test_a_method_is_told_of_every_leg_before_anything_follows_from_it() -> None:
    told: list[tuple[type, int, int]] = []

    class Telling(FullPipe):
        def observe(self, event: Landed | Drafted) -> None:
            id = event.flight if isinstance(event, Landed) else event.job
            told.append((type(event), id, engine.figures[0].num_emitted))

    engine = TellingEngine(virtual(), Telling())
    engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=20)))
    while engine.busy:
        engine.step()
    landings, answers = ([id for kind, id, _ in told if kind is wanted] for wanted in (Landed, Drafted))
    assert landings == list(range(len(landings))) and answers == list(range(len(answers)))
    assert len(landings) >= 20 and answers and told[0][2] == 0


# ---- on the wall clock -------------------------------------------------------------------------------------
# Nothing that works is quicker than it sleeps; nothing is asserted about how much slower a busy machine is.


def test_one_process_learns_what_its_stations_take() -> None:
    method = fullpipe()
    stages = [ScriptedStage(k, 2, TRUTH, delay_s=delay) for k, delay in enumerate((0.002, 0.004))]
    answered(InProcessPipeline(stages, ScriptedDraft(TRUTH), clock="wall"), method, 30)
    machine = method.machine
    assert machine and machine.stage and machine.gap and machine.draft
    assert machine.stages[0](1) > 0.001 and machine.stage(1) > 0.002
    assert machine.gap(1) == pytest.approx(machine.stages[0](1) + machine.stages[1](1))


@pytest.mark.processes
def test_processes_begin_with_their_links_and_follow_the_legs() -> None:
    stages = [StationSpec("fullpipe.stations.scripted:ScriptedStage", {"index": k, "num_stages": 2, "truth": TRUTH})
              for k in range(2)]
    draft = StationSpec("fullpipe.stations.drafts.scripted:ScriptedDraft", {"truth": TRUTH})
    links = Links([Link(0.002)], landing=Link(0.002), draft=Link(0.001))
    quick = CostCurve({1: 1e-3, 2: 1e-3, 4: 1e-3, 8: 1e-3, 16: 1e-3})
    with WorkersPipeline(stages, draft, links=links, pace={"stage 1": {1: 0.01}, "draft": {1: 0.005}}) as pipeline:
        devices = ["core of stage 0", "core of stage 1"]
        assert pipeline.machine() == Machine(2, link_s=0.004, draft_link_s=0.002, devices=devices)
        unknown, wrong = fullpipe(), fullpipe(LiveMachine(Machine(2, quick, quick)))
        engine = answered(pipeline, unknown, 30)
        engine.use(wrong)
        engine.submit(Request(1, (4, 8, 15), SamplingParams(max_tokens=40)))
        while engine.busy:
            engine.step()
    for machine in (unknown.machine, wrong.machine):
        assert machine and machine.stage and machine.draft and not machine.shared
        assert machine.stages[1](1) > 0.004 and machine.stage(1) >= machine.stages[1](1)
        assert machine.draft(1) > 0.001
