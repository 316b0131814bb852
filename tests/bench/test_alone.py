"""How bench/serving/alone.py judges two answers to one question: what must fail does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from serving.alone import Question, Run, Said, first_difference

from fullpipe.request import SamplingParams
from fullpipe.stations.sampling import RowContext, pick

ASKED = Question("q", "text")
REFERENCE = Said([1, 2, 3], [{1: -0.1}, {2: -0.5, 9: -0.7}, {3: -0.1}], "abc", "length", 5, 0)
CLOSE = Said([1, 9, 4], [{1: -0.1}, {9: -0.55, 2: -0.6}, {4: -0.1}], "abx", "length", 5, 0)


def figures(dtype: str, said: Said, at_once: int = 1) -> tuple[int, int, int, bool]:
    run = Run(dtype, "alone", [ASKED], 1, {"q": said}, {"q": REFERENCE}, at_once=at_once)
    found = run.figures()
    return found["equal"], found["near_ties"], found["different"], found["all_at_once"]


def test_a_near_tie_passes_in_bf16_and_in_nothing_finer() -> None:
    assert figures("bf16", CLOSE) == (0, 1, 0, True)
    assert figures("fp32", CLOSE) == (0, 0, 1, True)
    assert figures("fp32", REFERENCE) == figures("bf16", REFERENCE) == (1, 0, 0, True)
    assert not figures("fp32", REFERENCE, at_once=0)[3]


@pytest.mark.parametrize("said", [
    Said([1, 9, 4], [{1: -0.1}, {9: -0.05, 2: -3.0}, {4: -0.1}], "abx", "length", 5, 0),
    Said([1, 8, 4], [{1: -0.1}, {8: -0.05, 2: -0.06}, {4: -0.1}], "abx", "length", 5, 0),
    Said([1, 2], [{1: -0.1}, {2: -0.5}], "ab", "stop", 5, 0),
    Said([1, 2, 3], REFERENCE.told, "ABC", "length", 5, 0),
    Said([1, 2, 3], REFERENCE.told, "abc", "stop", 5, 0)],
    ids=["far", "rival not told", "shorter", "other text", "other end"])
def test_any_other_difference_fails(said: Said) -> None:
    assert figures("bf16", said) == (0, 0, 1, True)


def test_the_first_difference_counts() -> None:
    found = first_difference(ASKED, CLOSE, REFERENCE, 0.5)
    assert found is not None and found.index == 1


def test_margins_of_sampled_tokens_are_the_samplers_own() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.7, seed=12)
    (token,), (margin,) = pick(logits, [RowContext(params, 8)], margins=True)
    told = dict(enumerate(logits[0].log_softmax(0).tolist()))
    said = Said([0, 0, 0, token], [{}, {}, {}, told], "", "length", 5, 0)
    asked = Question("q", "", 0.7, 12)
    least = min(said.margin(3, rival, asked) for rival in range(50) if rival != token)
    assert least == pytest.approx(margin * 0.7, abs=1e-5)
