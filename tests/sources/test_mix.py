"""Merging guesses of several sources into one tree."""

from fullpipe.messages import Expansion
from fullpipe.sources.mix import merge


def test_every_guess_once_with_the_highest_probability_and_chains_kept() -> None:
    model = Expansion(4, [10, 11, 12], [-0.1, -2.0, -3.0], [-1, -1, -1])
    ngram = Expansion(4, [11, 20, 21], [-0.5, -0.2, -0.3], [-1, 0, 1])
    merged = merge([model, ngram])
    assert merged == Expansion(4, [10, 11, 12, 20, 21], [-0.1, -0.5, -3.0, -0.2, -0.3], [-1, -1, -1, 1, 3])


def test_the_same_chain_twice_is_one_chain() -> None:
    chain = Expansion(4, [1, 2], [-0.1, -0.2], [-1, 0])
    assert merge([chain, chain]) == chain
