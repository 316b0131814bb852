"""The cut against every possible cut, and the properties a user would notice."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.cluster.partition import cut, stage_costs
from fullpipe.errors import UsageError


def every_cut(layers: int, stages: int) -> list[list[range]]:
    """All cuts, those with empty stages included."""
    return [
        [range(a, b) for a, b in zip((0, *ends), (*ends, layers), strict=True)]
        for ends in combinations_with_replacement(range(layers + 1), stages - 1)
    ]


small_cost = st.integers(0, 12)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], float, float, int]:
    costs = draw(st.lists(small_cost, min_size=1, max_size=7))
    # Tenths: sums of them are not exact in binary, as real costs are not.
    scale = draw(st.sampled_from([1.0, 0.1]))
    head, embedding = draw(small_cost) * 2 * scale, draw(small_cost) * scale
    return [c * scale for c in costs], head, embedding, draw(st.integers(1, len(costs)))


@given(problems())
def test_no_other_cut_is_better(problem: tuple[list[float], float, float, int]) -> None:
    costs, head, embedding, stages = problem
    chosen = cut(costs, head, embedding, stages)

    def rank(layers: list[range]) -> tuple[float, int, float]:
        totals = stage_costs(layers, costs, head, embedding)
        empty = sum(len(part) == 0 for part in layers)
        return round(max(totals), 6), empty, round(sum(t * t for t in totals), 6)

    assert rank(chosen) == min(rank(layers) for layers in every_cut(len(costs), stages))


@given(problems())
def test_every_layer_is_on_one_stage_in_order(problem: tuple[list[float], float, float, int]) -> None:
    costs, head, embedding, stages = problem
    chosen = cut(costs, head, embedding, stages)
    assert len(chosen) == stages
    assert [layer for part in chosen for layer in part] == list(range(len(costs)))


def test_equal_layers_are_spread_evenly() -> None:
    sizes = [len(part) for part in cut([0.1] * 30, 0.0, 0.0, 8)]
    assert sorted(sizes) == [3, 3, 4, 4, 4, 4, 4, 4]


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    assert [len(part) for part in cut([1.0] * 8, 2.0, 0.0, 2)] == [5, 3]


def test_a_head_that_outweighs_layers_stands_alone() -> None:
    assert cut([1.0] * 4, 5.0, 0.0, 3) == [range(2), range(2, 4), range(4, 4)]


def test_an_empty_stage_that_gains_nothing_is_avoided() -> None:
    # The slowest stage costs 3 with or without layers beside the free head.
    assert cut([1.0, 3.0, 1.0], 0.0, 0.0, 3) == [range(1), range(1, 2), range(2, 3)]


def test_a_heavy_embedding_takes_layers_off_the_first_stage() -> None:
    assert [len(part) for part in cut([1.0] * 8, 0.0, 2.0, 2)] == [3, 5]


@pytest.mark.parametrize("stages", [0, -1, 5])
def test_the_number_of_stages_is_checked(stages: int) -> None:
    with pytest.raises(UsageError, match="4 layers") as caught:
        cut([1.0] * 4, 0.0, 0.0, stages)
    assert caught.value.hint is not None and "1 to 4" in caught.value.hint


def test_one_stage_per_layer_and_one_stage_for_all() -> None:
    assert cut([1.0] * 3, 0.5, 0.5, 3) == [range(1), range(1, 2), range(2, 3)]
    assert cut([1.0] * 3, 0.5, 0.5, 1) == [range(3)]
