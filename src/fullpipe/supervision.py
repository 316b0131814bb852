"""Keeps a service up when its pipeline fails, and tells observers of it.

`Recovery` is the main loop of a service's thread. After a failure it starts another pipeline and attaches the engine to
it. `Supervision` counts failures: it says how long to wait before the next try, when to give up, and whether one
request is the cause.

A request is blamed like this. Chance may strike a request three times, but hardly while it runs alone. So a request
that was on the stations at three failures, without getting a token in between, goes on alone; if two more failures
follow, it is ended, and no other request with it. These five failures are no more than a service bears before it gives
up.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fullpipe.engine import Engine, RequestStats, Stats
from fullpipe.errors import FullpipeError, PromptError, StationFailed, Unavailable
from fullpipe.messages import Event
from fullpipe.pipeline.base import Remade
from fullpipe.pipeline.guarded import guarded

log = logging.getLogger(__name__)

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

    def on_recut(self, why: str) -> None:
        """The pipeline is exchanged for a better one. Nothing has failed."""

    def on_engine_time(self, seconds: float) -> None:
        """The service's thread was at work for so long: not waiting for events."""


class Supervision:
    """Counts failures, and says what follows from them: when to try again, when to give up, and who is the cause.

    patience_s: it does not give up before so many seconds of failures; hosts that are lost may come back.

    suspect: the request that is to run alone. restarts: failures so far. last_failure: in one line.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s
        self._since = 0.0  # the first failure in a row
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
        return self._in_a_row >= _PATIENCE and time.monotonic() - self._since >= self._patience_s

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
        if not self._in_a_row:
            self._since = time.monotonic()
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


class Callers(Protocol):
    """Does for a service's callers what recovery asks for; only `step` raises."""

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""

    def step(self) -> None:
        """Take what callers want, and step the engine. Raises what the engine raises."""

    def tell_news(self) -> None:
        """Deliver what was emitted."""

    def on_stations(self) -> dict[int, int]:
        """How many tokens each request has that any station has heard of."""

    def give_up(self, id: int, why: str, failure: BaseException) -> None:
        """End a request that is the cause of failures. why: what it is told. failure: the newest."""

    def give_up_all(self, reason: str, why: str | None = None, failure: BaseException | None = None) -> None:
        """End all of them, and refuse what else was to be done."""


class Recovery:
    """Runs the main loop of a service: it steps the engine, and after a failure goes on with another pipeline.

    rebuild: starts another pipeline; None: the first failure is the end. lock: the service's, which takes nothing in
    without holding it and having called `check_open`. patience_s: see `Supervision`. state: what the service says of
    itself.
    """

    def __init__(self, engine: Engine, rebuild: Callable[[], Remade] | None, observers: Sequence[Observer],
                 callers: Callers, lock: threading.Lock, patience_s: float = 0.0) -> None:
        self._engine, self._rebuild, self._observers, self._callers = engine, rebuild, observers, callers
        self.supervision = Supervision(patience_s)
        self.state: State = "ready"
        self._lock = lock  # of the state
        self._retry_at = 0.0
        self._stopping = threading.Event()
        self._recut: tuple[str, float] | None = None  # why, and until when it waits for a quiet moment

    # ---- any thread --------------------------------------------------------------------------------------

    def turn(self, state: State) -> None:
        """Go to "draining" or "stopped", which nothing but "stopped" follows."""
        with self._lock:
            if self.state != "stopped":
                self.state = state
        if state == "stopped":
            self._stopping.set()

    def recut(self, why: str, patience_s: float) -> None:
        """Exchange the pipeline for another one, which `rebuild` starts: when nothing runs, or in so many seconds."""
        self._recut = self._recut or (why, time.monotonic() + patience_s)

    @property
    def retry_after_s(self) -> float:
        return 0.0 if self.state == "ready" else max(1.0, self._retry_at - time.monotonic())

    def check_open(self) -> None:
        """Raise Unavailable where nothing new is taken."""
        if self.state in ("failed", "draining", "stopped"):
            raise self.refusal()

    def refusal(self) -> Unavailable:
        """What is told to who comes while nothing is taken, or has come and is given up."""
        why = f" ({self.supervision.last_failure})" if self.state == "failed" else ""
        over = self._rebuild is None or self.state == "stopped"
        return Unavailable(f"the service is {self.state}{why}", retry_after_s=self.retry_after_s,
                           hint="It does not come back. Make another `LLM`." if over else "Try again later.")

    # ---- the engine's thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Step until told to stop, on one pipeline after another; then close the last one and end all requests."""
        try:
            while not self._stopping.is_set():
                try:
                    self._callers.step()
                    self._exchange_if_due()
                except BaseException as error:  # a bug of ours, too, must not leave callers waiting for ever
                    self._start_over(error)
        finally:
            self.turn("stopped")  # nothing is taken in from here on, so what is given up now is all there is
            guarded("closing the pipeline", self._engine.pipeline.close)
            self._callers.give_up_all("abort")

    def _exchange_if_due(self) -> None:
        """Requests that run go on with the same text; they only wait for as long as the new pipeline takes to start."""
        if self._recut is None or self.state != "ready":
            return
        why, until = self._recut
        if self._callers.busy and time.monotonic() < until:
            return
        self._recut = None
        log.info("going over to another pipeline: %s", why)
        for observer in self._observers:
            guarded("an observer", observer.on_recut, why)
        self._callers.tell_news()
        self._turn_unless_ending("rebuilding")
        guarded("closing the pipeline", self._engine.pipeline.close)
        while not (self._stopping.is_set() or self._recover()):
            pass

    def _start_over(self, error: BaseException) -> None:
        self._note(error, built=True)
        self._recut = None
        guarded("closing the pipeline", self._engine.pipeline.close)
        while not (self._stopping.is_set() or self._recover()):
            pass

    def _note(self, error: BaseException, *, built: bool) -> None:
        """Take a failure in. built: it was a pipeline that failed; else none could be started, which is no request's
        fault."""
        log.error("%s", error, exc_info=None if isinstance(error, FullpipeError) else error)
        station, reason = what_failed(error)
        try:
            self._blame(station, reason, error, built)
            hopeless = self.supervision.hopeless or self._rebuild is None
        except Exception:
            log.exception("what follows from a failure has failed, too")
            hopeless = True
        self._turn_unless_ending("failed" if hopeless else "rebuilding")
        if hopeless:
            self._callers.give_up_all("error", reason, error)

    def _blame(self, station: str, reason: str, error: BaseException, built: bool) -> None:
        """What was emitted before is delivered; who is the cause is ended; the rest waits."""
        self._callers.tell_news()
        for observer in self._observers:
            guarded("an observer", observer.on_restart, station, reason)
        for id, why in self.supervision.failed(reason, self._callers.on_stations() if built else {}):
            self._callers.give_up(id, why, error)
        self._callers.tell_news()

    def _recover(self) -> bool:
        """Have the engine go on with another pipeline; False when that did not work, or there was no time for it."""
        if self._rebuild is None:
            self._stopping.wait()
            return False
        pause = self.supervision.pause_s
        self._retry_at = time.monotonic() + pause
        if self._stopping.wait(pause):
            return False
        pipeline = None
        try:
            made = self._rebuild()
            pipeline, method = made if isinstance(made, tuple) else (made, None)
            self._engine.attach(pipeline, method)
            self._end_what_does_not_fit()
        except Exception as error:
            if pipeline is not None:
                pipeline.close()
            self._note(error, built=False)
            return False
        self._engine.isolate(self.supervision.suspect)
        self.supervision.built()
        self._turn_unless_ending("ready")
        return True

    def _end_what_does_not_fit(self) -> None:
        """A pipeline that was made anew may have less cache memory, and who can never run would hold up all others."""
        for sequence in self._engine.unfinished():
            try:
                self._engine.check_fits(sequence.request)
            except PromptError as error:
                self._callers.give_up(sequence.request.id, error.message, error)

    def _turn_unless_ending(self, state: State) -> None:
        with self._lock:
            if self.state not in ("draining", "stopped") and not (self.state == "failed" and state == "rebuilding"):
                self.state = state
