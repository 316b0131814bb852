"""A step's operations as Triton kernels: each says what its twin in `plain` says, in one launch or two.

Between the products a program computes one row, or one head of one, and sees nothing else. So a row's bits cannot
depend on its company, on where its context lies, or on how far a bucket is filled up. In a product a row is a column of
what the tensor cores compute, and the order in which they sum depends on the weight's shape alone.

Kernels begin early (Hopper's dependent launches): each lets the next one start at once, and waits itself, before it
reads anything that changes, until the one before is done. What a product does while it waits is to fetch its weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fullpipe.models.gpu import plain

CHUNK = 64
"""Positions that attention reads at a time."""

SPLITS = 32
"""Programs at most that share a row's context. Which chunks each has depends on the length of the context alone."""

EARLY = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""Whether this card has dependent launches."""

PER_WARP = 512
"""Numbers of a row that a warp of a norm has."""

_LEAST_DOT = 16  # rows of a matrix product on tensor cores


TILE, DEPTH, WARPS, STAGES = 64, 128, 4, 4
"""Rows of the weight that a program of a product has, and numbers of each that it reads at a time; its warps, and how
many reads are under way."""

AHEAD = 512
"""Numbers of each row of its weight that a program fetches into the card's cache while it waits: 64 KiB, for all
programs together less than half of that cache."""

ENOUGH, MOST_PARTS, LEAST_TILES = 128, 8, 3
"""A product is cut along its depth until there are enough programs, into so many parts at most, each not too short.
Nothing here follows the card, for bits follow it."""


@triton.jit
def _product(x, weight, parts, columns, depth, share, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
             AHEAD: tl.constexpr, EARLY: tl.constexpr):
    block, part = tl.program_id(0), tl.program_id(1)
    m, n, k = tl.arange(0, ROWS), block * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    total = tl.zeros([TILE, ROWS], tl.float32)
    first = part * share
    if EARLY:
        gdc_launch_dependents()
        own = weight + tl.minimum(n, columns - 1).to(tl.int64) * depth + first
        size = tl.minimum(tl.minimum(share, depth - first), AHEAD) * 2
        tl.inline_asm_elementwise("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
                                  [own.to(tl.int64), tl.zeros([TILE], tl.int32) + size], dtype=tl.int32, is_pure=False,
                                  pack=1)
        gdc_wait()
    rows = x + m[:, None] * depth + k[None, :]
    tile = weight + n[:, None].to(tl.int64) * depth + k[None, :]
    real = n < columns
    for at in range(first, tl.minimum(first + share, depth), DEPTH):
        there = at + k < depth
        given = tl.load(rows + at, mask=there[None, :], other=0.0)
        read = tl.load(tile + at, mask=real[:, None] & there[None, :], other=0.0)
        total = tl.dot(read, tl.trans(given), total)
    tl.store(parts + (part * ROWS + m[:, None]) * columns + n[None, :], tl.trans(total), mask=real[None, :])


@triton.jit
def _norm(hidden, parts, bias, weight, out, size, away, eps, BLOCK: tl.constexpr, PARTS: tl.constexpr,
          BIASED: tl.constexpr, EARLY: tl.constexpr):
    """With parts: they are added to hidden first. away: numbers from one part to the next."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(hidden + row * size + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            added += tl.load(parts + part * away + row * size + column, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            added += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        kept = (values + added).to(hidden.dtype.element_ty)
        tl.store(hidden + row * size + column, kept, mask=inside)
        values = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    scaled = values * scale * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * size + column, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(parts, bias, cosine, sine, qk_norm, places, queries, cache, room, away, eps, HEADS: tl.constexpr,
            KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr,
            NORMED: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    source = parts + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + i
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        low += tl.load(source + part * away, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(source + part * away + HALF, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        low += tl.load(bias + head * 2 * HALF + i, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(bias + head * 2 * HALF + HALF + i, mask=inside, other=0.0).to(tl.float32)
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
            BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """All query heads of one key-value head over one share of a row's context: highest score, sum, mixed values."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
             SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One head of a row: its shares, weighted anew by the highest score of all."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
def _gate(parts, out, size, away, BLOCK: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    left = tl.zeros([BLOCK], tl.float32)
    right = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        source = parts + part * away + row * 2 * size + column
        left += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        right += tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (left / (1.0 + tl.exp(-left)) * right).to(out.dtype.element_ty), mask=inside)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """See `plain.product`; the parts are float32, as many as the weight's shape asks for. Weights in float32 are the
    library's matter. x: [rows, in], rows a power of two and 16 or more."""
    if weight.dtype == torch.float32:
        return plain.product(x, weight)
    (rows, depth), columns = x.shape, weight.shape[0]
    tiles, count = triton.cdiv(depth, DEPTH), 1
    while count < MOST_PARTS and triton.cdiv(columns, TILE) * count < ENOUGH and tiles >= 2 * count * LEAST_TILES:
        count *= 2
    parts = torch.empty(count, rows, columns, dtype=torch.float32, device=x.device)
    _product[(triton.cdiv(columns, TILE), count)](
        x, weight, parts, columns, depth, triton.cdiv(tiles, count) * DEPTH, ROWS=rows, TILE=TILE, DEPTH=DEPTH,
        AHEAD=AHEAD, EARLY=EARLY, launch_pdl=EARLY, num_warps=WARPS, num_stages=STAGES)
    return parts


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `plain.norm`; weight: [n]."""
    return _normed(x, None, None, weight, eps)


def add_norm(hidden: Tensor, parts: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `plain.add_norm`."""
    return _normed(hidden, parts, bias, weight, eps)


def _normed(hidden: Tensor, parts: Tensor | None, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, size = hidden.shape
    out = torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    _norm[(rows,)](hidden, hidden if parts is None else parts, hidden if bias is None else bias, weight, out, size,
                   rows * size, eps, BLOCK=block, PARTS=0 if parts is None else len(parts), BIASED=bias is not None,
                   EARLY=EARLY, launch_pdl=EARLY, num_warps=min(16, max(1, block // PER_WARP)))
    return out


def rotate_and_store(parts: Tensor, bias: Tensor | None, cosine: Tensor, sine: Tensor, qk_norm: Tensor | None,
                     eps: float, places: Tensor, cache: Tensor) -> Tensor:
    """See `plain.rotate_and_store`."""
    (count, rows, width), (twice_kv, room, size) = parts.shape, cache.shape
    heads = width // size - twice_kv
    queries = torch.empty(rows, heads, size, dtype=cache.dtype, device=cache.device)
    _rotate[(rows, heads + twice_kv)](
        parts, parts if bias is None else bias, cosine, sine, cosine if qk_norm is None else qk_norm, places, queries,
        cache, room, rows * width, eps, HEADS=heads, KV_HEADS=twice_kv // 2, HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2), PARTS=count, BIASED=bias is not None, NORMED=qk_norm is not None,
        EARLY=EARLY, launch_pdl=EARLY, num_warps=1)
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
        ROWS=max(_LEAST_DOT, triton.next_power_of_2(heads // kv_heads)), BLOCK=block, EARLY=EARLY, launch_pdl=EARLY,
        num_warps=4)
    _combine[(rows, heads)](highest, total, mixed, lengths, out, HEADS=heads, SIZE=size, CHUNK=CHUNK, SPLITS=SPLITS,
                            BLOCK=block, EARLY=EARLY, launch_pdl=EARLY, num_warps=4)
    return out


def gate(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """See `plain.gate`."""
    count, rows, size = parts.shape[0], parts.shape[1], parts.shape[2] // 2
    out = torch.empty(rows, size, dtype=dtype, device=parts.device)
    _gate[(rows, triton.cdiv(size, 1024))](parts, out, size, parts[0].numel(), BLOCK=1024, PARTS=count, EARLY=EARLY,
                                           launch_pdl=EARLY, num_warps=4)
    return out
