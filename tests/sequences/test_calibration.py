"""Claims are mapped to what became of claims like them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import Expansion
from fullpipe.sequences.calibration import KNOTS, Calibration, check_counts
from fullpipe.sequences.tree import Node

probabilities = st.floats(1e-6, 1.0)
fates = st.lists(st.tuples(st.integers(0, 2), probabilities, st.booleans()), max_size=200)


def taught(seen: list[tuple[int, float, bool]]) -> Calibration:
    one = Calibration()
    for kind, probability, hit in seen:
        one.note(kind, math.log(probability), hit)
    return one


def said(*guesses: tuple[int, float, int], sources: tuple[int, ...] = ()) -> Expansion:
    return Expansion(0, [t for t, _, _ in guesses], [math.log(p) for _, p, _ in guesses], [u for _, _, u in guesses],
                     sources=list(sources))


def node(token: int) -> Node:
    return Node(0, token, None, 0, 0.0)


@given(fates, st.lists(probabilities, min_size=2), st.integers(0, 2))
def test_a_likelier_claim_stays_the_likelier_one_and_none_leaves_0_to_1(seen: list[tuple[int, float, bool]],
                                                                        claims: list[float], kind: int) -> None:
    one = taught(seen)
    mapped = [one.map(kind, math.log(claim)) for claim in sorted([*claims, *KNOTS, 1.0])]
    assert all(before <= after + 1e-9 for before, after in pairwise(mapped))
    assert all(-math.inf < own <= 0 for own in mapped)


@given(st.lists(probabilities, max_size=16), st.booleans())
def test_who_has_seen_nothing_believes_every_word(claims: list[float], again: bool) -> None:
    total = max(sum(claims), 1.0)
    whole = said(*((token, claim / total, -1) for token, claim in enumerate(claims)))
    assert Calibration().believed(whole, again).logprobs == whole.logprobs


@given(fates, st.lists(st.tuples(probabilities, st.integers(0, 5), st.integers(0, 3)), max_size=12), st.booleans(),
       st.booleans())
def test_what_follows_one_parent_is_at_most_certain_together(
        seen: list[tuple[int, float, bool]], guesses: list[tuple[float, int, int]], chained: bool, again: bool) -> None:
    parents = [own % (at + 1) - 1 if chained else -1 for at, (_, own, _) in enumerate(guesses)]
    whole = said(*((at, guess[0], under) for at, (guess, under) in enumerate(zip(guesses, parents))),
                 sources=tuple(source for _, _, source in guesses) if chained else ())
    believed = taught(seen).believed(whole, again)
    assert (believed.tokens, believed.parents, believed.sources) == (whole.tokens, whole.parents, whole.sources)
    for under in set(parents):
        assert sum(math.exp(own) for own, parent in zip(believed.logprobs, parents) if parent == under) <= 1 + 1e-5


def test_the_likelier_of_too_much_is_believed_and_the_others_share_what_is_left() -> None:
    """A mixture: what n-gram repeats and the model does not expect stands beside what the model is sure of."""
    whole = said((5, 0.45, -1), (6, 0.9, -1), (7, 0.02, -1), (8, 1e-12, -1), (9, 0.8, 0))
    for one in (whole, said((5, 0.45, -1), (6, 0.9, -1), (7, 0.02, -1), (8, 1e-12, -1))):
        believed = [math.exp(own) for own in Calibration().believed(one).logprobs]
        assert believed[:2] == pytest.approx([0.1, 0.9])
        assert believed[2] < 1e-8 and believed[3] == pytest.approx(1e-12), "none gains by it"


def test_a_draft_that_has_learned_itself_is_taken_at_its_word() -> None:
    one, root = taught([(0, 0.5, False)] * 100 + [(2, 0.5, False)] * 100), node(1)
    own = Expansion(0, [5, 6], [math.log(0.5)] * 2, [-1, 0], learned=True)
    before = one.counts()
    assert one.take(root, own).logprobs == own.logprobs
    one.learn(root, node(5))
    assert one.counts() == before and one.right == (1, 1, 1), "how often it is right is counted all the same"
    assert one.believed(said((5, 0.5, -1), (6, 0.5, 0))).logprobs[0] < math.log(0.1)


@pytest.mark.parametrize("truth", [
    lambda claim: claim, lambda claim: claim / 2, lambda claim: 0.5 * math.sqrt(claim), lambda claim: 0.3,
    lambda claim: 0.9 if claim > 0.5 else 0.02], ids=["true", "half", "root", "constant", "step"])
def test_it_finds_the_rates_of_a_draft_that_lies(truth: Callable[[float], float]) -> None:
    chance, one = random.Random(7), Calibration()
    for _ in range(12_000):
        claim = chance.choice([0.02, 0.07, 0.2, 0.4, 0.7, 0.9])
        one.note(0, math.log(claim), chance.random() < truth(claim))
    for claim in (0.02, 0.07, 0.2, 0.4, 0.7, 0.9):
        assert math.exp(one.map(0, math.log(claim))) == pytest.approx(truth(claim), abs=0.1)


def test_a_few_claims_change_little_and_only_those_of_their_kind() -> None:
    one = taught([(0, 0.5, number % 5 in (0, 1, 3)) for number in range(40)])
    assert 0.505 < math.exp(one.map(0, math.log(0.5))) < 0.56
    assert one.map(1, math.log(0.5)) == math.log(0.5)


def test_what_cannot_be_chance_is_believed_at_once() -> None:
    assert math.exp(taught([(0, 0.9, False)] * 40).map(0, math.log(0.9))) < 0.1
    assert math.exp(taught([(0, 0.3, True)] * 40).map(0, math.log(0.3))) > 0.7


def test_it_forgets() -> None:
    one = taught([(0, 0.5, False)] * 3000 + [(0, 0.5, True)] * 2500)
    assert math.exp(one.map(0, math.log(0.5))) > 0.8


def test_what_is_sure_can_be_doubted_and_what_is_impossible_is_let_be() -> None:
    one = taught([(0, 1.0, number % 2 == 0) for number in range(200)])
    assert math.exp(one.map(0, 0.0)) == pytest.approx(0.5, abs=0.1)
    assert one.map(0, -math.inf) == -math.inf
    one.note(0, -math.inf, False)
    assert one.noted == 200


def test_every_direct_guess_is_judged_and_the_next_of_a_chain() -> None:
    """Kinds: 0 first sight, 1 another look, 2 behind a guess."""
    one, root, true, last = Calibration(), node(1), node(5), node(6)
    one.take(root, said((5, 0.5, -1), (7, 0.3, -1), (6, 0.9, 0), (8, 0.9, 2), (9, 0.9, 1)))
    one.take(root, said((5, 0.8, -1)))
    one.learn(root, true)
    assert claims(one) == {0: (2, 1), 1: (1, 1)}
    one.learn(true, last)  # of the chain: 6 behind 5 was right; 9 stood behind a wrong guess, 8 is too far
    assert claims(one) == {0: (2, 1), 1: (1, 1), 2: (1, 1)}
    one.learn(last, node(8))
    assert claims(one) == {0: (2, 1), 1: (1, 1), 2: (1, 1)}


def test_who_named_a_guess_makes_a_kind() -> None:
    one, root = Calibration(), node(1)
    one.take(root, said((5, 0.5, -1), (6, 0.3, -1), (7, 0.2, -1), sources=(3, 1, 2)))
    one.learn(root, node(6))
    assert claims(one) == {9: (1, 0), 3: (1, 1), 6: (1, 0)}


def claims(one: Calibration) -> dict[int, tuple[int, int]]:
    """By kind, how many were noted and how many came true."""
    return {kind: (round(sum(row[0] for row in rows)), round(sum(row[2] for row in rows)))
            for kind, rows in one.counts().items()}


@given(fates)
def test_counts_make_the_same_map_again(seen: list[tuple[int, float, bool]]) -> None:
    one = taught(seen)
    check_counts(one.counts())
    again, twice = Calibration(one.counts()), Calibration(Calibration(one.counts()).counts())
    for kind, claim in zip(count(), KNOTS):
        assert again.map(kind % 3, math.log(claim)) == twice.map(kind % 3, math.log(claim))
    assert again.counts() == one.counts()


@pytest.mark.parametrize("rows", [[(1.0, 0.5, 0.5)], [(1.0, 0.5, 2.0)] * len(KNOTS), [(1.0, -0.5, 0.0)] * len(KNOTS),
                                  [(math.nan, 0.0, 0.0)] * len(KNOTS), [(1e9, 0.0, 0.0)] * len(KNOTS)])
def test_what_cannot_have_been_counted_is_refused(rows: list[tuple[float, float, float]]) -> None:
    with pytest.raises(ValueError, match="kind 4"):
        check_counts({4: rows})


def test_it_counts_how_often_the_best_guess_was_right_and_any() -> None:
    one = Calibration()
    for token in (5, 6, 7):
        root = node(1)
        one.take(root, said((5, 0.6, -1), (6, 0.3, -1), (7, 0.9, 0)))
        one.learn(root, node(token))
    assert one.right == (3, 1, 2), "what follows a guess is no guess of the next token"
    one.learn(node(1), node(2))
    assert one.right == (3, 1, 2), "nobody had been asked"
    silent = node(1)
    silent.answered = True
    one.learn(silent, node(2))
    assert one.right == (4, 1, 2), "the draft had nothing to say"
