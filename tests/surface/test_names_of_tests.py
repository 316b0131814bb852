"""pytest imports test files by their base names, so two of one name stop the collection of both."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_two_test_files_share_a_name() -> None:
    named = Counter(file.name for file in TESTS.rglob("test_*.py"))
    assert [name for name, times in named.items() if times > 1] == []
