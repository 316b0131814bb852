"""Emulated links and paced devices between real processes.

Asserted are legs and events: a message is never early, whatever else the machine does; and what must be under way at
one time is. Nothing is asserted about how late a busy machine is. Legs lie where `legs.Legs` places them: exactly as
far apart as links hold their messages, and within `NEAR` seconds of where they were.
"""

from __future__ import annotations

import math
import threading
import time
from itertools import count
from queue import SimpleQueue
from typing import Any

import pytest

from fullpipe.errors import UsageError
from fullpipe.messages import Drafted, Event, Failed, Flight, Landed, Opening, Part, Ready
from fullpipe.pipeline.cancelled import Cancelled
from fullpipe.pipeline.emulation import Arrival, Inbound, Outbox, Reply
from fullpipe.pipeline.frames import Answered, Free, Setup, Stay, Up
from fullpipe.pipeline.links import Link, Links, StationLinks
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import hash_token
from fullpipe.stations.spec import StationSpec

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
NEAR = 0.01
ECHO = StationSpec("fullpipe.stations.scripted:EchoDraft")


def _stages(*delays: float) -> list[StationSpec]:
    """A scripted stage per delay, in seconds of each flight."""
    return [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                        {"index": index, "num_stages": len(delays), "truth": TRUTH, "delay_s": delay})
            for index, delay in enumerate(delays)]


def _prompt(length: int) -> Flight:
    """Flight 0 opens request 0; the last of its prompt tokens, node 0, is 7."""
    part = Part(0, list(range(length)), [*[-1] * (length - 1), 0], [7] * length, list(range(length)),
                list(range(length)), [[] for _ in range(length)], [*[False] * (length - 1), True])
    return Flight(0, [part], [Opening(0, length, SamplingParams())])


def _guess(number: int) -> Flight:
    """One guess (node and token `number`) behind a prompt of one token."""
    return Flight(number, [Part(0, [], [number], [number], [1], [number], [[number]], [True])])


def _events_until(pipeline: WorkersPipeline, kind: type[Event], count: int) -> list[Event]:
    """All events up to the one that makes it so many of a kind."""
    seen: list[Event] = []
    while sum(isinstance(event, kind) for event in seen) < count:
        seen += pipeline.events()
    return seen


def _landings(pipeline: WorkersPipeline, count: int) -> list[Landed]:
    return [event for event in _events_until(pipeline, Landed, count) if isinstance(event, Landed)]


def _most_ahead(landed: list[Landed], hop: int) -> int:
    """How many flights at most were done at stage `hop` and not begun at the next, at one time."""
    ways = [(event.legs[hop].end, event.legs[hop + 1].start) for event in landed]
    return max(sum(left <= moment < begun for left, begun in ways) for moment, _ in ways)


@pytest.mark.processes
def test_every_link_takes_its_time() -> None:
    links = Links([Link(0.05, bandwidth=4e4), Link(0.03)], to_first=Link(0.02), landing=Link(0.04), draft=Link(0.06))
    with WorkersPipeline(_stages(0.0, 0.0, 0.0), ECHO, links=links) as pipeline:
        begun = time.monotonic()
        pipeline.launch(_prompt(100))
        pipeline.draft(Flight(0, [Part(0, [], [1], [5], [0], [0], [[]], [True])], fanout=2))
        events = _events_until(pipeline, Landed, 1)
        events += [] if any(isinstance(event, Drafted) for event in events) else pipeline.events()
    ready = [event for event in events if isinstance(event, Ready)][1]
    (landed,) = [event for event in events if isinstance(event, Landed)]
    (drafted,) = [event for event in events if isinstance(event, Drafted)]
    first, second, third = landed.legs
    size = 100 * 4 * 4  # the hidden rows alone
    assert first.start - begun >= 0.02
    assert ready.time - first.end >= 0.02 - NEAR
    assert second.start - first.end >= 0.05 + size / 4e4
    assert third.start - second.end >= 0.03
    assert landed.time - third.end >= 0.04
    assert drafted.leg.start - begun >= 0.06
    assert drafted.time - drafted.leg.end >= 0.06


@pytest.mark.processes
@pytest.mark.parametrize("needs", [1, 2], ids=["first", "second"])
def test_taps_take_the_time_of_their_own_links(needs: int) -> None:
    """And a slow one delays neither flights nor the taps of other stages."""
    links = Links([Link()], taps=[Link(0.05), Link(0.5, bandwidth=4e4)])
    stages = [StationSpec(spec.builder, spec.args | {"taps": [index + 1]})
              for index, spec in enumerate(_stages(0.0, 0.0))]
    checker = StationSpec("fullpipe.stations.drafts.scripted:TapChecker", {"truth": TRUTH, "needs": needs})
    with WorkersPipeline(stages, checker, links=links) as pipeline:
        pipeline.draft(Flight(0, [Part(0, [0], [0], [7], [99], [99], [[]], [True])],
                              [Opening(0, 100, SamplingParams())], fanout=2))
        pipeline.launch(_prompt(100))
        events = _events_until(pipeline, Drafted, 1)
        taps = pipeline.taps
    (landed,) = [event for event in events if isinstance(event, Landed)]
    (drafted,) = [event for event in events if isinstance(event, Drafted)]
    size = 100 * 4 * 4  # the features alone
    first, second = drafted.leg.start - landed.legs[0].end, drafted.leg.start - landed.legs[1].end
    assert first >= 0.05 - NEAR
    assert needs == 1 or second >= 0.5 + size / 4e4 - NEAR
    assert taps.count == needs and taps.bytes > needs * size


@pytest.mark.processes
def test_latency_is_hidden_behind_the_flights_on_the_way() -> None:
    """Order and answers are kept, and as many flights are on a link at a time as its latency asks for."""
    flights, service, latency = 24, 0.01, 0.1
    with WorkersPipeline(_stages(service, service), links=Links.even(2, Link(latency))) as pipeline:
        for number in range(flights):
            pipeline.launch(_guess(number) if number else _prompt(1))
        landed = _landings(pipeline, flights)
    assert [event.flight for event in landed] == list(range(flights))
    assert [event.tokens for event in landed] == [[hash_token(path, 50, 3)]
                                                  for path in ([7], *([7, number] for number in range(1, flights)))]
    assert all(event.legs[1].start - event.legs[0].end >= latency for event in landed)
    # On a machine that takes twice as long for everything there would be half as many.
    assert _most_ahead(landed, 0) > 3


@pytest.mark.processes
def test_slow_stage_slows_the_one_before_however_long_the_link() -> None:
    """Without the window nearly all flights would be ahead: stage 0 needs 0.1 s for them, stage 1 begins four in that.

    How many exactly is asserted of `Inbound` below. Between processes a busy machine adds some: a flight that was taken
    and has not begun yet, and what legs are misplaced by.
    """
    service, link, flights = 0.004, Link(0.02), 24
    with WorkersPipeline(_stages(service, 0.03), links=Links.even(2, link)) as pipeline:
        for number in range(flights):
            pipeline.launch(_guess(number) if number else _prompt(1))
        landed = _landings(pipeline, flights)
    assert link.window(service) < flights // 3
    assert 2 < _most_ahead(landed, 0) < flights // 2


@pytest.mark.processes
def test_cancel_overtakes_what_is_on_the_way() -> None:
    links = Links([Link(0.15), Link(0.15), Link(0.15)])
    with WorkersPipeline(_stages(0.0, 0.0, 0.0, 0.0), links=links) as pipeline:
        pipeline.launch(_prompt(1))
        pipeline.launch(_guess(1))
        _events_until(pipeline, Ready, 3)
        pipeline.cancel([1])  # 0.15 s to every stage, and the flight needs 0.3 s to stage 2
        cancelled = time.monotonic()
        legs = _landings(pipeline, 2)[1].legs
    assert legs[0].nodes == [1]
    assert legs[1].nodes == ([1] if legs[1].start < cancelled + 0.15 - NEAR else legs[1].nodes), "it came too early"
    assert legs[2].nodes == legs[3].nodes == []


def test_cancel_counts_from_its_arrival() -> None:
    cancelled, now = Cancelled(), time.monotonic()
    cancelled.add([1, 2], now + 60)
    cancelled.add([3], now)
    assert cancelled.take([1, 2, 3, 4]) == {3}
    cancelled.add([2], now)
    assert cancelled.take([1, 2]) == {2}
    assert len(cancelled) == 1


@pytest.mark.processes
def test_paced_stations_take_at_least_their_time() -> None:
    pace = {"stage 1": {1: 0.02, 3: 0.06}, "draft": {1: 0.03}}
    with WorkersPipeline(_stages(0.0, 0.0), ECHO, pace=pace) as pipeline:
        pipeline.draft(Flight(0, [Part(0, [], [1], [5], [0], [0], [[]], [True])], fanout=2))
        (drafted,) = [event for event in _events_until(pipeline, Drafted, 1) if isinstance(event, Drafted)]
        for flight in (_prompt(1), Flight(1, [Part(0, [], [1, 2], [1, 2], [1, 1], [1, 2], [[1], [2]], [True, True])]),
                       Flight(2)):
            pipeline.launch(flight)
        landed = _landings(pipeline, 3)
    taken = [leg.end - leg.start for leg in (event.legs[1] for event in landed)]
    assert taken[0] >= 0.02
    assert taken[1] >= 0.04
    assert taken[2] < 0.02, "nothing was computed"
    assert drafted.leg.end - drafted.leg.start >= 0.03


@pytest.mark.parametrize("arguments", [
    {"links": Links([Link()])},
    {"links": Links([Link(), Link(60.0)]), "timeout": 60.0},
    {"pace": {"stage 3": {1: 0.1}}},
    {"pace": {"draft": {1: 0.1}}},
    {"pace": {"stage 0": {1: -0.1}}},
], ids=["links", "latency", "stage", "draft", "curve"])
def test_what_cannot_be_emulated_is_refused_at_the_door(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        WorkersPipeline(_stages(0.0, 0.0, 0.0), **arguments)
    assert caught.value.hint


# ---- without processes -----------------------------------------------------------------------------------


def test_instant_link_sends_at_once_from_the_caller() -> None:
    sent: list[Reply] = []
    Outbox(sent.append, Link()).send(Free())
    assert sent == [Free()]


def test_outbox_tells_how_long_the_link_held_an_answer() -> None:
    sent: SimpleQueue[Reply] = SimpleQueue()
    outbox, begun = Outbox(sent.put, Link(0.02)), time.monotonic()
    for number in range(2):
        outbox.send(Answered(Landed(0.0, number), []))
    for number in range(2):
        answer = sent.get(timeout=5)
        assert isinstance(answer, Answered) and answer.landed.flight == number
        assert 0.02 <= answer.carried <= time.monotonic() - begun


class _Sender:
    """A stage before that always has a flight, each of which took it `service` seconds (nodes: computed rows). It sends
    one unasked, and then one whenever it is let."""

    def __init__(self, service: float, nodes: list[int]) -> None:
        self.sent = threading.Semaphore(0)
        self._may_send = threading.Semaphore(1)
        self.let_come = self._may_send.release
        self._given, self._service, self._nodes = count(1), service, nodes

    def receive(self) -> Arrival:
        self._may_send.acquire()
        self.sent.release()
        stay = Stay(0.0, 0.0, self._service, 0.0, self._nodes)
        return Arrival(Flight(next(self._given)), [stay], None, size=10, came=0.0, due=math.nan)


@pytest.mark.parametrize(("latency", "service", "nodes", "most"),
                         [(0.02, 0.005, [1], 5), (0.02, 0.02, [1], 2), (0.0, 0.005, [1], 1), (0.02, 0.005, [], 1)],
                         ids=["pipelines", "slow", "no-latency", "died-out"])
def test_inbound_lets_come_what_the_window_allows(latency: float, service: float, nodes: list[int],
                                                  most: int) -> None:
    """The sender holds no flight that counts as sent, so that all of the window is on the link or waits here."""
    sender, link = _Sender(service, nodes), Link(latency, bandwidth=1e9)
    inbound = Inbound(sender.receive, sender.let_come, link)
    assert not nodes or most == link.window(service)
    for _ in range(most):
        assert sender.sent.acquire(timeout=5)
    for number in range(1, 21):
        assert not sender.sent.acquire(blocking=False), "more than the window"
        assert inbound.next().flight.id == number
        assert sender.sent.acquire(timeout=5)


def test_inbound_raises_in_order_what_went_wrong() -> None:
    first = Arrival(Flight(1), [Stay(0.0, 0.0, 1.0, 0.0, [1])], None, size=1, came=0.0, due=0.0)
    coming = iter([first])

    def receive() -> Arrival:
        if (arrival := next(coming, None)) is None:
            raise ConnectionError("gone")
        return arrival

    inbound = Inbound(receive, lambda: None, Link(0.001))
    assert inbound.next() is first
    with pytest.raises(ConnectionError, match="gone"):
        inbound.next()


# ---- what workers report ---------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(("frame", "reason"), [
    (Up(), "NonsenseError: b'\\x82\\xa4kind\\xa2Up\\xabcache_slots\\xc0', which cannot be read (Invalid value 'Up'"),
    (Setup("stage 0", 0, 1, "", [], "", ECHO, {}, [], StationLinks.of(Links([]), 0, 1), None, 1, 1.0),
     "PipelineError: a second setup"),
])
def test_frame_that_makes_no_sense_is_reported(frame: Any, reason: str) -> None:
    with WorkersPipeline(_stages(0.0)) as pipeline:
        pipeline.launch(_prompt(1))
        _landings(pipeline, 1)
        pipeline._fleet.send(pipeline._fleet.workers[0], frame)
        pipeline.launch(_guess(1))
        (failed,) = [event for event in _events_until(pipeline, Failed, 1) if isinstance(event, Failed)]
    assert failed.station == "stage 0"
    assert failed.reason.startswith(reason)
    assert (failed.hint is not None) == isinstance(frame, Setup)
