"""The shipped fake: a draft that proposes what it is told, with a stated accuracy. No torch.

It knows the truth (see `fullpipe.pipeline.scripted`) and puts the true token first with probability
`accuracy`, among its other guesses with probability `coverage - accuracy`, and else leaves it out. Which
of these happens is a hash of the path and the seed: the same question always has the same answer.
"""

from __future__ import annotations

import math

from fullpipe.kvcache.slots import SlotTable
from fullpipe.messages import Expansion, Flight, Part
from fullpipe.pipeline.scripted import Truth, answerer, hash_token

_RESOLUTION = 1 << 20


class ScriptedSource:
    """accuracy: how often the first guess is true. coverage: how often any guess is.

    Guess r (from 0) is given the probability accuracy * (1 - accuracy)**r: the truth is rarer further
    down, as with a real draft.
    """

    def __init__(self, truth: Truth, *, accuracy: float = 0.8, coverage: float = 0.95, seed: int = 0,
                 vocab: int = 50) -> None:
        self.accuracy, self.coverage, self.seed, self.vocab = accuracy, coverage, seed, vocab
        self._answer = answerer(truth)
        self._tables: dict[int, SlotTable] = {}

    def run(self, job: Flight) -> list[Expansion]:
        for opening in job.opens:
            self._tables[opening.request] = SlotTable(opening)
        expansions = []
        for part in job.parts:
            table = self._tables[part.request]
            table.apply(part)
            expansions += [self._expand(table, part, row, job.top_k) for row in range(len(part)) if part.wants[row]]
        for request in job.closes:
            self._tables.pop(request, None)
        return expansions

    def _expand(self, table: SlotTable, part: Part, row: int, top_k: int) -> Expansion:
        path = table.tail(part, row, 3)
        truth = self._answer(table, part, row)
        chance = hash_token([*path[-2:], part.positions[row]], _RESOLUTION, self.seed) / _RESOLUTION
        wrong = [token for token in range(top_k + 1) if token != truth][:top_k]
        if chance < self.accuracy:
            rank = 0
        elif chance < self.coverage and top_k > 1:
            rank = 1 + hash_token(path, top_k - 1, self.seed + 1)
        else:
            rank = top_k
        tokens = [*wrong[:rank], truth, *wrong[rank:]][:top_k]
        decay = math.log(max(1 - self.accuracy, 1e-9))
        first = math.log(max(self.accuracy, 1e-9))
        return Expansion(part.nodes[row], tokens, [first + r * decay for r in range(len(tokens))], [-1] * len(tokens))
