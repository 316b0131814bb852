"""A signal ends a command, whatever the command is doing at that moment.

SIGINT and SIGTERM arrive as exceptions in the main thread, so that on the way out processes are stopped and temporary
files removed. But Python drops an exception that comes up where nobody can be told: in a `__del__`, in a weakref's
callback (every import has one), in a clause of a library that catches everything. And one that comes up right behind
an `acquire` leaves the lock taken, so that whoever cleans up waits for it for ever. Therefore

- a timer looks after the exception: one that is gone while the command goes on is raised again. An exception lives as
  long as somebody handles it, so who means to go on after a signal does so inside the `except`;
- cleaning up has a bound. Then, and at a second signal, the process and its children are ended by force;
- the exit code is decided where the command ends: after a signal it is that signal's, whatever became of the exception.

The timer is never stopped, and its signals interrupt what the main thread waits for. So a process that was told to end
ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

_LOOK_S = 0.05
_GRACE_S = 15.0  # to clean up; a service takes no longer to close (`service._CLOSE_S`)
SAME_S = 0.2  # `timeout`, and Ctrl-C under a launcher, may send one wish twice


class Interrupted(KeyboardInterrupt):
    """Ctrl-C."""


class Terminated(SystemExit):
    """SIGTERM."""


class Stopping:
    """Knows which signal has come, and sees to it that it is obeyed.

    raises: whether a signal is an exception now. Set it to False where no exception could be caught any more.
    """

    def __init__(self) -> None:
        self.raises = True
        self.later = False  # while something is done that must not be divided
        self._number = 0
        self._asked_at = 0.0
        self._raised: weakref.ref[BaseException] | None = None

    def begin(self) -> None:
        """From here on signals are obeyed. One that the process was started to ignore (`nohup`, `&`) stays ignored."""
        sys.unraisablehook = _unless_it_is_ours
        signal.signal(signal.SIGALRM, self._look)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._obey)

    def end(self) -> None:
        """The command is over. After a signal so is the process: what Python does at its end, joining threads and
        flushing streams, may wait for ever. Otherwise there is nothing left to clean up, and signals kill."""
        if self._number:
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                    stream.flush()
            self._end_by_force()
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == self._obey:
                signal.signal(number, signal.SIG_DFL)

    def _obey(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number and now - self._asked_at > SAME_S:
            self._end_by_force()
        if not self._number:
            self._number, self._asked_at = number, now
            if not self.raises:  # all is done, and there is nothing to clean up
                self._end_by_force()
            signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
            self._raise()

    def _look(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._asked_at > _GRACE_S:
            self._end_by_force()
        if self._raised is None or self._raised() is None:
            self._raise()

    def _raise(self) -> None:
        if self.raises and not self.later:
            raise self._error()

    def _error(self) -> BaseException:
        """A new one. Only here is it a local variable: in a frame of its traceback it would keep itself alive."""
        error = Interrupted() if self._number == signal.SIGINT else Terminated(128 + self._number)
        self._raised = weakref.ref(error)
        return error

    def _end_by_force(self) -> NoReturn:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        os._exit(128 + self._number)


_running = Stopping()


def undivided(action: Callable[[], object]) -> None:
    """Do something short with no exception in its middle: a signal that comes meanwhile is obeyed behind it."""
    _running.later = True
    try:
        action()
    finally:
        _running.later = False


def run(command: Callable[[], object]) -> None:
    """Run a whole command line, which signals end, with 128 and their number."""
    global _running
    stopping = _running = Stopping()
    try:
        stopping.begin()
        command()
    finally:
        stopping.raises = False  # Python looks for signals where a call begins or returns, so none comes before this
        stopping.end()


def _children() -> list[int]:
    """Processes that this one has started, where the system tells (Linux)."""
    found: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found += map(int, file.read_text().split())
    return found


def _unless_it_is_ours(told: sys.UnraisableHookArgs) -> None:
    """Report what Python drops. What was raised for a signal is raised again, so of that there is nothing to say."""
    if not isinstance(told.exc_value, (Interrupted, Terminated)):
        sys.__unraisablehook__(told)
