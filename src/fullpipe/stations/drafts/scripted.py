"""The shipped fake draft proposes what it is told, with a stated accuracy. No torch.

It knows the truth (see `fullpipe.stations.scripted`) and puts the true token first with probability
`accuracy`, among its other guesses with probability `coverage - accuracy`, and else leaves it out. Which
of these happens is a hash of the path and the seed: the same question always has the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from fullpipe.messages import Expansion, Flight, Part, Tap
from fullpipe.stations.drafts.chains import go_on
from fullpipe.stations.scripted import Truth, answerer, hash_token, tap_features
from fullpipe.stations.table import SlotTable, Tables

_RESOLUTION = 1 << 20


class ScriptedDraft:
    """Knows what is true, and says it as often as it is told.

    accuracy: how often the first guess is true. coverage: how often any guess is.

    Guess r (from 0) is given the probability accuracy * (1 - accuracy)**r: the truth is rarer further
    down, as with a real draft.
    """

    def __init__(self, truth: Truth, *, accuracy: float = 0.8, coverage: float = 0.95, seed: int = 0,
                 vocab: int = 50) -> None:
        self.accuracy, self.coverage, self.seed, self.vocab = accuracy, coverage, seed, vocab
        self._answer = answerer(truth)
        self._tables = Tables()

    def run(self, job: Flight) -> list[Expansion]:
        self._tables.open(job.opens)
        expansions = []
        for part in job.parts:
            table = self._tables[part.arena]
            table.apply(part)
            wanted = [row for row in range(len(part)) if part.wants[row]]
            said = [self._expand(table, part, row, job.fanout) for row in wanted]
            if said and part.ahead:
                go_on(part, wanted[0], said[0], job.least, partial(self._ask, table, job.fanout))
            expansions += said
        self._tables.close(job.closes)
        return expansions

    def _ask(self, table: SlotTable, fanout: int, one: Part) -> tuple[list[int], list[float]]:
        """What follows the only row of a part."""
        table.apply(one)
        said = self._expand(table, one, 0, fanout)
        return said.tokens, said.logprobs

    def _expand(self, table: SlotTable, part: Part, row: int, fanout: int) -> Expansion:
        path = table.tail(part, row, 3)
        truth = self._answer(table, part, row)
        chance = hash_token([*path[-2:], part.positions[row]], _RESOLUTION, self.seed) / _RESOLUTION
        wrong = [token for token in range(fanout + 1) if token != truth][:fanout]
        if chance < self.accuracy:
            rank = 0
        elif chance < self.coverage and fanout > 1:
            rank = 1 + hash_token(path, fanout - 1, self.seed + 1)
        else:
            rank = fanout
        tokens = [*wrong[:rank], truth, *wrong[rank:]][:fanout]
        decay = math.log(max(1 - self.accuracy, 1e-9))
        first = math.log(max(self.accuracy, 1e-9))
        return Expansion(part.nodes[row], tokens, [first + r * decay for r in range(len(tokens))], [-1] * len(tokens))


class TapChecker(ScriptedDraft):
    """Reads the taps of scripted stages besides, and checks that each is what it should be.

    needs: layers of a node that must have come before a job that wants it may start.
    tell: answer with the layers that have come for the node, as a chain of tokens in order of arrival: no guesses.
    options: see `ScriptedDraft`.

    Raises AssertionError for features that belong to another row, for a layer that came before, for flights of one
    stage out of order, for rows before their request is opened or after it is closed, and for a job started too early.
    """

    def __init__(self, truth: Truth, *, needs: int = 1, tell: bool = False, **options: Any) -> None:
        super().__init__(truth, **options)
        self.needs, self.tell = needs, tell
        self.layers: dict[_Row, list[int]] = {}  # that have come, in order
        self._forgotten: set[int] = set()
        self._newest: dict[tuple[int, ...], int] = {}  # by layers, which name the stage: the newest flight
        self._open: set[tuple[int, tuple[int, ...]]] = set()  # requests, of each stage

    def take(self, tap: Tap) -> None:
        flight, stage = tap.flight, tuple(tap.layers)
        assert np.array_equal(tap.features, tap_features(flight, tap.layers)), f"flight {flight.id}: {tap.features}"
        assert flight.id > self._newest.get(stage, -1), f"flight {flight.id} came again, or late"
        self._newest[stage] = flight.id
        self._open |= {(opening.arena, stage) for opening in flight.opens}
        for request, node, position in _rows(flight):
            assert (request, stage) in self._open, f"flight {flight.id}: request {request} is not open"
            layers = self.layers.setdefault(_row(request, node, position), [])
            assert not {*layers} & {*tap.layers}, f"node {node} has {layers}, and {tap.layers} came"
            layers += tap.layers
        self._open -= {(request, stage) for request in flight.closes}

    def ready(self, job: Flight) -> bool:
        return all(len(self._seen(*row)) >= self.needs or row[1] in self._forgotten for row in _rows(job, wanted=True))

    def forget(self, nodes: list[int]) -> None:
        self._forgotten.update(nodes)

    def run(self, job: Flight) -> list[Expansion]:
        assert self.ready(job), f"job {job.id} was started too early"
        if not self.tell:
            return super().run(job)
        return [Expansion(row[1], layers, [0.0] * len(layers), list(range(-1, len(layers) - 1)))
                for row in _rows(job, wanted=True) for layers in [list(self._seen(*row))]]

    def _seen(self, request: int, node: int, position: int) -> list[int]:
        return self.layers.get(_row(request, node, position), [])


_Row = tuple[int, int]  # -1 and the node; of prompt rows, which are no nodes, request and position


def _row(request: int, node: int, position: int) -> _Row:
    return (-1, node) if node >= 0 else (request, position)


def _rows(flight: Flight, *, wanted: bool = False) -> Iterator[tuple[int, int, int]]:
    """Request, node and position of all rows, or of the wanted ones."""
    for part in flight.parts:
        for node, position, wants in zip(part.nodes, part.positions, part.wants):
            if wants or not wanted:
                yield part.arena, node, position
