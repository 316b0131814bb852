"""Slots and blocks: conservation on the engine's side, paths on the station's side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import ArenaId, Opening, Part
from fullpipe.request import SamplingParams
from fullpipe.sequences.blocks import BlockPool, Kept, KeptPaths, SlotAllocator, shared
from fullpipe.stations.table import Slots, SlotTable, Tables


def table(path: list[int] | None = None, prompt_len: int = 2, slots: Slots | None = None) -> SlotTable:
    return SlotTable(Opening(ArenaId(0), prompt_len, SamplingParams(), path or []), slots or Slots())


# ---- the engine's side -------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["take", "give", "grow"]), max_size=60), st.integers(1, 5))
def test_free_plus_owned_is_all(steps: list[str], size: int) -> None:
    pool = BlockPool(size, None)
    pool.take(3)  # so that numbers of slots are not those of places
    slots, owned, blocks = SlotAllocator(size, pool.take(1)), list[int](), 1
    for step in steps:
        if step == "grow":
            slots.grow(pool.take(1))
            blocks += 1
        elif step == "take":
            slot = slots.take()
            assert (slot is None) == (len(owned) == blocks * size)
            owned += [] if slot is None else [slot]
        elif owned:
            slots.give(owned.pop(0))
        slots.check(owned)
        assert slots.num_free == blocks * size - len(owned)


def test_check_complains_about_a_double_owner_and_a_lost_slot() -> None:
    slots = SlotAllocator(3, [4])
    first = slots.take()
    assert first == 12
    with pytest.raises(AssertionError, match="two live owners"):
        slots.check([12, 12])
    with pytest.raises(AssertionError, match="lost"):
        slots.check([])
    slots.give(12)
    with pytest.raises(AssertionError, match="free slot has an owner"):
        slots.check([12])


def test_what_is_shared_is_read_and_never_handed_out() -> None:
    slots = SlotAllocator(4, [9], shared=[0, 1, 2], held=[0])
    assert (slots.capacity, slots.num_free, slots.blocks) == (7, 4, [0, 9])
    assert [slots.take() for _ in range(5)] == [36, 37, 38, 39, None]
    slots.check([0, 1, 2, 36, 37, 38, 39])
    with pytest.raises(AssertionError, match="somebody else"):
        SlotAllocator(4, [9], shared=[4], held=[0]).check([4])


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "end"]), st.integers(0, 9)), max_size=50))
def test_a_block_is_free_when_nobody_refers_to_it(steps: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(2, 7), list[list[int]]()
    for step, number in steps:
        if step == "take" and pool.has(number % 4):
            held.append(pool.take(number % 4))
        elif step == "share" and held:
            held.append(list(held[number % len(held)]))
            pool.hold(held[-1])
        elif step == "end" and held:
            pool.let_go(held.pop(number % len(held)))
        pool.check(held)
        used = {block for blocks in held for block in blocks}
        assert pool.num_used == len(used) and used <= set(range(7))
        assert pool.has(7 - len(used)) and not pool.has(8 - len(used))


def test_free_blocks_come_back_lowest_first() -> None:
    pool = BlockPool(2, None)
    pool.take(5)
    pool.let_go([3, 1])
    assert pool.take(3) == [1, 3, 5]


def test_what_is_kept_makes_room_the_oldest_first_and_only_if_that_is_enough() -> None:
    pool = BlockPool(4, 4)
    paths = KeptPaths(pool)
    for first in (10, 20):
        paths.keep(Kept(list(range(first, first + 20)), list(range(20)), 20, 20, pool.take(2)))
    pool.hold([2])  # somebody reads a block of the newer one
    assert paths.num_blocks == 3
    assert not paths.make_room(4) and len(paths.kept) == 2
    assert paths.make_room(2) and [kept.tokens[0] for kept in paths.kept] == [20]
    assert paths.best([20, *range(21, 60)]) is paths.kept[0] and paths.best(list(range(40))) is None
    assert paths.make_room(3) and not paths.kept
    pool.let_go([2])
    pool.check([])


@pytest.mark.parametrize(("known", "computed", "length"), [
    (50, 50, 39), (39, 50, 39), (30, 50, 30), (50, 20, 20), (50, 15, 0), (15, 50, 0)])
def test_how_much_is_shared(known: int, computed: int, length: int) -> None:
    """Of a prompt of 40 tokens never the last, and not too little."""
    assert shared(list(range(known)), list(range(40)), computed) == length
    assert shared([9, *range(1, known)], list(range(40)), computed) == 0


# ---- the station's side ------------------------------------------------------------------------------------------


def test_a_prompt_chunk_is_causal() -> None:
    slots = table()
    part = Part(ArenaId(0), commits=[0, 1, 2], nodes=[-1] * 3, tokens=[7, 8, 9], positions=[0, 1, 2], slots=[0, 1, 2],
                paths=[[], [], []], wants=[False] * 3)
    slots.apply(part)
    assert [slots.shared(part, row) for row in range(3)] == [1, 2, 3]
    assert slots.path(part, 1) == [7, 8]
    assert slots.committed_tokens().tolist() == [7, 8, 9]


def test_siblings_do_not_see_each_other_and_a_reused_slot_forgets_its_dead_owner() -> None:
    slots = table()
    slots.apply(Part(ArenaId(0), [0, 1], [-1, 5], [7, 8], [0, 1], [0, 1], [[], []], [False, True]))
    tree = Part(ArenaId(0), [], [6, 7, 8], [20, 21, 22], [2, 2, 3], [2, 3, 4], [[2], [3], [2, 4]], [True] * 3)
    slots.apply(tree)
    assert [slots.shared(tree, row) for row in range(3)] == [2, 2, 2]
    assert slots.path(tree, 2) == [7, 8, 20, 22]
    assert [slots.tail(tree, 2, count) for count in (1, 2, 3)] == [[22], [20, 22], [8, 20, 22]]
    # Node 6 (slot 2) is committed, node 7 (slot 3) died; a new node takes slot 3.
    late = Part(ArenaId(0), [2], [9], [30], [3], [3], [[3]], [True])
    slots.apply(late)
    assert slots.path(late, 0) == [7, 8, 20, 30]
    assert slots.committed_slots().tolist() == [0, 1, 2] and slots.shared(late, 0) == 3
    assert slots.is_committed(2, 2) and not slots.is_committed(3, 2) and not slots.is_committed(3, 3)


def test_a_row_cannot_begin_beyond_what_is_committed() -> None:
    slots = table()
    part = Part(ArenaId(0), [0], [5, 6], [7, 8], [0, 2], [0, 2], [[], [2]], [True, True])
    slots.apply(part)
    with pytest.raises(AssertionError, match="beyond what is committed"):
        slots.shared(part, 1)


@pytest.mark.parametrize("count", range(4))
def test_a_table_begins_with_anothers_committed_path(count: int) -> None:
    """Tokens 7, 8, 20 at positions 0, 1, 2 are committed, in slots 3, 0, 2; a guess stands in slot 1."""
    tables = Tables()
    tables.open([Opening(ArenaId(4), 2, SamplingParams())])
    for part in (Part(ArenaId(4), [3, 0], [-1, 5], [7, 8], [0, 1], [3, 0], [[], []], [False, True]),
                 Part(ArenaId(4), [], [6, 7], [20, 21], [2, 2], [2, 1], [[2], [1]], [True, True]),
                 Part(ArenaId(4), [2])):
        tables[ArenaId(4)].apply(part)
    path = tables[ArenaId(4)].committed_slots()[:count].tolist()
    tables.open([Opening(ArenaId(5), 2, SamplingParams(seed=4), path)])
    tables.close([ArenaId(4), ArenaId(77)])  # one that was never opened here is nothing to forget
    late = tables[ArenaId(5)]
    with pytest.raises(KeyError):
        tables[ArenaId(4)]
    assert late.committed_tokens().tolist() == [7, 8, 20][:count] and late.params.seed == 4
    part = Part(ArenaId(5), [], [9], [40], [count], [600], [[600]], [True])
    late.apply(part)
    assert late.path(part, 0) == [*[7, 8, 20][:count], 40]
