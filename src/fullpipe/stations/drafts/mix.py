"""Several drafts share one station, and their guesses are merged into one tree. No torch of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import cast

from msgspec import convert
from msgspec.structs import replace

from fullpipe.messages import ArenaId, Expansion, Flight, Part, Tap
from fullpipe.stations.base import DraftLike, least_slots, tap_reader
from fullpipe.stations.drafts.chains import chain_rows
from fullpipe.stations.spec import StationSpec

_LN2 = math.log(2)


class Mix:
    """Asks every draft and merges what they say. Put the draft first whose probabilities are the best: see
    `merge`.

    second: rows that the drafts after the first are asked about. A job names the best nodes first, and what a
    draft takes delays the answer to all of them (docs/log).
    """

    def __init__(self, drafts: Sequence[DraftLike], *, second: int = 4) -> None:
        self._drafts = list(drafts)
        self._second = second
        self._readers = {rank: reader for rank, draft in enumerate(drafts) if (reader := tap_reader(draft))}
        self._open: dict[int, ArenaId] = {}  # nodes that the first draft has yet to answer for
        self._held: dict[int, list[Expansion]] = {}  # what the others said of them

    @property
    def cache_slots(self) -> int | None:
        return least_slots(self._drafts)

    @property
    def reads_taps(self) -> bool:
        return bool(self._readers)

    def take(self, tap: Tap) -> None:
        for reader in self._readers.values():
            reader.take(tap)

    def ready(self, job: Flight) -> bool:
        """Whether every draft that reads taps is ready for what it will be asked."""
        return all(reader.ready(self._question(rank, job)) for rank, reader in self._readers.items())

    def forget(self, nodes: list[int]) -> None:
        for reader in self._readers.values():
            reader.forget(nodes)
        self._let_go(nodes)

    def run(self, job: Flight) -> list[Expansion]:
        """A draft that reads taps may answer for a node later. What the others say of it waits, for a node is
        answered once."""
        answers: dict[int, list[Expansion]] = {}
        for rank, draft in enumerate(self._drafts):
            said = draft.run(self._question(rank, job))
            for expansion in said:
                answers.setdefault(expansion.node, []).append(
                    replace(expansion, sources=[1 << rank] * len(expansion.tokens)))
            if rank == 0:
                job = _with_chains(job, said)
            if rank == 0 and rank in self._readers:
                answered = set(answers)
                for node in answered & self._held.keys():
                    answers[node] += self._held.pop(node)
        if 0 in self._readers:
            self._hold(job, {node: said for node, said in answers.items() if node not in answered}, answered)
            answers = {node: answers[node] for node in answers if node in answered}
        return [merge(expansions) for expansions in answers.values()]

    def _hold(self, job: Flight, said: dict[int, list[Expansion]], answered: set[int]) -> None:
        """Keep what was said of nodes that wait for the first draft, until it answers, somebody forgets them, or their
        arena ends."""
        self._open |= {node: part.arena for part in job.parts for node, wanted in zip(part.nodes, part.wants) if wanted}
        self._let_go(answered)
        for node in said.keys() & self._open.keys():
            self._held[node] = said[node]
        if job.closes:
            self._let_go([node for node, arena in self._open.items() if arena in job.closes])

    def _let_go(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            self._open.pop(node, None)
            self._held.pop(node, None)

    def _question(self, rank: int, job: Flight) -> Flight:
        return first_rows(job, self._second) if rank else job


def first_rows(job: Flight, count: int) -> Flight:
    """The same job, answers wanted for its first `count` wanted rows only. Rows and commits all stay."""
    parts = []
    for part in job.parts:
        wants = []
        for wanted in part.wants:
            wants.append(wanted and count > 0)
            count -= wanted
        parts.append(replace(part, wants=wants))
    return replace(job, parts=parts)


def _with_chains(job: Flight, said: Sequence[Expansion]) -> Flight:
    """The job for all drafts but the first: it alone goes on by itself, and what it has computed on its way the others
    must know of too, for those slots are filled now."""
    chains = {one.node: [one.tokens[index] for index in one.computed] for one in said if one.computed}
    parts = []
    for part in job.parts:
        if part.ahead:
            row = next((row for row, node in enumerate(part.nodes) if part.wants[row] and node in chains), None)
            part = part if row is None else _joined(part, chain_rows(part, row, chains[part.nodes[row]]))
            part = replace(part, ahead=[])
        parts.append(part)
    return replace(job, parts=parts)


def _joined(part: Part, chain: Part) -> Part:
    """The part, and behind its rows those of a chain, of which nobody wants to hear."""
    return Part(part.arena, part.commits, part.nodes + chain.nodes, part.tokens + chain.tokens,
                part.positions + chain.positions, part.slots + chain.slots, part.paths + chain.paths,
                part.wants + [False] * len(chain))


def merge(expansions: Sequence[Expansion]) -> Expansion:
    """One expansion of the same node that holds every guess once, chains included.

    What directly follows the node: the first draft has looked at all tokens, the others know of a few. So a
    token that both name gets the mean of their probabilities, one that only a later draft names gets half
    of what that draft gives it (the first one's share is next to nothing), and one that only the first
    names keeps its own. Further down a chain there is no second opinion. These are rules of thumb: what they are
    worth is learned from who named a guess (`Expansion.sources`).
    """
    merged = Expansion(expansions[0].node, [], [], [])
    places: dict[tuple[int, int], int] = {}  # (parent index in the merged one, token) -> index
    first_spoke = -1 in expansions[0].parents
    for rank, expansion in enumerate(expansions):
        moved: list[int] = []
        for token, logprob, parent, source in zip(expansion.tokens, expansion.logprobs, expansion.parents,
                                                  expansion.sources or repeat(0)):
            under = moved[parent] if parent >= 0 else -1
            index = places.setdefault((under, token), len(merged.tokens))
            if index == len(merged.tokens):
                merged.tokens.append(token)
                merged.logprobs.append(logprob - _LN2 if rank and first_spoke and under < 0 else logprob)
                merged.parents.append(under)
                merged.sources.append(source)
            else:
                merged.sources[index] |= source
                merged.logprobs[index] = math.log((math.exp(merged.logprobs[index]) + math.exp(logprob)) / 2)
            moved.append(index)
        if rank == 0:  # who alone goes on by itself
            merged.computed = [moved[index] for index in expansion.computed]
    return merged


def build_mix(*, drafts: list[dict[str, object]]) -> Mix:
    """Build every draft of a list of station specs (as plain dictionaries)."""
    return Mix([cast(DraftLike, convert(spec, StationSpec).build()) for spec in drafts])
