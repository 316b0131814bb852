"""Durations of workers, placed on the engine's clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import Leg
from fullpipe.pipeline.frames import Stay
from fullpipe.pipeline.legs import Legs

NAMES = ["stage 0", "stage 1", "stage 2"]
seconds = st.floats(0, 5)
stays = st.builds(Stay, seconds, seconds, seconds, seconds, st.just([1]))


def test_what_is_left_of_the_whole_is_spread_over_the_hops() -> None:
    one = [Stay(0.0, 1.0, 2.0, 0.0, [1]), Stay(3.0, 0.0, 4.0, 5.0, [1])]
    assert Legs(NAMES[:2]).place(100.0, 124.0, one, 6.0) == [Leg("stage 0", 102.0, 104.0, [1]),
                                                             Leg("stage 1", 108.0, 112.0, [1])]


def test_waiting_unseen_for_the_flight_before_is_made_good_first() -> None:
    """The second was sent 1 s after the first, and each takes 4 s at stage 1: it waited there for 3 s."""
    legs = Legs(NAMES[:2])
    stay = [Stay(0.0, 0.0, 1.0, 0.0, []), Stay(0.0, 0.0, 4.0, 0.0, [])]
    assert legs.place(10.0, 15.0, stay, 0.0)[1] == Leg("stage 1", 11.0, 15.0, [])
    assert legs.place(11.0, 19.3, stay, 0.0) == [Leg("stage 0", pytest.approx(11.1), pytest.approx(12.1), []),
                                                 Leg("stage 1", pytest.approx(15.2), pytest.approx(19.2), [])]


@given(st.lists(st.tuples(st.floats(0, 3), st.lists(stays, min_size=3, max_size=3), seconds, seconds), max_size=8))
def test_legs_are_in_order_and_as_long_as_they_were(flights: list[tuple[float, list[Stay], float, float]]) -> None:
    """However long the hops took; and all lie between sending and landing."""
    legs, sent, landed, before = Legs(NAMES), 1000.0, 0.0, [0.0] * 3
    for gap, at, carried, hops in flights:
        sent += gap
        floor = sum(stay.carried + stay.waited + stay.worked + stay.held for stay in at) + carried
        moment = sent
        for stay, end in zip(at, before):  # stations take one flight after the other
            moment = max(moment + stay.carried + stay.waited, end) + stay.worked + stay.held
        landed = max(landed, sent + floor, moment + carried) + hops
        found = legs.place(sent, landed, at, carried)
        assert [leg.station for leg in found] == NAMES
        last = sent
        for leg, stay, end in zip(found, at, before):
            assert leg.start >= last - 1e-6 and leg.start >= end - 1e-6
            assert leg.end - leg.start == pytest.approx(stay.worked, abs=1e-6)
            last = leg.end + stay.held
        assert last <= landed - carried + 1e-6
        before = [leg.end for leg in found]


def test_clocks_that_run_apart_do_not_put_a_leg_behind_its_landing() -> None:
    (leg,) = Legs(["draft"]).place(1.0, 2.0, [Stay(0.0, 0.0, 1.001, 0.0, [])], 0.0)
    assert (leg.start, leg.end) == (1.0, 2.0)
