"""How large a pool of cache memory is, and that what nobody uses takes no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fullpipe.errors import UsageError
from fullpipe.models.pool import MOST_SLOTS, empty, slots_for
from fullpipe.options import BLOCK

MIB = 1 << 20


def test_a_pool_takes_a_quarter_of_what_is_free_and_has_a_greatest_size() -> None:
    assert slots_for(1024, None, 100 * MIB) == 25 * MIB // 1024 // BLOCK * BLOCK
    assert slots_for(1024, None, 1 << 40) == MOST_SLOTS
    assert slots_for(1024, None, -5) == 8 * BLOCK, "with so little, weights are the problem"


def test_a_pool_of_a_size_that_was_asked_for_has_whole_blocks() -> None:
    assert slots_for(3000, 10 * MIB, 20 * MIB) == 13 * BLOCK


def test_slots_of_a_slice_without_layers_take_no_memory() -> None:
    assert slots_for(0, 1, 0) == MOST_SLOTS


def test_what_does_not_fit_is_told_with_the_number_that_would() -> None:
    with pytest.raises(UsageError, match="a cache pool of 30 MiB does not fit: 20 MiB are free") as told:
        slots_for(1024, 30 * MIB, 20 * MIB)
    assert told.value.param == "kv_pool_mib" and "`kv_pool_mib=20`" in (told.value.hint or "")
    with pytest.raises(UsageError, match="1 MiB has no room for a block of 256 tokens, which takes 3 MiB") as told:
        slots_for(10000, MIB, 20 * MIB)
    assert "`kv_pool_mib=3`" in (told.value.hint or "")


def test_memory_comes_when_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    pool = empty((4, 1 << 16, 4, 128), torch.bfloat16)
    assert pool.nbytes == 256 * MIB and not pool[2, 77].any()
    pool[:, :100] = 1
    assert resident() - before < 64 * MIB
