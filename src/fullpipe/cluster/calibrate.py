"""Measuring what rows cost, on the very stations that will serve."""

from __future__ import annotations

from collections.abc import Sequence

from fullpipe.costs import KNOTS, CostCurve
from fullpipe.engine.loop import Engine

_ROUNDS = 5
_LEAST_S = 1e-7  # a station that takes no time at all still takes some


def cost_curves(engine: Engine, knots: Sequence[int] = KNOTS[:7], *,
                draft: bool = True) -> tuple[CostCurve, CostCurve | None]:
    """Seconds of the slowest stage by rows of a flight, and of the draft by rows of a job (None without one).

    draft: measure it too; not to be asked of one that reads taps, whose jobs are of other kinds. The stations must be
    idle. All numbers of rows take their turn in each of a few rounds, and the least counts: what disturbs a machine
    only ever adds, and a spell of it must not pass for the cost of few rows, or many would seem to cost nothing more.
    """
    engine.probe(knots[0], draft)  # pays for what is made once
    stages: dict[str, dict[int, float]] = {}
    guesses: dict[int, float] = {}
    for _ in range(_ROUNDS):
        for rows in knots:
            legs, drafted = engine.probe(rows, draft)
            for leg in legs:
                _note(stages.setdefault(leg.station, {}), rows, leg.end - leg.start)
            if drafted:
                _note(guesses, rows, drafted.end - drafted.start)
    return CostCurve.slowest(CostCurve(points) for points in stages.values()), CostCurve(guesses) if guesses else None


def _note(points: dict[int, float], rows: int, seconds: float) -> None:
    points[rows] = max(min(seconds, points.get(rows, seconds)), _LEAST_S)
