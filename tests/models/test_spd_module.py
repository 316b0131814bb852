"""The draft module's forward and the training layout, against attention written out row by row."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fullpipe.models.linear import can_pack
from fullpipe.models.spd_module import Layout, depths_in_flight, types_by_depth
from fullpipe.training.objective import Fillings
from tiny_module import HIDDEN, VOCAB, Tiny, tiny

SIZE = 11  # of the texts; some fillings reach beyond their beginning
FOUR, EIGHT = ((2, 4, 6, 8),), (tuple(range(1, 9)),)

# Row types of their own for all depths, and shared ones: with 8 stages, depths 0 and 1, 2 and 3, ... are alike.
MODULES = {
    f"{name}, {layers} layers{', q/k norm' if qk_norm else ''}": tiny(layers, qk_norm=qk_norm, stages=stages, **more)
    for layers in (1, 2, 3) for qk_norm in (False, True)
    for name, stages, more in (("4 stages", FOUR, {}), ("8 stages", EIGHT, {}),
                               ("exit", FOUR, {"kind": "exit", "bounds": (2,)}))
} | {"biases": tiny(2, attention_bias=True), "a head of its own": tiny(1, shared_head=False, draft_vocab_size=9),
     "two bounds": tiny(2, bounds=(0, 8)), "taps within stages": tiny(2, bounds=(0, 1, 3, 5, 7))}

every_module = pytest.mark.parametrize("one", MODULES.values(), ids=MODULES)


def text(one: Tiny, size: int = SIZE, seed: int = 3) -> Tensor:
    """What is known of each token: [size, bounds, hidden]."""
    return torch.randn(size, len(one.config.bounds), HIDDEN, generator=torch.Generator().manual_seed(seed))


def trained(one: Tiny, features: Tensor, types: Sequence[int]) -> Tensor:
    """Logits for every token as the newest, by the layout for training: [size, draft vocab]."""
    layout = Layout.of(types, one.last, len(features), one.config.num_layers)
    hidden, _ = one.module(layout.rows(one.module, features[None]), layout.positions(), layout.masks, layout.queries)
    return one.module.logits(hidden)[0]


def types_at(types: Sequence[int], newest: int, last: int) -> list[int]:
    """Row types of the tokens up to position `newest`, from the first on."""
    known = [*types, *[last] * (newest + 1)]
    return known[: newest + 1][::-1]


def fillings(one: Tiny) -> list[tuple[int, ...]]:
    """Every filling that training draws and decoding meets, once each."""
    found = Fillings(one.config.bounds, one.config.stages)
    return sorted({found.of(ends, fill, shift, lead).types
                   for ends in one.config.stages for fill in range(1, len(ends) + 1)
                   for shift, lead in [(0, 0), *((shift, 0) for shift in range(1, len(ends))), (0, 1), (0, 2), (0, 3)]})


@every_module
def test_the_layout_for_training_is_every_token_as_the_newest_once(one: Tiny) -> None:
    features = text(one)
    for types in fillings(one):
        logits = trained(one, features, types)
        for newest in (0, 5, SIZE - 1):
            wanted = one.logits(features[: newest + 1], types_at(types, newest, one.last))
            torch.testing.assert_close(logits[newest], wanted, atol=1e-5, rtol=0)


def test_what_a_row_shows_matters() -> None:
    """Else the test above would say nothing."""
    for layers in (1, 2):
        one = tiny(layers)
        answers = [trained(one, text(one), types)[-1] for types in fillings(one)]
        apart = [(first - second).abs().max() for index, first in enumerate(answers) for second in answers[:index]]
        assert len(answers) > 10 and min(apart) > 1e-3


def test_with_one_layer_there_is_a_block_for_each_type_and_with_more_for_each_token_in_flight() -> None:
    types = [0, 0, 1, 1, 2]
    assert Layout.of(types, 4, SIZE, 1).block_types == [0, 1, 2, 4]
    assert Layout.of(types, 4, SIZE, 2).block_types == [*types, 4]


@pytest.mark.parametrize("layers", [1, 2])
def test_who_is_asked_sees_one_row_of_every_token_up_to_its_own(layers: int) -> None:
    for types in ([], [0], [0, 0, 1], [1, 1, 2, 3]):
        layout = Layout.of(types, 4, SIZE, layers)
        blocks = len(layout.block_types)
        for mask in layout.masks:
            seen = mask.view(-1, blocks, SIZE).sum(1)
            assert torch.equal(seen, torch.ones(SIZE, SIZE).tril().long().repeat(len(mask) // SIZE, 1))
        assert len(layout.masks) == layers and layout.masks[-1].shape == (SIZE, blocks * SIZE)


def test_depths_of_the_tokens_in_flight() -> None:
    assert depths_in_flight(4, 4) == [0, 1, 2, 3]
    assert depths_in_flight(4, 1) == [0]
    assert depths_in_flight(4, 4, shift=1) == [1, 2, 3]
    assert depths_in_flight(4, 2, lead=2) == [0, 0, 0, 1]
    assert depths_in_flight(4, 2, shift=3) == []


@pytest.mark.parametrize(("bounds", "ends", "types"), [
    ((0, 2, 4, 6, 8), (2, 4, 6, 8), [0, 1, 2, 3, 4]),
    ((0, 2, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8), [0, 0, 1, 1, 2, 2, 3, 3, 4]),
    ((0, 3, 8), (2, 5, 8), [0, 0, 1, 2]),  # a bound within a stage is there at that stage's end
    ((0, 1, 2, 8), (4, 8), [0, 2, 3]),  # two in one stage
    ((0, 4), (8,), [0, 1]),
    ((0, 8), (3, 8, 8), [0, 0, 1, 1]),  # a last stage without layers
    ((2,), (2, 4, 6, 8), [-1, 0, 0, 0, 0]),
    ((3,), (2, 4, 6, 8), [-1, -1, 0, 0, 0]),
])
def test_what_is_known_after_each_stage(bounds: tuple[int, ...], ends: tuple[int, ...], types: list[int]) -> None:
    assert types_by_depth(bounds, ends) == types


@every_module
def test_rows_that_were_kept_need_not_be_computed_again(one: Tiny) -> None:
    features = text(one)
    x = one.module.aggregate(features, one.last)[None]
    mask, layers, queries = torch.ones(SIZE, SIZE).tril().bool(), one.config.num_layers, torch.tensor([SIZE - 1])
    whole, caches = one.module(x, torch.arange(SIZE), [mask] * (layers - 1) + [mask[queries]], queries)
    for cut in (1, 6, SIZE - 1):
        past = [(keys[:, :cut], values[:, :cut]) for keys, values in caches]
        rest, asked = mask[cut:], torch.tensor([SIZE - 1 - cut])
        again, _ = one.module(x[:, cut:], torch.arange(cut, SIZE), [rest] * (layers - 1) + [rest[asked]], asked, past)
        torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)


@every_module
def test_texts_of_a_batch_do_not_see_each_other(one: Tiny) -> None:
    features = torch.stack([text(one, seed=1), text(one, seed=2)])
    types = fillings(one)[-1]
    layout = Layout.of(types, one.last, SIZE, one.config.num_layers)
    hidden, _ = one.module(layout.rows(one.module, features), layout.positions(), layout.masks, layout.queries)
    both = one.module.logits(hidden)
    for index in (0, 1):
        torch.testing.assert_close(both[index], trained(one, features[index], types), atol=1e-5, rtol=0)


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch cannot pack weights")
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"shared_head": False, "draft_vocab_size": 9}],
                         ids=["plain", "biases", "a head of its own"])
def test_packed_weights_say_the_same(changes: dict[str, object]) -> None:
    one, packed = tiny(2, **changes), tiny(2, **changes)
    packed.module.pack()
    features = text(one)
    torch.testing.assert_close(trained(packed, features, [0, 1, 2]), trained(one, features, [0, 1, 2]),
                               atol=1e-5, rtol=0)
    assert packed.module.logits(torch.zeros(3, HIDDEN)).shape == (3, changes.get("draft_vocab_size", VOCAB))


def test_a_scale_of_features_becomes_part_of_the_weights() -> None:
    one, other = tiny(1), tiny(1)
    scale = 0.5 + torch.rand(len(one.config.bounds), HIDDEN, generator=torch.Generator().manual_seed(1))
    one.module.scale_features(scale)
    features, types = text(one), [0, 1, 2, 3]
    plain = trained(other, features, types)
    scaled = trained(one, features, types)
    assert (plain - scaled).abs().max() > 0.1
    other.module.load_state_dict(one.module.folded())
    torch.testing.assert_close(trained(other, features, types), scaled, atol=1e-5, rtol=0)


def test_computing_layers_again_changes_neither_answers_nor_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        one = tiny(3)
        one.module.requires_grad_(True)
        one.module.checkpointing = checkpointing
        logits = trained(one, text(one), [0, 1, 2, 3])
        logits.square().sum().backward()
        grads.append([parameter.grad for parameter in one.module.parameters()])
    for first, second in zip(*grads, strict=True):
        assert first is not None
        torch.testing.assert_close(first, second, atol=0, rtol=0)
