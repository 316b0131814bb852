"""Triton's kernels say what plain torch says. They run on CUDA, or anywhere in Triton's interpreter:

    TRITON_INTERPRET=1 pytest tests/models/test_gpu_kernels.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fullpipe.models.gpu import plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("there is no CUDA device, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's, from the interpreter

from fullpipe.models.gpu import kernels  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter takes bfloat16 for integers in products
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
PARTS = pytest.mark.parametrize("count", [1, 3])
SHAPES = pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (12, 2, 128), (4, 4, 16), (4, 1, 80)])


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
    assert error < (1e-6 if dtype == torch.float32 else 8e-3)


@DTYPES
@pytest.mark.parametrize("size", [64, 576, 1536, 3584])
def test_norm(dtype: torch.dtype, size: int) -> None:
    x, weight = randn(5, size, dtype=dtype), randn(size)
    close(kernels.norm(x, weight, 1e-5), plain.norm(x, weight, 1e-5), dtype)


@DTYPES
@PARTS
@pytest.mark.parametrize("size", [576, 3584])
def test_adding_before_the_norm(dtype: torch.dtype, count: int, size: int) -> None:
    weight, parts = randn(size), randn(count, 5, size)
    for bias in (None, randn(size, dtype=dtype)):
        ours, theirs = randn(5, size, dtype=dtype), randn(5, size, dtype=dtype)
        normed = [ops.add_norm(hidden, parts, bias, weight, 1e-5) for ops, hidden in ((kernels, ours), (plain, theirs))]
        close(*normed, dtype)
        close(ours, theirs, dtype)


@DTYPES
@PARTS
@pytest.mark.parametrize("size", [96, 1536, 8960])
def test_gate(dtype: torch.dtype, count: int, size: int) -> None:
    parts = randn(count, 3, 2 * size)
    close(kernels.gate(parts, dtype), plain.gate(parts, dtype), dtype)


@pytest.mark.parametrize(("columns", "depth"), [(96, 64), (200, 576), (64, 2000), (130, 960)])
def test_product(columns: int, depth: int) -> None:
    """Whatever the bucket, a row has the same bits; but not in the interpreter, where NumPy multiplies."""
    x, weight = randn(64, depth, dtype=HALF), randn(columns, depth, dtype=HALF)
    whole, truth = kernels.product(x, weight), x.double() @ weight.double().t()
    assert whole.dtype == torch.float32 and (whole.double().sum(0) - truth).norm() / truth.norm() < 1e-5
    for rows in () if INTERPRETED else (16, 32):
        assert torch.equal(kernels.product(x[:rows].contiguous(), weight), whole[:, :rows])


def test_how_a_product_is_cut() -> None:
    counts = {shape: len(kernels.product(randn(16, shape[1], dtype=HALF), randn(*shape, dtype=HALF)))
              for shape in ((64, 256), (64, 128 * 6), (64, 128 * 12), (64, 128 * 24), (128 * 64, 256))}
    assert list(counts.values()) == [1, 2, 4, 8, 1]


@DTYPES
@SHAPES
@PARTS
@pytest.mark.parametrize("normed", [False, True])
def test_rotation(dtype: torch.dtype, count: int, heads: int, kv_heads: int, size: int, normed: bool) -> None:
    parts, angles = randn(count, 5, (heads + 2 * kv_heads) * size), randn(5, size // 2)
    bias = randn((heads + 2 * kv_heads) * size, dtype=dtype) if normed else None
    qk_norm = randn(heads + kv_heads, size) if normed else None
    places = torch.tensor([7, 3, 0, 19, 4], dtype=torch.int32, device=DEVICE)
    said: list[Any] = []
    for ops in (kernels, plain):
        cache = torch.zeros(2 * kv_heads, 24, size, dtype=dtype, device=DEVICE)
        queries = ops.rotate_and_store(parts, bias, angles.cos(), angles.sin(), qk_norm, 1e-5, places, cache)
        said.append((queries, cache))
    close(said[0][0], said[1][0], dtype)
    close(said[0][1], said[1][1], dtype)
    assert not said[0][1][:, [1, 2, 5, 23]].any()


@DTYPES
@SHAPES
def test_attention(dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> None:
    """The last of the lengths gives a program several chunks."""
    lengths = torch.tensor([1, 64, 65, 200, kernels.CHUNK * kernels.SPLITS + 100], dtype=torch.int32, device=DEVICE)
    width = 4096
    queries, cache = randn(5, heads, size, dtype=dtype), randn(2 * kv_heads, 3000, size, dtype=dtype)
    context = torch.randint(3000, (5, width), generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.int32)
    ours = kernels.attend(queries, cache, context, lengths)
    close(ours, plain.attend(queries, cache, context, lengths), dtype)
    for row, length in enumerate(lengths.tolist()):  # the same bits alone, in a narrow bucket
        narrow = context[row : row + 1, : -(-length // 256) * 256].contiguous()
        alone = kernels.attend(queries[row : row + 1], cache, narrow, lengths[row : row + 1])
        assert torch.equal(alone[0], ours[row])
