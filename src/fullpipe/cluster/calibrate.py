"""`measure_machine` measures what rows cost, on the very stations that will serve, before an engine drives them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from fullpipe.costs import KNOTS, CostCurve, Machine
from fullpipe.errors import StationFailed
from fullpipe.messages import ArenaId, Drafted, Event, Failed, Flight, Landed, Leg, Opening, Part, Ready
from fullpipe.options import EngineOptions
from fullpipe.pipeline.base import Pipeline
from fullpipe.request import SamplingParams

_ROUNDS = 5
_LEAST_S = 1e-7  # a station that takes no time at all still takes some
_ARENA = ArenaId(-1)  # none of an engine's
_FANOUT = EngineOptions().fanout


def measure_machine(pipeline: Pipeline, knots: Sequence[int] = KNOTS[:7], *, draft: bool = True) -> Machine:
    """Measure seconds of every stage by rows of a flight, and of the draft by rows of a job; the rest of the machine is
    what the pipeline says of itself.

    knots: rows to measure. draft: measure it too, if there is one; not to be asked of one that reads taps, whose jobs
    are of other kinds. The stations must be idle and not have been used. All numbers of rows take their turn in each of
    a few rounds, and the least counts: what disturbs a machine only ever adds, and a spell of it must not pass for the
    cost of few rows, or many would seem to cost nothing more.

    Raises StationFailed when a station is gone.
    """
    draft = draft and pipeline.has_draft
    probe = _Probe(pipeline, draft)
    probe.send(knots[0])  # pays for what is made once
    stages: dict[str, dict[int, float]] = defaultdict(dict)  # in the order of the legs, which is that of the stages
    guesses: dict[int, float] = {}
    for _ in range(_ROUNDS):
        for rows in knots:
            legs, drafted = probe.send(rows)
            for leg in legs:
                _note(stages[leg.station], rows, leg)
            if drafted:
                _note(guesses, rows, drafted)
    return replace(pipeline.machine(), stages=[CostCurve(points) for points in stages.values()],
                   draft=CostCurve(guesses) if guesses else None)


class _Probe:
    """Sends rows of no meaning through a pipeline that nobody else uses, and hands it on empty (see `Pipeline`)."""

    def __init__(self, pipeline: Pipeline, draft: bool) -> None:
        self._pipeline, self._draft = pipeline, draft
        while not any(isinstance(event, Ready) for event in self._events()):
            pass

    def send(self, rows: int) -> tuple[list[Leg], Leg | None]:
        """Wait for one flight of so many rows, and one draft job; how long each stage took, and the draft."""
        self._pipeline.launch(_flight(rows, self._pipeline.newest_flight + 1))
        if self._draft:
            self._pipeline.draft(_flight(rows, self._pipeline.newest_job + 1))
        legs: list[Leg] = []
        drafted: Leg | None = None
        missing = {Ready, Landed} | ({Drafted} if self._draft else set())
        while missing:
            for event in self._events():
                missing.discard(type(event))
                if isinstance(event, Landed):
                    legs = event.legs
                elif isinstance(event, Drafted):
                    drafted = event.leg
        return legs, drafted

    def _events(self) -> list[Event]:
        events = self._pipeline.events()
        for event in events:
            if isinstance(event, Failed):
                raise StationFailed(event.station, event.reason, hint=event.hint)
        return events


def _flight(rows: int, id: int) -> Flight:
    """A flight, or job, of a request that begins and ends with it."""
    nodes = list(range(rows))
    part = Part(_ARENA, nodes, nodes, [0] * rows, nodes, nodes, [[]] * rows, [True] * rows)
    return Flight(id, [part], [Opening(_ARENA, rows, SamplingParams(), drafts=False)], [_ARENA], _FANOUT)


def _note(points: dict[int, float], rows: int, leg: Leg) -> None:
    points[rows] = max(min(leg.end - leg.start, points.get(rows, math.inf)), _LEAST_S)
