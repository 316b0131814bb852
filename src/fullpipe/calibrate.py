"""Measuring what rows cost, on the very stations that will serve."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fullpipe.batching.costs import KNOTS, CostCurve
from fullpipe.engine import Engine

_REPEATS = 3
_LEAST_S = 1e-7  # a station that takes no time at all still takes some


def cost_curves(engine: Engine, knots: Sequence[int] = KNOTS[:7], *,
                draft: bool = True) -> tuple[CostCurve, CostCurve | None]:
    """Seconds of the slowest stage by rows of a flight, and of the draft by rows of a job (None without one).

    draft: measure it too; not to be asked of one that reads taps, whose jobs are of other kinds. The stations must be
    idle. Each number of rows is sent a few times, the median counts; the first of all, which pays
    for what is made once, is sent one time more and not counted.
    """
    engine.probe(knots[0], draft)
    stages: dict[str, dict[int, float]] = {}
    guesses: dict[int, float] = {}
    for rows in knots:
        spans: dict[str, list[float]] = {}
        for _ in range(_REPEATS):
            legs, drafted = engine.probe(rows, draft)
            for leg in [*legs, *([drafted] if drafted else [])]:
                spans.setdefault(leg.station, []).append(leg.end - leg.start)
        for station, seconds in spans.items():
            curve = guesses if station == "draft" else stages.setdefault(station, {})
            curve[rows] = max(median(seconds), _LEAST_S)
    return CostCurve.slowest(CostCurve(points) for points in stages.values()), CostCurve(guesses) if guesses else None
