"""What follows from a pipeline's failures: when to try again, when to give up, and whether one request is the cause;
and what those see who watch a service.

Bad luck may strike a request three times, but hardly while it runs alone, too. So a request that ran at three failures
without getting a token in between goes on alone, and is ended if that fails twice more: nobody else is ended with it.
Together these are no more failures than a service bears before it gives up. Knows no engine and no threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fullpipe.engine import RequestStats, Stats
from fullpipe.errors import FullpipeError, StationFailed
from fullpipe.messages import Event

State = Literal["ready", "rebuilding", "failed", "draining", "stopped"]

_PATIENCE = 5  # failures without a token in between, and then the service counts as failed
_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the next try
_STEADY_S = 60.0  # a pipeline that stood so long worked, whether or not anybody asked it for a token
_AMONG_OTHERS = 3  # failures that a request may see without getting on, before it goes on alone,
_ALONE = 2  # and then


@dataclass(slots=True)
class _Record:
    """What is left to a request that was on the stations when they failed. tokens: it had at the newest failure."""

    tokens: int = -1
    among_others: int = _AMONG_OTHERS
    alone: int = _ALONE


@dataclass(frozen=True, slots=True)
class Status:
    """What a look at the service shows. kv_used: cache slots of requests that run; what is kept to be shared can be had
    at any time. kv_total: all of them (0: unlimited). retry_after_s: seconds after which it may be worth trying again,
    where state is not "ready". last_failure: its reason in one line, "" before the first."""

    state: State
    running: int
    waiting: int
    kv_used: int
    kv_total: int
    restarts: int
    last_failure: str = ""
    retry_after_s: float = 0.0


class Observer:
    """Who watches a service overrides what it wants to know. Called from the engine's thread."""

    def on_start(self, stats: Stats) -> None:
        """What the engine counts; told once, before anything else. The figures go on growing."""

    def __call__(self, event: Event) -> None:
        """Every event of the engine."""

    def on_finish(self, id: int, reason: str, prompt_tokens: int, completion_tokens: int, stats: RequestStats,
                  cached_tokens: int) -> None:
        """The last that is told of a request. cached_tokens: of the prompt, taken over and not computed."""

    def on_restart(self, station: str, reason: str) -> None:
        """The pipeline is started anew because of `station`: what was under way is lost."""

    def on_engine_time(self, seconds: float) -> None:
        """The service's thread was at work for so long: not waiting for events."""


class Supervision:
    """suspect: the request that is to run alone. restarts: failures so far. last_failure: in one line."""

    def __init__(self) -> None:
        self.suspect: int | None = None
        self.restarts = 0
        self.last_failure = ""
        self._in_a_row = 0
        self._built_at = time.monotonic()
        self._records: dict[int, _Record] = {}

    def built(self) -> None:
        """There is a pipeline again."""
        self._built_at = time.monotonic()

    def got_on(self, id: int) -> None:
        """Tokens of a request came. If it ran alone for having seen failures, everybody may run again."""
        self._in_a_row = 0
        if id == self.suspect:
            self.forget(id)

    @property
    def hopeless(self) -> bool:
        return self._in_a_row >= _PATIENCE

    @property
    def pause_s(self) -> float:
        """How long to wait before the next try."""
        return _PAUSES_S[min(self._in_a_row, len(_PAUSES_S)) - 1] if self._in_a_row else 0.0

    def failed(self, reason: str, tokens: Mapping[int, int]) -> list[tuple[int, str]]:
        """Take a failure in. tokens: how many each request had that was on the stations; empty if there were none.

        Returns who is the cause and has to go, and what to tell him.
        """
        if time.monotonic() - self._built_at > _STEADY_S:
            self._in_a_row = 0
        self._built_at = math.inf
        self._in_a_row += 1
        self.restarts += 1
        self.last_failure = reason
        causes = [id for id, number in tokens.items() if self._is_cause(id, number)]
        if causes:
            self._in_a_row = 0
        self.suspect = next((id for id, one in sorted(self._records.items())
                             if one.among_others <= 0 and id not in causes), None)
        return [(id, f"the pipeline failed {_AMONG_OTHERS + _ALONE} times while this request ran, at last alone: "
                     f"{reason}") for id in causes]

    def _is_cause(self, id: int, tokens: int) -> bool:
        one = self._records.setdefault(id, _Record())
        if tokens > one.tokens:
            one.tokens, one.among_others, one.alone = tokens, _AMONG_OTHERS - 1, _ALONE  # this one counts
        elif id == self.suspect:
            one.alone -= 1
        else:
            one.among_others -= 1
        return one.alone <= 0

    def forget(self, id: int) -> None:
        """The request has ended, or is not the cause."""
        self._records.pop(id, None)
        if id == self.suspect:
            self.suspect = None


def what_failed(error: BaseException) -> tuple[str, str]:
    """The station, and of the reason the line that callers may see: what follows it is a worker's own log."""
    whole = error.message if isinstance(error, FullpipeError) else f"{type(error).__name__}: {error}"
    station = error.station if isinstance(error, StationFailed) else "engine"
    return station, whole.partition("\n")[0].removesuffix("; it printed:")
