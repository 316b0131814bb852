"""Hidden states go to a draft in the same process, on the virtual clock. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fullpipe.messages import Flight, Tap
from fullpipe.pipeline.agenda import Agenda
from fullpipe.pipeline.links import Links, Wire
from fullpipe.stations.base import TapCount, TapReader, drop_rows


class TapWay:
    """Brings taps to the draft on links of their own, and cancels too, which may be what its jobs wait for.

    message_bytes: size of so many hidden rows. try_job: called when something has come that a job may have waited for.
    arrived: the taps that have.
    """

    def __init__(self, agenda: Agenda, reader: TapReader, links: Links, num_stages: int,
                 message_bytes: Callable[[int], int], try_job: Callable[[], None]) -> None:
        self.arrived = TapCount()
        self._agenda, self._reader, self._try_job = agenda, reader, try_job
        self._wires = [Wire(links.tap(stage)) for stage in range(num_stages)]
        self._cancel_s = links.draft.latency_s
        self._message_bytes = message_bytes
        self._jobs: dict[int, Any] = {}  # by id: what carries a job that has been sent and has not started

    def expect(self, cargo: Any) -> None:
        """A job sets off. cargo: has it as `flight`, which a cancel may replace."""
        self._jobs[cargo.flight.id] = cargo

    def starts(self, job: Flight) -> None:
        del self._jobs[job.id]

    @property
    def waiting(self) -> int | None:
        """Id of the oldest job that has not started."""
        return next(iter(self._jobs), None)

    def ready(self, job: Flight) -> bool:
        return self._reader.ready(job)

    def send(self, stage: int, tap: Tap) -> None:
        size = len(tap.layers) * self._message_bytes(tap.flight.num_rows)
        self._agenda.at(self._wires[stage].arrival(self._agenda.time, size), lambda: self._take(tap, size))

    def cancel(self, nodes: list[int]) -> None:
        self._agenda.at(self._agenda.time + self._cancel_s, lambda: self._forget(nodes))

    def _take(self, tap: Tap, size: int) -> None:
        self.arrived.add(size)
        self._reader.take(tap)
        self._try_job()

    def _forget(self, nodes: list[int]) -> None:
        """Jobs still on their way are told too, for a cancel overtakes them."""
        for cargo in self._jobs.values():
            cargo.flight, _ = drop_rows(cargo.flight, None, set(nodes))
        self._reader.forget(nodes)
        self._try_job()
