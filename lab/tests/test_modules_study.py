"""The study of draft modules: cells by name, and texts that must be the target's."""

from __future__ import annotations

import pytest

from fullpipe.errors import UsageError
from fullpipe_lab.studies.modules import Cell, near_tie, row

TRUTH = {"tokens": [1, 2, 3], "margins": [9.0, 0.1, 9.0]}


def test_a_cell_is_read_and_named() -> None:
    assert Cell.of("spd:a/b+ngram,fullpipe,8,w4,t0.5,r") == Cell("spd:a/b,ngram", "fullpipe", 8, 4, 0.5, True)
    assert Cell.of("none,pp,2").name == "none/pp/n2/T0"
    for text in ("", "spd", "a,b,c", "a,b,2,x"):
        with pytest.raises(UsageError, match="is no cell"):
            Cell.of(text)


def test_a_text_may_leave_the_targets_at_a_near_tie_alone() -> None:
    assert near_tie(TRUTH, [1, 2, 3]) is None and near_tie(TRUTH, [1, 7, 3]) == 1
    with pytest.raises(AssertionError, match=r"led by 9\.00"):
        near_tie(TRUTH, [8, 2, 3])
    with pytest.raises(AssertionError, match="2 tokens instead of 3"):
        near_tie(TRUTH, [1, 2])


def test_a_row_is_over_all_prompts() -> None:
    samples = [{"tokens": [1] * 4, "steps": 8.0, "hits": 2, "misses": 1, "near_tie": None},
               {"tokens": [1] * 6, "steps": 6.0, "hits": 5, "misses": 0, "near_tie": 3}]
    assert row(Cell("a", "spd", 4), samples) == {
        "cell": "a/spd/n4/T0", "prompts": 2, "hit_rate": 0.875, "steps_per_token": 1.4, "near_ties": 1}
