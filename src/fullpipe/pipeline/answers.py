"""What a worker sends to the engine's process, read with the suspicion that a stranger's bytes deserve.

A worker that is damaged, or of another version, must become one `Failed` event and not an exception somewhere in the
engine, or a token that nobody chose. So every field is looked at before anything is made of it. What is looked at is
as long as the answer and no longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fullpipe.messages import Drafted, Expansion, Flight, Landed, Leg
from fullpipe.pipeline.wire import Frame, NonsenseError

_TOKENS = 1 << 31  # no vocabulary is as large


@dataclass(frozen=True, slots=True)
class Expected:
    """What may be said of a flight or job that is under way. nodes: of its rows; wanted: of those with `wants`."""

    id: int
    nodes: frozenset[int]
    wanted: list[int]

    @classmethod
    def of(cls, flight: Flight) -> Expected:
        return cls(flight.id, frozenset(node for part in flight.parts for node in part.nodes),
                   [node for part in flight.parts for node, wants in zip(part.nodes, part.wants) if wants])


@contextmanager
def sensible(what: str) -> Iterator[None]:
    """Whatever trips over a message inside says `NonsenseError`. what: the message, for the user."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise NonsenseError(f"{what} that cannot be read ({type(error).__name__}: {error})") from error


def read_landed(frame: Frame, time: float, expected: Expected | None, stations: Sequence[str]) -> Landed:
    """A landing. expected: the oldest flight under way, if there is one. stations: the stages' names.

    Raises `NonsenseError`, also for fields that are missing or of another kind."""
    with sensible("a landing"):
        due = _due(expected, frame["flight"])
        nodes, tokens, margins = _wholes(frame["nodes"]), _tokens(frame["tokens"]), _numbers(frame["margins"])
        wanted = iter(due.wanted)
        if not all(node in wanted for node in nodes):
            raise NonsenseError(f"flight {due.id} answered for nodes that it was not asked about")
        others = [_tokens(row) for row in _list(frame["others"])]
        logprobs = [[_told(*one) for one in _list(row)] for row in _list(frame.get("logprobs", []))]
        if len(tokens) != len(nodes) or not {len(margins), len(others), len(logprobs)} <= {0, len(nodes)}:
            raise NonsenseError(f"flight {due.id} with lists of different lengths")
        legs = [_leg(values, due) for values in _list(frame["legs"])]
        if [leg.station for leg in legs] != stations:
            raise NonsenseError(f"flight {due.id} with other legs than one of each stage")
        return Landed(time, due.id, nodes, tokens, margins, others, logprobs, legs)


def read_drafted(frame: Frame, time: float, expected: Expected | None, newest: int) -> Drafted:
    """A draft's answer. expected: the oldest job under way, if there is one. newest: the highest node that there has
    been, for a job may be answered about nodes of an earlier one.

    Raises `NonsenseError`, also for fields that are missing or of another kind."""
    with sensible("an answer"):
        due = _due(expected, frame["job"])
        expansions = [_expansion(*values, newest=newest) for values in _list(frame["expansions"])]
        return Drafted(time, due.id, expansions, _leg(frame["leg"], due))


def read_taps(frame: Frame) -> tuple[int, int]:
    """How many taps have come to the draft, and their bytes. Raises `NonsenseError`."""
    with sensible("an answer"):
        count, size = _wholes(frame.get("taps", [0, 0]))
        return count, size


def read_done(frame: Frame, newest: int) -> int:
    """The flight or job that a beat says is finished; -1: none. newest: the last one that went out. Raises
    `NonsenseError`."""
    with sensible("a beat"):
        (done,) = _wholes([frame["done"]])
        if not -1 <= done <= newest:
            raise NonsenseError(f"a beat that is done with {done}, which was never sent")
        return done


def read_words(frame: Frame, *names: str) -> list[str]:
    """Fields that are text. Raises `NonsenseError`."""
    with sensible("a report"):
        words = [frame[name] for name in names]
        if not all(type(word) is str for word in words):
            raise NonsenseError(f"{words!r:.60} where words should be")
        return words


def _due(expected: Expected | None, number: Any) -> Expected:
    if expected is None or type(number) is not int or number != expected.id:
        raise NonsenseError(f"{number!r:.60} came back, and {expected.id if expected else 'nothing'} is due")
    return expected


def _expansion(node: Any, tokens: Any, logprobs: Any, parents: Any, *, newest: int) -> Expansion:
    guesses, weights, under = _tokens(tokens), _numbers(logprobs), _wholes(parents)
    if type(node) is not int or not -1 <= node <= newest:
        raise NonsenseError(f"guesses for node {node!r:.60}, which was never there")
    if not len(guesses) == len(weights) == len(under):
        raise NonsenseError(f"guesses for node {node} in lists of different lengths")
    if not all(-1 <= parent < at for at, parent in enumerate(under)):
        raise NonsenseError(f"a guess for node {node} that comes before its parent")
    return Expansion(node, guesses, weights, under)


def _leg(values: Any, due: Expected) -> Leg:
    station, start, end, nodes = values
    _numbers([start, end])
    if type(station) is not str or not due.nodes.issuperset(_wholes(nodes)):
        raise NonsenseError(f"a leg of {due.id} with rows that it does not have")
    return Leg(station, start, end, nodes)


def _told(token: Any, logprob: Any) -> tuple[int, float]:
    return _tokens([token])[0], _numbers([logprob])[0]


def _list(values: Any) -> list[Any]:
    if type(values) is not list:
        raise NonsenseError(f"{values!r:.60} where a list should be")
    return values


def _wholes(values: Any) -> list[int]:
    if not all(type(value) is int for value in _list(values)):
        raise NonsenseError(f"{values!r:.60} where whole numbers should be")
    return values  # type: ignore[no-any-return]


def _tokens(values: Any) -> list[int]:
    if not all(0 <= value < _TOKENS for value in _wholes(values)):
        raise NonsenseError(f"{values!r:.60} where tokens should be")
    return values  # type: ignore[no-any-return]


def _numbers(values: Any) -> list[float]:
    if not all((type(value) is float and value == value) or type(value) is int for value in _list(values)):
        raise NonsenseError(f"{values!r:.60} where numbers should be")
    return values  # type: ignore[no-any-return]
