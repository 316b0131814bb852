"""These functions say how long stations take on a virtual clock. No torch."""

from __future__ import annotations

from typing import Protocol


class Costs(Protocol):
    """Says how long a station takes, in seconds of the virtual clock.

    station: "stage 0", ..., "draft". rows: those that were still wanted when it began. measured: seconds that
    the work took here. context: tokens in the longest path of the flight.
    """

    def __call__(self, station: str, rows: int, measured: float, context: int) -> float: ...


def unit_costs(station: str, rows: int, measured: float, context: int) -> float:
    """Every stage step and every draft call takes one second; a flight whose rows all died takes none."""
    return 1.0 if rows else 0.0


def measured_costs(station: str, rows: int, measured: float, context: int) -> float:
    """What the work took here, as if every station were a machine like this one."""
    return measured
