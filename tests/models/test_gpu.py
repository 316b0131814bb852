"""A slice on a device, seen from outside: on the CPU what its contract test in `test_decoder` does not ask; on CUDA
that graphs say what kernels say."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from fullpipe.errors import UsageError
from fullpipe.models.gpu import plain
from fullpipe.models.gpu.decoder import DeviceSlice, Weights, operations
from fullpipe.models.gpu.devices import find_device
from fullpipe.models.gpu.pool import SCRATCH, Pool
from fullpipe.models.gpu.rows import Rows, width_for
from fullpipe.models.paths import step_of_paths
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from fullpipe.options import BLOCK

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


def chain(slice: DeviceSlice, tokens: list[int], slots: list[int], start: int = 0) -> Tensor:
    """Logits of tokens that follow each other from position `start` on. slots: of all positions up to the last."""
    return slice.logits(slice.forward(Step.of_text(torch.tensor(tokens), np.array(slots, np.int32), start)))


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_a_row_has_the_same_bits_in_any_slots_company_and_parts(part: DeviceSlice, seed: int, sizes: list[int]) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(tiny.VOCAB) for _ in range(sum(sizes))]
    plain = chain(part, tokens, list(range(len(tokens))))
    slots, start = rng.sample(range(300, 900), len(tokens)), 0
    for size in sizes:
        paths = [slots[: start + row + 1] for row in range(size)]
        company = [list(range(1000, 1001 + row)) for row in range(rng.randrange(3))]
        x = torch.tensor(tokens[start : start + size] + [5] * len(company))
        found = part.logits(part.forward(step_of_paths(x, paths + company)))[:size]
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


def test_a_row_that_reads_no_whole_path_is_our_mistake(part: DeviceSlice) -> None:
    step = replace(step_of_paths(torch.tensor([3]), [[2, 1, 0]]), positions=np.array([5]))
    with pytest.raises(AssertionError, match="no whole path"):
        part.forward(step)


def test_slots_lie_behind_the_places_of_rows_that_fill_up(part: DeviceSlice) -> None:
    rows = Rows.of(step_of_paths(torch.tensor([3, 4]), [[0, 7, 9], [0, 7, 2]]))
    assert rows.places.tolist() == [SCRATCH + 9, SCRATCH + 2]
    assert rows.context[:, :3].tolist() == [[SCRATCH, SCRATCH + 7, SCRATCH + 9], [SCRATCH, SCRATCH + 7, SCRATCH + 2]]
    assert part.slots == 8 * BLOCK and part.pool.kv.shape[2] == SCRATCH + part.slots


@pytest.mark.parametrize(("length", "width"), [(1, 256), (256, 256), (257, 512), (1024, 1024), (1025, 2048)])
def test_contexts_come_in_few_widths(length: int, width: int) -> None:
    assert width_for(length) == width


def test_a_slice_without_layers_needs_no_memory(weights: Callable[..., Weights]) -> None:
    assert Pool(weights(CPU).config, 0, 1000, torch.float32, CPU).kv.nbytes == 0


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


def test_a_slice_that_nobody_uses_is_gone_before_room_is_looked_for(
        weights: Callable[..., Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that a slice has made hold it, and memory that torch keeps for later does not count as free."""
    from fullpipe.models.gpu import devices

    made = DeviceSlice(weights(CPU), torch.float32, CPU, pool_bytes=1 << 20)
    chain(made, [1, 2, 3], [0, 1, 2])
    pool, emptied = weakref.ref(made.pool), list[bool]()
    del made
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(pool() is None))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 0))
    devices.check_room(open_model(tiny.save(tiny.tiny_model("llama"), tmp_path)), 0, 5, has_embedding=True,
                       has_head=True, dtype=torch.float32, device=torch.device("cuda"), pool_bytes=None)
    assert emptied == [True]


def test_a_gpu_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.7, whose Triton has no dependent launches."""
    monkeypatch.setitem(sys.modules, "fullpipe.models.gpu.kernels", None)
    monkeypatch.delattr("fullpipe.models.gpu.kernels", raising=False)
    with pytest.raises(UsageError, match="there are no kernels for cuda:0: ") as told:
        operations(torch.device("cuda:0"))
    assert told.value.param == "device" and "`device=cpu`" in (told.value.hint or "")


def test_a_bucket_is_no_larger_than_the_scratch_block(weights: Callable[..., Weights]) -> None:
    with pytest.raises(AssertionError, match="no other place"):
        DeviceSlice(weights(CPU), torch.float32, CPU, rows=(16, 2 * BLOCK), pool_bytes=1 << 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_say_what_kernels_say_and_nearly_what_the_processor_says(
        weights: Callable[..., Weights], dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    rng = random.Random(0)
    tokens, slots = [rng.randrange(tiny.VOCAB) for _ in range(90)], list(range(90))
    truth = chain(DeviceSlice(weights(CPU), torch.float32, CPU), tokens, slots)
    for graphs, library in ((True, True), (False, True), (True, False)):
        made = DeviceSlice(weights(device, dtype), dtype, device, graphs=graphs, library=library)
        whole = chain(made, tokens, slots)
        others = [300 + slot for slot in slots]
        parts = [chain(made, tokens[at : at + 3], others[: at + 3], at) for at in range(0, 90, 3)]
        assert torch.equal(whole, torch.cat(parts))
        assert (whole - truth).norm() / truth.norm() < (1e-5 if dtype == torch.float32 else 3e-2)
