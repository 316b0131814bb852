"""Run a method against recorded tokens: exact in steps, hits and waste, without running the target. No torch.

The text does not depend on the method, and rows off the true path decide nothing. So the stages only pass
flights on, the last one answers with the recorded token, and all that costs time is imagined by a cluster.
The draft's answers are the real draft's (`memo.MemoSource`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

from fullpipe.bench.recording import Answer
from fullpipe.engine.loop import Engine
from fullpipe.errors import UsageError
from fullpipe.messages import Drafted, Emitted, Event, Flight, Landed, Launched, Part
from fullpipe.methods.base import Policy
from fullpipe.pipeline.inprocess import Costs, InProcessPipeline
from fullpipe.pipeline.links import Links
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.stats import RequestStats
from fullpipe.stations.base import DraftLike

_requests = count()


class Hardware(Protocol):
    """What a replay needs of a cluster (`planning.cluster.Cluster`)."""

    @property
    def num_stages(self) -> int: ...
    @property
    def links(self) -> Links: ...

    def message_bytes(self, rows: int) -> int: ...
    def device_of(self, station: str) -> str: ...
    def __call__(self, station: str, rows: int, measured: float, context: int) -> float: ...


class RecordedStage:
    """A stage that computes nothing; the last one says the recorded tokens."""

    def __init__(self, answer: Answer, *, is_last: bool) -> None:
        self._answer, self._is_last = answer, is_last

    def run(self, flight: Flight, hidden: None) -> Landed | None:
        if not self._is_last:
            return None
        verdict = Landed(0.0, flight.id)
        for part in flight.parts:
            say(self._answer, part, verdict)
        return verdict


def say(answer: Answer, part: Part, verdict: Landed) -> None:
    """Add to the verdict what the recording says of the part's rows. A committed row must be the recorded one."""
    tokens, before = answer.tokens, len(answer.prompt) - 1
    for node, token, position, path, wanted in zip(part.nodes, part.tokens, part.positions, part.paths, part.wants):
        place = position - before
        if place > 0 and not path:
            assert token == tokens[place - 1], "the committed path is not the recorded one"
        if wanted:
            verdict.nodes.append(node)
            verdict.tokens.append(tokens[min(place, len(tokens) - 1)])


class Ending:
    """Ends a request where its recording ends."""

    def __init__(self, answer: Answer) -> None:
        self._left, self._finish = len(answer.tokens), answer.finish

    def __call__(self, token: int) -> str | None:
        self._left -= 1
        return None if self._left else self._finish


@dataclass(slots=True)
class Meter:
    """Listens to an engine: what the stations did, and how far hits go.

    start, end: first launch and last token. busy: seconds of work by station between them. rows, flights: computed
    by station until `end`, the prompt's included. asked, hits: by places after the last miss, how many tokens came
    there, and how many of them were in flight already.
    """

    start: float = 0.0
    end: float = math.inf
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    flights: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    _since: int = 0
    _last: Emitted | None = None
    _began: bool = False

    def __call__(self, event: Event) -> None:
        match event:
            case Launched() if event.nodes and not self._began:
                self._began, self.start = True, event.time
                self.busy.clear()  # of the prompt's other chunks
            case Landed():
                for leg in event.legs:
                    self._work(leg.station, leg.start, leg.end, len(leg.nodes))
            case Drafted():
                self._work("draft", event.leg.start, event.leg.end, len(event.leg.nodes))
            case Emitted():
                if self._last is not None:  # the very last token counts as neither hit nor miss
                    self._count(self._last.hit)
                self._last = event

    def _work(self, station: str, start: float, end: float, rows: int) -> None:
        if start < self.end:
            self.busy[station] += max(0.0, min(end, self.end) - max(start, self.start))
            self.rows[station] += rows
            self.flights[station] += 1

    def _count(self, hit: bool) -> None:
        if self._since == len(self.asked):
            self.asked.append(0)
            self.hits.append(0)
        self.asked[self._since] += 1
        self.hits[self._since] += hit
        self._since = self._since + 1 if hit else 0


@dataclass(slots=True)
class Run:
    """What one replay measured. stats: of the request. engine_s: processor time of tree, policy and bookkeeping.
    wall_s: of all of it."""

    stats: RequestStats
    meter: Meter
    engine_s: float
    wall_s: float


def check_known(hardware: Hardware) -> None:
    """Raises UsageError for hardware whose costs would have to be measured."""
    if getattr(hardware, "is_measured", False):
        raise UsageError("a replay runs no stages, so their time cannot be measured",
                         hint="Give the devices a profile (`fullpipe profile`), a cost curve or a bandwidth.")


def replay(answer: Answer, params: SamplingParams, source: DraftLike | None, policy: Policy, hardware: Hardware,
           *, costs: Costs | None = None, listeners: tuple[Any, ...] = ()) -> Run:
    """One method on one recorded answer.

    params: those of the recording; its `max_tokens` bounds what is guessed, as it did then. Raises AssertionError
    when the text comes out other than recorded, which no draft can bring about, and UsageError for hardware whose
    costs would have to be measured.
    """
    check_known(hardware)
    begun, worked = time.perf_counter(), time.thread_time()
    n = hardware.num_stages
    pipeline = InProcessPipeline([RecordedStage(answer, is_last=k == n - 1) for k in range(n)], source,
                       costs=costs or hardware, links=hardware.links, message_bytes=hardware.message_bytes,
                       device_of=hardware.device_of)
    meter = Meter()
    engine = Engine(pipeline, policy, listeners=[meter, *listeners])
    said: list[int] = []
    track = engine.submit(Request(next(_requests), tuple(answer.prompt), params), Ending(answer))
    while engine.busy:
        said += [event.token for event in engine.step() if isinstance(event, Emitted)]
    assert said == answer.tokens, f"{answer.id}: the text differs from the recorded one"
    engine_s, stats = time.thread_time() - worked - pipeline.seconds_inside, replace(track.stats)
    meter.end = stats.last_token or 0.0
    engine.drain()  # what had not landed yet was work too
    return Run(stats, meter, engine_s, time.perf_counter() - begun)
