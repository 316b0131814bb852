"""Arithmetic says here where to cut a model into stages. Costs may be seconds or bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from fullpipe.errors import UsageError

# Sums of the same costs in another order differ in their last bits; so small a gain decides nothing.
_TOLERANCE = 1e-9


def cut(costs: Sequence[float], head: float, embedding: float, stages: int) -> list[range]:
    """The layers of each stage, cut so that the slowest stage costs least.

    costs: of each layer. head: of the final norm, head and sampling, added to the last stage. embedding:
    added to the first. All 0 or more, in one unit. stages: from 1 to the number of layers.

    A stage without layers appears only where it makes the slowest stage cheaper: a head that outweighs the
    layers may be alone on the last stage, an embedding on the first. Among equally good cuts the one with the
    least sum of squares is taken, which is the most even one.

    Takes O(stages x layers^2) steps. Raises `UsageError` for a number of stages out of range.
    """
    if not 1 <= stages <= len(costs):
        raise UsageError(
            f"cannot cut {len(costs)} layers into {stages} stages",
            hint=f"Choose from 1 to {len(costs)} stages.",
        )
    search = _Search(costs, head, embedding, stages)
    return search.most_even(search.least_maximum() * (1 + _TOLERANCE))


def stage_costs(
    stages: Sequence[range], costs: Sequence[float], head: float, embedding: float
) -> list[float]:
    """What each stage of a cut costs, in the unit of `costs`."""
    totals = [float(sum(costs[layer] for layer in layers)) for layers in stages]
    totals[0] += embedding
    totals[-1] += head
    return totals


class _Search:
    """Finds a best cut by dynamic programming over (stage, first layer after it): each begins with a best cut."""

    def __init__(self, costs: Sequence[float], head: float, embedding: float, stages: int) -> None:
        assert min(*costs, head, embedding) >= 0, "costs are 0 or more"
        self._sums = [0.0, *accumulate(costs)]
        self._head = head
        self._embedding = embedding
        self._stages = stages
        self._layers = len(costs)

    def _cost(self, stage: int, first: int, end: int) -> float:
        ends = self._embedding * (stage == 0) + self._head * (stage == self._stages - 1)
        return self._sums[end] - self._sums[first] + ends

    def least_maximum(self) -> float:
        """The cost of the slowest stage in the best cut, stages without layers allowed."""
        best = [self._cost(0, 0, end) for end in range(self._layers + 1)]
        for stage in range(1, self._stages):
            best = [
                min(max(best[first], self._cost(stage, first, end)) for first in range(end + 1))
                for end in range(self._layers + 1)
            ]
        return best[-1]

    def most_even(self, limit: float) -> list[range]:
        """Of the cuts with no stage above `limit`: fewest empty stages, then least sum of squares."""
        best: list[tuple[int, float, list[range]] | None] = [(0, 0.0, [])] + [None] * self._layers
        for stage in range(self._stages):
            best = [self._best_with(stage, end, best, limit) for end in range(self._layers + 1)]
        found = best[-1]
        assert found is not None, "the limit comes from a cut that exists"
        return found[2]

    def _best_with(
        self, stage: int, end: int, best: Sequence[tuple[int, float, list[range]] | None], limit: float
    ) -> tuple[int, float, list[range]] | None:
        """The best cut whose stage `stage` ends before layer `end`, given the best of the stage before."""
        options = []
        for first in range(end + 1):
            cost, before = self._cost(stage, first, end), best[first]
            if before is not None and cost <= limit:
                options.append((before[0] + (first == end), before[1] + cost * cost, first))
        if not options:
            return None
        empty, squares, first = min(options)
        cut_before = best[first]
        assert cut_before is not None
        return empty, squares, [*cut_before[2], range(first, end)]
