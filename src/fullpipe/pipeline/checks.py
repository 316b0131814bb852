"""These checks ask what types cannot say of a worker's answer: does it belong to what was sent?

A worker that is damaged, or of another version, must become one `Failed` event and not an exception somewhere in the
engine, or a token that nobody chose. Each check raises `NonsenseError`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fullpipe.messages import ArenaId, Expansion, Flight
from fullpipe.pipeline.frames import Answered, Beat, Guessed, Stay
from fullpipe.pipeline.wire import NonsenseError

_SOURCES = 1 << 16  # nobody mixes so many drafts


@dataclass(frozen=True, slots=True)
class Expected:
    """Knows what may be said of a flight or job that is under way.

    sent: when it went out, by the pipeline's clock. nodes: of its rows; wanted: of those with `wants`, in order.
    prompts: arenas of which it carries prompt rows.
    """

    id: int
    sent: float
    nodes: frozenset[int]
    wanted: list[int]
    prompts: frozenset[ArenaId]
    arenas: frozenset[ArenaId]

    @classmethod
    def of(cls, flight: Flight, sent: float) -> Expected:
        return cls(flight.id, sent, frozenset(flight.nodes),
                   [node for part in flight.parts for node, wants in zip(part.nodes, part.wants) if wants],
                   frozenset(part.arena for part in flight.parts if -1 in part.nodes),
                   frozenset(part.arena for part in flight.parts))


def check_answered(frame: Answered, due: Expected | None, stages: int) -> Expected:
    """Returns what it answers: the oldest flight under way, `due`."""
    landed = frame.landed
    due = _due(due, landed.flight)
    wanted = iter(due.wanted)
    if not all(node in wanted for node in landed.nodes):
        raise NonsenseError(f"flight {due.id} answered for nodes that it was not asked about")
    told = {len(landed.margins), len(landed.others), len(landed.logprobs)}
    if len(landed.tokens) != len(landed.nodes) or not told <= {0, len(landed.nodes)}:
        raise NonsenseError(f"flight {due.id} with lists of different lengths")
    if not {*landed.nodes}.issuperset(node for node, _ in landed.stuck):
        raise NonsenseError(f"flight {due.id} is stuck after nodes that it does not answer for")
    if not due.prompts.issuperset(score.arena for score in landed.prompts):
        raise NonsenseError(f"flight {due.id} answered for prompts that it does not carry")
    if len(frame.stays) != stages:
        raise NonsenseError(f"flight {due.id} with other stays than one at each stage")
    _check_stays(frame.stays, due)
    return due


def check_guessed(frame: Guessed, due: Expected | None, newest: int) -> Expected:
    """Returns what it answers: the oldest job under way, `due`. newest: the highest node that there has been, for a job
    may be answered about nodes of an earlier one."""
    due = _due(due, frame.job)
    for expansion in frame.expansions:
        _check_expansion(expansion, newest)
    _check_stays([frame.stay], due)
    return due


def check_beat(frame: Beat, newest: int) -> None:
    """newest: the flight or job that went out last."""
    if not -1 <= frame.done <= newest:
        raise NonsenseError(f"a beat that is done with {frame.done}, which was never sent")


def check_rows(flight: Flight, rows: int) -> None:
    """rows: hidden rows that came along with a neighbour's flight."""
    for part in flight.parts:
        columns = (part.tokens, part.positions, part.slots, part.paths, part.wants)
        if {len(column) for column in columns} != {len(part)}:
            raise NonsenseError(f"flight {flight.id} with lists of different lengths")
    if rows != flight.num_rows:
        raise NonsenseError(f"{rows} rows along with the {flight.num_rows} of flight {flight.id}")


def _due(due: Expected | None, number: int) -> Expected:
    if due is None or number != due.id:
        raise NonsenseError(f"{number} came back, and {due.id if due else 'nothing'} is due")
    return due


def _check_stays(stays: list[Stay], due: Expected) -> None:
    if not all(due.nodes.issuperset(stay.nodes) for stay in stays):
        raise NonsenseError(f"{due.id} with rows that it does not have")


def _check_expansion(one: Expansion, newest: int) -> None:
    if not -1 <= one.node <= newest:
        raise NonsenseError(f"guesses for node {one.node}, which was never there")
    if not len(one.tokens) == len(one.logprobs) == len(one.parents):
        raise NonsenseError(f"guesses for node {one.node} in lists of different lengths")
    if one.sources and not (len(one.sources) == len(one.tokens) and all(0 <= own < _SOURCES for own in one.sources)):
        raise NonsenseError(f"guesses for node {one.node} by nobody")
    if not all(-1 <= parent < at for at, parent in enumerate(one.parents)):
        raise NonsenseError(f"a guess for node {one.node} that comes before its parent")
    chain = [one.parents[index] if 0 <= index < len(one.parents) else None for index in one.computed]
    if one.computed and chain != [-1, *one.computed[:-1]]:
        raise NonsenseError(f"a chain behind node {one.node} that does not hang together")
