"""What sits inside a station: something that takes a flight and gives back what the next one needs.

The in-process pipeline calls these objects directly; the worker of the distributed pipeline hosts
exactly one. Both drive the same code. No torch here.
"""

from __future__ import annotations

from typing import Any, Protocol

from fullpipe.messages import Expansion, Flight


class StageLike(Protocol):
    """One slice of the model.

    `run` takes the flight (cancelled rows already dropped) and, except at the first stage, the previous
    stage's output: one hidden-state row per flight row, in order of parts, [rows, hidden]. It returns the
    same kind of thing, or at the last stage a `Verdict`. It opens arenas for `flight.opens` first and
    frees those of `flight.closes` last.
    """

    def run(self, flight: Flight, hidden: Any) -> Any: ...


class Verdict:
    """The last stage's answer: parallel lists over the rows with `wants`, in order."""

    __slots__ = ("margins", "nodes", "tokens")

    def __init__(self, nodes: list[int], tokens: list[int], margins: list[float]) -> None:
        self.nodes, self.tokens, self.margins = nodes, tokens, margins


class SourceLike(Protocol):
    """Who proposes: answers each row of the job that has `wants` with an `Expansion`."""

    def run(self, job: Flight) -> list[Expansion]: ...
