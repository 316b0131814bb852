"""A lane says when packets arrive."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.cluster.netlab_links import Count, Lane, Shape
from fullpipe.errors import UsageError

shapes = st.builds(Shape, delay_ms=st.floats(0, 100), jitter_ms=st.floats(0, 100), loss=st.floats(0, 1),
                   mbit=st.sampled_from([0.0, 1.0, 100.0]))
packets = st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 9000)), max_size=50)  # seconds since the one before


def lane(**shape: float) -> Lane:
    return Lane(Shape(**shape), random.Random(0))


@given(shapes, packets)
def test_packets_arrive_in_order_not_before_they_came_and_each_is_counted_once(
        shape: Shape, given_packets: list[tuple[float, int]]) -> None:
    one = Lane(shape, random.Random(0))
    now, due = 0.0, []
    for gap, size in given_packets:
        now += gap
        due.append((now, one.due(now, size)))
    arrivals = [when for _, when in due if when is not None]
    assert arrivals == sorted(arrivals)
    assert all(when >= came for came, when in due if when is not None)
    assert one.packets + one.dropped == len(given_packets)
    assert one.packets == len(arrivals)


@given(packets)
def test_a_bandwidth_is_kept(given_packets: list[tuple[float, int]]) -> None:
    one, now = lane(mbit=1), 0.0
    arrivals = []
    for gap, size in given_packets:
        now += gap
        if (due := one.due(now, size)) is not None:
            arrivals.append((due, size))
    for (before, _), (after, size) in itertools.pairwise(arrivals):
        assert after - before >= size * 8e-6 - 1e-12


def test_a_delay_is_added_to_the_time_that_a_packet_takes_to_leave() -> None:
    assert lane(delay_ms=10).due(5.0, 1000) == pytest.approx(5.010)
    assert lane(delay_ms=10, mbit=8).due(5.0, 1000) == pytest.approx(5.011)


def test_a_lane_that_is_more_than_a_second_behind_drops() -> None:
    one = lane(mbit=1)
    assert [one.due(0.0, 50_000) is None for _ in range(4)] == [False, False, True, True]
    assert one.count == Count(packets=2, bytes=100_000, dropped=2)
    assert one.due(0.5, 50_000) == pytest.approx(1.2)


def test_loss_loses_its_share_and_all_of_it_everything() -> None:
    one = lane(loss=0.25)
    lost = sum(one.due(0.0, 1) is None for _ in range(4000))
    assert 900 < lost < 1100
    assert {lane(loss=1).due(float(at), 1) for at in range(100)} == {None}


def test_a_change_of_shape_does_not_let_packets_overtake() -> None:
    one = lane(delay_ms=50)
    assert one.due(0.0, 1) == pytest.approx(0.05)
    one.shape = Shape()
    assert one.due(0.01, 1) == pytest.approx(0.05)
    assert one.due(0.06, 1) == pytest.approx(0.06)


@pytest.mark.parametrize("wrong", [{"delay_ms": -1}, {"jitter_ms": float("inf")}, {"mbit": float("nan")},
                                   {"loss": 1.5}, {"loss": -0.1}])
def test_a_link_that_cannot_be_is_refused_by_name(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name) as raised:
        Shape(**wrong)
    assert raised.value.param == name
