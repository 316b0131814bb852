"""Links as numbers: nothing here waits."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack

from fullpipe.errors import UsageError
from fullpipe.pipeline.links import Link, Links, StationLinks, Wire

links = st.builds(Link, st.floats(0, 2), st.floats(1, 1e9) | st.just(math.inf))
messages = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 100_000)), min_size=1, max_size=30)


def _arrivals(link: Link, sent: list[tuple[float, int]]) -> list[float]:
    wire = Wire(link)
    return [wire.arrival(moment, size) for moment, size in sent]


@given(links, messages)
def test_messages_arrive_in_order_and_not_before_their_time(link: Link, gaps: list[tuple[float, int]]) -> None:
    moments = [sum(gap for gap, _ in gaps[: k + 1]) for k in range(len(gaps))]
    sent = [(moment, size) for moment, (_, size) in zip(moments, gaps)]
    arrived = _arrivals(link, sent)
    assert arrived == sorted(arrived)
    for (moment, size), arrival in zip(sent, arrived):
        assert arrival >= moment + link.occupied_s(size) + link.latency_s - 1e-9


@given(links, messages)
def test_a_link_carries_one_message_at_a_time(link: Link, gaps: list[tuple[float, int]]) -> None:
    """All are sent at once: the last leaves when the link has carried the bytes of all, and no later."""
    sizes = [size for _, size in gaps]
    *_, last = _arrivals(link, [(1.0, size) for size in sizes])
    assert last == pytest.approx(1.0 + link.occupied_s(sum(sizes)) + link.latency_s)


def test_latency_delays_and_does_not_limit_throughput() -> None:
    sent = [(0.1 * k, 10) for k in range(20)]
    assert _arrivals(Link(latency_s=1.0), sent) == pytest.approx([1.0 + 0.1 * k for k in range(20)])


def test_bandwidth_limits_throughput() -> None:
    assert _arrivals(Link(bandwidth=100.0), [(0.0, 10)] * 3 + [(5.0, 10)]) == pytest.approx([0.1, 0.2, 0.3, 5.1])


@given(links)
def test_links_travel_as_they_are(link: Link) -> None:
    values = Links([link, Link()], to_first=Link(0.25), landing=link, draft=Link(bandwidth=1e6),
                   taps=[Link(), link, Link(0.5)])
    for rank in (1, 3):
        around = StationLinks.of(values, rank, 3)
        there = msgpack.decode(msgpack.encode(around), type=StationLinks)
        assert replace(there, taps=()) == replace(around, taps=()) and list(there.taps) == list(around.taps)


@pytest.mark.parametrize("arguments", [{"latency_s": -1e-9}, {"latency_s": math.inf}, {"latency_s": math.nan},
                                       {"bandwidth": 0.0}, {"bandwidth": -1.0}, {"bandwidth": math.nan}])
def test_links_that_cannot_be(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        Link(**arguments)
    assert caught.value.hint


def test_units_of_users() -> None:
    assert Link.of(20.0, 150.0) == Link(0.02, 18_750_000.0)
    assert Link.of(5.0) == Link(0.005)
    assert Link.of().instant
    assert not Link.of(mbit=1.0).instant


def test_window_covers_the_latency_and_one_more() -> None:
    assert Link(0.02).window(0.005) == 5
    assert Link(0.021).window(0.005) == 6
    assert Link(0.0).window(0.005) == Link(0.0).window(0.0) == 1
    assert Link(0.02).window(0.0) == sys.maxsize


@pytest.mark.parametrize("service", [0.001, 0.003, 0.02, 0.5])
def test_with_the_window_a_link_is_never_what_limits(service: float) -> None:
    """A sender that makes a flight per `service`, and a receiver that is as quick: no flight waits for leave."""
    link = Link(0.05)
    made = [service * (k + 1) for k in range(200)]
    begun: list[float] = []
    for k, moment in enumerate(_arrivals(link, [(moment, 0) for moment in made])):
        begun.append(max(moment, begun[-1] + service if begun else 0.0))
        first_unstarted = k - link.window(service)
        assert first_unstarted < 0 or begun[first_unstarted] <= made[k] + 1e-9


def test_even_links_leave_out_the_way_to_stage_0_and_the_draft() -> None:
    link = Link(0.02)
    assert Links.even(3, link) == Links([link, link], landing=link, taps=[Link(), link, link])
    assert Links.even(1, link) == Links([])
    assert Links.even(3, link).longest_s == 0.02
    with pytest.raises(UsageError, match="3 stages need 2 links"):
        Links.even(4, link).check(3)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_taps_have_a_link_from_every_stage_or_none(count: int) -> None:
    Links([Link()] * 2, taps=[Link()] * 3).check(3)
    with pytest.raises(UsageError, match=rf"3 stages have 3 links to the draft \(got {count}\)") as caught:
        Links([Link()] * 2, taps=[Link()] * count).check(3)
    assert caught.value.hint


def test_taps_without_links_are_instant() -> None:
    plain = Links([Link(1.0)])
    assert plain.tap(1) == Link()
    assert Links([Link(1.0)], taps=[Link(), Link(3.0)]).tap(1) == Link(3.0)
    assert Links([Link(1.0)], taps=[Link(), Link(3.0)]).longest_s == 3.0


def test_around_each_station() -> None:
    a, b, c, d = Link(0.1), Link(0.2), Link(0.3), Link(0.4)
    values = Links([a], to_first=b, landing=c, draft=d)
    assert StationLinks.of(values, 0, 2) == StationLinks(inward=b, ready=b, answer=c, cancel_s=0.2)
    assert StationLinks.of(values, 1, 2) == StationLinks(inward=a, ready=b, answer=c, cancel_s=0.1)
    assert StationLinks.of(values, 2, 2) == StationLinks(inward=d, ready=Link(), answer=d, cancel_s=0.4)
    assert StationLinks.of(Links([Link()]), 1, 2).instant
    around = StationLinks.of(Links([Link()], taps=[Link(), d]), 2, 2)
    assert around == StationLinks(Link(), Link(), Link(), 0.0, [Link(), d]) and not around.instant
    assert around.tap(1) == d and StationLinks.of(values, 2, 2).tap(1) == Link()
