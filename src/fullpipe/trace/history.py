"""A stream of events is sorted here: who was where and when, and what became of every node. No torch.

The stream tells things when the engine learns of them: where a flight has been only when it lands, whose child a
missed token is only by its place in the text. Pictures need it sorted by station and by node, and `history` sorts it.
Times stay those of the events.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from fullpipe.errors import UsageError
from fullpipe.events import Died, Emitted, Finished, Launched
from fullpipe.messages import Drafted, Event, Expansion, Failed, Landed, Leg
from fullpipe.trace.flying import alive_rows

E = TypeVar("E", bound=Event)
DRAFT = "draft"
PROMPT = -1  # the node id of prompt rows


@dataclass(slots=True)
class Stay:
    """Says when a flight was at a stage, or a job at the draft; `number` is its id.

    nodes: rows computed there. alive: how many of them were alive at the end of the stay; prompt rows always are.
    """

    station: str
    number: int
    start: float
    end: float
    nodes: list[int]
    alive: int


@dataclass(slots=True)
class Life:
    """Tells the life of a launched node.

    parent: the node before it, -1 for the last prompt token. job, proposed: the first draft call that guessed it,
    and when its answer came; None for a token that nobody guessed, or only when it was launched already.
    next_token: what truly follows, once landed. committed: when it became text; None for the last prompt token,
    and for a guess that never did.
    """

    id: int
    request: int
    token: int
    position: int
    parent: int
    flight: int
    launched: float
    job: int | None = None
    proposed: float | None = None
    landed: float | None = None
    next_token: int | None = None
    committed: float | None = None
    died: float | None = None

    def died_in_flight(self) -> bool:
        return self.died is not None and (self.landed is None or self.died < self.landed)


@dataclass(slots=True)
class History:
    """Holds a run, sorted.

    start, end: of all that was seen. stays: per station, the draft first, then the stages; each in order of time.
    speculated: some node was launched before it was certain; a plain pipeline has neither hits nor misses. child: for
    an emission, by its index, the node that carries its token, if that was launched at all.
    """

    start: float
    end: float
    stays: dict[str, list[Stay]]
    lives: dict[int, Life]
    emissions: list[Emitted]
    deaths: list[Died]
    finishes: list[Finished]
    failures: list[Failed]
    speculated: bool
    child: dict[int, int] = field(default_factory=dict)

    @property
    def stages(self) -> list[str]:
        return [station for station in self.stays if station != DRAFT]

    @property
    def in_steps(self) -> bool:
        """Every stage takes exactly 1 for a flight: the times of such a run are steps, and not seconds."""
        return all(stay.end - stay.start == 1 for station in self.stages for stay in self.stays[station])

    @property
    def hits(self) -> int:
        return sum(one.fate == "hit" for one in self.emissions)

    @property
    def misses(self) -> int:
        return sum(one.fate == "miss" for one in self.emissions)

    def all_stays(self) -> Iterator[Stay]:
        for stays in self.stays.values():
            yield from stays


def history(events: Iterable[Event]) -> History:
    """Sort a stream. Raises `UsageError` when nothing in it took time: there is nothing to draw then."""
    stream = list(events)
    legs = list(_legs(stream))
    if not legs:
        raise UsageError("the trace shows no work: no flight landed and no draft call returned",
                         hint="Record a run that emits at least one token.")
    deaths = _all(Died, stream)
    told = History(
        min(stream[0].time, *(leg.start for _, leg in legs)), max(stream[-1].time, *(leg.end for _, leg in legs)),
        _stays(legs, {node: event.time for event in deaths for node in event.nodes}), _lives(stream),
        _all(Emitted, stream), deaths, _all(Finished, stream), _all(Failed, stream),
        speculated=any(parent >= 0 for event in _all(Launched, stream) for parent in event.parents))
    _commit(told)
    return told


def tokens_of(events: Iterable[Event]) -> set[int]:
    """Every token that a picture may have to name."""
    found: set[int] = set()
    for event in events:
        if isinstance(event, Launched | Landed):
            found.update(event.tokens)
        elif isinstance(event, Emitted):
            found.add(event.token)
    return found


def _all(kind: type[E], stream: Iterable[Event]) -> list[E]:
    return [event for event in stream if isinstance(event, kind)]


def _legs(stream: Iterable[Event]) -> Iterator[tuple[int, Leg]]:
    for event in stream:
        if isinstance(event, Landed):
            yield from ((event.flight, leg) for leg in event.legs)
        elif isinstance(event, Drafted):
            yield event.job, event.leg


def _stays(legs: list[tuple[int, Leg]], dead: dict[int, float]) -> dict[str, list[Stay]]:
    """A stay without rows (all were cancelled before it) took no work and is left out."""
    stations = sorted({leg.station for _, leg in legs}, key=_place)
    found: dict[str, list[Stay]] = {station: [] for station in stations}
    for number, leg in legs:
        if leg.nodes:
            found[leg.station].append(Stay(leg.station, number, leg.start, leg.end, leg.nodes, alive_rows(leg, dead)))
    for stays in found.values():
        stays.sort(key=lambda stay: stay.start)
    return found


def _place(station: str) -> tuple[int, str]:
    """The draft first; "stage 10" after "stage 9"."""
    number = re.search(r"\d+$", station)
    return (int(number[0]) if number else -1), station


# ---- nodes -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Guess:
    """Names a place in a draft's answer: guess `index` of `expansion`, or with -1 the node that it is about."""

    expansion: Expansion
    index: int
    job: int
    time: float

    def followed_by(self, token: int) -> _Guess | None:
        columns = zip(self.expansion.tokens, self.expansion.parents)
        index = next((i for i, one in enumerate(columns) if one == (token, self.index)), None)
        return None if index is None else _Guess(self.expansion, index, self.job, self.time)


def _lives(stream: list[Event]) -> dict[int, Life]:
    """Every launched node. The guesses of a draft call are followed from node to node as these are launched."""
    lives: dict[int, Life] = {}
    guesses: defaultdict[int, list[_Guess]] = defaultdict(list)
    missed: dict[tuple[int, int], int] = {}  # request and position of a missed token -> the node before it
    for event in stream:
        match event:
            case Launched():
                for life in _launched(event, missed):
                    _find_guess(life, guesses)
                    lives[life.id] = life
            case Drafted():
                for expansion in event.expansions:
                    guesses[expansion.node].append(_Guess(expansion, -1, event.job, event.time))
            case Landed():
                stuck = dict(event.stuck)
                for id, token in zip(event.nodes, event.tokens):
                    if found := lives.get(id):
                        found.landed, found.next_token = event.time, None if id in stuck else token
            case Emitted() if not event.hit:
                missed[event.request, event.position] = event.node
            case Died():
                for id in event.nodes:
                    if found := lives.get(id):
                        found.died = event.time
    return lives


def _launched(event: Launched, missed: dict[tuple[int, int], int]) -> Iterator[Life]:
    columns = zip(event.nodes, event.requests, event.tokens, event.positions, event.parents, strict=True)
    for id, request, token, position, parent in columns:
        if parent < 0:  # a root: the last prompt token, or one that was missed
            parent = missed.get((request, position), -1)
        yield Life(id, request, token, position, parent, event.flight, event.time)


def _find_guess(life: Life, guesses: defaultdict[int, list[_Guess]]) -> None:
    places = [place for guess in guesses.get(life.parent, ()) if (place := guess.followed_by(life.token))]
    if places:
        guesses[life.id] += places
        first = min(places, key=lambda place: place.time)
        life.job, life.proposed = first.job, first.time


def _commit(told: History) -> None:
    """Find the node of every emitted token."""
    by_place = {(life.parent, life.token): life for life in told.lives.values() if life.parent >= 0}
    for index, one in enumerate(told.emissions):
        if life := by_place.get((one.node, one.token)):
            life.committed = one.time
            told.child[index] = life.id
