"""Curves that follow what legs take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.costs import CostCurve, Machine
from fullpipe.live_costs import LiveCurve, LiveMachine, learning
from fullpipe.messages import ArenaId, Drafted, Landed, Leg, Scored

KNOWN = CostCurve({1: 0.020, 2: 0.023, 4: 0.029, 8: 0.044, 16: 0.080, 32: 0.150})
MIXED = (1, 8, 3, 2, 6, 1, 12, 4, 5)

rows_seen = st.one_of(st.integers(0, 12), st.integers(0, 300))
legs_seen = st.lists(st.tuples(rows_seen, st.floats(0, 10)), max_size=60)


def follow(curve: LiveCurve, legs: Sequence[tuple[int, float]]) -> int:
    """How many times another curve was told."""
    told = 0
    for rows, seconds in legs:
        before = curve.curve
        changed = curve.observe(rows, seconds)
        assert changed == (curve.curve is not before)
        told += changed
    return told


def taking(seconds: Callable[[int], float], count: int, rows: Sequence[int] = MIXED) -> list[tuple[int, float]]:
    return [(number, seconds(number)) for number in islice(cycle(rows), count)]


@given(legs=legs_seen, begins=st.sampled_from([None, KNOWN, CostCurve({1: 0.0}), CostCurve({4: 1.0, 200: 1.0})]))
def test_whatever_legs_say_more_rows_never_take_less(legs: list[tuple[int, float]], begins: CostCurve | None) -> None:
    curve = LiveCurve(begins)
    follow(curve, legs)
    if curve.curve is None:
        assert begins is None
        return
    seconds = [curve.curve(rows) for rows in range(1, 400)]
    assert all(math.isfinite(one) for one in seconds) and seconds == sorted(seconds)
    assert min(seconds) >= 0


@given(points=st.dictionaries(st.integers(1, 256), st.floats(0, 10), min_size=1, max_size=9),
       rows=st.lists(rows_seen, max_size=40), now=st.floats(0, 1e5))
def test_legs_that_take_what_the_curve_says_change_nothing(points: dict[int, float], rows: list[int],
                                                           now: float) -> None:
    """To the bit, wherever on the clock they lie: unless they are too short for it to show."""
    begins = CostCurve({number: max(seconds, 1e-3) for number, seconds in points.items()})
    curve = LiveCurve(begins)
    assert not follow(curve, [(number, now + begins(number) - now) for number in rows])
    assert curve.curve is begins


@pytest.mark.parametrize("truth", [lambda rows: 2 * KNOWN(rows), lambda rows: KNOWN(rows) / 2, lambda rows: 0.02,
                                   lambda rows: 0.01 * rows, lambda rows: 0.02 + 0.01 * max(0, rows - 4)],
                         ids=["twice as slow", "twice as quick", "flat", "a row, a share", "free up to 4"])
def test_the_curve_becomes_what_the_legs_say(truth: Callable[[int], float]) -> None:
    curve = LiveCurve(KNOWN)
    told = follow(curve, taking(truth, 600))
    assert curve.curve is not None
    for rows in (1, 2, 4, 8):
        assert curve.curve(rows) == pytest.approx(truth(rows), rel=0.08), rows
    assert told < 50


def test_a_change_shows_after_a_few_dozen_legs_and_at_rows_that_were_not_seen() -> None:
    curve = LiveCurve(KNOWN)
    follow(curve, taking(lambda rows: 2 * KNOWN(rows), 40))
    assert curve.curve is not None
    assert all(curve.curve(rows) > 1.75 * KNOWN(rows) for rows in MIXED)
    assert curve.curve(32) > 1.4 * KNOWN(32), "drawn along"


@given(rows=st.integers(1, 300), seconds=st.floats(0, 1e6))
def test_a_single_leg_moves_nothing(rows: int, seconds: float) -> None:
    curve = LiveCurve(KNOWN)
    follow(curve, taking(KNOWN, 5))
    assert not curve.observe(rows, seconds) and curve.curve is KNOWN


def test_now_and_then_a_hiccup_moves_little() -> None:
    curve = LiveCurve(KNOWN)
    follow(curve, [(rows, seconds * (100 if place % 20 == 7 else 1))
                   for place, (rows, seconds) in enumerate(taking(KNOWN, 600))])
    assert curve.curve is not None
    assert all(curve.curve(rows) == pytest.approx(KNOWN(rows), rel=0.12) for rows in (1, 2, 4, 8, 32))


def test_what_made_rows_dear_for_a_while_is_forgotten_though_nobody_tries_them_again() -> None:
    curve = LiveCurve(KNOWN)
    follow(curve, taking(lambda rows: 3 * KNOWN(rows), 30, rows=(8,)))
    assert curve.curve is not None and curve.curve(8) > 2.5 * KNOWN(8)
    follow(curve, taking(lambda rows: KNOWN(rows) * 1.01, 3000, rows=(1, 2)))
    assert curve.curve(8) < 1.2 * KNOWN(8)


def test_begun_from_nothing_it_is_known_when_rows_have_come_twice() -> None:
    curve = LiveCurve(None)
    assert not curve.observe(40, 0.2) and not curve.observe(1, 0.5) and curve.curve is None
    assert curve.observe(1, 0.02), "the quicker of two: what disturbs only adds"
    assert curve.curve is not None and curve.curve.points == {1: 0.02}
    follow(curve, taking(KNOWN, 60, rows=(1, 8, 40, 3)))
    for rows in (1, 3, 8, 40):
        assert curve.curve(rows) == pytest.approx(KNOWN(rows), rel=0.06)


@given(rows=st.lists(st.integers(1, 100_000), max_size=300))
def test_there_are_never_many_knots(rows: list[int]) -> None:
    curve = LiveCurve(None)
    follow(curve, [(number, 0.01 + 0.001 * number) for number in rows * 2])
    assert curve.curve is None or len(curve.curve.rows) < 60


# ---- machines ----------------------------------------------------------------------------------------------


def landing(*legs: tuple[int, float]) -> Landed:
    return Landed(0.0, 0, legs=[Leg(f"stage {k}", 5.0, 5.0 + seconds, [-1] * rows)
                                for k, (rows, seconds) in enumerate(legs)])


def answer(rows: int, seconds: float) -> Drafted:
    return Drafted(0.0, 0, [], Leg("draft", 5.0, 5.0 + seconds, [-1] * rows))


def test_each_station_follows_its_own_legs() -> None:
    machine = LiveMachine(Machine(2, KNOWN, KNOWN, link_s=0.01, shared=True, draft_link_s=0.02, devices=["a", "a"],
                                  reads_taps=True))
    assert (machine.link_s, machine.shared, machine.draft_link_s, machine.reads_taps) == (0.01, True, 0.02, True)
    for _ in range(60):
        machine.observe(landing((1, KNOWN(1)), (1, 0.06)))
        machine.observe(answer(1, 0.005))
    assert machine.stages[0] is KNOWN and machine.stage and machine.gap and machine.draft
    assert machine.stages[1](1) == pytest.approx(0.06, rel=0.06) == machine.stage(1)
    assert machine.gap(1) == pytest.approx(0.08, rel=0.06)
    assert machine.draft(1) == pytest.approx(0.005, rel=0.06)


def test_a_machine_is_known_when_all_its_stages_are() -> None:
    machine = LiveMachine(Machine(2))
    for seconds in (0.01, 0.01):
        machine.observe(landing((1, seconds), (0, 0.0)))  # its rows had died on the way
        machine.observe(answer(3, seconds))
    assert machine.stage is None and machine.draft and machine.draft.points == {3: pytest.approx(0.01)}
    for seconds in (0.02, 0.02):
        machine.observe(landing((1, 0.01), (1, seconds)))
    assert machine.stage and machine.stage(1) == pytest.approx(0.02)


def test_what_scoring_a_prompt_takes_says_nothing_of_other_rows() -> None:
    machine = LiveMachine(Machine(1, KNOWN))
    for _ in range(60):
        scored = landing((32, 9.0))
        scored.prompts = [Scored(ArenaId(0), 1, 1, [(5, -0.5)])]
        machine.observe(scored)
    assert machine.stage is KNOWN


def test_what_is_given_is_certain() -> None:
    given_, live = Machine(1, KNOWN), LiveMachine(Machine(1))
    for _ in range(50):
        given_.observe(landing((1, 9.0)))
    assert given_.stage is KNOWN
    assert learning(given_) is given_ and learning(live) is live
    begun = learning(Machine(3, link_s=0.5))
    assert isinstance(begun, LiveMachine) and (begun.num_stages, begun.link_s) == (3, 0.5)
