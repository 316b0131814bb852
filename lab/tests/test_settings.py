"""What a benchmark tries, method by method."""

from __future__ import annotations

import pytest

from fullpipe.bench.settings import CHAIN_DEPTHS, Setting, candidates
from fullpipe.errors import UsageError
from fullpipe.methods import POLICIES

BOTH = ("model", "model,ngram")


@pytest.mark.parametrize("method", POLICIES)
def test_every_candidate_is_a_policy_of_its_method_and_no_two_are_alike(method: str) -> None:
    found = candidates(method, BOTH, (4, 8, 32, 64), None)
    assert found and len({one.key for one in found}) == len(found)
    for one in found:
        policy = one.policy()
        assert policy.name == method
        assert one.width is None or policy.width == one.width
        assert one.depth is None or policy.depth == one.depth  # type: ignore[attr-defined]


def test_what_is_tried_of_each_method() -> None:
    assert candidates("pp", BOTH, (4,), (3,)) == [Setting("pp", "none")]
    assert [(one.draft, one.depth) for one in candidates("chain", BOTH, (4,), (2, 3))] \
        == [("model", 2), ("model", 3), ("model,ngram", 2), ("model,ngram", 3)]
    assert {one.depth for one in candidates("chain", ("ngram",), (4,), None)} == set(CHAIN_DEPTHS)
    assert [(one.width, one.depth) for one in candidates("fullpipe", ("ngram",), (4, 64), (3,))] \
        == [(4, None), (64, None)]


def test_static_trees_of_too_many_rows_are_left_out() -> None:
    found = {(one.width, one.depth) for one in candidates("static-tree", ("ngram",), (8, 32, 64), (3, 16, 40))}
    assert found == {(8, 3), (8, 16), (32, 3)}


def test_an_unknown_method_names_the_known() -> None:
    with pytest.raises(UsageError, match="unknown method 'spp'") as caught:
        candidates("spp", BOTH, (4,), None)
    assert all(name in (caught.value.hint or "") for name in POLICIES)


def test_a_setting_in_words() -> None:
    assert str(Setting("static-tree", "model", 8, 4)) == "static-tree, width 8, depth 4, model"
    assert str(Setting("pp", "none")) == "pp"
