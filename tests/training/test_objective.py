"""Losses, fillings of the pipeline, and the order of the batches."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from fullpipe.training.batches import epoch_batches
from fullpipe.training.objective import Fillings, accepted, divergence, inverse

BOUNDS, ENDS = (0, 2, 4, 6, 8), ((2, 4, 6, 8), tuple(range(1, 9)))


@pytest.mark.parametrize(("loss", "formula"), [
    ("forward-kl", lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q))),
    ("reverse-kl", lambda p, q: sum(b * math.log(b / a) for a, b in zip(p, q))),
    ("total-variation", lambda p, q: sum(abs(a - b) for a, b in zip(p, q)) / 2),
])
def test_losses_are_the_plain_formulas(loss: str, formula: object) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (3 * torch.randn(6, 9, generator=generator) for _ in range(2))
    found = divergence(student, teacher, loss)
    for row in range(6):
        p, q = (
            [math.exp(value) / sum(math.exp(other) for other in logits[row].tolist()) for value in logits[row].tolist()]
            for logits in (teacher, student))
        assert found[row].item() == pytest.approx(formula(p, q), abs=1e-5)  # type: ignore[operator]
    assert divergence(teacher, teacher, loss).abs().max() < 1e-6


def test_a_loss_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no such loss"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), "mse")


def test_fillings_are_drawn_as_they_are_met() -> None:
    fillings, source = Fillings(BOUNDS, ENDS, refreshed=0.2, ahead=0.3), random.Random(3)
    drawn = [fillings.draw(source) for _ in range(4000)]
    assert 0.47 < sum(one.stages == 4 for one in drawn) / 4000 < 0.53
    assert 0.47 < sum(one.fill == one.stages for one in drawn) / 4000 < 0.53
    part = Counter(one.fill for one in drawn if one.stages == 8 and one.fill < 8)
    assert set(part) == set(range(1, 8)) and min(part.values()) > 90
    assert 0.17 < sum(one.shift > 0 for one in drawn) / 4000 < 0.23
    assert 0.27 < sum(one.lead > 0 for one in drawn) / 4000 < 0.33
    assert not any(one.shift and one.lead for one in drawn)
    assert {one.weight for one in drawn} == {1.0}
    assert all(0 <= kind < 4 for one in drawn for kind in one.types), "a complete token is none in flight"


def test_one_stage_has_one_filling() -> None:
    fillings = Fillings((0, 8), ((8,),), refreshed=0.0, ahead=0.0)
    assert {fillings.draw(random.Random(seed)).types for seed in range(20)} == {(0,)}


@pytest.mark.parametrize(("fill", "shift", "lead", "types"), [
    (8, 0, 0, (0, 0, 1, 1, 2, 2, 3, 3)), (3, 0, 0, (0, 0, 1)), (8, 2, 0, (1, 1, 2, 2, 3, 3)), (2, 5, 0, ()),
    (2, 0, 3, (0, 0, 0, 0, 0)),
])
def test_types_of_a_filling(fill: int, shift: int, lead: int, types: tuple[int, ...]) -> None:
    assert Fillings(BOUNDS, ENDS).of(ENDS[1], fill, shift, lead).types == types


def test_an_exit_module_is_asked_about_what_has_left_the_first_stage() -> None:
    for fill in range(1, 5):
        assert Fillings((2,), ENDS[:1]).of(ENDS[0], fill).types == ()  # all that is known of a token is one state


@pytest.mark.parametrize("power", [1.0, -0.5])
def test_weights_by_filling(power: float) -> None:
    fillings = Fillings(BOUNDS, ENDS, power=power)
    for fill in range(1, 9):
        assert fillings.of(ENDS[1], fill).weight == pytest.approx((fill / 8) ** power)


def test_what_counts_as_accepted() -> None:
    scores, ids = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), torch.tensor([4, 7, 9])
    assert accepted(scores, torch.tensor([4, 7]), ids).tolist() == [True, False]
    assert accepted(scores, torch.tensor([9, 7]), ids, 2).tolist() == [True, True]
    assert accepted(scores, torch.tensor([5, 0]), ids, 3).tolist() == [False, False]  # not in the vocabulary
    assert inverse(ids, 10).tolist() == [-1, -1, -1, -1, 0, -1, -1, 1, -1, 2]


# ---- batches -----------------------------------------------------------------------------------------------------

LENGTHS = [random.Random(4).randint(3, 90) for _ in range(500)] + [400]


def test_every_sample_comes_once_and_batches_hold_what_they_may() -> None:
    batches = epoch_batches(LENGTHS, 256, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(501))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(LENGTHS[index] for index in batch) <= 256
    tokens = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    assert tokens < 1.1 * sum(LENGTHS), "little is padding"


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = epoch_batches(LENGTHS, 256, 1, 0)
    assert epoch_batches(LENGTHS, 256, 1, 0) == first
    assert epoch_batches(LENGTHS, 256, 1, 1) != first != epoch_batches(LENGTHS, 256, 2, 0)
