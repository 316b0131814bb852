"""A launcher has station processes come to be on their hosts, and says how they end. Every one keeps this promise.

Workers do not care who started them: a launcher runs `python -m fullpipe.pipeline.worker` on the station's host and
writes the station's `Door` into its standard input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fullpipe.pipeline.frames import Door


@dataclass(frozen=True, slots=True)
class Needs:
    """Says what a station's process takes of its host. threads: it computes with. cpus: that are reserved for it, fewer
    where stations take turns; 0: as many as threads. memory: bytes; 0: nobody knows."""

    threads: int = 1
    cpus: float = 0.0
    gpus: float = 0.0
    memory: int = 0

    @property
    def told(self) -> str:
        parts = [f"{self.cpus or self.threads:g} CPU", f"{self.gpus:g} GPU" if self.gpus else "",
                 f"{self.memory >> 20:,} MiB of memory" if self.memory else ""]
        return ", ".join(part for part in parts if part)


class Process(ABC):
    """Is the process of one station, wherever it runs.

    Promises:
    - `fileno` is a descriptor that can be read from when the process has ended, at once and for ever.
    - `last_words` says how it ended, and what it printed; it may wait for half a second.
    - `terminate` asks it to end, `kill` does not ask; both may come late. After `wait` said so nothing of it is left.
    - `close` has one that runs all the same end by itself.
    """

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether it runs, as far as is known."""

    @abstractmethod
    def last_words(self) -> str:
        """How it ended, with the tail of what it printed."""

    @abstractmethod
    def log_tail(self) -> str:
        """The last lines that it printed, ready to be appended to a reason; "" if none."""

    @abstractmethod
    def terminate(self) -> None:
        """Ask it to end."""

    @abstractmethod
    def kill(self) -> None:
        """End it."""

    @abstractmethod
    def wait(self, seconds: float | None) -> bool:
        """Whether it has ended, after waiting for so long at most; None: until it has."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held here for it. It has ended, or nobody can reach it any more."""


class Launcher(ABC):
    """Starts the station processes of one pipeline."""

    @abstractmethod
    def start(self, door: Door, host: str, needs: Needs) -> Process:
        """Start the process of one station. host: where; "" for this one. needs: what it takes there.

        Returns at once, or after some seconds where a host is far. Raises StationFailed.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what all processes shared. One that has not been closed ends, soon, by itself."""
