"""Arenas: rows go where they are told, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from fullpipe.models.arena import SLOT_MULTIPLE, KVArena, Writes
from fullpipe.models.hf_config import read_hf

CONFIG = read_hf({
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 10})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_land_in_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    arena = KVArena.allocate(CONFIG, 3, 20, dtype)
    rows = torch.randn(3, 4, 8).to(dtype)
    Writes([arena], [torch.tensor([17, 0, 5])])(1, rows)
    assert torch.equal(arena.keys(1)[:, [17, 0, 5]], rows[:, :2].transpose(0, 1))
    assert torch.equal(arena.values(1)[:, [17, 0, 5]], rows[:, 2:].transpose(0, 1))
    assert arena.kv.count_nonzero() == rows.count_nonzero()
    assert arena.kv[1].count_nonzero() == rows.count_nonzero()


def test_a_slot_is_overwritten_by_its_next_owner() -> None:
    arena = KVArena.allocate(CONFIG, 1, 4, torch.float32)
    for value in (1.0, 2.0):
        Writes([arena], [torch.tensor([3])])(0, torch.full((1, 4, 8), value))
    assert (arena.keys(0)[:, 3] == 2).all() and (arena.values(0)[:, 3] == 2).all()


def test_rows_of_several_requests_go_each_to_its_own_arena() -> None:
    arenas = [KVArena.allocate(CONFIG, 2, 4, torch.float32) for _ in range(2)]
    rows = torch.randn(4, 4, 8)  # the last belongs to nobody
    Writes(arenas, [torch.tensor([3, 1]), torch.tensor([0])])(1, rows)
    assert torch.equal(arenas[0].kv[1][:, [3, 1]], rows[:2].transpose(0, 1))
    assert torch.equal(arenas[1].kv[1][:, [0]], rows[2:3].transpose(0, 1))
    assert sum(arena.kv.count_nonzero() for arena in arenas) == rows[:3].count_nonzero()


def test_shape_and_size() -> None:
    arena = KVArena.allocate(CONFIG, 3, SLOT_MULTIPLE + 1, torch.bfloat16)
    assert (len(arena.kv), arena.capacity) == (3, SLOT_MULTIPLE + 1)
    assert arena.keys(0).shape == arena.values(2).shape == (2, 2 * SLOT_MULTIPLE, 8)
    assert arena.nbytes == 3 * 2 * SLOT_MULTIPLE * CONFIG.sizes(2).kv_bytes


def test_a_slice_without_layers_has_an_empty_arena() -> None:
    assert KVArena.allocate(CONFIG, 0, 16, torch.float32).nbytes == 0


@pytest.mark.parametrize("capacity", [20, 32, 33, 90])
def test_an_enlarged_arena_holds_what_stood_in_the_used_slots(capacity: int) -> None:
    arena = KVArena.allocate(CONFIG, 3, 20, torch.float32)
    arena.kv[:, :, :7] = torch.randn(3, 4, 7, 8)
    larger = arena.enlarged(capacity, used=7)
    assert larger.capacity == capacity
    assert larger.kv.shape[2] == -(-capacity // SLOT_MULTIPLE) * SLOT_MULTIPLE
    assert torch.equal(larger.kv[:, :, :7], arena.kv[:, :, :7]) and not larger.kv[:, :, 7:].any()
    assert (larger.kv is arena.kv) == (capacity <= SLOT_MULTIPLE)


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("slots", [[], [4], [5, 0, 17]])
def test_an_arena_begins_with_rows_of_another(layers: int, slots: list[int]) -> None:
    arena, other = (KVArena.allocate(CONFIG, layers, capacity, torch.bfloat16) for capacity in (3, 20))
    other.kv.normal_(generator=torch.Generator().manual_seed(1))
    arena.begin_with(other, torch.tensor(slots, dtype=torch.int64))
    assert torch.equal(arena.kv[:, :, : len(slots)], other.kv[:, :, slots])
    assert not arena.kv[:, :, len(slots) :].any()
