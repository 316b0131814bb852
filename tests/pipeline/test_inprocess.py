"""Virtual time with links, slow stages and shared devices: everything is counted by hand, nothing is measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from driving import TellingEngine
from fullpipe.errors import PipelineError
from fullpipe.messages import Drafted, Event, Flight, Landed, Leg, Opening, Part, Ready, Tap, Woken
from fullpipe.methods import make_method
from fullpipe.pipeline.durations import unit_costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.base import TapCount
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import EchoDraft, ScriptedStage

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
Costs = Callable[[str, int, float, int], float]


def given(**seconds: float) -> Costs:
    """What each station takes; stage_0=..., draft=...; 1 for those not named."""
    return lambda station, rows, measured, context: seconds.get(station.replace(" ", "_"), 1.0) if rows else 0.0


def pipeline(stages: int, **options: object) -> InProcessPipeline:
    return InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)], EchoDraft(),
                             **options)  # type: ignore[arg-type]


def flight(id: int) -> Flight:
    """One row each: a chain of tokens, the first of them opens the request."""
    opens = [Opening(0, 1, SamplingParams())] if id == 0 else []
    path = list(range(1, id + 1))
    return Flight(id, [Part(0, [0] if id == 1 else [], [id], [7], [id], [id], [path], [True])], opens=opens)


def play(one: InProcessPipeline, count: int) -> list[Event]:
    """Launch a flight at every Ready; the events until all have landed."""
    events: list[Event] = []
    launched = 0
    while sum(isinstance(event, Landed) for event in events) < count:
        happened = one.events()
        events += happened
        for event in happened:
            if isinstance(event, Ready) and launched < count:
                one.launch(flight(launched))
                launched += 1
    return events


def landings(events: list[Event]) -> list[Landed]:
    return [event for event in events if isinstance(event, Landed)]


def spans(events: list[Event], station: str) -> list[tuple[float, float]]:
    return [(leg.start, leg.end) for event in landings(events) for leg in event.legs if leg.station == station]


# ---- links -------------------------------------------------------------------------------------------------


def test_without_links_a_flight_lands_every_step() -> None:
    events = play(pipeline(4), 6)
    assert [event.time for event in landings(events)] == [4, 5, 6, 7, 8, 9]
    assert [event.time for event in events if isinstance(event, Ready)] == [0, 1, 2, 3, 4, 5, 6]


def test_latency_adds_up_and_is_filled_with_flights() -> None:
    """Four steps, three hops of 2.5 and a landing of 0.5; behind the first the others come step by step."""
    links = Links([Link(2.5)] * 3, landing=Link(0.5))
    events = play(pipeline(4, links=links), 6)
    assert [event.time for event in landings(events)] == [12 + k for k in range(6)]
    (first, *_) = landings(events)
    assert [(leg.start, leg.end) for leg in first.legs] == [(0, 1), (3.5, 4.5), (7, 8), (10.5, 11.5)]


def test_an_engine_elsewhere_waits_for_ready_and_for_the_flight_to_go_down() -> None:
    """To stage 0, the step, and the word that it is free: 0.25 + 1 + 0.25 between two flights."""
    events = play(pipeline(2, links=Links([Link()], to_first=Link(0.25))), 4)
    assert spans(events, "stage 0") == [(0.25 + 1.5 * k, 1.25 + 1.5 * k) for k in range(4)]
    assert [event.time for event in events if isinstance(event, Ready)] == [0, 1.5, 3, 4.5, 6]


def test_bandwidth_lets_one_message_through_at_a_time() -> None:
    """A message of 100 bytes occupies the hop for 3 s, stage 0 makes one a second: the hop sets the pace."""
    links = Links([Link(bandwidth=100 / 3)])
    events = play(pipeline(2, links=links, message_bytes=lambda rows: 100 * rows), 5)
    starts = [start for start, _ in spans(events, "stage 1")]
    assert starts == pytest.approx([4 + 3 * k for k in range(5)])


def test_replies_take_bandwidth_by_their_rows() -> None:
    """A landing of one row has 64 bytes."""
    events = play(pipeline(1, links=Links([], landing=Link(bandwidth=128.0))), 2)
    assert [event.time for event in landings(events)] == [1.5, 2.5]


def test_a_draft_elsewhere_takes_the_way_there_and_back() -> None:
    one = pipeline(1, links=Links([], draft=Link(0.75)), costs=given(draft=2.0))
    job = flight(0)
    job.fanout = 2
    one.draft(job)
    events = play(one, 1)
    while not any(isinstance(event, Drafted) for event in events):
        events += one.events()
    (drafted,) = [event for event in events if isinstance(event, Drafted)]
    assert (drafted.leg.start, drafted.leg.end, drafted.time) == (0.75, 2.75, 3.5)


@pytest.mark.parametrize(("latency", "event", "computed"), [
    (0.0, Ready, []), (0.4, Ready, []),  # sent at 2 s: flight 1 waits at stage 1 until 4 s + latency
    (0.0, Landed, []), (0.4, Landed, [1]),  # sent at 4 s + latency, when stage 1 begins it
])
def test_a_cancel_overtakes_but_takes_a_latency(latency: float, event: type[Event], computed: list[int]) -> None:
    one = pipeline(2, links=Links([Link(latency)]), costs=given(stage_1=3.0))
    events = one.events()
    one.launch(flight(0))
    events += one.events()
    one.launch(flight(1))
    while not isinstance(events[-1], event) or events[-1].time < 2:
        events += one.events()
    one.cancel([1])
    while len(landings(events)) < 2:
        events += one.events()
    landed = landings(events)[1]
    assert [leg.nodes for leg in landed.legs] == [[1], computed]
    assert landed.nodes == computed and landed.time == 4 + latency + 3 * len(computed)


# ---- back-pressure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [0.0, 0.4, 1.0, 2.3])
def test_a_slow_stage_holds_those_before_it(latency: float) -> None:
    """Stage 3 takes five times as long. Once it sets the pace, every stage before it starts a flight per five
    seconds, and never are more than the window's number on a hop or behind it."""
    count, slow = 30, 5.0
    link = Link(latency)
    one = pipeline(4, links=Links([link] * 3), costs=given(stage_3=slow))
    events = play(one, count)
    held = window_watch(events, link)
    assert max(held) == link.window(1.0)
    for station in range(4):
        starts = [start for start, _ in spans(events, f"stage {station}")]
        assert [b - a for a, b in pairwise(starts)][-5:] == pytest.approx([slow] * 5)


def window_watch(events: list[Event], link: Link) -> list[int]:
    """For each flight: how many were ahead of stage 3, not started, when stage 2 began a further one. It begins none
    while it holds one, so all that it has finished by then are on the hop or wait behind it."""
    before, here = spans(events, "stage 2"), spans(events, "stage 3")
    return [sum(end <= begun for _, end in before) - sum(start <= begun for start, _ in here) for begun, _ in before]


def test_ready_waits_with_a_held_stage_0() -> None:
    """Else flights would be chosen long before they can go on."""
    events = play(pipeline(2, costs=given(stage_1=3.0)), 5)
    assert [event.time for event in events if isinstance(event, Ready)] == [0, 1, 2, 4, 7, 10]
    assert [event.time for event in landings(events)] == [4, 7, 10, 13, 16]


def test_equal_stages_hold_nothing() -> None:
    """With links of any length the throughput is that of the stages."""
    for latency in (0.0, 0.3, 1.0, 7.7):
        events = play(pipeline(3, links=Links([Link(latency)] * 2)), 12)
        starts = [start for start, _ in spans(events, "stage 2")]
        assert [b - a for a, b in pairwise(starts)] == pytest.approx([1.0] * 11)


# ---- stations that share a device --------------------------------------------------------------------------


def engine_run(device_of: Callable[[str], str], costs: Costs = unit_costs, links: Links | None = None,
               stages: int = 3) -> list[Event]:
    one = InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)],
                            ScriptedDraft(TRUTH, accuracy=0.7), costs=costs, links=links, device_of=device_of,
                            message_bytes=lambda rows: 100 + 1000 * rows)
    events: list[Event] = []
    engine = TellingEngine(one, make_method("fullpipe", width=4), listeners=[events.append])
    engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=40)))
    while engine.busy:
        engine.step()
        engine.check()
    engine.drain()
    return events


def legs(events: list[Event]) -> list[Leg]:
    found = [leg for event in events if isinstance(event, Landed) for leg in event.legs]
    found += [event.leg for event in events if isinstance(event, Drafted)]
    return sorted(found, key=lambda leg: (leg.start, leg.end))


def by_rows(station: str, rows: int, measured: float, context: int) -> float:
    return (0.3 if station == "draft" else 0.9) + 0.01 * rows if rows else 0.0


DEVICES = {
    "draft with stage 0": lambda station: "a" if station in ("draft", "stage 0") else station,
    "draft and two stages": lambda station: "a" if station != "stage 1" else "b",
    "all on one": lambda station: "only",
}


@pytest.mark.parametrize("name", DEVICES)
def test_stations_of_one_device_take_turns(name: str) -> None:
    device_of = DEVICES[name]
    events = engine_run(device_of, by_rows, Links([Link(0.2), Link(0.1)], landing=Link(0.2)))
    for device in {device_of(leg.station) for leg in legs(events)}:
        work = [leg for leg in legs(events) if device_of(leg.station) == device and leg.end > leg.start]
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(work)), device


@pytest.mark.parametrize("name", DEVICES)
def test_nobody_on_a_device_is_forgotten(name: str) -> None:
    """The draft gets a turn among every few steps of its neighbours, however many these have to do."""
    device_of = DEVICES[name]
    work = [leg.station for leg in legs(engine_run(device_of, by_rows))
            if device_of(leg.station) == device_of("draft") and leg.nodes]
    sharers = len({*work})
    turns = [index for index, station in enumerate(work) if station == "draft"]
    assert len(turns) > 8 and max(b - a for a, b in pairwise(turns)) <= sharers + 1


def test_what_has_waited_longest_goes_first() -> None:
    """The job came at 0.5 s. The two flights that came at 1 s go after it, in spite of its being the last station."""
    one = pipeline(2, device_of=lambda station: "only", links=Links([Link()], draft=Link(0.5)))
    job = flight(0)
    job.fanout = 2
    one.draft(job)
    found = legs(play(one, 3))
    assert [leg.station for leg in found] == ["stage 0", "draft", "stage 0", "stage 1", "stage 0", "stage 1", "stage 1"]
    assert [leg.start for leg in found] == list(range(7))


# ---- taps ----------------------------------------------------------------------------------------------------


class Reader(EchoDraft):
    """Notes when taps come and when nodes are forgotten, and is ready when it has seen `needs` of each wanted node."""

    def __init__(self, needs: int = 0) -> None:
        super().__init__()
        self.needs = needs
        self.pipeline: InProcessPipeline | None = None
        self.taken: list[tuple[float, int, list[int]]] = []
        self.forgotten: list[tuple[float, list[int]]] = []
        self.nodes: list[int] = []
        self.seen: list[int] = []  # when it was last asked

    def take(self, tap: Tap) -> None:
        assert self.pipeline
        self.taken.append((self.pipeline.now(), tap.flight.id, tap.layers))
        self.nodes += [node for part in tap.flight.parts for node in part.nodes]

    def ready(self, job: Flight) -> bool:
        self.seen = list(self.nodes)
        return all(self.nodes.count(node) >= self.needs for part in job.parts for node in part.nodes)

    def forget(self, nodes: list[int]) -> None:
        assert self.pipeline
        self.forgotten.append((self.pipeline.now(), nodes))


def tapped(taps: list[list[int]], source: EchoDraft, **options: object) -> InProcessPipeline:
    stages = [ScriptedStage(k, len(taps), TRUTH, taps=layers) for k, layers in enumerate(taps)]
    one = InProcessPipeline(stages, source, **options)  # type: ignore[arg-type]
    if isinstance(source, Reader):
        source.pipeline = one
    return one


def asks(one: InProcessPipeline, *nodes: int, id: int = 0) -> None:
    zeros = [0] * len(nodes)
    part = Part(0, [], list(nodes), zeros, zeros, zeros, [[] for _ in nodes], [True] * len(nodes))
    one.draft(Flight(id, [part], fanout=1))


def drafted(one: InProcessPipeline) -> Drafted:
    while True:
        for event in one.events():
            if isinstance(event, Drafted):
                return event


def test_taps_leave_when_the_stage_has_finished_and_take_their_own_links() -> None:
    reader = Reader()
    one = tapped([[1], [], [3, 4]], reader, links=Links([Link(0.5)] * 2, taps=[Link(0.25), Link(), Link(2.0)]))
    play(one, 2)
    with pytest.raises(PipelineError, match="nothing is under way"):
        one.events()  # the last taps come after the last landing
    assert reader.taken == [(1.25, 0, [1]), (2.25, 1, [1]), (6.0, 0, [3, 4]), (7.0, 1, [3, 4])]
    assert one.taps.count == 4


def test_a_tap_is_as_large_as_its_layers() -> None:
    """Two layers of one row, 100 bytes each: 2 s on a link of 100 bytes a second, and the next waits for it."""
    reader = Reader()
    one = tapped([[1, 2]], reader, links=Links([], taps=[Link(bandwidth=100.0)]), message_bytes=lambda rows: 100 * rows)
    play(one, 2)
    with pytest.raises(PipelineError, match="nothing is under way"):
        one.events()
    assert [time for time, *_ in reader.taken] == [3.0, 5.0]
    assert one.taps == TapCount(2, 400)


def test_taps_delay_no_stage() -> None:
    """However slow their link, and even where a stage holds its flight because the next is slow."""
    options = {"links": Links([Link(0.3)] * 2, taps=[Link(50.0, 1.0)] * 3), "costs": given(stage_2=3.0),
               "message_bytes": lambda rows: rows}
    reader = Reader()
    with_taps = play(tapped([[1], [2], [3]], reader, **options), 8)
    assert with_taps == play(tapped([[], [], []], EchoDraft(), **options), 8)
    assert not reader.taken


def test_a_stage_that_holds_its_flight_has_sent_its_tap() -> None:
    reader = Reader()
    events = play(tapped([[1], []], reader, costs=given(stage_1=3.0)), 4)
    ends = [end for _, end in spans(events, "stage 0")]
    assert [time for time, *_ in reader.taken] == ends
    assert ends[2:] != [time.start for time in (event.legs[1] for event in landings(events))][2:], "it did hold some"


@pytest.mark.parametrize(("needs", "start"), [(0, 0.0), (1, 1.0), (2, 2.0), (3, 7.5)])
def test_a_job_begins_when_its_last_tap_comes(needs: int, start: float) -> None:
    """At that very instant, be the link instant (stage 0 and 1) or not; before it nobody is asked."""
    one = tapped([[1], [2], [3]], Reader(needs), links=Links([Link()] * 2, taps=[Link(), Link(), Link(4.5)]))
    asks(one, 0)
    one.launch(flight(0))
    assert drafted(one).leg.start == start


@pytest.mark.parametrize("wait", [None, 0.0, 0.1])
def test_a_job_that_waits_for_what_nobody_will_send_is_an_error(wait: float | None) -> None:
    one = tapped([[1]], Reader(1))
    assert [type(event) for event in one.events(wait)] == [Ready]
    if wait is not None:
        assert one.events(wait) == []
    asks(one, 0)
    with pytest.raises(PipelineError, match="draft job 0 waits for hidden states that nobody will send"):
        one.events(wait)


def test_jobs_behind_one_that_waits_keep_their_order() -> None:
    reader = Reader(1)
    one = tapped([[1]], reader)
    asks(one, 1, id=0)
    asks(one, 0, id=1)
    events = play(one, 2)
    while len(found := [event for event in events if isinstance(event, Drafted)]) < 2:
        events += one.events()
    assert [(event.job, event.leg.start) for event in found] == [(0, 2.0), (1, 3.0)]


def test_a_waiting_job_leaves_its_device_to_others() -> None:
    one = tapped([[1], [2]], Reader(2), device_of=lambda station: "only")
    asks(one, 0)
    found = legs([*play(one, 1), drafted(one)])
    assert [(leg.station, leg.start) for leg in found] == [("stage 0", 0.0), ("stage 1", 1.0), ("draft", 2.0)]


@pytest.mark.parametrize(("latency", "size"), [(0.0, 1e9), (0.75, 1e9), (0.75, 64.0)])
def test_a_cancel_lets_a_job_go_after_its_latency(latency: float, size: float) -> None:
    """Or when the job itself arrives, where the cancel has overtaken it."""
    reader = Reader(1)
    one = tapped([[1]], reader, links=Links([], draft=Link(latency, size)))
    play(one, 1)
    assert one.now() == 1.0
    asks(one, 0, 5, id=3)
    one.cancel([5, 6])
    event = drafted(one)
    assert [expansion.node for expansion in event.expansions] == event.leg.nodes == [0]
    assert reader.forgotten == [(1 + latency, [5, 6])]
    assert event.leg.start == pytest.approx(1 + latency + 128 / size)


def test_a_job_that_waits_already_is_let_go_by_a_cancel() -> None:
    reader = Reader(1)
    one = tapped([[1]], reader, links=Links([], draft=Link(0.25)))
    asks(one, 0, 5)
    play(one, 1)
    assert one.now() == 1.0 and reader.nodes == [0]
    one.cancel([5])
    event = drafted(one)
    assert (event.leg.start, event.leg.nodes) == (1.25, [0])


@pytest.mark.parametrize("latency", [0.0, 0.5])
def test_a_job_that_begins_when_a_tap_comes_sees_it(latency: float) -> None:
    """Though it needs none, and was on its way before the stage had begun."""
    reader = Reader()
    one = tapped([[1]], reader, links=Links([], draft=Link(1 + latency), taps=[Link(latency)]))
    asks(one, 0)
    one.launch(flight(0))
    assert drafted(one).leg.start == 1 + latency
    assert reader.seen == [0]


def test_a_source_that_reads_no_taps_gets_none() -> None:
    one = tapped([[1], [2]], EchoDraft())
    play(one, 3)
    assert one.taps == TapCount()


def test_a_job_that_can_never_begin_is_an_error() -> None:
    one = tapped([[1]], Reader(1))
    asks(one, 5, id=4)
    play(one, 1)
    with pytest.raises(PipelineError, match="draft job 4 waits for hidden states") as caught:
        one.events()
    assert caught.value.hint


# ---- determinism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEVICES)
def test_two_runs_are_equal_to_the_last_digit(name: str) -> None:
    links = Links([Link(0.21, 1e5), Link(0.1)], to_first=Link(0.03), landing=Link(0.2), draft=Link(0.07, 1e6))
    assert engine_run(DEVICES[name], by_rows, links) == engine_run(DEVICES[name], by_rows, links)


# ---- besides -------------------------------------------------------------------------------------------------


def test_it_wakes_when_it_is_asked_to_whether_or_not_anything_is_under_way() -> None:
    one = pipeline(1)
    one.wake(0.5)
    one.wake(7.0)
    assert [*one.events(), *one.events()] == [Ready(0.0), Woken(0.5)]
    one.launch(flight(0))
    assert [(type(event), event.time) for event in [*one.events(), *one.events()]] \
        == [(Landed, 1.5), (Ready, 1.5), (Woken, 7.0)]
    assert one.now() == 7.0


def test_the_newest_ids_and_the_time_spent_inside_are_told() -> None:
    one = pipeline(2)
    assert (one.newest_flight, one.newest_job, one.seconds_inside) == (-1, -1, 0.0)
    play(one, 3)
    one.draft(Flight(5))
    assert (one.newest_flight, one.newest_job) == (2, 5)
    assert one.seconds_inside > 0
