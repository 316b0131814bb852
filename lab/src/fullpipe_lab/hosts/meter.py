"""When tokens came and when stages computed, of one answer at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fullpipe.events import Emitted
from fullpipe.messages import Event, Landed, Leg

Stay = tuple[float, float]
"""From when until when."""


class Meter:
    """Listens to an engine that answers one request."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """The question is asked now."""
        self._begun = time.perf_counter()
        self.times: list[float] = []
        self._emitted: list[float] = []
        self._legs: list[Leg] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Emitted():
                self.times.append(time.perf_counter() - self._begun)
                self._emitted.append(event.time)
            case Landed():
                self._legs += event.legs

    def told(self) -> dict[str, Any]:
        """Shares of the time between the first and the last token."""
        if len(self._emitted) < 2:
            return {"overlap": 0.0, "busy": {}}
        window = self._emitted[0], self._emitted[-1]
        stays = stays_within(self._legs, window)
        whole = window[1] - window[0]
        return {"overlap": together(stays.values()) / whole,
                "busy": {station: sum(end - start for start, end in found) / whole for station, found in stays.items()}}


def stays_within(legs: Iterable[Leg], window: Stay) -> dict[str, list[Stay]]:
    """Of each stage, as far as they lie in the window."""
    found: dict[str, list[Stay]] = {}
    for leg in legs:
        start, end = max(leg.start, window[0]), min(leg.end, window[1])
        if leg.station.startswith("stage") and end > start:
            found.setdefault(leg.station, []).append((start, end))
    return found


def together(stays: Iterable[Sequence[Stay]]) -> float:
    """For how long two or more stages computed. A stage is at one flight at a time."""
    turns = sorted(itertools.chain.from_iterable(((start, 1), (end, -1)) for found in stays for start, end in found))
    total, running = 0.0, 0
    for (at, change), (then, _) in itertools.pairwise(turns):
        running += change
        total += (then - at) * (running > 1)
    return total


def mean_share(answers: Iterable[tuple[Mapping[str, Any], float]], name: str) -> float:
    """A share over several answers, each weighted with its seconds."""
    found = [(told[name] * seconds, seconds) for told, seconds in answers]
    whole = sum(seconds for _, seconds in found)
    return sum(part for part, _ in found) / whole if whole else 0.0
