"""Cores, how compute threads wait for each other, and work that no signal tears. The second must act before torch is
imported, so nothing of it is imported here."""

from __future__ import annotations

import _thread
import os
import queue
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

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


def beside(work: Callable[[], T], *, stop: Callable[[], None], meanwhile: Callable[[], None] = lambda: None,
           every_s: float = 0.2) -> T:
    """Do `work` in a thread of its own, and wait for it in this one, with `meanwhile` now and then.

    Signals arrive as exceptions in the main thread alone, and there between any two calls: within `Popen` one loses
    the process that was just started, within `wait` it leaves a lock taken. So what must not be torn is done beside.
    When something is raised here, `stop` is called and the end of `work` waited for.

    What passes between the threads is a list and a bell that are made in C: they are not torn either.
    """
    outcome: list[tuple[T, None] | tuple[None, BaseException]] = []
    bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def do() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))
        bell.put(None)

    begun = False
    try:
        begun = True  # no signal comes between here and the end of the next call
        try:
            _thread.start_new_thread(do, ())
        except RuntimeError:  # the system gives no more threads
            begun = False
            raise
        while not outcome:
            if not _rung(bell, every_s):
                meanwhile()
    except BaseException:
        stop()
        while begun and not outcome:
            _rung(bell, every_s)
        raise
    value, error = outcome.pop()
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # the first kind of outcome


def _rung(bell: queue.SimpleQueue[None], within_s: float) -> bool:
    try:
        bell.get(timeout=within_s)
    except queue.Empty:
        return False
    return True
