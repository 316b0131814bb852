"""The table of all hosts, for people and for programs."""

from __future__ import annotations

import io
import json
from typing import Any

from host_reports import GIB, MODEL, OTHER_HASH, host
from rich.console import Console

from fullpipe.cluster.checks import Needs, compare
from fullpipe.cluster.host_table import as_json, host_table, problem_lines
from fullpipe.cluster.report import Device, HostReport, ModelSeen, Problem

HEAD = host(reaches={"beta": None})


def shown(reports: list[HostReport], problems: list[Problem], width: int = 240, **options: Any) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(host_table(reports, problems, width=width, **options))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_line_for_each_host_and_a_column_for_each_fact() -> None:
    heading, alpha, beta = shown([HEAD, host("beta", models=[ModelSeen(MODEL)])], [])
    assert heading.split("  ")[0] == "HOST" and MODEL in heading
    for fact in ("ADDRESS", "FULLPIPE", "PYTHON", "TORCH", "RAY", "KERNELS", "CORES", "DEVICES", "FREE MEMORY",
                 "FREE DISK", "REACHES"):
        assert fact in heading
    assert alpha.split() == ["alpha", "10.0.0.1", "0.1.0", "3.11.7", "2.9.0+cpu", "2.60.0", "avx512", "8", "cpu",
                             "(AMD", "EPYC)", "16.0", "GiB", "100.0", "GiB", "0.1", "GiB,", "abababababab", "all"]
    assert beta.startswith("beta") and beta.endswith("from the head")


def test_problems_are_marked_where_they_are() -> None:
    beta = host("beta", kernels=None, models=[ModelSeen(MODEL, "/m", GIB, OTHER_HASH)], reaches={"alpha": "silent"},
                versions=HEAD.versions | {"torch": "2.8.0", "ray": None})
    problems = compare(HEAD, [beta], Needs())
    _, alpha, line = shown([HEAD, beta], problems)
    assert "✗" not in alpha and "!" not in alpha
    for cell in ("! 2.8.0", "✗ none", "✗ 1.0 GiB, cdcdcdcdcdcd", "✗ not alpha"):
        assert cell in line
    assert line.count("✗") == 4 and line.count("✗ none") == 2
    told = problem_lines(problems)
    assert len(told) == len(problems) == 5 and told[0].startswith("✗ beta: its native kernels are not built")
    assert sum(one.startswith("! beta: it has torch 2.8.0") for one in told) == 1


def test_in_a_narrow_terminal_hosts_stand_side_by_side() -> None:
    lines = shown([HEAD, host("beta"), host("gamma")], [], width=80)
    assert lines[0].split() == ["HOST", "alpha", "beta", "gamma"]
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("RAY")).split() == ["RAY", *["2.60.0"] * 3]


def test_what_is_needed_stands_beside_what_is_free() -> None:
    lines = shown([host(devices=[Device("cpu", "x", GIB), Device("cuda:0", "NVIDIA H100", 80 * GIB)])], [],
                  needed={"alpha": GIB // 2})
    assert "cpu (x)" in lines[1] and " 1.0 GiB" in lines[1]
    assert "cuda:0 (H100)" in lines[2] and "80.0 GiB" in lines[2]
    assert "of which 0.5 GiB are needed" in lines[3]


def test_programs_get_the_same() -> None:
    problems = [Problem("beta", "x", "y", "ray", False)]
    found = json.loads(json.dumps(as_json([HEAD, host("beta")], problems)))
    assert [one["name"] for one in found["hosts"]] == ["alpha", "beta"]
    assert found["hosts"][0]["models"][0]["name"] == MODEL and found["hosts"][0]["reaches"] == {"beta": None}
    assert found["problems"] == [{"host": "beta", "what": "x", "way_out": "y", "fact": "ray", "stops": False}]


def test_what_a_host_is_called_is_never_taken_for_markup() -> None:
    assert "[red]" in shown([host("[red]")], [])[1]
