"""All hosts are shown in one table, a line for each and a column for each fact; what is a problem is marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from fullpipe.cluster.report import HostReport, Problem

if TYPE_CHECKING:
    from rich.table import Table

STOPS, TOLD = "✗", "!"
"""Marks of a cell: nothing may start because of it; it is told only."""

# What a problem may be about, and the heading of the column that shows it. Models have columns of their own.
_VERSIONS = ("fullpipe", "python", "torch", "ray")
_COLUMNS = ("host", "address", *_VERSIONS, "kernels", "cores", "devices", "memory", "disk")
_HEADINGS = {"memory": "FREE MEMORY", "disk": "FREE DISK"}


def host_table(reports: Sequence[HostReport], problems: Sequence[Problem]) -> Table:
    """For a terminal; in a narrow one cells take several lines. The head comes first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    rows = [dict(_cells(report)) for report in reports]
    facts = list(dict.fromkeys(fact for row in rows for fact in row))
    for fact in facts:
        right = fact in ("cores", "memory", "disk")
        table.add_column(_HEADINGS.get(fact, fact.upper() if fact in (*_COLUMNS, "reaches") else fact),
                         justify="right" if right else "left", overflow="fold")
    marks = _marks(problems)
    for report, row in zip(reports, rows):
        mark = {fact: marks.get((report.name, fact), "") for fact in facts}
        table.add_row(*(Text(f"{mark[fact]} {row.get(fact, '')}".strip(), style=_STYLES[mark[fact]]) for fact in facts))
    return table


_STYLES = {STOPS: "bold red", TOLD: "yellow", "": ""}


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """What stands under the table: each problem with its host and the way out."""
    return [f"{STOPS if one.stops else TOLD} {one.host}: {one.what}. {one.way_out}".rstrip() for one in problems]


def as_json(reports: Sequence[HostReport], problems: Sequence[Problem]) -> dict[str, Any]:
    """The same, for programs."""
    return {"hosts": msgspec.to_builtins(list(reports)), "problems": msgspec.to_builtins(list(problems))}


def _marks(problems: Sequence[Problem]) -> dict[tuple[str, str], str]:
    """By host and fact; what stops is stronger."""
    found: dict[tuple[str, str], str] = {}
    for one in sorted(problems, key=lambda one: one.stops):
        found[one.host, one.fact] = STOPS if one.stops else TOLD
    return found


def _cells(report: HostReport) -> Iterator[tuple[str, str]]:
    yield "host", report.name
    yield "address", report.address or "none"
    for name in _VERSIONS:
        yield name, report.versions.get(name) or "none"
    yield "kernels", report.kernels or "none"
    yield "cores", str(report.cores)
    yield "devices", "\n".join(f"{one.name} ({_short(one.title)})" for one in report.devices)
    yield "memory", "\n".join(_gib(one.free) for one in report.devices)
    yield "disk", _gib(report.free_disk)
    for model in report.models:
        yield model.name, f"{_gib(model.size)}, {(model.sha256 or '')[:12]}" if model.path else "from the head"
    if report.reaches:
        unreached = [name for name, reason in report.reaches.items() if reason]
        yield "reaches", f"not {', '.join(unreached)}" if unreached else "all"


def _short(title: str) -> str:
    """The name of a processor without what says nothing."""
    for noise in ("(R)", "(TM)", " CPU", " Processor", "NVIDIA "):
        title = title.replace(noise, "")
    return " ".join(title.split())


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.1f} GiB"
