"""Inside a station sits something that takes a flight and gives back what the next one needs.

The in-process pipeline calls these objects directly; a worker process hosts exactly one. Both drive the same code.
No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from msgspec.structs import replace

from fullpipe.messages import Expansion, Flight, Tap


class StageLike(Protocol):
    """Computes one slice of the model.

    `run` takes the flight (cancelled rows already dropped) and, except at the first stage, the previous
    stage's output: one hidden-state row per flight row, in order of parts, [rows, hidden]. It returns the
    same kind of thing, or at the last stage a `Landed` with time 0 and no legs. It gets to know the requests of
    `flight.opens` first, and forgets those of `flight.closes` last.

    A station that has cache memory says by an attribute `cache_slots` for how many slots (see `cache_slots`).
    """

    def run(self, flight: Flight, hidden: Any) -> Any: ...


class DraftLike(Protocol):
    """Proposes: answers each row of the job that has `wants` with an `Expansion`."""

    def run(self, job: Flight) -> list[Expansion]: ...


class Tapped:
    """Is what a stage's `run` returns that is to send hidden states to the draft station: its result, and with it
    `layers` and `features` as in `messages.Tap`."""

    __slots__ = ("features", "layers", "result")

    def __init__(self, result: Any, layers: list[int], features: Any) -> None:
        self.result, self.layers, self.features = result, layers, features


class TapReader(Protocol):
    """Proposes by hidden states that it reads out of the stages.

    The pipeline calls `take` for every tap that arrives, from one stage in the order of its flights, never while
    `run` is at work. Before it starts a job it asks `ready`; while the answer is no the job waits, and is asked for
    again after every tap and every cancel. `forget` names nodes that were cancelled: their taps may never come. Rows of
    theirs have been taken out of the jobs that wait.

    A request's taps may come before the job that opens it and after the one that closes it. From each stage the first
    has a flight that `opens` it, and the last one that `closes` it, even where such a flight has no rows.

    A draft that holds others may say by an attribute `reads_taps` whether it reads taps; without one every draft that
    has a `take` does.
    """

    def run(self, job: Flight) -> list[Expansion]: ...

    def take(self, tap: Tap) -> None: ...

    def ready(self, job: Flight) -> bool: ...

    def forget(self, nodes: list[int]) -> None: ...


def cache_slots(station: StageLike | DraftLike) -> int | None:
    """How many slots a station has room for; None: for as many as anybody names."""
    return getattr(station, "cache_slots", None)


def least_slots(stations: Iterable[StageLike | DraftLike | None]) -> int | None:
    """How many slots each of some stations has room for. None among them counts as none."""
    return least(cache_slots(station) for station in stations if station is not None)


def least(counts: Iterable[int | None]) -> int | None:
    """The least number of those that are one."""
    return min((count for count in counts if count is not None), default=None)


@dataclass(slots=True)
class TapCount:
    """Counts what has reached the draft station: messages, and their bytes on the link."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        self.count += 1
        self.bytes += size


def tap_reader(draft: DraftLike | None) -> TapReader | None:
    """The draft, if it reads taps (see `TapReader`)."""
    return cast(TapReader, draft) if getattr(draft, "reads_taps", hasattr(draft, "take")) else None


def untapped(flight: Flight, result: Any) -> tuple[Any, Tap | None]:
    """What a stage's `run` returned, without its tap, and the tap to send: none where the stage does not tap, and none
    for a flight without rows that neither opens nor closes a request."""
    if not isinstance(result, Tapped):
        return result, None
    tells = flight.num_rows or flight.opens or flight.closes
    return result.result, Tap(flight, result.layers, result.features) if tells else None


def drop_rows(flight: Flight, hidden: Any, dead: set[int]) -> tuple[Flight, Any]:
    """The flight without the rows of `dead` nodes, and the hidden rows [rows, hidden] that go with it."""
    if dead.isdisjoint(flight.nodes):
        return flight, hidden
    parts, kept, start = [], [], 0
    for part in flight.parts:
        rows = [i for i, node in enumerate(part.nodes) if node not in dead]
        parts.append(part.keep(rows))
        kept += [start + i for i in rows]
        start += len(part)
    alive = replace(flight, parts=parts)
    return alive, hidden if hidden is None else hidden[kept]
