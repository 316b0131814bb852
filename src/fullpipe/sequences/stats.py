"""Counting what speculation did for one request. The metrics' meanings are fixed in DESIGN section 8."""

from __future__ import annotations

from dataclasses import dataclass

from fullpipe.messages import Leg


@dataclass(slots=True)
class RequestStats:
    """All times in seconds of the pipeline's clock.

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

    def on_emit(self, now: float, hit: bool, *, last: bool, altered: bool = False) -> None:
        """The last token counts as neither hit nor miss: nothing was to follow it."""
        if self.first_token is None:
            self.first_token = now
        self.last_token = now
        self.num_emitted += 1
        self.altered += altered
        if not last:
            self.hits += hit
            self.misses += not hit

    def on_leg(self, leg: Leg, alive: int) -> None:
        """A stage's stay of a flight; `alive` of its rows belong to this request and were alive at its end."""
        if leg.nodes and self.first_launch is not None:
            since = max(leg.start, self.first_launch)  # of a prompt's earlier chunks, only what came after
            self.alive_seconds += max(leg.end - since, 0.0) * alive / len(leg.nodes)

    def on_period(self, leg: Leg) -> None:
        """Stage 0's stay of a flight without prompt rows: one service period."""
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

    def speculation(self, method: str, num_stages: int, width: int) -> dict[str, object]:
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
