"""Sampling looks at few tokens, and says what the whole vocabulary says, bit by bit (`whole_vocabulary.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import whole_vocabulary as slow
from torch import Tensor

from fullpipe.kernels import load
from fullpipe.request import SamplingParams
from fullpipe.stations import candidates, noise
from fullpipe.stations.noise import FAINT, QUIET, gumbel, gumbel_of, loud, uniforms
from fullpipe.stations.sampling import MOST_TYPICAL, RowContext, pick, process, rank, tell_logprobs, typical

VOCAB = 3000
needs_kernels = pytest.mark.skipif(load() is None, reason="the kernels were not built")


def normal(seed: int, rows: int, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def steep(seed: int, rows: int, vocab: int = VOCAB) -> Tensor:
    """Logits that fall as those of a model do: few near the best, most of them far below."""
    order = torch.stack([torch.randperm(vocab, generator=torch.Generator().manual_seed(seed + row))
                         for row in range(rows)])
    return -2.5 * (1.0 + order).log() + normal(seed, rows, vocab, 0.3)


def some_impossible(seed: int, rows: int) -> Tensor:
    logits = normal(seed, rows)
    logits[:, ::3] = -math.inf
    return logits


LOGITS: dict[str, Callable[[], Tensor]] = {
    "steep": lambda: steep(1, 3),
    "sure": lambda: 4 * steep(2, 3),
    "normal": lambda: normal(3, 3),
    "flat": lambda: normal(4, 3, scale=0.01),
    "equal": lambda: torch.zeros(3, VOCAB),
    "ties": lambda: normal(5, 3).round(),
    "far from 0": lambda: normal(6, 3) - 1e6,
    "huge": lambda: normal(7, 3, scale=1e36),
    "some impossible": lambda: some_impossible(8, 3),
    "few tokens": lambda: normal(9, 3, 5),
    "one block": lambda: normal(10, 3, 64),
}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "hot": {"temperature": 5.0},
    "boiling": {"temperature": 1e6},
    "cold": {"temperature": 0.05},
    "frozen": {"temperature": 1e-300},
    "top-k": {"temperature": 0.8, "top_k": 20},
    "top-1": {"temperature": 0.8, "top_k": 1},
    "large top-k": {"temperature": 1.0, "top_k": 700},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "nearly all": {"temperature": 1.0, "top_p": 0.99999},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "tiny min-p": {"temperature": 0.8, "min_p": 1e-9, "top_p": 0.999},
    "Qwen's": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
    "all": {"temperature": 1.3, "top_k": 300, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.2,
            "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {0: 1.5, 2: -math.inf}},
}


def history() -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    return np.array([1, 4, 4, 0]), np.array([3, 3, 2])


def context(options: dict[str, Any], position: int, **more: Any) -> RowContext:
    return RowContext(SamplingParams(seed=position % 7, **options, **more), position, history)


@pytest.mark.parametrize("options", PARAMS)
@pytest.mark.parametrize("shape", LOGITS)
def test_bit_by_bit(shape: str, options: str) -> None:
    logits = LOGITS[shape]()
    rows = [context(PARAMS[options], 40 + at, logprobs=5, accept_typical=0.05) for at in range(len(logits))]
    picked, margins = pick(logits, rows, margins=True)
    assert (picked, margins) == slow.pick(logits, rows)
    assert pick(logits, rows) == (picked, [])
    assert torch.equal(process(logits, rows), slow.process(logits, rows))
    assert typical(logits, rows, picked) == slow.typical(logits, rows, picked, MOST_TYPICAL)
    assert tell_logprobs(logits, rows, picked) == slow.tell_logprobs(logits, rows, picked)
    for ours, expected in zip(rank(logits, rows, 8), slow.rank(logits, rows, 8)):
        np.testing.assert_array_equal(ours, expected)


def test_rows_of_every_kind_in_one_batch() -> None:
    logits = torch.cat([steep(11, 8), normal(12, len(PARAMS) - 8)])
    rows = [context(options, 9 + at, accept_typical=at % 3 / 10, logprobs=at % 4 or None)
            for at, options in enumerate(PARAMS.values())]
    picked, margins = pick(logits, rows, margins=True)
    assert (picked, margins) == slow.pick(logits, rows)
    assert typical(logits, rows, picked) == slow.typical(logits, rows, picked, MOST_TYPICAL)
    assert tell_logprobs(logits, rows, picked) == slow.tell_logprobs(logits, rows, picked)
    assert rank(logits, rows, 8) == slow.rank(logits, rows, 8)


def test_a_token_far_below_wins_by_its_noise() -> None:
    """The loudest of 200,000 lies 12 below the best, and everything else lower still."""
    whole = gumbel(3, 5, 200_000)
    loudest = int(whole.argmax())
    other = (loudest + 1) % len(whole)
    logits = torch.full((1, len(whole)), -30.0)
    logits[0, loudest], logits[0, other] = float(whole[other] - whole[loudest]) + 0.5, 0.0
    assert logits[0, loudest] < -candidates._DEEP
    assert pick(logits, [RowContext(SamplingParams(temperature=1.0, seed=3), 5)])[0] == [loudest]


# ---- noise of some tokens --------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("kernels", marks=needs_kernels), "without"])
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_loud", noise._Cache(4))
    if request.param == "without":
        monkeypatch.setattr(noise, "load_kernels", lambda: None)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 3), (2**64 - 1, 2**40)])
def test_noise_of_some_tokens_is_that_of_all(seed: int, position: int) -> None:
    whole = gumbel(seed, position, 20_000).numpy()
    for tokens in ([19_999], [5, 4, 4, 7, 0], [*range(0, 20_000, 7)], [*range(20_000)]):
        assert np.array_equal(gumbel_of(seed, position, np.array(tokens), 20_000), whole[tokens])
    assert len(gumbel_of(seed, position, np.array([], np.int64), 20_000)) == 0


@pytest.mark.usefixtures("drawn")
def test_the_loud_are_all_that_are_loud() -> None:
    for vocab in (50_000, 9, 50_001, 20_000):
        whole = gumbel(5, 6, vocab).numpy()
        tokens, values = loud(5, 6, vocab)
        assert np.array_equal(values, whole[tokens]) and np.all(np.diff(tokens) > 0)
        assert np.delete(whole, tokens).max() <= QUIET
        assert len(tokens) <= 1 + vocab / 200


def test_nothing_is_fainter_than_said() -> None:
    least = noise._noise(torch.tensor([2.0**-53], dtype=torch.float64))
    assert FAINT <= least < FAINT + 0.001


@needs_kernels
@pytest.mark.parametrize("options", ["top-k", "top-p", "min-p", "sampled"])
def test_no_vector_of_noise_is_drawn_where_few_tokens_can_win(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = steep(13, 2, 20_000), [context(PARAMS[options], 1), context(PARAMS[options], 2)]
    expected = slow.pick(logits, rows)[0]
    monkeypatch.setattr(noise, "uniforms", lambda *_: pytest.fail("drawn"))
    monkeypatch.setattr(noise, "_whole", noise._Cache(4))
    assert pick(logits, rows)[0] == expected


@needs_kernels
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 3), (2**64 - 1, 2**40), (5 + 2**63, 100)])
def test_words_of_the_kernels_are_those_of_numpy(seed: int, position: int) -> None:
    kernels, vocab, least = load(), 4001, 2**63
    assert kernels is not None
    words = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(vocab)
    for room in (10, vocab):
        tokens, found = np.empty(room, np.int64), np.empty(room, np.uint64)
        count = kernels.words_from(seed, position, vocab, least, room, tokens.ctypes.data, found.ctypes.data)
        assert count == (words >= least).sum()
        assert tokens[:count].tolist() == np.flatnonzero(words >= least)[:room].tolist()
        assert found[:count].tolist() == words[words >= least][:room].tolist()
    tokens, found = np.array([4000, 0, 1, 17, 16]), np.empty(5, np.uint64)
    kernels.words_of(seed, position, tokens.ctypes.data, 5, found.ctypes.data)
    assert found.tolist() == words[tokens].tolist()
    assert len(uniforms(seed, position, 3)) == 3
