"""Where nothing can be won nothing is lost: with a useless draft `fullpipe` is as fast as `pp`, and it notices when the
draft is useless no more. In virtual time, on machines like those of ../shared/data/clusters."""

from __future__ import annotations

from functools import cache

import pytest

from driving import TellingEngine
from fullpipe.costs import CostCurve, Machine
from fullpipe.events import Emitted
from fullpipe.messages import Event, Expansion, Flight, Part
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.base import DraftLike
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage
from fullpipe.stations.table import SlotTable

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
FIRST = 50  # tokens in which a draft may be found out
TURNS = 120  # position at which a useless draft becomes a good one
HALF = CostCurve({1: 0.020, 2: 0.023, 4: 0.029, 8: 0.044, 16: 0.084, 32: 0.165})
STAGE = {2: HALF, **{count: CostCurve({rows: seconds * 2 / count for rows, seconds in HALF.points.items()})
                     for count in (1, 4)}}
DRAFT = CostCurve({1: 0.012, 2: 0.013, 4: 0.016, 8: 0.024, 16: 0.044, 32: 0.082})
MACHINES = {  # stages, seconds one way, the draft beside stage 0
    "1 host": (1, 0.0, True), "1 host, 10 ms": (1, 0.01, True),
    "2 hosts, 0.1 ms": (2, 1e-4, True), "2 hosts, 10 ms": (2, 0.01, True), "2 hosts, 100 ms": (2, 0.1, True),
    "4 hosts, 0.1 ms": (4, 1e-4, True), "4 hosts, 10 ms": (4, 0.01, True),
    "draft apart, 0.1 ms": (2, 1e-4, False), "draft apart, 10 ms": (2, 0.01, False),
    "draft apart, 100 ms": (2, 0.1, False), "4 hosts, draft apart, 10 ms": (4, 0.01, False)}


class Empty(ScriptedDraft):
    """Answers, and knows nothing."""

    def run(self, job: Flight) -> list[Expansion]:
        return [Expansion(one.node, [], [], []) for one in super().run(job)]


class Turning(ScriptedDraft):
    """Is sure and always wrong, and from some position on sure and mostly right."""

    def _expand(self, table: SlotTable, part: Part, row: int, fanout: int) -> Expansion:
        said = super()._expand(table, part, row, fanout)
        if part.positions[row] < TURNS:
            said.tokens = [(token + 1) % 50 for token in said.tokens]
        return said


class Dumb(ScriptedDraft):
    """Has nothing to say of the first request."""

    def _expand(self, table: SlotTable, part: Part, row: int, fanout: int) -> Expansion:
        said = super()._expand(table, part, row, fanout)
        return said if table.request else Expansion(said.node, [], [], [])


USELESS = {"empty": lambda: Empty(TRUTH),
           "sure and wrong": lambda: ScriptedDraft({**TRUTH, "seed": 4}, accuracy=1.0),
           "less sure and wrong": lambda: ScriptedDraft({**TRUTH, "seed": 4}, accuracy=0.6, coverage=0.9)}


def times(method: str, machine: str, draft: DraftLike, told: bool, *tokens: int) -> list[float]:
    """When each token of the last of some answers came, one after another. told: the method begins with the curves;
    else it learns them."""
    count, seconds, shared = MACHINES[machine]
    curve, link = STAGE[count], Link(seconds)
    pipeline = InProcessPipeline(
        [ScriptedStage(k, count, TRUTH) for k in range(count)], draft,
        costs=lambda station, rows, measured, context: (DRAFT if station == "draft" else curve)(rows),
        links=Links([link] * (count - 1), landing=link, draft=Link() if shared else link),
        device_of=lambda station: "stage 0" if shared and station == "draft" else station)
    known = Machine(count, curve, DRAFT, link_s=count * seconds, shared=shared,
                    draft_link_s=0.0 if shared else 2 * seconds)
    came: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Emitted) and event.request == len(tokens) - 1:
            came.append(event.time)

    engine = TellingEngine(pipeline, make_method(method, machine=known if told else None), listeners=[listen])
    for id, number in enumerate(tokens):
        engine.submit(Request(id, (4, 8, 15), SamplingParams(max_tokens=number)))
        while engine.busy:
            engine.step()
    return came


@cache
def plain(machine: str) -> float:
    """Seconds per token of `pp`."""
    came = times("pp", machine, Empty(TRUTH), True, 100)
    return (came[-1] - came[FIRST]) / (len(came) - 1 - FIRST)


@pytest.mark.parametrize("told", [True, False], ids=["told", "learning"])
@pytest.mark.parametrize("draft", USELESS)
@pytest.mark.parametrize("machine", MACHINES)
def test_with_a_useless_draft_it_is_as_fast_as_without(machine: str, draft: str, told: bool) -> None:
    came = times("fullpipe", machine, USELESS[draft](), told, 200)
    assert (came[-1] - came[FIRST]) / (len(came) - 1 - FIRST) <= 1.01 * plain(machine)


@pytest.mark.parametrize("machine", [name for name in MACHINES if not name.startswith("1 host")])
def test_a_draft_that_has_become_good_is_used_again(machine: str) -> None:
    """A hundred tokens later it wins at least two thirds of what one wins that always was, whose claims nobody has
    learned to doubt."""
    turned, good = (times("fullpipe", machine, draft, False, TURNS + 240) for draft in
                    (Turning(TRUTH, accuracy=0.95, coverage=1.0), ScriptedDraft(TRUTH, accuracy=0.95, coverage=1.0)))
    span, best = (came[-1] - came[TURNS + 100] for came in (turned, good))
    none = plain(machine) * 139
    assert best < 0.97 * none
    assert none - span >= 2 / 3 * (none - best)


@pytest.mark.parametrize("machine", ["1 host", "1 host, 10 ms", "2 hosts, 0.1 ms"])
def test_a_draft_that_was_of_no_use_to_one_request_is_tried_with_the_next(machine: str) -> None:
    """Also where all share one device, which never rests."""
    draft = Dumb(TRUTH, accuracy=0.95, coverage=1.0)
    after, first = times("fullpipe", machine, draft, True, 200, 100), times("fullpipe", machine, ScriptedDraft(
        TRUTH, accuracy=0.95, coverage=1.0), True, 100)
    span, best = (came[-1] - came[0] for came in (after, first))
    none = plain(machine) * 99
    assert best < 0.8 * none
    assert none - span >= 2 / 3 * (none - best)
