"""Every pipeline keeps this promise, and the engine knows nothing else about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from fullpipe.costs import Machine
from fullpipe.messages import Event, Flight
from fullpipe.methods.base import Method


class Pipeline(ABC):
    """Moves flights through stations in a row (stages), and jobs through one beside them (draft).

    Promises:
    - Flights leave every station in the order in which they entered it; so do draft jobs. `Landed` and
      `Drafted` events arrive when they arrive, in any order between the two kinds.
    - Every launched flight lands, even one whose rows were all cancelled (its `commits` must arrive).
      `Landed` reports rows with `wants`; cancelled rows may be missing.
    - `Ready` comes once before the first launch and once per launched flight, never twice in between.
      The engine launches at most one flight per `Ready`.
    - `events` blocks until something happened, and returns everything that happened up to one instant,
      in order of time. Times never run backwards. It returns an empty list only where it was told how long to
      wait (`wait` seconds of real time) and nothing happened; told so, it may be called with nothing under way.
      On the virtual clock nothing is ever waited for: there is an event, or there will be none.
    - `cancel` overtakes. Nothing depends on its arriving in time, or at all; it may be called at any time.
    - A station that dies or hangs is reported by one `Failed` event; afterwards only `close` may be called.
    - One that has been used is handed on empty: what was launched has landed, and the last `Ready` was taken.
    - `close` may be called at any time and more than once; it leaves no process, socket or file behind.
    """

    num_stages: int
    has_draft: bool
    cache_slots: int | None = None  # of the pool of the station that has the fewest; None: nobody sets a bound
    newest_flight = -1  # id of what was launched last; -1: nothing
    newest_job = -1  # of what was sent to the draft last

    @abstractmethod
    def launch(self, flight: Flight) -> None:
        """Send a flight to stage 0. Takes ownership of `flight`."""

    @abstractmethod
    def draft(self, job: Flight) -> None:
        """Send a job to the draft station. Takes ownership of `job`."""

    @abstractmethod
    def cancel(self, nodes: list[int]) -> None:
        """Nobody needs these rows any more: a station that has not computed them yet may drop them."""

    @abstractmethod
    def events(self, wait: float | None = None) -> list[Event]:
        """Wait for what happens next; with `wait`, for so many seconds at most."""

    @abstractmethod
    def now(self) -> float:
        """Seconds on this pipeline's clock."""

    @abstractmethod
    def machine(self) -> Machine:
        """What is known of the stations before any of them has worked: how many, where they sit, what links take."""

    @abstractmethod
    def close(self) -> None:
        """End everything that the pipeline started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


Remade = Pipeline | tuple[Pipeline, Method]
"""Another pipeline in place of one, with another method where it is cut in another way."""
