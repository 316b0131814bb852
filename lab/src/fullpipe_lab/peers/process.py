"""A runner as its parent sees it: a process that is asked one thing at a time, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_LEAVE_S = 3.0  # what a runner gets to leave by itself once its input has ended
_REASON_CHARACTERS = 300
_READ_BYTES = 1 << 16


class RunnerFailed(Exception):
    """One line: what went wrong with a runner. Becomes `PeerResult.reason`, so nobody else has to catch it."""


class Runner:
    """A runner script under the peer's interpreter. Leaving the context ends it and whatever it has started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as until_started:
            self._log = until_started.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=dict(environment),
                bufsize=0, start_new_session=True)  # Ctrl-C reaches us alone, and the whole group can be ended
            until_started.pop_all()
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._heard = bytearray()

    def ask(self, question: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """What the runner says to one line. Raises RunnerFailed when it does not, or not in time."""
        with contextlib.suppress(BrokenPipeError):  # why it ended shows in what it says, or does not
            self._in.write(json.dumps(question).encode() + b"\n")
        line = self._line(limit_s)
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RunnerFailed(_one_line(f"said what is no answer: {line.decode(errors='replace')}"))
        if "failed" in value:
            raise RunnerFailed(_one_line(str(value["failed"])))
        return value

    def peak_memory(self) -> int | None:
        """The sum over its processes of the most memory that each has had in use, bytes; None without /proc."""
        return peak_memory(self._process.pid)

    def close(self) -> None:
        self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        self._out.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:  # it may be in the middle of something long
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.close()

    def _line(self, limit_s: float) -> bytes:
        until = time.monotonic() + limit_s
        while (end := self._heard.find(b"\n")) < 0:
            if not self._selector.select(max(until - time.monotonic(), 0.0)):
                raise RunnerFailed(f"did not answer within {limit_s:g} s")
            if not (more := os.read(self._out.fileno(), _READ_BYTES)):
                raise RunnerFailed(_one_line(self._how_it_ended()))
            self._heard += more
        line = bytes(self._heard[:end])
        del self._heard[: end + 1]
        return line

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            return "closed its output but still runs"
        how = f"exited with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _READ_BYTES, max(0, size - _READ_BYTES)).decode(errors="replace")
        last = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
        return f"its process {how}" + (f": {last}" if last else "")


def peak_memory(root: int) -> int | None:
    """Sum of the peak resident sizes of `root` and its descendants, bytes (VmHWM of /proc/PID/status)."""
    parents: dict[int, int] = {}
    peaks: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            values = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            parents[int(status.parent.name)] = int(values["PPid"])
            peaks[int(status.parent.name)] = int(values.get("VmHWM", "0 kB").split()[0]) * 1024
    if root not in parents:
        return None
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(peaks[pid] for pid in family)


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _REASON_CHARACTERS else flat[: _REASON_CHARACTERS - 3] + "..."
