"""Tests on several hosts take turns, so that those of two pytest processes leave each other's timing alone.

They hold a lock, a module at a time. (Groups of pytest-xdist 3.8 would do, but pytest 9.2 knows nothing of them.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from fullpipe.cluster.netlab import available
from fullpipe_lab.hosts import ray_nodes

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what makes hosts."""
    for item in items:
        if item.path.is_relative_to(HERE) and "hosts_can_be_made" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.hosts)


@pytest.fixture(scope="module")
def hosts_can_be_made() -> Iterator[None]:
    """Skip where no host can be made; hold the one lock for tests that make any."""
    if (reason := available()) is not None:
        pytest.skip(f"no hosts here: {reason}")
    with FileLock(Path(tempfile.gettempdir()) / "fullpipe-hosts.lock"):
        yield


@pytest.fixture(scope="module")
def ray_can_be_started(hosts_can_be_made: None) -> None:
    """Skip where Ray is missing."""
    if (reason := ray_nodes.missing()) is not None:
        pytest.skip(f"no Ray here: {reason}")
