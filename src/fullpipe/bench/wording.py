"""How the report writes numbers, settings and clusters. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from fullpipe.bench.document import Cell, Grid
from fullpipe.bench.metrics import Estimate
from fullpipe.bench.receipt import Candidate, ClusterInfo, Sample

OURS = "fullpipe"

LABELS = {
    "modelled": "modelled: its device times come from arithmetic, not from a machine",
    "measured": "measured: its device times were taken from a machine",
    "unit": "unit costs: every step of a stage and every draft call takes one unit of time, whatever its rows",
}
_IMAGINED = {
    "modelled": "virtual time (modelled devices: imagined time, real tokens)",
    "measured": "virtual time (devices as measured)",
    "unit": "virtual time (unit costs)",
}


def where(clock: Literal["virtual", "wall"], cluster: ClusterInfo) -> str:
    """What every caption says of its times."""
    return _IMAGINED[cluster.label] if clock == "virtual" else f"wall clock (devices {cluster.label})"


def unit_of(cluster: ClusterInfo, typical: float) -> tuple[str, float]:
    """The unit that times of this size are given in, and how many of it are a second (a unit, with unit costs)."""
    if cluster.label == "unit":
        return "units", 1.0
    return ("s", 1.0) if typical >= 10 else ("ms", 1e3) if typical >= 1e-3 else ("µs", 1e6)


def setting(one: Sample | Candidate) -> str:
    """What was given to the method: "width 8, floor 0.001, ngram"."""
    parts = [f"{name} {value:g}" for name in ("width", "depth", "floor")
             if (value := getattr(one, name)) is not None]
    return ", ".join([*parts, one.draft] if one.draft else parts) or "-"


def number(value: float, style: str = "d") -> Cell:
    return Cell(format(value, style), value=value)


def percent(share: float) -> Cell:
    return Cell(f"{100 * share:.1f}%", value=share)


def interval(one: Estimate) -> str:
    return f"{one.low:.2f}-{one.high:.2f}"


def speedup_cell(one: Estimate) -> Cell:
    return Cell(f"{one.value:.2f}x", interval(one) if one.low is not None else "", one.value)


def many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def free_grid(caption: str, rows: Sequence[dict[str, Any]]) -> Grid:
    """A table of rows whose columns their maker chose; a row may lack some."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Grid(caption, columns, [[_free(row.get(name)) for name in columns] for row in rows])


def _free(value: Any) -> Cell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(show(value), value=value if is_number else None)


def show(value: Any) -> str:
    """Any value of a receipt, for people."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case str() | int():
            return str(value)
        case list() if all(isinstance(one, str | int | float) for one in value):
            return ", ".join(show(one) for one in value)
        case _:
            return json.dumps(value, ensure_ascii=False)
