"""The server counts things here, and Prometheus reads them.

`Metrics` hears every event of the engine, and reads from the engine what that counts itself (`engine/stats.py`). What
vLLM has too carries vLLM's name behind our prefix, and, so that dashboards made for vLLM work, a second time under
`vllm:`. The other meanings are those of DESIGN section 8. Knows no HTTP.

A stage's idle time is a *bubble* only while somebody waits for tokens: a server without requests has none.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fullpipe.engine import RequestStats, Stats, Totals
from fullpipe.events import Admitted, Emitted, Finished, Launched, Submitted
from fullpipe.messages import Drafted, Event, Landed, Leg
from fullpipe.server.hosts import Hosts, station_and_host
from fullpipe.supervision import Observer, State, Status
from fullpipe.trace.flying import Flying

REASONS = ("stop", "length", "abort", "deadline", "error")


def _series(start: int, end: int, steps: tuple[float, ...]) -> tuple[float, ...]:
    """Bounds of buckets: `steps` times the powers of ten from 10**start up to 10**end, both included."""
    return (*(float(f"{step}e{power}") for power in range(start, end) for step in steps), float(f"1e{end}"))


_GAPS = _series(-3, 1, (1, 1.5, 2, 3, 5, 7))  # seconds between tokens
_SPANS = _series(-3, 3, (1, 2, 5))  # seconds of a request
_LENGTHS = _series(0, 6, (1, 2, 5))  # tokens
_ROWS = tuple(2.0**power for power in range(11))
_STEPS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _SPANS),
    "inter_token_latency_seconds": ("Between a request's consecutive tokens.", _GAPS),
    "request_time_per_output_token_seconds": ("Mean time between tokens of a request.", _GAPS),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", _SPANS),
    "request_queue_time_seconds": ("From a request's arrival to its admission.", _SPANS),
    "request_prefill_time_seconds": ("From a request's admission to its first token.", _SPANS),
    "request_decode_time_seconds": ("From a request's first token to its last.", _SPANS),
    "request_prompt_tokens": ("Tokens of a request's prompt.", _LENGTHS),
    "request_generation_tokens": ("Tokens of a request's answer.", _LENGTHS),
    "flight_rows": ("Rows that a flight had at the first stage, prompts counted.", _ROWS),
    "request_steps_per_token": ("Service periods of stage 0 per token of a request: 1 is ideal, the number of stages "
                                "is a pipeline without speculation.", _STEPS),
}
_COUNTS = {
    "prompt_tokens": "Prompt tokens of requests that have got their first token.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens taken over from the prefix cache.",
    "flights": "Flights launched.",
    "spec_decode_num_draft_tokens": "Guesses that were launched.",
    "wasted_rows": "Launched rows of ended requests that carried no token of the text.",
    "draft_jobs": "Answers of the draft.",
    "draft_seconds": "Time that the draft has worked.",
    "engine_seconds": "Time that the engine's thread has worked.",
}
_TOTALS: dict[str, tuple[str, Callable[[Totals], float]]] = {
    "generation_tokens": ("Tokens emitted.", lambda totals: totals.emitted),
    "spec_decode_num_drafts": ("Verifications; each ends with a miss.", lambda totals: totals.misses),
    "spec_decode_num_accepted_tokens": ("Guesses that became text.", lambda totals: totals.hits),
    "hits": ("Emitted tokens that were in flight already.", lambda totals: totals.hits),
    "misses": ("Emitted tokens that were not in flight, without each request's last.", lambda totals: totals.misses),
    "altered_tokens": ("Emitted tokens in whose place the target would have said another one.",
                       lambda totals: totals.altered),
    "launched_rows": ("Rows launched, prompts not counted.", lambda totals: totals.launched_rows),
    "draft_rows": ("Rows that the draft was sent.", lambda totals: totals.draft_rows),
    "num_preemptions": ("Requests put back into the queue.", lambda totals: totals.preemptions),
}
_SHARED = {*list(_HISTOGRAMS)[:9], *list(_COUNTS)[:3], "request_success", "generation_tokens", "num_preemptions",
           "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "spec_decode_num_drafts",
           "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"}
"""What vLLM has too."""


@dataclass(slots=True)
class _Stage:
    """Holds seconds at work; of these, on rows that were alive when it was done; and idle while somebody waited."""

    busy: float = 0.0
    alive: float = 0.0
    bubble: float = 0.0
    until: float = -math.inf  # the end of the newest stay


@dataclass(slots=True)
class _Life:
    """Remembers a request that has not ended. last_token: when its newest token came."""

    num_prompt: int
    admitted: bool = False
    last_token: float | None = None


class Metrics(Observer, Collector):
    """Counts for a service. May be called from any thread.

    model_name: the label on everything. hosts: where the stages are, if on several; restarts carry the host then.
    vllm_names: also say what vLLM has under vLLM's name, with its labels.
    """

    def __init__(self, model_name: str, *, hosts: Hosts | None = None, vllm_names: bool = True) -> None:
        self._labels, self._hosts, self._vllm_names = {"model_name": model_name}, hosts, vllm_names
        self._lock = threading.Lock()
        self._stats = Stats()
        self._status = Status("ready", 0, 0, 0, 0, 0)
        self._lives: dict[int, _Life] = {}
        self._since = 0.0  # when the newest stretch of time with requests began
        self._stages: dict[str, _Stage] = {}
        self._flying = Flying()
        self._own = own = CollectorRegistry()
        self._histograms = {name: Histogram(name, text, buckets=bounds, registry=own)
                            for name, (text, bounds) in _HISTOGRAMS.items()}
        self._counts = {name: Counter(name, text, registry=own) for name, text in _COUNTS.items()}
        self._ended = Counter("request_success", "Requests that have ended, by reason.", ["finished_reason"],
                              registry=own)
        self._restarts = Counter("restarts", "Times that the pipeline was built anew, by the station that failed.",
                                 ["station", "host"] if hosts else ["station"], registry=own)
        self._recuts = Counter("recuts", "Times that the pipeline was exchanged for a better one.", registry=own)
        for reason in REASONS:
            self._ended.labels(reason)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # ---- what is told -------------------------------------------------------------------------------------

    def on_start(self, stats: Stats) -> None:
        self._stats = stats

    def on_restart(self, station: str, reason: str) -> None:
        self._restarts.labels(*(station_and_host(station) if self._hosts else (station,))).inc()

    def on_recut(self, why: str) -> None:
        self._recuts.inc()

    def on_engine_time(self, seconds: float) -> None:
        self._counts["engine_seconds"].inc(seconds)

    def _observe(self, **values: float) -> None:
        for name, value in values.items():
            self._histograms[name].observe(max(value, 0.0))

    # ---- the engine's events ------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._hear(event)
            self._flying(event)

    def _hear(self, event: Event) -> None:
        match event:
            case Submitted():
                self._since = self._since if self._lives else event.time
                self._lives[event.request] = _Life(event.prompt_tokens)
            case Admitted():
                self._on_admitted(event)
            case Launched():
                self._counts["flights"].inc()
                self._counts["spec_decode_num_draft_tokens"].inc(sum(parent >= 0 for parent in event.parents))
            case Landed():
                for leg in event.legs[:1]:
                    self._observe(flight_rows=len(leg.nodes))
                for leg in event.legs:
                    self._on_stay(leg)
            case Drafted():
                self._counts["draft_jobs"].inc()
                self._counts["draft_seconds"].inc(event.leg.end - event.leg.start)
            case Emitted():
                self._on_emitted(event)
            case Finished():
                self._on_finished(event)

    def _on_admitted(self, event: Admitted) -> None:
        life = self._lives[event.request]
        if not life.admitted:  # else it comes again, after a preemption or a failure
            life.admitted = True
            self._counts["prefix_cache_queries"].inc(life.num_prompt)
            self._counts["prefix_cache_hits"].inc(event.cached_tokens)

    def _on_stay(self, leg: Leg) -> None:
        if leg.nodes:  # else all its rows were cancelled before: no work
            stage = self._stages.setdefault(leg.station, _Stage())
            stage.bubble += max(leg.start - max(stage.until, self._since), 0.0)
            stage.until = max(stage.until, leg.end)
            stage.busy += leg.end - leg.start
            stage.alive += (leg.end - leg.start) * self._flying.alive(leg)

    def _on_emitted(self, event: Emitted) -> None:
        if life := self._lives.get(event.request):
            if life.last_token is None:
                self._counts["prompt_tokens"].inc(life.num_prompt)
                self._observe(time_to_first_token_seconds=self._stats.of(event.request).ttft_s)
            else:
                self._observe(inter_token_latency_seconds=event.time - life.last_token)
            life.last_token = event.time

    def _on_finished(self, event: Finished) -> None:
        stats, life = self._stats.of(event.request), self._lives.pop(event.request)
        self._ended.labels(event.reason).inc()
        self._counts["wasted_rows"].inc(stats.wasted_rows)
        self._observe(request_prompt_tokens=life.num_prompt, request_generation_tokens=stats.num_emitted,
                      e2e_request_latency_seconds=event.time - stats.started, **_spans(stats))

    # ---- what is said -------------------------------------------------------------------------------------

    def render(self, status: Status) -> tuple[bytes, str]:
        """The text of `/metrics`, and its content type."""
        self._status = status
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        of_hosts = list(_of_hosts(self._hosts)) if self._hosts else []
        with self._lock:
            families = [*self._own.collect(), *self._of_totals(), *self._of_stages(), *self._of_state(), *of_hosts]
        for family in families:
            yield _named("fullpipe_", family, self._labels)
        for family in families if self._vllm_names else ():
            if family.name in _SHARED:
                yield _named("vllm:", family, {**self._labels, "engine": "0"})

    def _of_totals(self) -> Iterator[Metric]:
        totals = self._stats.totals
        for name, (text, figure) in _TOTALS.items():
            yield CounterMetricFamily(name, text, figure(totals))
        yield GaugeMetricFamily("hit_ratio", "hits / (hits + misses) since the start.", totals.hit_rate)
        yield GaugeMetricFamily("mean_acceptance_length", "1 + hits per verification since the start (0: nothing "
                                "emitted).", totals.mean_acceptance_length)

    def _of_stages(self) -> Iterator[Metric]:
        stages = sorted(self._stages.items(), key=lambda entry: (len(entry[0]), entry[0]))
        busy = CounterMetricFamily("stage_busy_seconds", "Time that a stage has worked.", labels=["station"])
        alive = CounterMetricFamily("stage_alive_seconds", "Of that, the share of rows that were alive when it was "
                                    "done.", labels=["station"])
        bubble = CounterMetricFamily("stage_bubble_seconds", "Time without work while there were requests.",
                                     labels=["station"])
        for name, stage in stages:
            busy.add_metric([name], stage.busy)
            alive.add_metric([name], stage.alive)
            bubble.add_metric([name], stage.bubble)
        yield from (busy, alive, bubble)
        yield GaugeMetricFamily(
            "fill_ratio", "Share of the stages' time, while there were requests, spent on rows that were alive, since "
            "the start.", _share(sum(stage.alive for _, stage in stages),
                             sum(stage.busy + stage.bubble for _, stage in stages)))

    def _of_state(self) -> Iterator[Metric]:
        status = self._status
        yield GaugeMetricFamily("num_requests_running", "Requests that have rows in the cache.", status.running)
        yield GaugeMetricFamily("num_requests_waiting", "Requests that wait for admission.", status.waiting)
        yield GaugeMetricFamily(
            "kv_cache_usage_perc", "Share of the cache's slots that requests use: 1 is all (0: unlimited). What is "
            "kept to be shared counts as free.", _share(status.kv_used, status.kv_total))
        states = GaugeMetricFamily("state", "1 for the state that the service is in.", labels=["state"])
        for state in get_args(State):
            states.add_metric([state], float(state == status.state))
        yield states


def _of_hosts(hosts: Hosts) -> Iterator[Metric]:
    up = GaugeMetricFamily("host_up", "1 for a host that can take part, 0 for one that is lost.", labels=["host"])
    for host in hosts.hosts():
        up.add_metric([host.name], float(host.state != "lost"))
    latency = GaugeMetricFamily("link_latency_seconds", "From one host to another, one way, as measured.",
                                labels=["from", "to"])
    bandwidth = GaugeMetricFamily("link_bandwidth_bytes_per_second", "From one host to another, as measured (+Inf: "
                                  "without bound).", labels=["from", "to"])
    for way, link in sorted(hosts.links().items()):
        latency.add_metric(way, link.latency_s)
        bandwidth.add_metric(way, link.bandwidth)
    yield from (up, latency, bandwidth)
    for name, text, seconds in (
            ("planned_seconds_per_token", "What the plan promises one request alone.", hosts.planned_s),
            ("seen_seconds_per_token", "Mean time between a request's tokens lately, on this pipeline.", hosts.seen_s)):
        if seconds is not None:
            yield GaugeMetricFamily(name, text, seconds)


def _spans(stats: RequestStats) -> dict[str, float]:
    """What is observed of a request when it has ended, as far as it came."""
    found = {}
    if stats.admitted is not None:
        found["request_queue_time_seconds"] = stats.admitted - stats.started
        if stats.first_token is not None:
            found["request_prefill_time_seconds"] = stats.first_token - stats.admitted
    if stats.first_token is not None and stats.last_token is not None:
        found["request_decode_time_seconds"] = stats.last_token - stats.first_token
    if stats.num_emitted > 1:
        found["request_time_per_output_token_seconds"] = stats.tbt_s
    if stats.steps:
        found["request_steps_per_token"] = stats.steps_per_token
    return found


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _named(prefix: str, family: Metric, labels: dict[str, str]) -> Metric:
    """The same family with a prefix and more labels, without the times at which its counters were made."""
    named = Metric(prefix + family.name, family.documentation, family.type)
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            named.add_sample(prefix + sample.name, {**labels, **sample.labels}, sample.value)
    return named
