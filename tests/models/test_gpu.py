"""A slice on a device, seen from outside: on the CPU what its contract test in `test_decoder` does not ask; on CUDA
that graphs say what kernels say."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from fullpipe.errors import UsageError
from fullpipe.models.attention import Segment
from fullpipe.models.gpu import plain
from fullpipe.models.gpu.decoder import DeviceSlice, Weights
from fullpipe.models.gpu.devices import find_device
from fullpipe.models.gpu.pool import BLOCK, DeviceArena, Pool
from fullpipe.models.gpu.rows import Rows, width_for
from fullpipe.models.weights import open_model

CPU = torch.device("cpu")
SLOT_BYTES = tiny.LAYERS * 2 * 2 * 16 * 4  # layers, keys and values, heads, numbers, bytes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Weights]:
    folder: Path = tiny.save(tiny.tiny_model("qwen2"), tmp_path_factory.mktemp("model"))
    return lambda device, dtype=torch.float32: Weights.read(
        open_model(folder), 0, tiny.LAYERS, has_embedding=True, has_head=True, dtype=dtype, device=device)


@pytest.fixture(scope="module")
def part(weights: Callable[..., Weights]) -> DeviceSlice:
    return DeviceSlice(weights(CPU), torch.float32, CPU, pool_bytes=8 * BLOCK * SLOT_BYTES, rows=(4, 8, 16))


def chain(slice: DeviceSlice, arena: DeviceArena, tokens: list[int], slots: list[int], start: int) -> Tensor:
    """Logits of tokens that follow each other from position `start` on. slots: of all positions up to the last."""
    mask = torch.zeros(len(tokens), arena.capacity, dtype=torch.bool)
    for row in range(len(tokens)):
        mask[row, slots[: start + row + 1]] = True
    positions = torch.arange(start, start + len(tokens))
    own = torch.tensor(slots[start : start + len(tokens)])
    return slice.logits(slice.forward(torch.tensor(tokens), positions, [Segment(0, len(tokens), arena, own, mask)]))


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_a_row_has_the_same_bits_in_any_slots_company_and_parts(part: DeviceSlice, seed: int, sizes: list[int]) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(tiny.VOCAB) for _ in range(sum(sizes))]
    plain = chain(part, part.allocate(300), tokens, list(range(len(tokens))), 0)
    blocker = part.allocate(rng.randrange(1, 300))  # so that blocks lie elsewhere
    arena, other = part.allocate(300), part.allocate(300)
    del blocker
    slots, start = rng.sample(range(300), len(tokens)), 0
    for size in sizes:
        mask = torch.zeros(size, 300, dtype=torch.bool)
        for row in range(size):
            mask[row, slots[: start + row + 1]] = True
        company = rng.randrange(3)
        positions = torch.tensor([*range(start, start + size), *range(company)])
        x = torch.tensor(tokens[start : start + size] + [5] * company)
        segments = [Segment(0, size, arena, torch.tensor(slots[start : start + size]), mask)]
        if company:
            own = torch.arange(company)
            segments.append(Segment(size, size + company, other, own,
                                    torch.ones(company, company, dtype=torch.bool).tril()))
        found = part.logits(part.forward(x, positions, segments))[:size]
        assert torch.equal(found, plain[start : start + size])
        start += size


def in_any_order(x: Tensor, weight: Tensor) -> Tensor:
    """A product that sums so finely that order does not count."""
    return (x.double() @ weight.double().t()).float()[None]


def test_buckets_that_disagree_are_left_out(weights: Callable[..., Weights],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that sums eight rows in another order than four or sixteen."""
    monkeypatch.setattr(plain, "product", lambda x, weight: in_any_order(x, weight) * (1 + 1e-6 * (len(x) == 8)))
    made = DeviceSlice(weights(CPU), torch.float32, CPU, rows=(4, 8, 16), pool_bytes=1 << 20)
    assert (made.rows, made.exact) == ((4, 16), True)


def test_a_product_that_minds_the_order_of_rows_is_told(weights: Callable[..., Weights],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "product", lambda x, weight: in_any_order(x, weight) * (
        1 + 1e-6 * (torch.arange(len(x)) == 3)[:, None]))
    assert not DeviceSlice(weights(CPU), torch.float32, CPU, rows=(4,), pool_bytes=1 << 20).exact


def test_blocks_come_from_the_pool_and_go_back(part: DeviceSlice) -> None:
    free = part.pool.num_free
    arena = part.allocate(BLOCK + 1)
    assert part.pool.num_free == free - 2 * BLOCK
    assert arena.enlarged(2 * BLOCK, 7) is arena
    assert part.pool.num_free == free - 2 * BLOCK
    arena.enlarged(2 * BLOCK + 1, 7)
    assert (part.pool.num_free, arena.capacity) == (free - 3 * BLOCK, 2 * BLOCK + 1)
    assert len(set(arena.places.tolist())) == 3 * BLOCK and arena.places.min() >= BLOCK  # none is scratch
    del arena
    assert part.pool.num_free == free


def test_a_pool_that_is_full_says_so(part: DeviceSlice) -> None:
    free = part.pool.num_free
    arena = part.allocate(free)
    with pytest.raises(UsageError, match=r"pool of 2048 cache slots .* is full: 0 are free, 256 more") as told:
        part.allocate(1)
    assert told.value.param == "kv_pool_mib" and "`kv_pool_mib`" in (told.value.hint or "")
    with pytest.raises(UsageError, match="is full"):
        arena.enlarged(free + 1, 0)
    del arena
    assert part.pool.num_free == free


def test_an_arena_begins_with_rows_of_another(part: DeviceSlice) -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    one, other = part.allocate(40), part.allocate(40)
    slots = [7, 3, 30, 11, 0, 22, 9, 39]
    expected = chain(part, one, tokens, slots, 0)
    other.begin_with(one, torch.tensor(slots[:5]))
    assert torch.equal(chain(part, other, tokens[5:], list(range(8)), 5), expected[5:])


def test_a_row_that_reads_no_whole_path_is_our_mistake(part: DeviceSlice) -> None:
    arena, mask = part.allocate(8), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(AssertionError, match="no whole path"):
        Rows.of(torch.tensor([5]), [Segment(0, 1, arena, torch.tensor([2]), mask)])


@pytest.mark.parametrize(("length", "width"), [(1, 256), (256, 256), (257, 512), (1024, 1024), (1025, 2048)])
def test_contexts_come_in_few_widths(length: int, width: int) -> None:
    assert width_for(length) == width


def test_a_slice_without_layers_needs_no_memory(weights: Callable[..., Weights]) -> None:
    config = weights(CPU).config
    pool = Pool(config, 0, 1000, torch.float32, CPU)
    assert pool.kv.nbytes == 0 and DeviceArena(pool, 600).capacity == 600


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="there is no device cuda: ") as told:
        find_device("cuda")
    assert "`device=cpu`" in (told.value.hint or "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (find_device("cuda"), find_device("cuda:1")) == ("cuda:0", "cuda:1")
    with pytest.raises(UsageError, match="there is no device cuda:2: 2 can be seen") as told:
        find_device("cuda:2")
    assert told.value.hint == "Use one of cuda:0, cuda:1."


def test_a_device_that_is_too_small(weights: Callable[..., Weights], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    from fullpipe.models.gpu import devices

    files = open_model(tiny.save(tiny.tiny_model("llama"), tmp_path))
    layers = {"has_embedding": True, "has_head": True, "dtype": torch.float32, "device": torch.device("cuda")}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600 << 20, 0))
    devices.check_room(files, 0, 5, pool_bytes=10 << 20, **layers)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"5 layers of .* need 612 MiB on cuda .*100 of cache.*, and 600 are free"):
        devices.check_room(files, 0, 5, pool_bytes=100 << 20, **layers)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_say_what_kernels_say_and_nearly_what_the_processor_says(
        weights: Callable[..., Weights], dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    rng = random.Random(0)
    tokens, slots = [rng.randrange(tiny.VOCAB) for _ in range(90)], list(range(90))
    truth = chain(one := DeviceSlice(weights(CPU), torch.float32, CPU), one.allocate(90), tokens, slots, 0)
    for graphs, library in ((True, True), (False, True), (True, False)):
        made = DeviceSlice(weights(device, dtype), dtype, device, graphs=graphs, library=library)
        arena = made.allocate(90)
        whole = chain(made, made.allocate(90), tokens, slots, 0)
        parts = [chain(made, arena, tokens[at : at + 3], slots, at) for at in range(0, 90, 3)]
        assert torch.equal(whole, torch.cat(parts))
        assert (whole - truth).norm() / truth.norm() < (1e-5 if dtype == torch.float32 else 3e-2)
