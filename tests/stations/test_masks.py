"""What may not be picked: allowed ids, bad words, ends that come too early and structures, held against a loop over the
whole vocabulary."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fullpipe.errors import ModelError
from fullpipe.request import SamplingParams
from fullpipe.stations.bits import Bits, bits_of, bools_of, mask, mask_slowly
from fullpipe.stations.masks import leading, may_follow
from fullpipe.stations.sampling import RowContext, pick, process, rank, tell_logprobs, typical
from fullpipe.stations.structure import Place

VOCAB, ENDS = 40, (3, 5)


class Fixed:
    """A walk that always says the same."""

    def __init__(self, allowed: Sequence[int] | None) -> None:
        self.allowed = allowed

    def may_follow(self, place: Place) -> Bits | None:
        return None if self.allowed is None else bits_of(np.array([token in self.allowed for token in range(64)]))


def place(output: Sequence[int]) -> Place:
    return Place(len(output), 0, lambda count: list(output[-count:]))


def row(params: SamplingParams, output: Sequence[int] = (), walk: Fixed | None = None) -> RowContext:
    history = np.array([1, 2], np.int64), np.array(output, np.int64)
    return RowContext(params, 2 + len(output), lambda: history, place(output), ENDS, walk)  # type: ignore[arg-type]


def slowly(params: SamplingParams, output: list[int], token: int) -> bool:
    """Whether a token may not follow, as it is written."""
    if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
        return True
    if len(output) < params.min_tokens and (token in ENDS or token in params.stop_token_ids):
        return True
    after = (*output, token)
    return any(len(word) <= len(after) and after[-len(word):] == word for word in params.bad_word_ids)


def some_params(dice: random.Random) -> SamplingParams:
    words = tuple(tuple(dice.choices(range(6), k=dice.randrange(1, 4))) for _ in range(dice.randrange(4)))
    allowed = tuple(dice.sample(range(VOCAB), 20)) if dice.random() < 0.4 else None
    return SamplingParams(min_tokens=dice.randrange(5), bad_word_ids=words, allowed_token_ids=allowed,
                          stop_token_ids=tuple(dice.sample(range(VOCAB), 2)))


@pytest.mark.parametrize("seed", range(60))
def test_masks_are_those_of_a_loop_over_the_vocabulary(seed: int) -> None:
    dice = random.Random(seed)
    params, output = some_params(dice), dice.choices(range(6), k=dice.randrange(7))
    expected = [slowly(params, output, token) for token in range(VOCAB)]
    for vocab in (VOCAB, 10):  # a draft's head may be smaller
        bits = may_follow(params, ENDS, place(output), vocab)
        found = np.ones(vocab) if bits is None else bools_of(bits)[:vocab]
        assert [not may for may in found] == expected[:vocab]
    chain = dice.choices(range(6), k=5)
    count = next((at for at, token in enumerate(chain) if slowly(params, output + chain[:at], token)), 5)
    assert leading(params, ENDS, place(output), chain) == count


def normal(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


OTHERS = [{}, {"temperature": 1.0, "seed": 3},
          {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2},
          {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {7: 2.0}}]


@pytest.mark.parametrize("others", OTHERS, ids=str)
@pytest.mark.parametrize("allowed", [range(0, VOCAB, 3), [7, 11], [30]], ids=len)
def test_what_is_forbidden_is_as_if_its_logit_were_minus_infinity(others: dict[str, object],
                                                                  allowed: list[int]) -> None:
    """For the pick, its margin, a draft's guesses and what a lossy request lets pass, bit by bit."""
    logits = normal(4, 6)
    masked = torch.full_like(logits, -math.inf)
    masked[:, list(allowed)] = logits[:, list(allowed)]
    plain = SamplingParams(accept_typical=0.1, **others)  # type: ignore[arg-type]
    ours = [SamplingParams(accept_typical=0.1, allowed_token_ids=tuple(allowed), **others),  # type: ignore[arg-type]
            SamplingParams(accept_typical=0.1, min_tokens=1, **others)]  # type: ignore[arg-type]
    output = [6, 9]
    for params, walk in zip(ours, (None, Fixed(allowed))):
        rows, expected = [row(params, output, walk)] * 6, [row(plain, output)] * 6
        assert torch.equal(process(logits, rows), process(masked, expected))
        picks, margins = pick(logits, rows, margins=True)
        assert (picks, margins) == pick(masked, expected, margins=True)
        assert set(picks) <= set(allowed)
        (tokens, weights), (same, theirs) = rank(logits, rows, 8), rank(masked, expected, 8)
        assert tokens == same
        for one, other in zip(weights, theirs):
            assert one == pytest.approx(other, abs=1e-5)
        assert typical(logits, rows, picks) == typical(masked, expected, picks)


def test_rows_without_masks_among_those_with_some() -> None:
    logits = normal(5, 3)
    before = logits.clone()
    rows = [row(SamplingParams()), row(SamplingParams(allowed_token_ids=(9,))), row(SamplingParams(temperature=1.0))]
    picks, _ = pick(logits, rows)
    assert picks[1] == 9 and [picks[0], picks[2]] == [pick(logits[at : at + 1], [rows[at]])[0][0] for at in (0, 2)]
    assert torch.equal(logits, before)
    told = tell_logprobs(logits[:1], [row(SamplingParams(allowed_token_ids=(9,), logprobs=2))], [9])
    assert told[0][0][1] == float(logits[0].log_softmax(0)[9]), "of the raw logits"


def test_a_structure_that_is_complete_ends_whatever_else_is_asked() -> None:
    logits, ends = normal(6), Fixed(ENDS)
    for params in (SamplingParams(min_tokens=9), SamplingParams(allowed_token_ids=(8, 9)),
                   SamplingParams(min_tokens=9, logit_bias={3: -math.inf, 5: -math.inf}, temperature=1.0)):
        [token], _ = pick(logits, [row(params, (), ends)])
        assert token in ENDS
        assert {*rank(logits, [row(params, (), ends)], 9)[0][0]} == {*ENDS}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stage_answers_for_rows_that_nobody_will_commit(temperature: float) -> None:
    """And a draft guesses nothing behind them."""
    logits = normal(7)
    plain, _ = pick(logits, [row(SamplingParams(temperature=temperature))])
    for params, walk in ((SamplingParams(min_tokens=1, temperature=temperature), Fixed(None)),
                         (SamplingParams(allowed_token_ids=(4,), bad_word_ids=((4,),), temperature=temperature), None)):
        rows = [row(params, (), walk)]
        assert pick(logits, rows)[0] == plain
        assert rank(logits, rows, 5) == ([[]], [[]])


def test_a_draft_that_does_not_know_the_tokens_that_are_left_guesses_nothing() -> None:
    logits = normal(8)
    logits[:, 20:] = -math.inf
    rows = [row(SamplingParams(allowed_token_ids=(25, 30))), row(SamplingParams())]
    tokens, logprobs = rank(logits.expand(2, -1), rows, 3)
    assert (tokens[0], logprobs[0]) == ([], []) and len(tokens[1]) == 3


def test_a_mask_for_fewer_tokens_forbids_the_rest() -> None:
    logits = torch.zeros(1, 80)
    logits[0, 70] = 9.0
    assert pick(logits, [row(SamplingParams(min_tokens=1), (), Fixed([8, 12]))])[0] == [8]


@pytest.mark.parametrize(("size", "known"), [(0, 8), (1, 8), (8, 8), (33, 40), (64, 40), (1000, 1000), (151, 160)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_kernel_masks_as_numpy_does(size: int, known: int, share: float) -> None:
    dice = np.random.default_rng(size + known)
    given = dice.normal(size=size).astype(np.float32)
    given[dice.random(size) < 0.1] = math.nan
    given[dice.random(size) < 0.1] = -math.inf
    bits = bits_of(dice.random(known) < share)
    ours, theirs = np.full(size, 5, np.float32), np.full(size, 6, np.float32)
    assert mask(given, bits, ours) == mask_slowly(given, bits, theirs)
    assert ours.tobytes() == theirs.tobytes()


def test_properties_of_params() -> None:
    assert SamplingParams().plain_greedy and not SamplingParams().restricted
    for params in (SamplingParams(min_tokens=1), SamplingParams(allowed_token_ids=(1,)),
                   SamplingParams(bad_word_ids=((1, 2),))):
        assert params.restricted and not params.plain_greedy and not params.needs_history


@pytest.mark.parametrize("seed", range(8))
def test_the_best_token_is_taken_without_masked_logits_where_it_may_follow(seed: int) -> None:
    """Rows of all kinds beside each other: each is picked as it is with margins, for which nothing is cut short."""
    dice = random.Random(seed)
    kinds = [SamplingParams(), SamplingParams(min_tokens=1), SamplingParams(min_tokens=1, temperature=1.0, seed=5),
             SamplingParams(min_tokens=1, logit_bias={4: 3.0}), SamplingParams(allowed_token_ids=(*range(0, 40, 2),))]
    rows = [row(dice.choice(kinds), [6], Fixed(dice.sample(range(VOCAB), dice.choice([1, 20, 39])))) for _ in range(9)]
    logits = normal(seed, 9)
    assert pick(logits, rows) == (pick(logits, rows, margins=True)[0], [])
    logits[3] = math.nan
    with pytest.raises(ModelError, match="no token can be picked"):
        pick(logits[3:4], rows[3:4])
