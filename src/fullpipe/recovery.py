"""Keeping an engine on a pipeline that works: the main loop of a service's thread, and what it does after a failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fullpipe.engine import Engine
from fullpipe.errors import FullpipeError, Unavailable
from fullpipe.pipeline.base import Pipeline
from fullpipe.supervision import Observer, State, Supervision, what_failed

log = logging.getLogger(__name__)

IDLE_S = 0.5  # between two looks at stations that have nothing to do


class Callers(Protocol):
    """What a service does for its callers, and recovery has it do."""

    def step(self) -> None:
        """Take what callers want, and step the engine. Raises what the engine raises."""

    def tell_news(self) -> None:
        """Deliver what was emitted."""

    def take_inbox(self, wait: float = 0.0) -> None:
        """Do what callers want done, waiting for it for so many seconds."""

    def on_stations(self) -> dict[int, int]:
        """How many tokens each request has that any station has heard of."""

    def give_up(self, id: int, why: str) -> None:
        """End a request that is the cause of failures."""

    def give_up_all(self, reason: str, error: str | None = None) -> None:
        """End all of them."""


class Recovery:
    """rebuild: starts another pipeline; None: the first failure is the end.

    state: what the service says of itself. failure: the newest.
    """

    def __init__(self, engine: Engine, rebuild: Callable[[], Pipeline] | None, observers: Sequence[Observer],
                 callers: Callers) -> None:
        self._engine, self._rebuild, self._observers, self._callers = engine, rebuild, observers, callers
        self.supervision = Supervision()
        self.failure: BaseException | None = None
        self.state: State = "ready"
        self._lock = threading.Lock()  # of the state
        self._retry_at = 0.0
        self._stopping = threading.Event()

    # ---- any thread --------------------------------------------------------------------------------------

    def turn(self, state: State) -> None:
        """Go to "draining" or "stopped", which nothing but "stopped" follows."""
        with self._lock:
            if self.state != "stopped":
                self.state = state
        if state == "stopped":
            self._stopping.set()

    @property
    def retry_after_s(self) -> float:
        return 0.0 if self.state == "ready" else max(1.0, self._retry_at - time.monotonic())

    def check_open(self) -> None:
        """Raise Unavailable where nothing new is taken."""
        if self.state in ("failed", "draining", "stopped"):
            why = f" ({self.supervision.last_failure})" if self.state == "failed" else ""
            raise Unavailable(f"the service is {self.state}{why}", retry_after_s=self.retry_after_s,
                              hint="Try again later.")

    # ---- the engine's thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Step until told to stop, on one pipeline after another; then close the last one."""
        while not self._stopping.is_set():
            try:
                self._callers.step()
            except BaseException as error:  # a bug of ours, too, must not leave callers waiting for ever
                self._note(error, built=True)
                self._engine.pipeline.close()
                while not (self._stopping.is_set() or self._recover()):
                    pass
        self._engine.pipeline.close()
        self._callers.take_inbox()
        self._callers.give_up_all("abort")

    def _note(self, error: BaseException, *, built: bool) -> None:
        """What was emitted before is delivered; who is the cause is ended; the rest waits. built: it was a pipeline
        that failed; else none could be started, which is no request's fault."""
        self.failure = error
        log.error("%s", error, exc_info=None if isinstance(error, FullpipeError) else error)
        self._callers.tell_news()
        station, reason = what_failed(error)
        for observer in self._observers:
            observer.on_restart(station, reason)
        for id, why in self.supervision.failed(reason, self._callers.on_stations() if built else {}):
            self._callers.give_up(id, why)
        self._callers.tell_news()
        hopeless = self.supervision.hopeless or self._rebuild is None
        self._turn_unless_ending("failed" if hopeless else "rebuilding")
        if self.state == "failed":
            self._callers.give_up_all("error", reason)

    def _recover(self) -> bool:
        """Have the engine go on with another pipeline; False when that did not work, or there was no time for it."""
        if self._rebuild is None:
            self._callers.take_inbox(IDLE_S)
            return False
        pause = self.supervision.pause_s
        self._retry_at = time.monotonic() + pause
        if self._stopping.wait(pause):
            return False
        try:
            self._engine.attach(self._rebuild())
        except Exception as error:
            self._note(error, built=False)
            return False
        self._engine.isolate(self.supervision.suspect)
        self.supervision.built()
        self._turn_unless_ending("ready")
        return True

    def _turn_unless_ending(self, state: State) -> None:
        with self._lock:
            if self.state not in ("draining", "stopped") and not (self.state == "failed" and state == "rebuilding"):
                self.state = state
