"""Counting what happens, once, for everybody: tests, metrics, pages, replays and reports read these figures.

`Stats` is the engine's first listener. The figures' meanings are fixed in DESIGN section 8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fullpipe.events import Admitted, Asked, Attached, Died, Emitted, Finished, Launched, Preempted, Submitted
from fullpipe.messages import Event, Landed, Leg


@dataclass(slots=True)
class RequestStats:
    """What speculation did for one request. All times in seconds of the pipeline's clock.

    admitted: when it first got memory on the stations and waited no longer.
    alive_seconds: time that stages spent, since the first launch, on rows of this request that were alive
    when the stage was done with them. Flights that had not landed when the request ended are not counted.
    altered: emitted tokens in whose place the target would have said another one (lossy requests only).
    """

    started: float
    admitted: float | None = None
    first_launch: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_emitted: int = 0
    hits: int = 0
    misses: int = 0
    altered: int = 0
    launched_rows: int = 0
    draft_rows: int = 0
    draft_calls: int = 0
    alive_seconds: float = 0.0
    period_seconds: float = 0.0
    num_periods: int = 0

    def on_launch(self, now: float, rows: int) -> None:
        if self.first_launch is None:
            self.first_launch = now
        self.launched_rows += rows

    def on_emit(self, event: Emitted) -> None:
        if self.first_token is None:
            self.first_token = event.time
        self.last_token = event.time
        self.num_emitted += 1
        self.altered += event.altered
        self.hits += event.fate == "hit"
        self.misses += event.fate == "miss"

    def on_leg(self, leg: Leg, alive: int) -> None:
        """Count a stage's stay of a flight; `alive` of its rows belong to this request and were alive at its end."""
        if leg.nodes and self.first_launch is not None:
            since = max(leg.start, self.first_launch)  # of a prompt's earlier chunks, only what came after
            self.alive_seconds += max(leg.end - since, 0.0) * alive / len(leg.nodes)

    def on_period(self, leg: Leg) -> None:
        """Count stage 0's stay of a flight without prompt rows: one service period."""
        if leg.nodes:
            self.period_seconds += leg.end - leg.start
            self.num_periods += 1

    # ---- the metrics -----------------------------------------------------------------------------------

    @property
    def decode_seconds(self) -> float:
        """From the launch of the flight that carried the last prompt token to the last token."""
        if self.first_launch is None or self.last_token is None:
            return 0.0
        return self.last_token - self.first_launch

    @property
    def steps(self) -> float:
        """Decode time in service periods of stage 0 (0 when no period was seen)."""
        if not self.period_seconds:
            return 0.0
        return self.decode_seconds * self.num_periods / self.period_seconds

    @property
    def steps_per_token(self) -> float:
        return self.steps / self.num_emitted if self.num_emitted else 0.0

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses), over all emitted tokens but the last."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted drafts per verification; a verification ends with a miss."""
        return 1 + self.hits / max(self.misses, 1) if self.num_emitted else 0.0

    @property
    def wasted_rows(self) -> int:
        """Launched rows that carried no committed token."""
        return max(self.launched_rows - self.num_emitted, 0)

    def fill(self, num_stages: int) -> float:
        """Share of the stages' time, from first launch to last token, spent on rows that were alive."""
        total = num_stages * self.decode_seconds
        return min(self.alive_seconds / total, 1.0) if total else 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token - self.started if self.first_token is not None else 0.0

    @property
    def tbt_s(self) -> float:
        """Mean time between tokens."""
        if self.first_token is None or self.last_token is None or self.num_emitted < 2:
            return 0.0
        return (self.last_token - self.first_token) / (self.num_emitted - 1)

    def speculation(self, method: str, num_stages: int, width: int | None) -> dict[str, object]:
        """The `speculation` block of `fullpipe generate --json`."""
        return {
            "method": method,
            "stages": num_stages,
            "width": width,
            "steps": round(self.steps, 3),
            "steps_per_token": round(self.steps_per_token, 4),
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": round(self.hit_rate, 4),
            "mean_acceptance_length": round(self.mean_acceptance_length, 4),
            "altered_tokens": self.altered,
            "launched_rows": self.launched_rows,
            "wasted_rows": self.wasted_rows,
            "fill": round(self.fill(num_stages), 4),
            "draft_calls": self.draft_calls,
            "draft_rows": self.draft_rows,
        }


@dataclass(slots=True)
class Totals:
    """Of all requests since the engine began, those that run included. preemptions: how often one went back to
    waiting."""

    emitted: int = 0
    hits: int = 0
    misses: int = 0
    altered: int = 0
    launched_rows: int = 0
    prompt_rows: int = 0
    draft_rows: int = 0
    draft_calls: int = 0
    finished: int = 0
    preemptions: int = 0

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); 0 before the first of either."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """1 + hits per verification, each of which ends with a miss; 0 before the first hit or miss."""
        return 1 + self.hits / max(self.misses, 1) if self.hits + self.misses else 0.0


@dataclass(slots=True)
class _Flight:
    """Rows of a flight that is under way: whose each node is, and prompt rows by request."""

    owners: dict[int, int]
    prompt_rows: dict[int, int]

    @property
    def requests(self) -> set[int]:
        return {*self.owners.values(), *self.prompt_rows}


@dataclass(slots=True)
class Stats:
    """Takes every event of an engine. `of` a request that has finished is forgotten here once that was told; whoever
    asked before keeps the object."""

    totals: Totals = field(default_factory=Totals)
    _requests: dict[int, RequestStats] = field(default_factory=dict)
    _flights: dict[int, _Flight] = field(default_factory=dict)
    _flying: set[int] = field(default_factory=set)  # nodes
    _died: dict[int, float] = field(default_factory=dict)  # of nodes that fly: when

    def of(self, request: int) -> RequestStats:
        """The figures of a request that waits or runs; they go on growing. Raises KeyError for others."""
        return self._requests[request]

    def forget(self, request: int) -> None:
        """The request is over, and everybody has been told."""
        self._requests.pop(request, None)

    def __call__(self, event: Event) -> None:
        if handle := _HANDLERS.get(type(event)):
            handle(self, event)

    def _on_launched(self, event: Launched) -> None:
        self._flights[event.flight] = _Flight(dict(zip(event.nodes, event.requests)), event.prompt_rows)
        self._flying.update(event.nodes)
        self.totals.launched_rows += len(event.nodes)
        self.totals.prompt_rows += sum(event.prompt_rows.values())
        for request in set(event.requests):
            self._requests[request].on_launch(event.time, event.requests.count(request))

    def _on_landed(self, event: Landed) -> None:
        """Count whose rows were alive at each stage. A row that was dropped before a stage is not in its leg."""
        if (flight := self._flights.pop(event.flight, None)) is None:
            return
        requests = [stats for request in flight.requests if (stats := self._requests.get(request))]
        if not flight.prompt_rows:
            for stats in requests:
                stats.on_period(event.legs[0])
        dead = {node: self._died.pop(node) for node in self._died.keys() & flight.owners.keys()}
        died, is_one = dead.get, len(flight.requests) == 1
        for leg in event.legs:
            end = leg.end
            gone = [node for node in leg.nodes if died(node, end) < end] if dead else []
            if is_one:
                for stats in requests:
                    stats.on_leg(leg, len(leg.nodes) - len(gone))
            else:
                self._share_leg(flight, leg, set(leg.nodes).difference(gone))
        self._flying.difference_update(flight.owners)

    def _share_leg(self, flight: _Flight, leg: Leg, alive: set[int]) -> None:
        """The same for a flight of several requests; prompt rows never die."""
        rows = Counter(owner for node, owner in flight.owners.items() if node in alive)
        rows.update(flight.prompt_rows)
        for request in flight.requests:
            if stats := self._requests.get(request):
                stats.on_leg(leg, rows[request])

    def _on_emitted(self, event: Emitted) -> None:
        self._requests[event.request].on_emit(event)
        self.totals.emitted += 1
        self.totals.altered += event.altered
        self.totals.hits += event.fate == "hit"
        self.totals.misses += event.fate == "miss"

    def _on_died(self, event: Died) -> None:
        if flying := self._flying.intersection(event.nodes):
            self._died |= dict.fromkeys(flying, event.time)

    def _on_submitted(self, event: Submitted) -> None:
        self._requests[event.request] = RequestStats(started=event.arrived)

    def _on_admitted(self, event: Admitted) -> None:
        stats = self._requests[event.request]
        stats.admitted = event.time if stats.admitted is None else stats.admitted

    def _on_preempted(self, event: Preempted) -> None:
        self.totals.preemptions += 1

    def _on_finished(self, event: Finished) -> None:
        self.totals.finished += 1

    def _on_attached(self, event: Attached) -> None:
        self._flights.clear()
        self._flying.clear()
        self._died.clear()

    def _on_asked(self, event: Asked) -> None:
        for request, rows in event.rows.items():
            stats = self._requests[request]
            stats.draft_calls += 1
            stats.draft_rows += rows
        self.totals.draft_calls += bool(event.rows)
        self.totals.draft_rows += sum(event.rows.values())


_HANDLERS: dict[type[Event], Callable[[Stats, Any], None]] = {
    Submitted: Stats._on_submitted, Admitted: Stats._on_admitted, Preempted: Stats._on_preempted,
    Attached: Stats._on_attached, Launched: Stats._on_launched, Asked: Stats._on_asked, Landed: Stats._on_landed,
    Emitted: Stats._on_emitted, Died: Stats._on_died, Finished: Stats._on_finished,
}
