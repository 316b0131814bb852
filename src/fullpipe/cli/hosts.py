"""Hosts are shown before anything is loaded on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fullpipe.cli import console

if TYPE_CHECKING:
    from fullpipe.cluster.report import HostReport, Problem


def print_hosts(reports: Sequence[HostReport], problems: Sequence[Problem], needed: Mapping[str, int]) -> None:
    """The table of all hosts, on standard error, and under it what is to be told and does not stop the start."""
    from fullpipe.cluster.host_table import host_table, problem_lines

    out = console.error_console()
    out.print(host_table(reports, problems, needed=needed, width=out.width if out.is_terminal else None))
    for line in problem_lines([problem for problem in problems if not problem.stops]):
        console.print_note(line)
