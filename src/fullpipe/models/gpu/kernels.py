"""What lies between the products, as Triton kernels: each says what its twin in `plain` says, in one launch or two.

A program computes one row, or one head of one, and sees nothing else. So a row's bits cannot depend on its company, on
where its context lies, or on how far a bucket is filled up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
"""Positions that attention reads at a time."""

SPLITS = 32
"""Programs at most that share a row's context. Which chunks each has depends on the length of the context alone."""

_LEAST_DOT = 16  # rows of a matrix product on tensor cores


@triton.jit
def _norm(x, weight, out, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    scaled = values * scale * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * size + column, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(qkv, cosine, sine, qk_norm, places, queries, cache, room, eps, HEADS: tl.constexpr,
            KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + i
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORMED:
            scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / (2 * HALF) + eps)
            weight = qk_norm + head * 2 * HALF + i
            low = low * scale * tl.load(weight, mask=inside, other=0.0)
            high = high * scale * tl.load(weight + HALF, mask=inside, other=0.0)
        c = tl.load(cosine + row * HALF + i, mask=inside, other=0.0)
        s = tl.load(sine + row * HALF + i, mask=inside, other=0.0)
        turned_low = low * c - high * s
        turned_high = high * c + low * s
        low = turned_low
        high = turned_high
    if head < HEADS:
        target = queries + (row * HEADS + head) * 2 * HALF + i
        tl.store(target, low.to(queries.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(queries.dtype.element_ty), mask=inside)
    else:
        place = tl.load(places + row).to(tl.int64)
        written = cache + ((head - HEADS) * room + place) * 2 * HALF + i
        tl.store(written, low.to(cache.dtype.element_ty), mask=inside)
        tl.store(written + HALF, high.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _attend(queries, cache, context, lengths, highest, total, mixed, width, room, scale, HEADS: tl.constexpr,
            KV_HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr):
    """All query heads of one key-value head over one share of a row's context: highest score, sum, mixed values."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    length = tl.load(lengths + row)
    chunks = (length + CHUNK - 1) // CHUNK
    share = (chunks + SPLITS - 1) // SPLITS
    first = split * share
    last = tl.minimum(first + share, chunks)
    if first < last:
        g, d, k = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, CHUNK)
        head = row * HEADS + kv_head * GROUPS + g
        real = g < GROUPS
        filled = real[:, None] & (d < SIZE)[None, :]
        query = tl.load(queries + head[:, None] * SIZE + d[None, :], mask=filled, other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        mix = tl.zeros([ROWS, BLOCK], tl.float32)
        for chunk in range(first, last):
            position = chunk * CHUNK + k
            there = position < length
            place = tl.load(context + row * width + position, mask=there, other=0).to(tl.int64)
            both = there[:, None] & (d < SIZE)[None, :]
            key = tl.load(cache + (kv_head * room + place)[:, None] * SIZE + d[None, :], mask=both, other=0.0)
            value = tl.load(cache + ((KV_HEADS + kv_head) * room + place)[:, None] * SIZE + d[None, :], mask=both,
                            other=0.0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            score = tl.where(there[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weights = tl.exp(score - higher[:, None])
            fade = tl.exp(top - higher)
            weight = weight * fade + tl.sum(weights, 1)
            mix = mix * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            top = higher
        part = head * SPLITS + split
        tl.store(highest + part, top, mask=real)
        tl.store(total + part, weight, mask=real)
        tl.store(mixed + part[:, None] * SIZE + d[None, :], mix, mask=filled)


@triton.jit
def _combine(highest, total, mixed, lengths, out, HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
             SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """One head of a row: its shares, weighted anew by the highest score of all."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = (tl.load(lengths + row) + CHUNK - 1) // CHUNK
    share = (chunks + SPLITS - 1) // SPLITS
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    there = split * share < chunks
    part = (row * HEADS + head) * SPLITS + split
    top = tl.load(highest + part, mask=there, other=float("-inf"))
    fade = tl.exp(top - tl.max(top, 0))
    weight = tl.sum(fade * tl.load(total + part, mask=there, other=0.0), 0)
    parts = tl.load(mixed + part[:, None] * SIZE + d[None, :], mask=there[:, None] & (d < SIZE)[None, :], other=0.0)
    mix = tl.sum(fade[:, None] * parts, 0) / weight
    tl.store(out + (row * HEADS + head) * SIZE + d, mix.to(out.dtype.element_ty), mask=d < SIZE)


@triton.jit
def _gate(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    left = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(gate_up + (row * 2 + 1) * size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (left / (1.0 + tl.exp(-left)) * right).to(out.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `plain.norm`; weight: [n]."""
    rows, size = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _norm[(rows,)](x, weight, out, size, eps, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return out


def rotate_and_store(qkv: Tensor, cosine: Tensor, sine: Tensor, qk_norm: Tensor | None, eps: float, places: Tensor,
                     cache: Tensor) -> Tensor:
    """See `plain.rotate_and_store`."""
    twice_kv, room, size = cache.shape
    rows, heads = len(qkv), qkv.shape[1] // size - twice_kv
    queries = torch.empty(rows, heads, size, dtype=qkv.dtype, device=qkv.device)
    _rotate[(rows, heads + twice_kv)](
        qkv, cosine, sine, cosine if qk_norm is None else qk_norm, places, queries, cache, room, eps, HEADS=heads,
        KV_HEADS=twice_kv // 2, HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2), NORMED=qk_norm is not None,
        num_warps=1)
    return queries


def attend(queries: Tensor, cache: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
    """See `plain.attend`. Scores, weights and sums are float32; weights are rounded to the values' dtype."""
    (rows, heads, size), (twice_kv, room, _), width = queries.shape, cache.shape, context.shape[1]
    kv_heads, block = twice_kv // 2, triton.next_power_of_2(size)
    highest, total = torch.empty(2, rows, heads, SPLITS, dtype=torch.float32, device=queries.device)
    mixed = torch.empty(rows, heads, SPLITS, size, dtype=torch.float32, device=queries.device)
    out = torch.empty(rows, heads * size, dtype=queries.dtype, device=queries.device)
    _attend[(rows, kv_heads, min(SPLITS, triton.cdiv(width, CHUNK)))](
        queries, cache, context, lengths, highest, total, mixed, width, room, size**-0.5, HEADS=heads,
        KV_HEADS=kv_heads, SIZE=size, CHUNK=CHUNK, SPLITS=SPLITS,
        ROWS=max(_LEAST_DOT, triton.next_power_of_2(heads // kv_heads)), BLOCK=block, num_warps=4)
    _combine[(rows, heads)](highest, total, mixed, lengths, out, HEADS=heads, SIZE=size, CHUNK=CHUNK, SPLITS=SPLITS,
                            BLOCK=block, num_warps=4)
    return out


def gate(gate_up: Tensor) -> Tensor:
    """See `plain.gate`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    _gate[(rows, triton.cdiv(size, 1024))](gate_up, out, size, BLOCK=1024, num_warps=4)
    return out
