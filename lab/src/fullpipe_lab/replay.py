"""Run a method against recorded tokens: exact in steps, hits and waste, without running the target. No torch.

The text does not depend on the method, and rows off the true path decide nothing. So the stages only pass flights on,
the last one answers with the recorded token, and all that costs time is imagined by a cluster. The draft's answers are
the real draft's (`memo.MemoDraft`).
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fullpipe.engine import Engine, Listener, RequestStats
from fullpipe.errors import UsageError
from fullpipe.events import Emitted, Launched
from fullpipe.messages import ArenaId, Drafted, Event, Flight, Landed, Leg, Part
from fullpipe.methods import Method
from fullpipe.pipeline.durations import Costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Links
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.calibration import Calibration
from fullpipe.stations.base import DraftLike
from fullpipe_lab.recording import Answer


class Hardware(Protocol):
    """What a replay needs of a cluster (`clusters.Cluster`)."""

    @property
    def num_stages(self) -> int: ...
    @property
    def is_measured(self) -> bool: ...
    @property
    def links(self) -> Links: ...

    def message_bytes(self, rows: int) -> int: ...
    def device_of(self, station: str) -> str: ...
    def __call__(self, station: str, rows: int, measured: float, context: int) -> float: ...


class RecordedStage:
    """A stage that computes nothing; the last one says the recorded tokens. answers: by request id."""

    def __init__(self, answers: Sequence[Answer], *, is_last: bool) -> None:
        self._answers, self._is_last = answers, is_last
        self._requests: dict[ArenaId, int] = {}

    def run(self, flight: Flight, hidden: None) -> Landed | None:
        if not self._is_last:
            return None
        for opening in flight.opens:
            self._requests[opening.arena] = opening.request
        landed = Landed(0.0, flight.id)
        for part in flight.parts:
            say(self._answers[self._requests[part.arena]], part, landed)
        for arena in flight.closes:
            self._requests.pop(arena, None)
        return landed


def say(answer: Answer, part: Part, landed: Landed) -> None:
    """Add what the recording says of the part's rows. A committed row must be the recorded one."""
    tokens, before = answer.tokens, len(answer.prompt) - 1
    for node, token, position, path, wanted in zip(part.nodes, part.tokens, part.positions, part.paths, part.wants):
        place = position - before
        if place > 0 and not path:
            assert token == tokens[place - 1], "the committed path is not the recorded one"
        if wanted:
            landed.nodes.append(node)
            landed.tokens.append(tokens[min(place, len(tokens) - 1)])


def recorded_pipeline(answers: Sequence[Answer], draft: DraftLike | None, hardware: Hardware,
                      costs: Costs | None = None) -> InProcessPipeline:
    """A pipeline on the virtual clock that says these answers; a request's id is its answer's index.

    Raises UsageError for hardware whose costs would have to be measured.
    """
    if hardware.is_measured:
        raise UsageError("a replay runs no stages, so their time cannot be measured",
                         hint="Give the devices a profile (`fullpipe profile`), a cost curve or a bandwidth.")
    last = hardware.num_stages - 1
    return InProcessPipeline([RecordedStage(answers, is_last=k == last) for k in range(last + 1)], draft,
                             clock="virtual", costs=costs or hardware, links=hardware.links,
                             message_bytes=hardware.message_bytes, device_of=hardware.device_of)


def request_of(id: int, answer: Answer, params: SamplingParams) -> Request:
    """The request whose text ends where the recording ends. params: those of the recording."""
    ends = frozenset(answer.tokens[-1:]) if answer.finish == "stop" else frozenset[int]()
    return Request(id, tuple(answer.prompt), params, ends)


@dataclass(slots=True)
class Meter:
    """Listens to an engine: what the stations did, and how far hits go.

    start, end: first launch and last token. busy: seconds of work by station between them. rows, flights: computed by
    station until `end`, the prompt's included. asked, hits: by places after the last miss, how many tokens came there,
    and how many of them were in flight already.
    """

    start: float = 0.0
    end: float = math.inf
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    flights: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    _since: int = 0
    _began: bool = False

    def __call__(self, event: Event) -> None:
        match event:
            case Launched() if event.nodes and not self._began:
                self._began, self.start = True, event.time
                self.busy.clear()  # of the prompt's other chunks
            case Landed():
                for leg in event.legs:
                    self._work(leg)
            case Drafted():
                self._work(event.leg)
            case Emitted() if event.fate != "last":
                self._count(event.hit)

    def _work(self, leg: Leg) -> None:
        if leg.start < self.end:
            self.busy[leg.station] += max(0.0, min(leg.end, self.end) - max(leg.start, self.start))
            self.rows[leg.station] += len(leg.nodes)
            self.flights[leg.station] += 1

    def _count(self, hit: bool) -> None:
        if self._since == len(self.asked):
            self.asked.append(0)
            self.hits.append(0)
        self.asked[self._since] += 1
        self.hits[self._since] += hit
        self._since = self._since + 1 if hit else 0


@dataclass(frozen=True, slots=True)
class Run:
    """What one replay measured. stats: of the request. engine_s: processor time of tree, method and bookkeeping.
    wall_s: of all of it."""

    stats: RequestStats
    meter: Meter
    engine_s: float
    wall_s: float


def replay(answer: Answer, params: SamplingParams, draft: DraftLike | None, method: Method, hardware: Hardware, *,
           costs: Costs | None = None, listeners: Iterable[Listener] = (),
           calibration: Calibration | None = None) -> Run:
    """Run one method on one recorded answer.

    params: those of the recording; its `max_tokens` bounds what is guessed, as it did then. calibration: how far the
    draft is believed to begin with; it learns. None: at its word. Raises AssertionError when
    the text comes out other than recorded, which no draft can bring about, and UsageError as `recorded_pipeline` does.
    """
    begun, worked = time.perf_counter(), time.thread_time()
    pipeline, meter = recorded_pipeline([answer], draft, hardware, costs), Meter()
    engine = Engine(pipeline, method, listeners=[meter, *listeners], calibration=calibration)
    sequence = engine.submit(request_of(0, answer, params))
    counted = engine.stats.of(0)
    while engine.busy:
        engine.step()
    assert sequence.output == answer.tokens, f"{answer.id}: the text differs from the recorded one"
    assert sequence.finished == answer.finish, f"{answer.id}: ended with {sequence.finished!r}, not {answer.finish!r}"
    engine_s, stats = time.thread_time() - worked - pipeline.seconds_inside, copy.copy(counted)
    meter.end = stats.last_token or 0.0
    engine.drain()  # what had not landed yet was work too
    return Run(stats, meter, engine_s, time.perf_counter() - begun)
