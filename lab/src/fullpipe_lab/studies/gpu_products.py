"""Products of few rows on a GPU: the library's in each bucket of rows, and a kernel of ours in many forms, against the
time of reading the weight. Part g of `gpu_stage`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMS = ((32, 128, 4, 4, False), (32, 256, 4, 4, False), (64, 128, 4, 4, False), (64, 64, 4, 4, True),
         (64, 128, 4, 4, True), (64, 128, 4, 6, True), (64, 256, 4, 3, True), (128, 64, 4, 4, True),
         (128, 128, 4, 4, True), (128, 128, 8, 4, True))
"""Columns and depth of a tile, warps, stages; whether the weight is the left factor."""

Form = tuple[int, int, int, int, bool]
SPLITS = (1, 2, 4, 8)


@triton.jit
def _product(x, weight, parts, columns, depth, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
             SWAPPED: tl.constexpr):
    block, split = tl.program_id(0), tl.program_id(1)
    m, n, k = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    total = tl.zeros([COLUMNS, ROWS], tl.float32) if SWAPPED else tl.zeros([ROWS, COLUMNS], tl.float32)
    first = split * share
    left = x + m[:, None] * depth + k[None, :]
    right = weight + n[:, None].to(tl.int64) * depth + k[None, :]
    real = n < columns
    for at in range(first, tl.minimum(first + share, depth), DEPTH):
        there = at + k < depth
        a = tl.load(left + at, mask=there[None, :], other=0.0)
        b = tl.load(right + at, mask=real[:, None] & there[None, :], other=0.0)
        total = tl.dot(b, tl.trans(a), total) if SWAPPED else tl.dot(a, tl.trans(b), total)
    if SWAPPED:
        total = tl.trans(total)
    tl.store(parts + (split * ROWS + m[:, None]) * columns + n[None, :], total, mask=real[None, :])


def ours(x: Tensor, weight: Tensor, form: Form, splits: int, parts: Tensor) -> None:
    """Sums over parts of the depth: parts, float32 [splits, rows, columns]. x: [16, 32 or 64, depth]."""
    (rows, depth), columns = x.shape, weight.shape[0]
    wide, deep, warps, stages, swapped = form
    share = triton.cdiv(triton.cdiv(depth, deep), splits) * deep
    _product[(triton.cdiv(columns, wide), splits)](x, weight, parts, columns, depth, share, ROWS=rows, COLUMNS=wide,
                                                   DEPTH=deep, SWAPPED=swapped, num_warps=warps, num_stages=stages)


def captured_us(run: Callable[[], object], calls: int, repeats: int = 12) -> float:
    """Median microseconds of one of the calls that `run` makes, in a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    event: Callable[[], Any] = partial(torch.cuda.Event, enable_timing=True)
    marks = [(event(), event()) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(float(start.elapsed_time(end)) for start, end in marks) / calls


def compare(weights: list[Tensor], gbps: float, note: Callable[..., None], name: str) -> None:
    """weights: several of one shape, bfloat16 [columns, depth], together far larger than the cache of the card."""
    columns, depth = weights[0].shape
    limit = weights[0].nbytes / gbps / 1e3
    x = {rows: torch.randn(rows, depth, device=weights[0].device).bfloat16() for rows in (16, 32, 64)}
    for rows, given in x.items():
        taken = captured_us(lambda given=given: [given @ weight.t() for weight in weights], len(weights))  # type: ignore
        note("products", shape=name, columns=columns, depth=depth, by="library", rows=rows, us=taken, limit_us=limit,
             over_limit=taken / limit)
    found = []
    for form in FORMS:
        for splits in SPLITS:
            blocks = triton.cdiv(columns, form[0]) * splits
            if not 100 <= blocks <= 20000 or (splits > 1 and blocks > 2500) or splits * form[1] > depth:
                continue
            parts = torch.empty(splits, 16, columns, device=weights[0].device)
            try:
                taken = captured_us(lambda f=form, s=splits, p=parts: [ours(x[16], w, f, s, p) for w in weights],  # type: ignore
                                    len(weights), 6)
            except Exception as error:  # too much shared memory, say
                note("products failed", shape=name, form=str(form), splits=splits, error=str(error)[:100])
                break
            found.append((taken, form, splits))
    for taken, form, splits in sorted(found)[:4]:
        note("products", shape=name, columns=columns, depth=depth, by=f"ours {form} x{splits}", rows=16, us=taken,
             limit_us=limit, over_limit=taken / limit)
    if found:
        _check(weights[0], min(found)[1], min(found)[2], note, name)


def _check(weight: Tensor, form: Form, splits: int, note: Callable[..., None], name: str) -> None:
    """The best form in each bucket: right, and the same bits?"""
    columns, depth = weight.shape
    x = torch.randn(64, depth, device=weight.device).bfloat16()
    truth, said = x.double() @ weight.double().t(), {}
    for rows in (16, 32, 64):
        parts = torch.empty(splits, rows, columns, device=weight.device)
        try:
            ours(x[:rows].contiguous(), weight, form, splits, parts)
            said[rows] = parts.sum(0)
            taken = captured_us(lambda p=parts, r=rows: [ours(x[:r], weight, form, splits, p) for _ in range(8)], 8)  # type: ignore
        except Exception as error:
            note("products failed", shape=name, form=str(form), splits=splits, error=str(error)[:100])
            continue
        note("our product", shape=name, form=str(form), splits=splits, rows=rows, us_from_cache=taken,
             error=float((said[rows] - truth[:rows]).norm() / truth[:rows].norm()),
             same_bits_as_16=torch.equal(said[rows][:16], said[16]))
