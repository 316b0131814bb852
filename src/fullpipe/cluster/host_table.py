"""All hosts are shown in one table, with every fact that decides whether they can take part; problems are marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from fullpipe.cluster.report import HostReport, Problem

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

STOPS, TOLD = "✗", "!"
"""Marks of a cell: nothing may start because of it; it is told only."""

_STYLES = {STOPS: "bold red", TOLD: "yellow", "": ""}
_GAP = 2  # between columns

# What a problem may be about. Models are facts too, whose heading is their name as it was given.
_VERSIONS = ("fullpipe", "python", "torch", "ray")
_FACTS = ("host", "address", *_VERSIONS, "kernels", "cores", "devices", "memory", "disk", "reaches")
_HEADINGS = {fact: fact.upper() for fact in _FACTS} | {"memory": "FREE MEMORY", "disk": "FREE DISK"}


def host_table(reports: Sequence[HostReport], problems: Sequence[Problem], *, needed: Mapping[str, int] | None = None,
               width: int | None = None) -> Table:
    """The head's line comes first. needed: bytes of memory by host (`Needs.memory`), told beside what is free.
    width: of the terminal; where the lines are longer, hosts stand side by side, a line for each fact. None: any."""
    from rich.table import Table

    grid = _grid(reports, problems, needed or {})
    if width is not None and sum(max(map(_longest, column)) + _GAP for column in zip(*grid)) - _GAP > width:
        grid = [list(line) for line in zip(*grid)]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for heading in grid[0]:
        table.add_column(heading, overflow="fold")
    for line in grid[1:]:
        table.add_row(*line)
    return table


def _grid(reports: Sequence[HostReport], problems: Sequence[Problem], needed: Mapping[str, int]) -> list[list[Text]]:
    """Headings, and a line for each host."""
    from rich.text import Text

    rows, marks = [dict(_cells(report, needed.get(report.name))) for report in reports], _marks(problems)
    facts = list(dict.fromkeys(fact for row in rows for fact in row))
    grid = [[Text(_HEADINGS.get(fact, fact), style="bold") for fact in facts]]
    for report, row in zip(reports, rows):
        mark = {fact: marks.get((report.name, fact), "") for fact in facts}
        grid.append([Text(f"{mark[fact]} {row.get(fact, '')}".strip(), style=_STYLES[mark[fact]]) for fact in facts])
    return grid


def _longest(cell: Text) -> int:
    return max(map(len, cell.plain.split("\n")))


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


def _cells(report: HostReport, needed: int | None) -> Iterator[tuple[str, str]]:
    yield "host", report.name
    yield "address", report.address or "none"
    for name in _VERSIONS:
        yield name, report.versions.get(name) or "none"
    yield "kernels", report.kernels or "none"
    yield "cores", str(report.cores)
    yield "devices", "\n".join(f"{one.name} ({_short(one.title)})" for one in report.devices)
    free = [_gib(one.free) for one in report.devices]
    yield "memory", "\n".join(free if needed is None else [*free, f"of which {_gib(needed)} are needed"])
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
