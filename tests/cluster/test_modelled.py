"""The recurrence against the formula, and against the real engine over scripted stations."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fullpipe.engine.loop import Engine
from fullpipe.errors import UsageError
from fullpipe.messages import Emitted
from fullpipe.methods import make_policy
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.planning.modelled import METHODS, Setup, _Chances, _Trees, geometric, modelled, moments, sweep
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage

UNIT8 = (1.0,) * 8


# ---- the formula -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pipedec", "fullpipe"])
def test_it_is_the_formula_where_the_formula_holds(method: str) -> None:
    """n / (1 + (1 - p)(n - 1)) over pp: chain-like filling, unit stages, no links, draft no slower than a stage."""
    tokens = 2000
    setups = [Setup(method=method, stages=(1.0,) * n, draft=draft, hits=(p,))
              for n in (1, 2, 4, 8, 16, 64) for p in (0.0, 0.3, 0.5, 0.8, 0.95, 1.0) for draft in (0.0, 0.5, 1.0)]
    for setup, outcome in zip(setups, modelled(setups, tokens)):
        assert setup.hits is not None
        n, (p,) = len(setup.stages), setup.hits
        error = (n - 1) * math.sqrt(p * (1 - p) / (tokens - 1))  # standard error of the mean of hits and misses
        assert outcome.tbt == pytest.approx(1 + (1 - p) * (n - 1), abs=4 * error + 1e-9), setup
        # Given how many hits there were, nothing is left to luck.
        assert outcome.seconds == pytest.approx(outcome.hits + outcome.misses * n)


def test_links_are_more_depth_and_a_slow_draft_is_a_slow_stage() -> None:
    far = Setup(method="fullpipe", stages=(1.0,) * 4, hops=2.0, landing=2.0, draft=0.5, hits=(1.0,))
    slow = replace(far, draft=3.0, draft_link=0.5)
    always = modelled([far, slow], 101)
    never = modelled([replace(far, hits=(0.0,)), replace(far, method="pp", hits=None)], 101)
    assert [outcome.tbt for outcome in always] == pytest.approx([1.0, 4.0])
    assert [outcome.tbt for outcome in never] == pytest.approx([12.0, 12.0])


# ---- the engine ------------------------------------------------------------------------------------------


def emitted(setup: Setup, acceptance: float, tokens: int, *, method: str | None = None,
            **options: Any) -> tuple[list[float], list[bool], float]:
    """What the engine makes of a set-up: when it emits each token, which of them were hits, steps per token. method:
    another than the set-up's."""
    truth = {"kind": "hash", "vocab": 50, "seed": 3}
    number = len(setup.stages)
    assert isinstance(setup.hops, float)

    def costs(station: str, rows: int, measured: float, context: int) -> float:
        took = setup.draft if station == "draft" else setup.stages[int(station.removeprefix("stage "))]
        return took if rows else 0.0

    links = Links([Link(setup.hops)] * (number - 1), Link(setup.to_first), Link(setup.landing), Link(setup.draft_link))
    pipeline = InProcessPipeline([ScriptedStage(k, number, truth) for k in range(number)],
                                 ScriptedDraft(truth, accuracy=acceptance, coverage=acceptance, seed=3), costs=costs,
                                 links=links)
    policy = make_policy(method or setup.method, width=setup.width, floor=0.0, **options)
    engine = Engine(pipeline, policy, top_k=1, spare=512)
    track = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=tokens)))
    news: list[Emitted] = []
    while engine.busy:
        news += [event for event in engine.step() if isinstance(event, Emitted)]
    start = news[0].time
    return [event.time - start for event in news], [event.hit for event in news[:-1]], track.stats.steps_per_token


@pytest.mark.parametrize(("method", "acceptance"), [
    ("pp", 0.8), ("pipedec", 0.8), ("fullpipe", 0.8), ("pipedec", 0.5), ("fullpipe", 0.5),
])
@pytest.mark.parametrize("stages", [1, 2, 8])
def test_with_unit_costs_it_is_the_engine_token_by_token(method: str, acceptance: float, stages: int) -> None:
    setup = Setup(method=method, stages=(1.0,) * stages, draft=1.0, hits=(acceptance,))
    times, hits, steps = emitted(setup, acceptance, 120)
    assert moments(setup, hits) == pytest.approx(times)
    # Left to its own luck it comes to the same mean. The engine's counts the first traversal too.
    mean = modelled([setup], 3000)[0]
    error = (stages - 1) * math.sqrt(acceptance * (1 - acceptance) / 120)
    assert steps == pytest.approx(mean.steps_per_token, rel=0.02, abs=4 * error + stages / 120)


@pytest.mark.parametrize("draft", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("stages", [UNIT8, (1.0, 2.0, 1.5, 1.0)])
def test_a_chain_of_spd_is_one_of_pipedec(stages: tuple[float, ...], draft: float) -> None:
    """Why `spd` is no method here (docs/benchmarking.md)."""
    setup = Setup(method="pipedec", stages=stages, draft=draft, hits=(0.7,))
    assert emitted(setup, 0.7, 120, method="spd") == emitted(setup, 0.7, 120)


@pytest.mark.parametrize("stages", [(1.0,), UNIT8, (1.0, 1.2, 0.8)])
def test_a_chain_takes_the_engines_rounds(stages: tuple[float, ...]) -> None:
    setup = Setup(method="chain", stages=stages, hops=0.25, draft=0.5, hits=(0.8,), depth=4)
    times, hits, _ = emitted(setup, 0.8, 120, depth=4)
    # The engine's first root travels alone, and its last rounds guess no further than the text may go.
    assert not hits[0]
    assert moments(setup, hits)[:-5] == pytest.approx(times[:-5])


@pytest.mark.parametrize("method", ["pipedec", "fullpipe"])
@pytest.mark.parametrize("changes", [
    {"stages": (1.0, 1.5, 1.0, 0.7), "draft": 1.0},
    {"stages": (1.0, 1.5, 1.0, 0.7), "draft": 1.0, "hops": 0.3, "landing": 0.3},
    {"stages": (1.0, 0.8, 1.0, 0.7), "draft": 1.6},
    {"stages": (1.0, 0.8, 1.0, 0.7), "draft": 0.35, "draft_link": 0.4, "hops": 2.3, "landing": 2.3},
    {"stages": UNIT8, "draft": 2.0},
    {"stages": (0.6, *UNIT8[1:]), "draft": 0.5, "to_first": 0.25},
    {"stages": (0.5, 0.5, 2.0, 0.5), "draft": 1.0},
], ids=str)
def test_with_uneven_costs_and_links_it_is_near_the_engine(method: str, changes: dict[str, Any]) -> None:
    setup = Setup(method=method, hits=(0.8,), **changes)
    times, hits, _ = emitted(setup, 0.8, 150)
    assert moments(setup, hits)[-1] == pytest.approx(times[-1], rel=0.08)


# ---- trees -----------------------------------------------------------------------------------------------


def test_a_tree_of_width_one_is_a_chain() -> None:
    setup = Setup(method="pipedec", stages=UNIT8, ranks=(0.6, 0.3))
    chances, tree = _Chances([setup]), _Trees([setup])
    draws = np.random.default_rng(1).random(300)
    assert [bool(chances.draw(u)[0]) for u in draws] == [bool(tree.draw(u)[0]) for u in draws]


def test_a_static_tree_accepts_what_its_layers_hold() -> None:
    """Two guesses a node, two nodes a layer: the first layer holds 0.7 + 0.3, the second 0.49 + 0.21 of that. So a
    round of depth 2 has 1.7 hits in 2.7 tokens."""
    setup = Setup(method="static-tree", stages=UNIT8, ranks=(0.7, 0.3), width=2, depth=2, draft=1.0)
    (outcome,) = modelled([setup], 4000)
    assert outcome.hit_rate == pytest.approx(1.7 / 2.7, abs=0.02)
    assert outcome.seconds == pytest.approx(outcome.misses * (8 + 2))  # hits come with the round's landing


def test_commits_make_room_in_a_layer() -> None:
    """With four unit stages three tokens lie between a layer and what is known: two guesses a node spread to 2^4 there,
    and a layer that holds all of them misses nothing."""
    narrow, wide = (Setup(method="pipedec", stages=(1.0,) * 4, draft=1.0, ranks=(0.6, 0.4), width=width)
                    for width in (2, 2**4))
    missing, whole = modelled([narrow, wide], 500)
    assert whole.misses == 0 and missing.misses > 0


def test_wider_is_never_slower() -> None:
    setups = [Setup(method="fullpipe", stages=UNIT8, draft=1.0, ranks=geometric(0.7), width=width)
              for width in (1, 2, 4, 8, 16)]
    times = [outcome.tbt for outcome in modelled(setups, 1000)]
    assert times == sorted(times, reverse=True) and times[-1] < times[0] / 1.5


# ---- use -------------------------------------------------------------------------------------------------


def test_a_result_depends_on_setup_tokens_and_seed_alone() -> None:
    one = Setup(method="pipedec", stages=UNIT8, draft=1.0, ranks=geometric(0.7), width=4)
    others = [Setup(method=method, stages=(0.5, 1.0), draft=0.2, hits=(0.4, 0.9)) for method in METHODS]
    alone, among = modelled([one], 200), modelled([*others, one, *others], 200)
    assert among[len(others)] == alone[0]
    assert modelled([one], 200, seed=1) != alone


def test_a_thousand_setups_of_64_stages_take_far_less_than_a_minute() -> None:
    setups = [Setup(method="fullpipe", stages=(1.0,) * 64, hops=0.1, draft=0.9, hits=(k / 1000,)) for k in range(1000)]
    start = time.perf_counter()
    outcomes = modelled(setups, 1000)
    assert time.perf_counter() - start < 30  # half a second on the development machine
    assert len(outcomes) == 1000 and outcomes[0].tbt > outcomes[-1].tbt


def test_a_sweep_has_every_combination_with_the_best_depth() -> None:
    points = sweep(methods=("pp", "chain", "fullpipe"), stages=(4, 8), acceptances=(0.5, 0.9), links=(0.0, 2.0),
                   drafts=(0.5,), depths=(1, 4), tokens=200)
    assert len(points) == 2 * 2 * 2 * 3
    for point in points:
        setup = point.outcome.setup
        if setup.method == "pp":
            assert point.speedup == pytest.approx(1.0)
        if setup.method == "chain":
            both = modelled([replace(setup, depth=depth) for depth in (1, 4)], 200)
            assert point.outcome.tbt == min(outcome.tbt for outcome in both)
    assert {point.outcome.setup.depth for point in points if point.outcome.setup.method == "chain"} == {1, 4}


@pytest.mark.parametrize(("changes", "says"), [
    ({"method": "magic"}, "unknown method 'magic'; methods are: pp"), ({"stages": ()}, "there must be a stage"),
    ({"stages": (1.0, -1.0)}, "times must be 0 or more"), ({"draft": math.nan}, "times must be 0 or more"),
    ({"stages": (0.0, 0.0)}, "some stage must take time"), ({"hops": (1.0,)}, "1 hops cannot join 8 stages"),
    ({"hits": (1.5,)}, "chances must be in"), ({"hits": ()}, "must not be empty"), ({"hits": None}, "needs an accept"),
    ({"hits": None, "ranks": (0.7, 0.7)}, "sum to more than 1"), ({"hits": None, "ranks": (0.1, 0.7)}, "not likelier"),
    ({"width": 4}, "a width means nothing beside hits"), ({"depth": 0}, "depth must be 1 or more"),
])
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    good = Setup(method="fullpipe", stages=UNIT8, hits=(0.5,))
    with pytest.raises(UsageError, match=says):
        replace(good, **changes)


def test_one_token_has_no_time_between_tokens() -> None:
    with pytest.raises(UsageError, match="tokens must be 2 or more"):
        modelled([], 1)
