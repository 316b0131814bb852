"""How much a newcomer must open to follow a prompt token: the table in docs/life-of-a-token.md, added up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs" / "life-of-a-token.md"
ROW = re.compile(r"\| `([\w/]+\.py)` \|[^|]+\|\s*(x?)\s*\|\s*(x?)\s*\|")
MOST_LINES = {"in process": 1800, "workers": 2600}  # the goals: 1,500 and 2,200
MOST_FILES = {"in process": 12, "workers": 16}


def passed(way: str) -> list[Path]:
    """The files that a prompt token passes on this way."""
    column = list(MOST_LINES).index(way) + 2
    return [ROOT / "src" / "fullpipe" / row[1] for row in ROW.finditer(TOUR.read_text(encoding="utf-8")) if row[column]]


@pytest.mark.parametrize("way", MOST_LINES)
def test_a_newcomer_need_not_read_more(way: str) -> None:
    lines = {"/".join(file.parts[-2:]): len(file.read_text(encoding="utf-8").splitlines()) for file in passed(way)}
    assert 8 <= len(lines) <= MOST_FILES[way]
    assert sum(lines.values()) <= MOST_LINES[way], f"{sum(lines.values())} lines: {lines}"


def test_the_ways_part_at_the_pipeline_alone() -> None:
    only = {file.parent.name for way in MOST_LINES for file in {*passed(way)}} - {
        file.parent.name for file in {*passed("in process")} & {*passed("workers")}}
    assert only == {"pipeline"}
