"""What the server counts, as Prometheus reads it.

`Metrics` hears every event of the engine and adds to plain numbers; families with names and labels are made only when
somebody asks (`render`). What vLLM has too carries vLLM's name behind our prefix, and, so that dashboards made for vLLM
work, a second time under `vllm:`. The other meanings are those of DESIGN section 8. Knows no HTTP.

Two figures need care. A token is a hit or a miss only when another follows it, so each waits for the next one. And a
stage's idle time is a *bubble* only while somebody waits for tokens: a server without requests has none.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fullpipe.messages import Died, Drafted, Emitted, Event, Landed, Launched, Leg
from fullpipe.sequences.stats import RequestStats
from fullpipe.service import Observer, State, Status

REASONS = ("stop", "length", "abort", "deadline", "error")
_LAST = ("stop", "length")  # the reasons with which a request's last token was known to be the last


def _series(start: int, end: int, steps: tuple[float, ...]) -> tuple[float, ...]:
    """Bounds of buckets: `steps` times the powers of ten from 10**start up to 10**end, both included."""
    return (*(float(f"{step}e{power}") for power in range(start, end) for step in steps), float(f"1e{end}"))


_GAPS = _series(-3, 1, (1, 1.5, 2, 3, 5, 7))  # seconds between tokens
_SPANS = _series(-3, 3, (1, 2, 5))  # seconds of a request
_LENGTHS = _series(0, 6, (1, 2, 5))  # tokens
_ROWS = tuple(2.0**power for power in range(11))
_STEPS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)


class _Histogram:
    """Counts of values by bucket. A bucket takes values up to its bound, the bound included, the last the rest."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, number in zip((*self.bounds, math.inf), self.counts):
            total += number
            found.append(("+Inf" if math.isinf(bound) else repr(bound), float(total)))
        return found


class _Presence:
    """The times at which there was a request at all."""

    def __init__(self) -> None:
        self.since: float | None = None
        # Old spans go when every stage has reported what came later (`forget`). The bound is for a server whose
        # requests all end before any flight lands.
        self._spans: deque[tuple[float, float]] = deque(maxlen=1000)

    def begin(self, now: float) -> None:
        if self.since is None:
            self.since = now

    def end(self, now: float) -> None:
        if self.since is not None:
            self._spans.append((self.since, now))
            self.since = None

    def within(self, start: float, end: float) -> float:
        """Seconds between `start` and `end` at which there was one."""
        spans = [*self._spans, (self.since, math.inf)] if self.since is not None else self._spans
        return math.fsum(max(min(end, last) - max(start, first), 0.0) for first, last in spans)

    def forget(self, before: float) -> None:
        while self._spans and self._spans[0][1] <= before:
            self._spans.popleft()


@dataclass(slots=True)
class _Stage:
    """Seconds at work; of these, on rows that were alive when it was done; and without work while somebody waited."""

    busy: float = 0.0
    alive: float = 0.0
    bubble: float = 0.0
    until: float = -math.inf  # the end of the newest stay


@dataclass(slots=True)
class _Life:
    """A request that has not ended. Times as told; hit: of its newest token, while it may still be the last."""

    submitted: float
    num_prompt: int
    first_token: float | None = None
    last_token: float = 0.0
    num_emitted: int = 0
    hit: bool | None = None


_Sample = tuple[dict[str, str], float | _Histogram]


@dataclass(slots=True)
class _Family:
    """One metric, without prefix. samples: labels beside the model's name, and the value. shared: vLLM has it too."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    samples: list[_Sample]
    shared: bool = False


@dataclass(slots=True)
class _Counts:
    """Running totals since the start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    hits: int = 0
    misses: int = 0
    altered: int = 0
    flights: int = 0
    launched_rows: int = 0
    guesses: int = 0
    wasted_rows: int = 0
    draft_jobs: int = 0
    draft_rows: int = 0
    draft_seconds: float = 0.0
    engine_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    restarts: dict[str, int] = field(default_factory=dict)


class Metrics(Observer, Collector):
    """Counts for a service. May be called from any thread.

    model_name: the label on everything. clock: the pipeline's; times of events and of `on_submit` are on it, and ends
    of requests are put on it. vllm_names: also say what vLLM has under vLLM's name, with its labels.

    A request's id is that of its events, before a restart and after.
    """

    def __init__(self, model_name: str, *, vllm_names: bool = True,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._labels = {"model_name": model_name}
        self._vllm_names = vllm_names
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._presence = _Presence()
        self._stages: dict[str, _Stage] = {}
        self._lives: dict[int, _Life] = {}
        self._flights: dict[int, list[int]] = {}  # nodes of those under way
        self._flying: set[int] = set()  # these nodes
        self._died: dict[int, float] = {}  # when those of them died that did
        self._unused: set[int] = set()  # launched nodes that may still carry a token of the text
        self._to_first_token, self._between_tokens = _Histogram(_SPANS), _Histogram(_GAPS)
        self._per_token, self._whole = _Histogram(_GAPS), _Histogram(_SPANS)
        self._queued, self._prefill, self._decode = _Histogram(_SPANS), _Histogram(_SPANS), _Histogram(_SPANS)
        self._prompt_lengths, self._answer_lengths = _Histogram(_LENGTHS), _Histogram(_LENGTHS)
        self._steps, self._rows = _Histogram(_STEPS), _Histogram(_ROWS)
        self._status = Status("starting", 0, 0, 0, 0, 0)
        self._hear: dict[type[Event], Callable[[Any], None]] = {
            Launched: self._on_launched, Landed: self._on_landed, Drafted: self._on_drafted,
            Emitted: self._on_emitted, Died: self._on_died}
        self._rendering = threading.Lock()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # ---- what is told -------------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        if hear := self._hear.get(type(event)):
            with self._lock:
                hear(event)

    def on_submit(self, id: int, prompt_tokens: int, time: float) -> None:
        with self._lock:
            self._lives[id] = _Life(time, prompt_tokens)
            self._presence.begin(time)

    def on_finish(self, id: int, reason: str, prompt_tokens: int, completion_tokens: int, stats: RequestStats,
                  cached_tokens: int) -> None:
        with self._lock:
            now, counts = self._clock(), self._counts
            counts.finished[reason] = counts.finished.get(reason, 0) + 1
            self._prompt_lengths.observe(prompt_tokens)
            self._answer_lengths.observe(completion_tokens)
            if stats.admitted is not None:
                counts.prefix_queries += prompt_tokens
                counts.prefix_hits += cached_tokens
            if stats.steps:
                self._steps.observe(stats.steps_per_token)
            if life := self._lives.pop(id, None):
                self._end(life, reason, stats.admitted, now)
            if not self._lives:
                self._presence.end(now)

    def on_restart(self, station: str, reason: str) -> None:
        with self._lock:
            self._counts.restarts[station] = self._counts.restarts.get(station, 0) + 1
            self._counts.wasted_rows += len(self._unused)
            self._unused.clear()
            self._flights.clear()
            self._flying.clear()
            self._died.clear()

    def on_preempt(self) -> None:
        with self._lock:
            self._counts.preemptions += 1

    def on_engine_time(self, seconds: float) -> None:
        with self._lock:
            self._counts.engine_seconds += seconds

    def _end(self, life: _Life, reason: str, admitted: float | None, now: float) -> None:
        if reason not in _LAST:
            self._judge(life)
        if admitted is not None:
            self._queued.observe(max(admitted - life.submitted, 0.0))
            if life.first_token is not None:
                self._prefill.observe(max(life.first_token - admitted, 0.0))
        self._whole.observe(max(now - life.submitted, 0.0))
        if life.first_token is not None:
            self._decode.observe(life.last_token - life.first_token)
            if life.num_emitted > 1:
                self._per_token.observe((life.last_token - life.first_token) / (life.num_emitted - 1))

    # ---- the engine's events ------------------------------------------------------------------------------

    def _on_launched(self, event: Launched) -> None:
        counts = self._counts
        counts.flights += 1
        counts.launched_rows += len(event.nodes)
        counts.guesses += sum(parent >= 0 for parent in event.parents)
        self._flights[event.flight] = event.nodes
        self._flying.update(event.nodes)
        self._unused.update(event.nodes)

    def _on_landed(self, event: Landed) -> None:
        if event.legs:
            self._rows.observe(len(event.legs[0].nodes))
        for leg in event.legs:
            self._count_stay(leg)
        for node in self._flights.pop(event.flight, ()):
            self._flying.discard(node)
            self._died.pop(node, None)
        self._presence.forget(min((stage.until for stage in self._stages.values()), default=-math.inf))

    def _count_stay(self, leg: Leg) -> None:
        if not leg.nodes:  # all its rows were cancelled before: no work
            return
        stage = self._stages.get(leg.station)
        if stage is None:
            stage = self._stages[leg.station] = _Stage()
        if leg.start > stage.until:
            stage.bubble += self._presence.within(stage.until, leg.start)
        stage.until = max(stage.until, leg.end)
        stage.busy += leg.end - leg.start
        died = self._died
        alive = sum(died.get(node, math.inf) >= leg.end for node in leg.nodes) if died else len(leg.nodes)
        stage.alive += (leg.end - leg.start) * alive / len(leg.nodes)

    def _on_drafted(self, event: Drafted) -> None:
        self._counts.draft_jobs += 1
        self._counts.draft_rows += len(event.leg.nodes)
        self._counts.draft_seconds += event.leg.end - event.leg.start

    def _on_emitted(self, event: Emitted) -> None:
        self._unused.discard(event.node)
        self._counts.generation_tokens += 1
        self._counts.altered += event.altered
        if life := self._lives.get(event.request):
            self._judge(life)
            life.hit = event.hit
            life.num_emitted += 1
            if life.first_token is None:
                life.first_token = event.time
                self._counts.prompt_tokens += life.num_prompt
                self._to_first_token.observe(max(event.time - life.submitted, 0.0))
            else:
                self._between_tokens.observe(max(event.time - life.last_token, 0.0))
            life.last_token = max(event.time, life.last_token)

    def _judge(self, life: _Life) -> None:
        """Another token follows the newest one, or would have."""
        if life.hit is not None:
            self._counts.hits += life.hit
            self._counts.misses += not life.hit
            life.hit = None

    def _on_died(self, event: Died) -> None:
        for node in event.nodes:
            if node in self._unused:
                self._unused.remove(node)
                self._counts.wasted_rows += 1
            if node in self._flying:
                self._died[node] = event.time

    # ---- what is said -------------------------------------------------------------------------------------

    def render(self, status: Status) -> tuple[bytes, str]:
        """The text of `/metrics`, and its content type."""
        with self._rendering:
            self._status = status
            return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            families = [*self._of_requests(), *self._of_speculation(), *self._of_stations(), *self._of_state()]
            made = [_metric("fullpipe_", family, self._labels) for family in families]
            if self._vllm_names:
                labels = {**self._labels, "engine": "0"}
                made += [_metric("vllm:", family, labels) for family in families if family.shared]
        yield from made

    def _of_requests(self) -> Iterator[_Family]:
        counts = self._counts
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", self._to_first_token),
            ("inter_token_latency_seconds", "Between a request's consecutive tokens.", self._between_tokens),
            ("request_time_per_output_token_seconds", "Mean time between tokens of a request.", self._per_token),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", self._whole),
            ("request_queue_time_seconds", "From a request's arrival to its admission.", self._queued),
            ("request_prefill_time_seconds", "From a request's admission to its first token.", self._prefill),
            ("request_decode_time_seconds", "From a request's first token to its last.", self._decode),
            ("request_prompt_tokens", "Tokens of a request's prompt.", self._prompt_lengths),
            ("request_generation_tokens", "Tokens of a request's answer.", self._answer_lengths),
        ):
            yield _Family("histogram", name, text, [({}, histogram)], shared=True)
        yield _counter("prompt_tokens", "Prompt tokens processed.", counts.prompt_tokens, shared=True)
        yield _counter("generation_tokens", "Tokens emitted.", counts.generation_tokens, shared=True)
        ended: list[_Sample] = [({"finished_reason": reason}, number) for reason, number in counts.finished.items()]
        yield _Family("counter", "request_success", "Requests that have ended, by reason.", ended, shared=True)
        yield _counter("num_preemptions", "Requests put back into the queue.", counts.preemptions, shared=True)
        yield _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", counts.prefix_queries,
                       shared=True)
        yield _counter("prefix_cache_hits", "Prompt tokens taken over from the prefix cache.", counts.prefix_hits,
                       shared=True)

    def _of_speculation(self) -> Iterator[_Family]:
        counts = self._counts
        yield _counter("spec_decode_num_drafts", "Verifications; each ends with a miss.", counts.misses, shared=True)
        yield _counter("spec_decode_num_draft_tokens", "Guesses that were launched.", counts.guesses, shared=True)
        yield _counter("spec_decode_num_accepted_tokens", "Guesses that became text.", counts.hits, shared=True)
        yield _counter("hits", "Emitted tokens that were in flight already.", counts.hits)
        yield _counter("misses", "Emitted tokens that were not in flight, without each request's last.", counts.misses)
        yield _gauge("hit_ratio", "hits / (hits + misses) since the start.",
                     _share(counts.hits, counts.hits + counts.misses))
        yield _gauge("mean_acceptance_length", "1 + hits per verification since the start (0: nothing emitted).",
                     1 + counts.hits / max(counts.misses, 1) if counts.hits + counts.misses else 0.0)
        yield _counter("altered_tokens", "Emitted tokens in whose place the target would have said another one.",
                       counts.altered)
        yield _counter("flights", "Flights launched.", counts.flights)
        yield _counter("launched_rows", "Rows launched, prompts not counted.", counts.launched_rows)
        yield _counter("wasted_rows", "Launched rows that carried no token of the text.", counts.wasted_rows)
        yield _Family("histogram", "flight_rows", "Rows that a flight had at the first stage, prompts counted.",
                      [({}, self._rows)])
        yield _Family("histogram", "request_steps_per_token", "Service periods of stage 0 per token of a request: "
                      "1 is ideal, the number of stages is a pipeline without speculation.", [({}, self._steps)])
        yield _counter("draft_jobs", "Answers of the draft.", counts.draft_jobs)
        yield _counter("draft_rows", "Rows that the draft has computed.", counts.draft_rows)
        yield _counter("draft_seconds", "Time that the draft has worked.", counts.draft_seconds)

    def _of_stations(self) -> Iterator[_Family]:
        stages = sorted(self._stages.items(), key=lambda entry: (len(entry[0]), entry[0]))
        for name, text, seconds in (
            ("stage_busy_seconds", "Time that a stage has worked.", [stage.busy for _, stage in stages]),
            ("stage_alive_seconds", "Of that, the share of rows that were alive when it was done.",
             [stage.alive for _, stage in stages]),
            ("stage_bubble_seconds", "Time without work while there were requests.",
             [stage.bubble for _, stage in stages]),
        ):
            yield _Family("counter", name, text,
                          [({"station": station}, value) for (station, _), value in zip(stages, seconds)])
        yield _gauge("fill_ratio", "Share of the stages' time, while there were requests, spent on rows that were "
                     "alive, since the start.", _share(sum(stage.alive for _, stage in stages),
                                                       sum(stage.busy + stage.bubble for _, stage in stages)))
        yield _Family("counter", "restarts", "Times that the pipeline was built anew, by the station that failed.",
                      [({"station": station}, number) for station, number in self._counts.restarts.items()])
        yield _counter("engine_seconds", "Time that the engine's thread has worked.", self._counts.engine_seconds)

    def _of_state(self) -> Iterator[_Family]:
        status = self._status
        yield _gauge("num_requests_running", "Requests that have rows in the cache.", status.running, shared=True)
        yield _gauge("num_requests_waiting", "Requests that wait for admission.", status.waiting, shared=True)
        yield _gauge("kv_cache_usage_perc", "Share of the cache's slots that requests use: 1 is all (0: unlimited). "
                     "What is kept to be shared counts as free.",
                     _share(status.kv_used, status.kv_total), shared=True)
        yield _Family("gauge", "state", "1 for the state that the service is in.",
                      [({"state": state}, float(state == status.state)) for state in get_args(State)])


def _counter(name: str, text: str, value: float, *, shared: bool = False) -> _Family:
    return _Family("counter", name, text, [({}, value)], shared)


def _gauge(name: str, text: str, value: float, *, shared: bool = False) -> _Family:
    return _Family("gauge", name, text, [({}, value)], shared)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _metric(prefix: str, family: _Family, labels: dict[str, str]) -> Metric:
    names = [*labels, *(family.samples[0][0] if family.samples else ())]
    if family.kind == "histogram":
        histograms = HistogramMetricFamily(prefix + family.name, family.help, labels=names)
        for more, value in family.samples:
            assert isinstance(value, _Histogram)
            histograms.add_metric([*labels.values(), *more.values()], value.cumulative(), value.sum)
        return histograms
    plain: CounterMetricFamily | GaugeMetricFamily
    if family.kind == "counter":
        plain = CounterMetricFamily(prefix + family.name, family.help, labels=names)
    else:
        plain = GaugeMetricFamily(prefix + family.name, family.help, labels=names)
    for more, value in family.samples:
        assert not isinstance(value, _Histogram)
        plain.add_metric([*labels.values(), *more.values()], value)
    return plain
