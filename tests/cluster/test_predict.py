"""What is predicted of a layout is what the engine takes there on the virtual clock."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from imagined import host, imagined

from driving import TellingEngine
from fullpipe.cluster.acceptance import Acceptance
from fullpipe.cluster.layout import Ground, Guesser, Layout, Skeleton
from fullpipe.cluster.links import between
from fullpipe.cluster.modes import CONTEXT, ENGINE_S, PP, WIDTHS, Mode, Modes
from fullpipe.cluster.planner import predict
from fullpipe.cluster.survey import Survey
from fullpipe.costs import CostCurve, Machine
from fullpipe.live_costs import LiveMachine
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage

TRUTH = {"kind": "hash", "vocab": 5000, "seed": 3}
RIGHT = 0.8
GUESSER = Guesser(("imagined",), "model", Acceptance(RIGHT, RIGHT))
LAN, WAN = 0.0001, 0.05


def seconds_of(survey: Survey, layout: Layout, station: str, rows: float) -> float:
    """What a station takes, by the hosts' profiles alone."""
    if station == "draft":
        assert layout.draft_host
        return survey.hosts[layout.draft_host].profile.draft(rows, CONTEXT)
    index = int(station.removeprefix("stage "))
    return survey.hosts[layout.order[index]].profile.stage(
        layout.layers[index], rows, CONTEXT, is_first=index == 0, is_last=index == len(layout.order) - 1)


def simulated(survey: Survey, layout: Layout, method: str, tokens: int = 160) -> float:
    """Seconds per token of an engine on the virtual clock, its own time besides."""
    number, head = len(layout.order), survey.head
    stations = [f"stage {k}" for k in range(number)]
    where = dict(zip(stations, layout.order)) | {"draft": layout.draft_host or head}
    if layout.draft_host and survey.hosts[layout.draft_host].slots > 1:
        where["draft"] = "cores of its own"

    def link(a: str, b: str) -> Link:
        pair = between(survey.pairs, a, b)
        return Link(pair.latency_s, pair.bandwidth)

    links = Links([link(*pair) for pair in pairwise(layout.order)], to_first=link(head, layout.order[0]),
                  landing=link(layout.order[-1], head), draft=link(head, layout.draft_host or head))
    draft = ScriptedDraft(TRUTH, accuracy=RIGHT, coverage=RIGHT) if method == "fullpipe" else None

    def costs(station: str, rows: int, measured: float, context: int) -> float:
        return seconds_of(survey, layout, station, rows) if rows else 0.0

    row = survey.hosts[head].profile.row_bytes
    pipeline = InProcessPipeline([ScriptedStage(k, number, TRUTH) for k in range(number)], draft, costs=costs,
                                 links=links, device_of=lambda name: where[name],
                                 message_bytes=lambda rows: rows * row)
    said = pipeline.machine()
    curves = {name: CostCurve.of(partial(seconds_of, survey, layout, name), WIDTHS)
              for name in [*stations, *(["draft"] if draft else [])]}
    machine = Machine(number, stages=[curves[name] for name in stations], draft=curves.get("draft"), link_s=said.link_s,
                      shared=said.shared, draft_link_s=said.draft_link_s, devices=said.devices)
    engine = TellingEngine(pipeline, make_method(method, machine=LiveMachine(machine)))
    engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=tokens)))
    while engine.busy:
        engine.step()
    return engine.figures[0].tbt_s + ENGINE_S


EQUAL = {"a": host(), "b": host()}
UNEQUAL = {"a": host(), "b": host(0.5), "c": host(2.0)}
CASES = {
    "two hosts, the draft in turn with the first": (imagined(EQUAL, LAN), Layout(("a", "b"), (14, 14), "a")),
    "two hosts, 50 ms": (imagined(EQUAL, WAN), Layout(("a", "b"), (14, 14), "a")),
    "the draft on cores of its own": (imagined({"a": host(cores=2), "b": host()}, 0.01),
                                      Layout(("a", "b"), (14, 14), "a")),
    "unequal hosts": (imagined(UNEQUAL, 0.005), Layout(("a", "b", "c"), (9, 14, 5), "a")),
    "unequal hosts, a bad cut": (imagined(UNEQUAL, 0.005), Layout(("a", "b", "c"), (2, 8, 18), "a")),
    "the head has no stage": (imagined(UNEQUAL, 0.002), Layout(("b", "c"), (22, 6), "a")),
    "the draft on a host of its own": (imagined(UNEQUAL, 0.002), Layout(("a", "b"), (9, 19), "c")),
    "four hosts": (imagined({name: host() for name in "abcd"}, 0.02), Layout(tuple("abcd"), (7, 7, 7, 7), "a")),
}


@pytest.mark.parametrize("case", CASES)
def test_fullpipe_takes_what_was_predicted_within_a_fifth(case: str) -> None:
    survey, layout = CASES[case]
    predicted = predict(survey, layout, GUESSER, method="fullpipe").seconds
    assert predicted == pytest.approx(simulated(survey, layout, "fullpipe"), rel=0.2)


@pytest.mark.parametrize("case", CASES)
def test_plain_pipeline_parallelism_takes_what_was_predicted(case: str) -> None:
    survey, layout = CASES[case]
    predicted = predict(survey, layout, GUESSER, method="fullpipe").pp_seconds
    assert predicted == pytest.approx(simulated(survey, layout, "pp", 20), rel=0.03)


def test_a_period_is_the_longest_of_all_that_a_flight_must_wait_for() -> None:
    """In turn a stage, the way to the first, a link's bytes, the draft, and cores that are shared."""
    only_period = Modes((Mode("x", 1, 1, period=1.0, first=0.0, wide=0.0, fixed=0.0),))

    def period(survey: Survey, order: tuple[str, ...], layers: list[int], draft: str | None = None,
               asks: float = 0.0) -> float:
        modes = only_period if not asks else Modes((Mode("x", 1, 1, 1.0, 0.0, 0.0, 0.0, asks=asks, chain=asks),))
        skeleton = Skeleton(Ground(survey, GUESSER), order, draft)
        return float(skeleton.seconds(np.array([layers]), modes)[0])

    survey = imagined(EQUAL, 0.01)
    first = seconds_of(survey, Layout(("a", "b"), (20, 8)), "stage 0", 1)
    last = seconds_of(survey, Layout(("a", "b"), (8, 20)), "stage 1", 1)
    assert period(survey, ("a", "b"), [20, 8]) == pytest.approx(first)
    assert period(survey, ("a", "b"), [8, 20]) == pytest.approx(last)
    assert period(survey, ("b", "a"), [20, 8]) == pytest.approx(first + 0.02), "it hears late that it may go on"
    slow = imagined(EQUAL, 0.01, bandwidth=1e4)
    assert period(slow, ("a", "b"), [20, 8]) == pytest.approx((6144 + 64 + 128) / 1e4)
    assert period(survey, ("a", "b"), [8, 20], "a", asks=0.5) == pytest.approx(
        0.5 + seconds_of(survey, Layout(("a", "b"), (8, 20)), "stage 0", 1)), "draft and stage in turn"
    together = imagined({"a": host(processor="one"), "b": host(processor="one")}, 0.01)
    both = sum(seconds_of(together, Layout(("a", "b"), (14, 14)), f"stage {k}", 1) for k in range(2))
    assert period(together, ("a", "b"), [14, 14]) == pytest.approx(both)


def test_plain_is_the_sum_of_stages_and_links() -> None:
    survey = imagined(UNEQUAL, 0.005)
    skeleton = Skeleton(Ground(survey), ("b", "a"))
    layout = Layout(("b", "a"), (20, 8))
    stages = sum(seconds_of(survey, layout, f"stage {k}", 1) for k in range(2))
    bytes_s = (6144 + 64 + 128) / 125e6
    assert skeleton.seconds(np.array([[20, 8]]), PP)[0] == pytest.approx(stages + 0.01 + bytes_s + ENGINE_S)
