"""The one cost curve: seconds by rows. Machines are put together of them."""

from __future__ import annotations

import math

import pytest

from fullpipe.costs import CostCurve, Machine
from fullpipe.errors import UsageError


def test_a_curve_is_straight_between_its_points_and_goes_on() -> None:
    curve = CostCurve({8: 2.0, 1: 1.0, 4: 1.0})
    assert [curve(rows) for rows in (0, 1, 3, 4, 6, 8, 12)] == [0.0, 1.0, 1.0, 1.0, 1.5, 2.0, 3.0]
    assert [curve.marginal(rows) for rows in (1, 4, 7, 8, 99)] == [0.0, 0.25, 0.25, 0.25, 0.25]
    assert [curve.most_rows(seconds, 10) for seconds in (0.5, 1.0, 1.6, 9.0)] == [0, 4, 6, 10]
    assert CostCurve({4: 0.5})(1) == CostCurve({4: 0.5})(64) == 0.5
    assert (CostCurve({4: 0.5})(0), CostCurve({4: 0.5})(-1)) == (0.0, 0.0)
    assert [curve(size) for size in (0.5, 4.5, 7.9)] == pytest.approx([1.0, 1.125, 1.975]), "sizes need not be whole"


def test_a_curve_never_falls() -> None:
    falls = CostCurve({1: 2.0, 2: 1.0})
    assert falls(2) == falls(9) == 2.0 and falls.points == {1: 2.0, 2: 2.0}
    assert CostCurve(falls.points)(5) == 2.0


def test_the_slowest_of_several() -> None:
    slowest = CostCurve.slowest([CostCurve({1: 1.0, 4: 1.0, 8: 2.0}), CostCurve({1: 1.5})])
    assert [slowest(rows) for rows in (1, 8)] == [1.5, 2.0]


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {1: -0.1}, {1: math.inf}, {1: math.nan}, {"1": 0.1}, {1.5: 0.1},
                                    {1: None}, [0.1], None], ids=str)
def test_points_that_make_no_curve(points: object) -> None:
    with pytest.raises(UsageError, match="no cost curve") as caught:
        CostCurve(points)  # type: ignore[arg-type]
    assert caught.value.hint


# ---- machines ----------------------------------------------------------------------------------------------

QUICK, SLOW = CostCurve({1: 1.0, 8: 1.0, 16: 3.0}), CostCurve({1: 2.0})


@pytest.mark.parametrize(("devices", "gap"), [((), [2.0, 3.0]), (("a", "b", "c"), [2.0, 3.0]),
                                              (("a", "a", "b"), [3.0, 5.0]), (("a", "a", "a"), [5.0, 7.0])], ids=str)
def test_flights_follow_each_other_as_the_busiest_device_lets_them(devices: tuple[str, ...], gap: list[float]) -> None:
    machine = Machine(3, stages=[QUICK, SLOW, SLOW], devices=devices)
    assert machine.stage and machine.gap
    assert [machine.stage(rows) for rows in (1, 16)] == [2.0, 3.0]
    assert [machine.gap(rows) for rows in (1, 16)] == gap


def test_a_machine_of_equal_stages_needs_no_list_of_them() -> None:
    machine = Machine(3, QUICK, SLOW, 0.5)
    assert machine.stage is QUICK and machine.draft is SLOW and machine.stages == (QUICK, QUICK, QUICK)
    assert (Machine(2).stage, Machine(2).stages, Machine(2).gap) == (None, (), None)
