"""What sits inside a station: something that takes a flight and gives back what the next one needs.

The in-process pipeline calls these objects directly; the worker of the distributed pipeline hosts
exactly one. Both drive the same code. No torch here.
"""

from __future__ import annotations

from typing import Any, Protocol

from fullpipe.messages import Expansion, Flight, Tap


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


class Tapped:
    """What a stage's `run` returns that is to send hidden states to the draft station: its result, and with it
    `layers` and `features` as in `messages.Tap`."""

    __slots__ = ("features", "layers", "result")

    def __init__(self, result: Any, layers: list[int], features: Any) -> None:
        self.result, self.layers, self.features = result, layers, features


class TapReader(Protocol):
    """A source that reads hidden states out of the stages.

    The pipeline calls `take` for every tap that arrives, from one stage in the order of its flights, never while
    `run` is at work. Before it starts a job it asks `ready`; while the answer is no the job waits, and is asked for again
    after every tap and every cancel. `forget` names nodes that were cancelled: their taps may never come.
    """

    def run(self, job: Flight) -> list[Expansion]: ...

    def take(self, tap: Tap) -> None: ...

    def ready(self, job: Flight) -> bool: ...

    def forget(self, nodes: list[int]) -> None: ...
