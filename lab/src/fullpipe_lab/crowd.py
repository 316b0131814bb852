"""Many recorded answers at once through one engine, in virtual time. No torch.

What `replay` does with one answer: the text of a request depends on nothing else, so the stages compute nothing and say
the recorded tokens, each request its own. Requests come when a schedule says so, on the clock of the pipeline; what
waits for admission waits in the engine.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from fullpipe.engine import Engine, Listener, RequestStats
from fullpipe.errors import UsageError
from fullpipe.events import Emitted, Finished
from fullpipe.messages import ArenaId, Drafted, Event, Expansion, Flight, Landed, Leg, Part
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.durations import Costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.base import DraftLike
from fullpipe_lab.recording import Answer
from fullpipe_lab.replay import Hardware, recorded_pipeline, request_of

MakeEngine = Callable[[Pipeline, Sequence[Listener]], Engine]
"""Makes an engine over this pipeline that tells these listeners."""

Schedule = Sequence[float | None]
"""When each request comes, in seconds of the pipeline's clock, rising; None: as soon as one before it has ended."""


def closed(count: int, at_once: int) -> list[float | None]:
    """A schedule with so many at once, and a new one when one ends."""
    if min(count, at_once) < 1:
        raise UsageError(f"there must be a request, and one at a time at least (got {count} and {at_once})")
    return [0.0 if index < at_once else None for index in range(count)]


def poisson(count: int, rate: float, seed: int) -> list[float | None]:
    """A schedule of independent arrivals, `rate` a second on the mean; the first comes at 0."""
    if count < 1 or rate <= 0:
        raise UsageError(f"there must be a request, and a rate above 0 (got {count} and {rate:g})")
    gaps = random.Random(seed)
    return [0.0, *accumulate(gaps.expovariate(rate) for _ in range(count - 1))]


class Answering(Protocol):
    """What answers one request's parts (`memo.MemoDraft`)."""

    def answer(self, part: Part, fanout: int) -> list[Expansion]: ...


class CrowdDraft:
    """A draft station that answers each request's rows from what is kept of its prompt, all of them in one job.

    opening: makes what answers a request, from its id, whenever the request is opened here.
    """

    def __init__(self, opening: Callable[[int], Answering]) -> None:
        self._opening = opening
        self._open: dict[ArenaId, Answering] = {}

    def run(self, job: Flight) -> list[Expansion]:
        for opening in job.opens:
            if opening.arena not in self._open:  # else it has grown
                self._open[opening.arena] = self._opening(opening.request)
        said = [one for part in job.parts for one in self._open[part.arena].answer(part, job.fanout)]
        for arena in job.closes:
            self._open.pop(arena, None)
        return said


@dataclass(slots=True)
class Stations:
    """Listens to an engine: what each station has done in flights that have landed and jobs that were answered.

    busy: seconds. rows, calls: computed there, the prompts' included.
    """

    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __call__(self, event: Event) -> None:
        match event:
            case Landed():
                for leg in event.legs:
                    self._add(leg)
            case Drafted():
                self._add(event.leg)

    def _add(self, leg: Leg) -> None:
        self.busy[leg.station] += leg.end - leg.start
        self.rows[leg.station] += len(leg.nodes)
        self.calls[leg.station] += bool(leg.nodes)


@dataclass(frozen=True, slots=True)
class Served:
    """What one request got. id: of the recorded answer. arrived: when it came; times: when each of its tokens did, all
    in seconds of the pipeline's clock. hits, misses: as in `RequestStats`. launched_rows, draft_rows: spent on it."""

    id: str
    arrived: float
    times: list[float]
    hits: int
    misses: int
    launched_rows: int
    draft_rows: int

    @property
    def ttft_s(self) -> float:
        """From its arrival on, so waiting to be admitted counts."""
        return self.times[0] - self.arrived

    @property
    def tbt_s(self) -> float | None:
        """Mean time between its tokens; None with a single one."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Between its tokens, one by one; those that came together are 0 apart."""
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True, slots=True)
class CrowdRun:
    """What one run measured. requests: in order of arrival. span_s: from the first arrival to the last token.
    engine_s: processor time of trees, method and bookkeeping, which the virtual clock does not see."""

    requests: list[Served]
    stations: Stations
    span_s: float
    engine_s: float

    @property
    def tokens(self) -> int:
        return sum(len(one.times) for one in self.requests)

    @property
    def throughput(self) -> float:
        """Emitted tokens of all requests a second."""
        return self.tokens / self.span_s


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and tails of some values."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Straight lines between the ordered values."""
        median, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
        return cls(float(median), float(p90), float(p99))


def play(answers: Sequence[Answer], schedule: Schedule, params: SamplingParams, draft: DraftLike | None,
         hardware: Hardware, make_engine: MakeEngine, *, costs: Costs | None = None) -> CrowdRun:
    """Answer the requests, one for each of `answers` (which may be the same ones again), as they come.

    A request's id is its index. params: those of the recording. Raises AssertionError when a text comes out other than
    recorded, which neither a draft nor other requests can bring about, and UsageError for hardware whose costs would
    have to be measured.
    """
    assert len(answers) == len(schedule)
    pipeline, stations = recorded_pipeline(answers, draft, hardware, costs), Stations()
    crowd = _Crowd(answers, schedule, params, pipeline)
    engine = make_engine(pipeline, [stations, crowd])
    worked = time.thread_time()
    crowd.run(engine)
    engine_s = time.thread_time() - worked - pipeline.seconds_inside
    requests = crowd.served()
    return CrowdRun(requests, stations, max(one.times[-1] for one in requests) - requests[0].arrived, engine_s)


class _Crowd:
    """The requests of one run: those to come, those that run, and what was said."""

    def __init__(self, answers: Sequence[Answer], schedule: Schedule, params: SamplingParams,
                 pipeline: InProcessPipeline) -> None:
        self._answers, self._params, self._pipeline = answers, params, pipeline
        self._due = deque((moment, index) for index, moment in enumerate(schedule) if moment is not None)
        self._next = deque(index for index, moment in enumerate(schedule) if moment is None)
        self._arrived: dict[int, float] = {}
        self._stats: dict[int, RequestStats] = {}
        self._said: list[list[Emitted]] = [[] for _ in answers]
        self._ended: list[Finished] = []
        self._left = len(answers)

    def __call__(self, event: Event) -> None:
        match event:
            case Emitted():
                self._said[event.request].append(event)
            case Finished():
                self._ended.append(event)

    def run(self, engine: Engine) -> None:
        for moment, _ in self._due:
            self._pipeline.wake(moment)
        while self._left:
            while self._due and self._due[0][0] <= self._pipeline.now():
                moment, index = self._due.popleft()
                self._submit(engine, index, moment)
            engine.step()
            while self._ended:
                self._end(engine, self._ended.pop(0))

    def served(self) -> list[Served]:
        found = []
        for index in sorted(self._arrived, key=lambda index: (self._arrived[index], index)):
            said, stats = self._said[index], self._stats[index]
            found.append(Served(self._answers[index].id, self._arrived[index], [one.time for one in said], stats.hits,
                                stats.misses, stats.launched_rows, stats.draft_rows))
        return found

    def _submit(self, engine: Engine, index: int, arrived: float) -> None:
        self._arrived[index] = arrived
        engine.submit(request_of(index, self._answers[index], self._params))
        self._stats[index] = engine.stats.of(index)

    def _end(self, engine: Engine, news: Finished) -> None:
        answer, said = self._answers[news.request], [one.token for one in self._said[news.request]]
        assert said == answer.tokens, f"{answer.id}: the text differs from the recorded one"
        assert news.reason == answer.finish, f"{answer.id}: ended with {news.reason!r}, not {answer.finish!r}"
        self._left -= 1
        if self._next:
            self._submit(engine, self._next.popleft(), news.time)
