"""Slots: conservation on the engine's side, masks and paths on the station's side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import Opening, Part
from fullpipe.request import SamplingParams
from fullpipe.sequences.blocks import SlotAllocator
from fullpipe.stations.table import SlotTable, open_table


def table(capacity: int = 16, prompt_len: int = 2) -> SlotTable:
    return SlotTable(Opening(0, capacity, prompt_len, SamplingParams()))


@given(st.lists(st.booleans(), max_size=60))
def test_free_plus_owned_is_all(takes: list[bool]) -> None:
    slots = SlotAllocator(7)
    owned: list[int] = []
    for take in takes:
        if take:
            slot = slots.take()
            assert (slot is None) == (len(owned) == 7)
            if slot is not None:
                assert slot == min(set(range(7)) - set(owned)), "the lowest free slot comes first"
                owned.append(slot)
        elif owned:
            slots.give(owned.pop(0))
        slots.check(owned)
        assert slots.num_free == 7 - len(owned)


def test_check_complains_about_a_double_owner_and_a_lost_slot() -> None:
    slots = SlotAllocator(3)
    first = slots.take()
    assert first == 0
    with pytest.raises(AssertionError, match="two live owners"):
        slots.check([0, 0])
    with pytest.raises(AssertionError, match="lost"):
        slots.check([])
    slots.give(0)
    with pytest.raises(AssertionError, match="free slot has an owner"):
        slots.check([0])


def test_a_prompt_chunk_is_causal() -> None:
    slots = table()
    part = Part(0, commits=[0, 1, 2], nodes=[-1] * 3, tokens=[7, 8, 9], positions=[0, 1, 2], slots=[0, 1, 2],
                paths=[[], [], []], wants=[False] * 3)
    slots.apply(part)
    assert slots.mask(part).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert slots.path(part, 1) == [7, 8]
    assert slots.committed_tokens().tolist() == [7, 8, 9]


def test_siblings_do_not_see_each_other_and_a_reused_slot_forgets_its_dead_owner() -> None:
    slots = table()
    slots.apply(Part(0, [0, 1], [-1, 5], [7, 8], [0, 1], [0, 1], [[], []], [False, True]))
    tree = Part(0, [], [6, 7, 8], [20, 21, 22], [2, 2, 3], [2, 3, 4], [[2], [3], [2, 4]], [True] * 3)
    slots.apply(tree)
    assert slots.mask(tree).astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]
    assert slots.path(tree, 2) == [7, 8, 20, 22]
    assert [slots.tail(tree, 2, count) for count in (1, 2, 3)] == [[22], [20, 22], [8, 20, 22]]
    # Node 6 (slot 2) is committed, node 7 (slot 3) died; a new node takes slot 3.
    late = Part(0, [2], [9], [30], [3], [3], [[3]], [True])
    slots.apply(late)
    assert slots.path(late, 0) == [7, 8, 20, 30]
    assert np.flatnonzero(slots.mask(late)[0]).tolist() == [0, 1, 2, 3]


def scrambled() -> SlotTable:
    """Tokens 7, 8, 20 at positions 0, 1, 2 are committed, in slots 3, 0, 2; a guess stands in slot 1."""
    slots = table(4)
    slots.apply(Part(0, [3, 0], [-1, 5], [7, 8], [0, 1], [3, 0], [[], []], [False, True]))
    slots.apply(Part(0, [], [6, 7], [20, 21], [2, 2], [2, 1], [[2], [1]], [True, True]))
    slots.apply(Part(0, [2]))
    return slots


def test_an_enlarged_table_knows_what_it_knew() -> None:
    slots = scrambled()
    late = Part(0, [6], [9], [30], [3], [6], [[6]], [True])
    with pytest.raises(IndexError):
        slots.apply(late)
    slots.enlarge(7)
    slots.enlarge(5)  # of an open arena the capacity only grows
    assert slots.capacity == 7
    slots.apply(late)
    assert slots.committed_tokens().tolist() == slots.path(late, 0)[:-1] == [7, 8, 20, 30]
    assert np.flatnonzero(slots.mask(late)[0]).tolist() == [0, 2, 3, 6]


@pytest.mark.parametrize("count", range(4))
def test_a_table_begins_with_a_committed_path(count: int) -> None:
    tables = {0: scrambled()}
    copied = tables[0].committed_slots()[:count].tolist()
    slots = open_table(tables, Opening(1, 8, 2, SamplingParams(seed=4), copy_from=0, copied=copied))
    assert slots.committed_tokens().tolist() == [7, 8, 20][:count]
    assert slots.committed_slots().tolist() == list(range(count))
    assert (slots.width, slots.params.seed) == (count, 4)
    part = Part(1, [], [9], [40], [count], [count], [[count]], [True])
    slots.apply(part)
    assert slots.path(part, 0) == [*[7, 8, 20][:count], 40]
    assert slots.mask(part).tolist() == [[True] * (count + 1)]


@pytest.mark.parametrize("copied", [[3, 1], [0], [3, 2], [0, 3]], ids=["a guess", "not the first", "a gap", "order"])
def test_nothing_but_a_committed_path_is_copied(copied: list[int]) -> None:
    with pytest.raises(AssertionError, match="only the committed path"):
        open_table({0: scrambled()}, Opening(1, 8, 2, SamplingParams(), copy_from=0, copied=copied))


def test_opening_what_is_open_enlarges_it() -> None:
    tables = {0: scrambled()}
    assert open_table(tables, Opening(0, 9, 2, SamplingParams())) is tables[0]
    assert tables[0].capacity == 9
