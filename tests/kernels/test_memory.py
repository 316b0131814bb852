"""Where weights lie: in memory that the system may give huge pages to."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullpipe.models.native.weights import _refusal, _region

SMAPS = Path("/proc/self/smaps")


@pytest.mark.skipif(not SMAPS.exists() or _refusal() is not None, reason="this system gives no huge pages")
def test_huge_pages_are_asked_for_and_no_setting_of_shared_memory_is_in_the_way() -> None:
    _memory, address = _region(1 << 20)
    flags: set[str] = set()
    inside = False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            flags = set(rest)
    assert "hg" in flags and "sh" not in flags
