"""Taps without processes: the inbox of a draft that reads them, and the drafts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from driving import TellingEngine
from fullpipe.messages import Expansion, Flight, Opening, Part, Tap
from fullpipe.methods import make_method
from fullpipe.pipeline.emulation import Arrival
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.taps import CancelArrival, TapArrival, TapInbox
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.base import TapCount, Tapped, tap_reader, untapped
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.scripted import TapChecker
from fullpipe.stations.scripted import EchoDraft, ScriptedStage, tap_features

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
OPENING = Opening(0, 1, SamplingParams())


def part(*nodes: int, request: int = 0) -> Part:
    count = len(nodes)
    return Part(request, [], list(nodes), [1] * count, [9] * count, [5] * count, [[5]] * count, [True] * count)


def tap(flight: int, layers: list[int], *nodes: int, opens: bool = False, closes: bool = False) -> Tap:
    made = Flight(flight, [part(*nodes)] if nodes else [], [OPENING] if opens else [], [0] if closes else [])
    return Tap(made, layers, tap_features(made, layers))


# ---- the inbox ---------------------------------------------------------------------------------------------


class _Control:
    """What an inbox needs of one."""

    def __init__(self) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.waits = False

    def job(self, number: int, *nodes: int, due: float = 0.0) -> None:
        self.inbox.put(Arrival(Flight(number, [part(*nodes)]), [], None, 0, 0.0, due))


def inbox(needs: int = 1) -> tuple[_Control, TapChecker, TapInbox]:
    control, checker = _Control(), TapChecker(TRUTH, needs=needs)
    return control, checker, TapInbox(control, checker)  # type: ignore[arg-type]


def test_all_that_has_come_is_taken_before_a_job() -> None:
    control, source, one = inbox(needs=0)
    control.job(0, 4)
    control.job(1, 5)
    control.inbox.put(TapArrival(tap(0, [1], 4, opens=True), 100, 0.0))
    control.inbox.put(TapArrival(tap(0, [2], 4, opens=True), 20, 0.0))
    assert one.next().flight.id == 0
    assert [*source.layers.values()] == [[1, 2]] and one.taps == TapCount(2, 120)
    assert one.next().flight.id == 1


@pytest.mark.parametrize("release", [
    lambda control: control.inbox.put(TapArrival(tap(0, [1], 4, opens=True), 1, 0.0)),
    lambda control: control.inbox.put(CancelArrival([4], 0.0)),
    lambda control: control.inbox.put(CancelArrival([4], time.monotonic() + 0.02)),
], ids=["tap", "cancel", "cancel under way"])
def test_a_job_waits_for_a_tap_or_a_cancel(release: Callable[[_Control], None]) -> None:
    control, source, one = inbox()
    control.job(0, 4)
    control.job(1)
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.extend((one.next().flight.id, one.next().flight.id)))
    thread.start()
    control.inbox.put(TapArrival(tap(0, [7], 8, opens=True), 1, 0.0))  # of another node
    deadline = time.monotonic() + 5
    while not (control.waits and source.layers):
        assert time.monotonic() < deadline
    assert not taken
    release(control)
    thread.join(5)
    assert taken == [0, 1] and not control.waits


def test_a_cancel_reaches_jobs_that_it_has_overtaken() -> None:
    control, _, one = inbox()
    now = time.monotonic()
    control.job(0, 4, 5, due=now + 0.03)
    control.inbox.put(CancelArrival([4, 5], now + 0.01))
    job = one.next().flight
    assert time.monotonic() >= now + 0.03
    assert job.num_rows == 0


def test_a_job_begins_when_it_arrives_and_not_before() -> None:
    control, _, one = inbox(needs=0)
    due = time.monotonic() + 0.02
    control.job(0, 4, due=due)
    assert one.next().flight.id == 0
    assert time.monotonic() >= due


def test_a_tap_counts_once_its_link_has_carried_it() -> None:
    """One on a slow link delays none on another, though it came first."""
    control, checker, one = inbox(needs=2)
    now = time.monotonic()
    control.inbox.put(TapArrival(tap(0, [1], 4, opens=True), 10, now + 0.05))
    control.inbox.put(TapArrival(tap(0, [2], 4, opens=True), 20, now + 0.02))
    control.job(0)
    control.job(1, 4)
    assert one.next().flight.id == 0 and not checker.layers
    assert one.next().flight.id == 1 and one.taps == TapCount(2, 30)
    assert time.monotonic() >= now + 0.05 and [*checker.layers.values()] == [[2, 1]]


# ---- drafts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taps", "what"), [
    ([tap(0, [1], 4)], "request 0 is not open"),
    ([tap(0, [1], 4, opens=True, closes=True), tap(1, [1], 5)], "request 0 is not open"),
    ([tap(0, [1], 4, opens=True), tap(0, [1], 5)], "flight 0 came again"),
    ([tap(3, [1], 4, opens=True), tap(2, [1], 5)], "flight 2 came again, or late"),
    ([tap(0, [1], 4, opens=True), tap(1, [1], 4)], "node 4 has"),
    ([tap(0, [1, 2], 4, opens=True), tap(0, [2, 3], 4, opens=True)], "node 4 has"),
    ([Tap(tap(0, [1], 4, opens=True).flight, [1], np.zeros((1, 1, 4), np.float32))], "flight 0: "),
], ids=["unopened", "closed", "again", "late", "node again", "layer again", "content"])
def test_the_checker_finds_what_is_wrong(taps: list[Tap], what: str) -> None:
    source = TapChecker(TRUTH)
    for one in taps[:-1]:
        source.take(one)
    with pytest.raises(AssertionError, match=what):
        source.take(taps[-1])


def test_the_checker_starts_no_job_too_early() -> None:
    source = TapChecker(TRUTH, needs=2, tell=True)
    job = Flight(0, [part(4)])
    source.take(tap(0, [1], 4, opens=True))
    with pytest.raises(AssertionError, match="too early"):
        source.run(job)
    source.take(tap(0, [3], 4, opens=True))
    assert source.run(job) == [Expansion(4, [1, 3], [0.0, 0.0], [-1, 0])]


def test_the_checker_does_not_wait_for_the_forgotten() -> None:
    source = TapChecker(TRUTH)
    assert not source.ready(Flight(0, [part(4)]))
    source.forget([4])
    assert source.ready(Flight(0, [part(4)])) and not source.ready(Flight(0, [part(4, 5)]))


def test_a_mix_reads_taps_if_one_of_its_drafts_does() -> None:
    checker = TapChecker(TRUTH)
    assert tap_reader(Mix([EchoDraft(), EchoDraft()])) is None
    assert tap_reader(EchoDraft()) is tap_reader(None) is None
    mix = Mix([EchoDraft(), checker], second=1)
    assert tap_reader(mix) is mix and tap_reader(checker) is checker
    assert not mix.ready(Flight(0, [part(4, 5)]))
    mix.take(tap(0, [1], 4, opens=True))
    assert mix.ready(Flight(0, [part(4, 5)])), "the second source is asked about one row"
    assert not mix.ready(Flight(0, [part(5, 4)]))
    mix.forget([5])
    assert mix.ready(Flight(0, [part(5, 4)]))


def test_flights_that_tell_nothing_send_no_tap() -> None:
    features = np.zeros((0, 1, 4), np.float32)
    assert untapped(Flight(0), "result") == ("result", None)
    assert untapped(Flight(0), Tapped("result", [1], features)) == ("result", None)
    for flight in (Flight(0, opens=[OPENING]), Flight(0, closes=[0]), Flight(0, [part(4)])):
        assert untapped(flight, Tapped("result", [1], features)) == ("result", Tap(flight, [1], features))


@pytest.mark.parametrize("method", ["pp", "chain", "static-tree", "pipedec", "fullpipe"])
def test_taps_do_not_change_what_is_said(method: str) -> None:
    """With an engine, whatever it launches and cancels; every tap is checked by the draft."""
    texts = []
    for taps in ([[], [], []], [[1], [2, 3], [4]]):
        stages = [ScriptedStage(k, 3, TRUTH, taps=layers) for k, layers in enumerate(taps)]
        source = TapChecker(TRUTH, needs=0, accuracy=0.6)
        engine = TellingEngine(InProcessPipeline(stages, source), make_method(method))
        track = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=40)))
        while engine.busy:
            engine.step()
        engine.drain()
        texts.append(track.tokens[3:])
        assert bool(source.layers) == (taps[0] != [])
    assert texts[0] == texts[1] and len(texts[0]) >= 39
