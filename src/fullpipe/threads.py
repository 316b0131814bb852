"""Cores, and how compute threads wait for each other. The latter must act before torch is imported, so nothing of it
is imported here."""

from __future__ import annotations

import os
import sys

_SPINS = "2000"


def share_the_machine() -> None:
    """Let idle OpenMP threads sleep soon instead of spinning, unless the user has said otherwise.

    GNU OpenMP spins for milliseconds by default. With as many threads as cores and all cores busy, every
    parallel region then waits for the scheduler, and steps take up to ten times as long. Sleeping costs
    about a tenth on an idle machine (docs/log has both figures). Without effect once torch is loaded.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def cores() -> int:
    """How many cores this process may use; where the system does not say, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
