"""One contract for every pipeline: what `fullpipe.pipeline.base` promises, under random traffic.

`Traffic` is a small engine without a method: it opens requests, sends their prompts in chunks, grows
random trees, commits random children, kills random subtrees, reuses the slots of the dead at once, and
asks a draft station about random nodes. Requests take one small block of slots after the other, blocks of those that
have ended go to others at once, and a request may begin with another one's committed path. It knows what every row must
answer, for the stages answer from a hash of the path, and it checks the promises on every event that comes back.

On some pipelines the stages tap. Their draft checks every tap, starts no job before the taps that it needs, and
answers with the layers that have come, so that in the end all taps can be accounted for, row by row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from fullpipe.errors import PipelineError
from fullpipe.messages import Drafted, Event, Failed, Flight, Landed, Leg, Opening, Part, Ready
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.durations import measured_costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.pipeline.starting import Hosting, Place
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.sequences.blocks import BlockPool, SlotAllocator
from fullpipe.stations.drafts.scripted import TapChecker
from fullpipe.stations.scripted import EchoDraft, ScriptedStage, hash_token
from fullpipe.stations.spec import StationSpec

VOCAB, SEED, STAGES = 50, 3, 3
BLOCK = 8  # slots
DELAYS = (0.001, 0.003, 0.0)  # seconds of a flight at each stage
DRAFT_DELAY = 0.001  # seconds of each row of a job: small jobs beat the stages, big ones do not


TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}
TAPS = [[2], [], [5, 9]]  # layers that each stage taps, where they do: one of them nothing, the last one too
NEEDS = 1  # taps of a node before it may be asked about


def _specs(taps: bool = False) -> list[StationSpec]:
    return [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                        {"index": index, "num_stages": STAGES, "delay_s": delay, "truth": TRUTH,
                         "taps": TAPS[index] if taps else []})
            for index, delay in enumerate(DELAYS)]


def _workers(links: Links | None = None, taps: bool = False, places: Sequence[Place] | None = None) -> Pipeline:
    source = StationSpec("fullpipe.stations.scripted:EchoDraft", {"delay_s": DRAFT_DELAY})
    checker = StationSpec("fullpipe.stations.drafts.scripted:TapChecker",
                          {"truth": TRUTH, "needs": NEEDS, "tell": True})
    return WorkersPipeline(_specs(taps), checker if taps else source, links=links,
                           hosting=Hosting(places or (), Place("", "127.0.0.1")))


def _hosts(*names: str) -> list[Place]:
    """Hosts that are all this machine. Their stations are started here, and believe the names: between two of them
    everything goes over TCP."""
    return [Place(name, "127.0.0.1") for name in names]


def _inprocess(taps: bool = False, **options: object) -> Pipeline:
    stages = [ScriptedStage(**(spec.args | {"delay_s": 0.0})) for spec in _specs(taps)]
    source = TapChecker(TRUTH, needs=NEEDS, tell=True) if taps else EchoDraft()
    return InProcessPipeline(stages, source, **options)  # type: ignore[arg-type]


def _slow_draft(station: str, rows: int, measured: float, context: int) -> float:
    return 7.0 if station == "draft" else 0.5 + 0.25 * rows


def _links(seconds: float, bandwidth: float = 1e3) -> Links:
    link = Link(seconds, bandwidth)  # 1e3: a flight's few hundred bytes take a good part of a second
    taps = [link, link, Link(3 * seconds, bandwidth / 2)]
    return Links([link] * (STAGES - 1), to_first=link, landing=link, draft=link, taps=taps)


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "virtual": lambda: _inprocess(),
    "virtual-links": lambda: _inprocess(links=_links(0.7)),
    "virtual-slow-draft": lambda: _inprocess(costs=_slow_draft, links=_links(3.0)),
    "virtual-one-device": lambda: _inprocess(links=_links(0.1), device_of=lambda station: "only"),
    "virtual-measured": lambda: _inprocess(costs=measured_costs),
    "wall": lambda: _inprocess(clock="wall"),
    "workers": _workers,
    "workers-links": lambda: _workers(_links(0.003, 1e7)),
    "virtual-taps": lambda: _inprocess(taps=True),
    "virtual-taps-links": lambda: _inprocess(taps=True, links=_links(0.7), message_bytes=lambda rows: 100 + 30 * rows),
    "virtual-taps-slow-draft": lambda: _inprocess(taps=True, costs=_slow_draft, links=_links(3.0)),
    "virtual-taps-one-device": lambda: _inprocess(taps=True, links=_links(0.1), device_of=lambda station: "only"),
    "wall-taps": lambda: _inprocess(taps=True, clock="wall"),
    "workers-taps": lambda: _workers(taps=True),
    "workers-hosts": lambda: _workers(places=_hosts("", "far", "", "far")),
    "workers-hosts-taps": lambda: _workers(taps=True, places=_hosts("one", "one", "two", "draft's")),
    "workers-taps-links": lambda: _workers(_links(0.003, 1e7), taps=True),
}


@dataclass(eq=False)
class Node:
    id: int
    token: int
    position: int
    slot: int
    parent: Node | None
    path: list[int]  # tokens, own last
    alive: bool = True
    children: list[Node] = field(default_factory=list)

    def subtree(self) -> list[Node]:
        return [self, *(node for child in self.children for node in child.subtree())]

    def branch(self, root: Node) -> list[int]:
        """Slots from below the root down to this node."""
        return [] if self is root or self.parent is None else [*self.parent.branch(root), self.slot]


@dataclass(eq=False)
class Line:
    """One request in the traffic."""

    id: int
    prompt: list[int]
    slots: SlotAllocator
    fed: int = 0
    root: Node | None = None
    commits: list[int] = field(default_factory=list)
    standing: list[int] = field(default_factory=list)  # committed slots that the stages know of, in order


class Traffic:
    """Drives one pipeline; ids go on from one use to the next, as in a long-lived engine."""

    def __init__(self, pipeline: Pipeline, taps: bool) -> None:
        self.pipeline, self.taps = pipeline, taps
        self.computed: dict[tuple[int, int, int], list[int]] = {}  # by request, node, position: layers to be tapped
        self.messages = 0  # with taps
        self.told: list[list[int]] = []  # the newest answer of a draft that tells of taps
        self.ready = False
        self.seen: Counter[str] = Counter()
        self.time = -float("inf")
        self.lines: list[Line] = []
        self.pool = BlockPool(BLOCK, None)
        self.flights: list[Flight] = []  # launched, not landed; oldest first
        self.jobs: list[Flight] = []
        self.nodes: dict[int, Node] = {}
        self.starts: dict[str, float] = {}
        self.flight_ids, self.job_ids, self.node_ids, self.line_ids = 0, 0, 0, 0
        self.late = 0  # landings that came while younger flights were under way

    def run(self, seed: int, flights: int, prompt: int = 40) -> None:
        """Launch so many flights, chosen at random, and wait until everything has come back."""
        self.rng, self.prompt = random.Random(seed), prompt
        goal = self.flight_ids + flights
        while self.flight_ids < goal:
            if self.ready:
                self.launch(self.choose())
            if self.rng.random() < 0.3:
                self.ask_draft()
            if self.rng.random() < 0.8 or not self.ready:
                self.take(self.pipeline.events())
        while self.lines:
            self.finish(self.lines[0])
        self.settle()
        self.account()

    def settle(self) -> None:
        while self.flights or self.jobs or not self.ready:
            self.take(self.pipeline.events())

    def finish(self, line: Line) -> None:
        self.await_ready()
        self.lines.remove(line)
        self.launch(Flight(self.next_flight(), closes=[self.end(line)]))

    def end(self, line: Line) -> int:
        """Its blocks go to whoever comes next, though rows that write into them may be under way."""
        self.pool.let_go(line.slots.blocks)
        return line.id

    def await_ready(self) -> None:
        while not self.ready:
            self.take(self.pipeline.events())

    def next_flight(self) -> int:
        self.flight_ids += 1
        return self.flight_ids

    def launch(self, flight: Flight) -> None:
        assert self.ready
        self.ready = False
        self.flights.append(_copy(flight))
        self.pipeline.launch(flight)

    # ---- what goes in

    def choose(self) -> Flight:
        flight = Flight(self.next_flight())
        if len(self.lines) < 3 and self.rng.random() < 0.3:
            shares = self.lines and not self.taps and self.rng.random() < 0.8
            flight.opens.append(self.open_with(self.rng.choice(self.lines)) if shares else self.open())
        for line in self.rng.sample(self.lines, self.rng.randint(0, len(self.lines))):
            part = self.prefill(line) if line.fed < len(line.prompt) else self.grow(line)
            line.standing += part.commits
            flight.parts.append(part)
        if self.lines and self.rng.random() < 0.1:
            flight.closes.append(self.end(self.lines.pop(self.rng.randrange(len(self.lines)))))
        return flight

    def open(self) -> Opening:
        return self.begin([self.rng.randrange(VOCAB) for _ in range(self.rng.randint(1, self.prompt))])

    def begin(self, prompt: list[int], shared: list[int] | None = None) -> Opening:
        """shared: slots of others, in which the prompt's beginning stands."""
        self.line_ids += 1
        shared = shared or []
        self.pool.hold(held := {slot // BLOCK for slot in shared})
        slots = SlotAllocator(BLOCK, [], shared, held)
        self.lines.append(Line(self.line_ids, prompt, slots, fed=len(shared), standing=list(shared)))
        return Opening(self.line_ids, len(prompt), SamplingParams(), list(shared))

    def open_with(self, source: Line) -> Opening:
        """Some of the source's committed path, and other tokens behind it."""
        path = source.root.path if source.root else source.prompt
        count = self.rng.randint(0, len(source.standing))
        self.seen["shared"] += bool(count)
        return self.begin(path[:count] + [self.rng.randrange(VOCAB) for _ in range(self.rng.randint(1, 9))],
                          source.standing[:count])

    def slot(self, line: Line) -> int:
        if not line.slots.num_free:
            line.slots.grow(self.pool.take(1))
        slot = line.slots.take()
        assert slot is not None
        return slot

    def prefill(self, line: Line) -> Part:
        part = Part(line.id)
        for position in range(line.fed, min(len(line.prompt), line.fed + self.rng.randint(1, self.prompt))):
            last = position == len(line.prompt) - 1
            slot = self.slot(line)
            token = line.prompt[position]
            node = self.new_node(token, position, slot, None, line.prompt) if last else None
            _add(part, node.id if node else -1, token, position, slot, [], last)
            part.commits.append(slot)
            line.root = node
        line.fed += len(part)
        return part

    def grow(self, line: Line) -> Part:
        """A part with some new nodes, after some may have been committed and some may have died."""
        assert line.root
        if self.rng.random() < 0.4:
            self.commit(line)
        if self.rng.random() < 0.2 and line.root.children:
            self.kill(line, self.rng.choice(line.root.subtree()[1:]))
        part = Part(line.id, commits=line.commits)
        line.commits = []
        for _ in range(self.rng.randint(0, 6)):
            parent = self.rng.choice(line.root.subtree()[-8:])
            node = self.new_node(self.rng.randrange(VOCAB), parent.position + 1, self.slot(line), parent,
                                 parent.path)
            parent.children.append(node)
            _add(part, node.id, node.token, node.position, node.slot, node.branch(line.root),
                 self.rng.random() < 0.9)
        return part

    def new_node(self, token: int, position: int, slot: int, parent: Node | None, path: list[int]) -> Node:
        self.node_ids += 1
        path = [*path, token] if parent else path
        node = Node(self.node_ids, token, position, slot, parent, path)
        self.nodes[node.id] = node
        return node

    def commit(self, line: Line) -> None:
        assert line.root
        if line.root.children:
            chosen = self.rng.choice(line.root.children)
            for sibling in [child for child in line.root.children if child is not chosen]:
                self.kill(line, sibling)
            line.commits.append(chosen.slot)
            line.root = chosen

    def kill(self, line: Line, node: Node) -> None:
        assert node.parent
        node.parent.children.remove(node)
        dead = node.subtree()
        for victim in dead:
            victim.alive = False
            line.slots.give(victim.slot)
        self.pipeline.cancel([victim.id for victim in dead])

    def ask_draft(self) -> None:
        alive = [node for line in self.lines if line.root for node in line.root.subtree()]
        if alive:
            self.ask(self.rng.sample(alive, min(len(alive), self.rng.randint(1, 8))), fanout=self.rng.randint(1, 4))

    def ask(self, nodes: Sequence[Node], fanout: int = 1) -> None:
        part = Part(0)
        for node in nodes:
            _add(part, node.id, node.token, node.position, node.slot, [], True)
        self.draft([part], fanout)

    def draft(self, parts: list[Part], fanout: int = 1) -> None:
        self.job_ids += 1
        job = Flight(self.job_ids, parts, fanout=fanout)
        self.jobs.append(_copy(job))
        self.pipeline.draft(job)

    def account(self) -> None:
        """The draft has every tap that the stages have made, once each and no others. Some may still have been on
        their way when the last flight landed, so it is asked until the last has come."""
        for _ in range(5000):
            parts = [Part(request) for request, _, _ in self.computed]
            for part, (_, node, position) in zip(parts, self.computed):
                _add(part, node, 0, position, 0, [], True)
            self.draft(parts)
            self.settle()
            if (self.told, self.pipeline.taps.count) == (list(self.computed.values()), self.messages):
                break
        assert self.told == list(self.computed.values())
        assert self.pipeline.taps.count == self.messages
        self.computed.clear()

    # ---- what comes out

    def take(self, events: list[Event]) -> None:
        assert events, "an empty list of events"
        for event in events:
            assert event.time >= self.time, "time ran backwards"
            self.time = event.time
            self.seen[type(event).__name__] += 1
            match event:
                case Ready():
                    assert not self.ready, "ready twice with no launch in between"
                    self.ready = True
                case Landed():
                    self.check_landed(event, self.flights.pop(0))
                case Drafted():
                    self.check_drafted(event, self.jobs.pop(0))
                case Failed():
                    raise AssertionError(f"{event.station}: {event.reason}")
        assert self.pipeline.now() >= self.time

    def check_landed(self, landed: Landed, flight: Flight) -> None:
        assert landed.flight == flight.id, "flights land in the order of their launch, once"
        wanted = [node for part in flight.parts for node, want in zip(part.nodes, part.wants) if want]
        assert landed.nodes == [node for node in wanted if node in set(landed.nodes)], "order of rows"
        assert len(landed.tokens) == len(landed.nodes)
        missing = set(wanted) - set(landed.nodes)
        assert not [node for node in missing if self.nodes[node].alive], "a living row went unanswered"
        for node, token in zip(landed.nodes, landed.tokens):
            if self.nodes[node].alive:
                assert token == hash_token(self.nodes[node].path, VOCAB, SEED), "a wrong answer"
        self.check_legs(landed.legs, flight)
        self.late += bool(self.flights)

    def check_legs(self, legs: list[Leg], flight: Flight) -> None:
        assert [leg.station for leg in legs] == [f"stage {index}" for index in range(STAGES)]
        entered, before = [node for part in flight.parts for node in part.nodes], -float("inf")
        for leg in legs:
            assert before <= leg.start <= leg.end, "a stage began before the one before had ended"
            assert leg.start >= self.starts.get(leg.station, before), "a station changed the order"
            assert Counter(leg.nodes) <= Counter(entered), "a row appeared from nowhere"
            entered, before, self.starts[leg.station] = leg.nodes, leg.end, leg.start
        assert before <= self.time
        for leg, layers in zip(legs, TAPS if self.taps else []):
            self.note_taps(leg, flight, layers)

    def note_taps(self, leg: Leg, flight: Flight, layers: list[int]) -> None:
        self.messages += bool(layers and (leg.nodes or flight.opens or flight.closes))
        for part in flight.parts:
            for node, position in zip(part.nodes, part.positions):
                if node in leg.nodes:
                    self.computed.setdefault((part.arena, node, position), []).extend(layers)

    def check_drafted(self, drafted: Drafted, job: Flight) -> None:
        assert drafted.job == job.id, "jobs are answered in order"
        assert drafted.leg.station == "draft"
        assert drafted.leg.start <= drafted.leg.end <= self.time
        self.starts["draft"] = drafted.leg.start
        answered = {expansion.node: expansion for expansion in drafted.expansions}
        for node in (node for part in job.parts for node in part.nodes):
            assert node in answered or not self.nodes[node].alive, "a living row got no guesses"
        self.told = [sorted(expansion.tokens) for expansion in drafted.expansions]  # stages overtake each other
        for node, expansion in answered.items():
            if self.taps:
                assert len(expansion.tokens) >= NEEDS, "asked before its taps had come"
            else:
                first = self.nodes[node].token + 1
                assert expansion.tokens == list(range(first, first + job.fanout))


def _copy(flight: Flight) -> Flight:
    """The pipeline owns the flight from launch on."""
    return Flight(flight.id, [part.keep(list(range(len(part)))) for part in flight.parts],
                  list(flight.opens), list(flight.closes), flight.fanout)


def _add(part: Part, node: int, token: int, position: int, slot: int, path: list[int], want: bool) -> None:
    columns = (part.nodes, part.tokens, part.positions, part.slots)
    for column, value in zip(columns, (node, token, position, slot)):
        column.append(value)
    part.paths.append(path)
    part.wants.append(want)


@pytest.fixture(scope="module",
                params=[pytest.param(name, marks=pytest.mark.processes) if name.startswith("workers")
                        else name
                        for name in PIPELINES])
def traffic(request: pytest.FixtureRequest) -> Iterator[Traffic]:
    """Traffic on each pipeline; the pipeline lives through all tests of this module."""
    with PIPELINES[request.param]() as pipeline:
        yield Traffic(pipeline, taps="-taps" in request.param)
    pipeline.close()  # again: it may be called more than once


def test_says_what_it_is(traffic: Traffic) -> None:
    assert traffic.pipeline.num_stages == STAGES
    assert traffic.pipeline.has_draft


def test_ready_comes_before_the_first_launch_and_alone(traffic: Traffic) -> None:
    events = traffic.pipeline.events()
    assert [type(event) for event in events] == [Ready]
    traffic.take(events)


def test_flight_with_nothing_in_it_lands(traffic: Traffic) -> None:
    for _ in range(3):
        traffic.await_ready()
        traffic.launch(Flight(traffic.next_flight()))
    traffic.settle()
    assert not traffic.flights


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic(traffic: Traffic, seed: int) -> None:
    traffic.run(seed, flights=60)
    assert traffic.seen["Ready"] == traffic.seen["Landed"] + 1 == traffic.flight_ids + 1
    assert traffic.seen["Drafted"] == traffic.job_ids
    assert traffic.late, "flights overlapped"
    assert traffic.seen["shared"] or traffic.taps


def test_long_prompts(traffic: Traffic) -> None:
    traffic.run(seed=9, flights=6, prompt=3000)


def test_a_request_begins_with_the_path_of_one_that_ends_with_it(traffic: Traffic) -> None:
    """Ten times in a row, each a token longer than the one before."""
    if traffic.taps:
        pytest.skip("sharing is not asked of pipelines whose draft reads taps")
    traffic.rng, traffic.prompt = random.Random(3), 4
    traffic.await_ready()
    flight, before = Flight(traffic.next_flight(), opens=[traffic.open()]), traffic.lines[-1]
    while before.fed < len(before.prompt):
        flight.parts.append(part := traffic.prefill(before))
        before.standing += part.commits
    traffic.launch(flight)
    for _ in range(10):
        traffic.await_ready()
        opening = traffic.begin([*before.prompt, traffic.rng.randrange(VOCAB)], before.standing)
        line = traffic.lines[-1]
        part = traffic.prefill(line)
        assert len(part) == 1 and part.wants == [True]
        line.standing += part.commits
        traffic.launch(Flight(traffic.next_flight(), [part], [opening], [traffic.end(before)]))
        traffic.lines.remove(before)
        before = line
    traffic.finish(before)
    traffic.settle()


def test_told_how_long_to_wait_it_waits_no_longer(traffic: Traffic) -> None:
    """Also with nothing under way, where it would refuse to wait otherwise."""
    traffic.settle()
    for wait in (0.0, 0.001):
        assert traffic.pipeline.events(wait) == []
    with pytest.raises(PipelineError, match="nothing is under way"):
        traffic.pipeline.events()
    traffic.ready = False
    traffic.flights.append(flight := Flight(traffic.next_flight()))
    traffic.pipeline.launch(_copy(flight))
    while not (traffic.ready and not traffic.flights):
        traffic.take(traffic.pipeline.events(60.0))
    assert traffic.pipeline.events(0.0) == []


def test_flight_whose_rows_all_died_lands_and_commits(traffic: Traffic) -> None:
    """The commit travels in a flight whose only row is cancelled at once; the next row depends on it."""
    traffic.rng, traffic.prompt = random.Random(0), 1
    traffic.await_ready()
    opening = traffic.open()
    line = traffic.lines[-1]
    traffic.launch(Flight(traffic.next_flight(), [traffic.prefill(line)], [opening]))
    for _ in range(20):
        traffic.await_ready()
        assert line.root
        child = traffic.new_node(1, line.root.position + 1, traffic.slot(line), line.root, line.root.path)
        stray = traffic.new_node(2, line.root.position + 1, traffic.slot(line), line.root, line.root.path)
        line.root.children += [child, stray]
        part = Part(line.id, commits=line.commits)
        _add(part, child.id, child.token, child.position, child.slot, [child.slot], True)
        traffic.launch(Flight(traffic.next_flight(), [part]))
        traffic.await_ready()
        part = Part(line.id, commits=[child.slot])
        _add(part, stray.id, stray.token, stray.position, stray.slot, [stray.slot], True)
        traffic.launch(Flight(traffic.next_flight(), [part]))
        traffic.kill(line, stray)
        line.root, line.commits = child, []
    traffic.finish(line)
    traffic.settle()


def test_a_job_waits_for_the_taps_that_its_source_needs(traffic: Traffic) -> None:
    """Of a row that has not even been launched. A source that reads none is asked at once."""
    traffic.rng, traffic.prompt = random.Random(1), 4
    traffic.await_ready()
    flight = Flight(traffic.next_flight(), opens=[traffic.open()])
    line = traffic.lines[-1]
    while line.root is None:
        flight.parts.append(traffic.prefill(line))
    traffic.ask([line.root])
    if not traffic.taps:
        traffic.settle()
    traffic.launch(flight)
    traffic.settle()
    assert (traffic.starts["draft"] >= traffic.starts["stage 0"]) == traffic.taps
    traffic.finish(line)
    traffic.settle()
    traffic.account()


def test_a_job_that_waits_for_the_dead_is_let_go(traffic: Traffic) -> None:
    """None of its rows is ever launched: one is cancelled while the job waits or is on its way."""
    traffic.rng, traffic.prompt = random.Random(2), 1
    traffic.await_ready()
    opening = traffic.open()
    line = traffic.lines[-1]
    traffic.launch(Flight(traffic.next_flight(), [traffic.prefill(line)], [opening]))
    traffic.settle()
    assert line.root
    for cancelled in ([0], [1], [0, 1]):
        children = [traffic.new_node(token, 1, traffic.slot(line), line.root, line.root.path) for token in range(2)]
        line.root.children += children
        traffic.ask([line.root, *(children[index] for index in cancelled)])
        for index in cancelled:
            traffic.kill(line, children[index])
        traffic.settle()
    traffic.finish(line)
    traffic.settle()
    traffic.account()
