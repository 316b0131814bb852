"""Merging guesses of several sources into one tree."""

import math

import pytest

from fullpipe.messages import Expansion
from fullpipe.sources.mix import merge


def expansion(*guesses: tuple[int, float, int]) -> Expansion:
    return Expansion(4, [t for t, _, _ in guesses], [math.log(p) for _, p, _ in guesses], [u for _, _, u in guesses])


def test_every_guess_once_and_chains_kept() -> None:
    model = expansion((10, 0.6, -1), (11, 0.3, -1), (12, 0.1, -1))
    ngram = expansion((11, 0.5, -1), (20, 0.8, 0), (21, 0.9, 1), (30, 0.4, -1))
    merged = merge([model, ngram])
    assert merged.tokens == [10, 11, 12, 20, 21, 30]
    assert merged.parents == [-1, -1, -1, 1, 3, -1]
    assert [math.exp(logprob) for logprob in merged.logprobs] == pytest.approx([0.6, 0.4, 0.1, 0.8, 0.9, 0.2])


def test_without_a_judge_nothing_is_discounted() -> None:
    chain = expansion((1, 0.9, -1), (2, 0.8, 0))
    assert merge([Expansion(4, [], [], []), chain]) == chain


def test_the_same_chain_twice_is_one_chain() -> None:
    chain = expansion((1, 0.9, -1), (2, 0.8, 0))
    merged = merge([chain, chain])
    assert (merged.tokens, merged.parents) == ([1, 2], [-1, 0])
    assert merged.logprobs == pytest.approx(chain.logprobs)
