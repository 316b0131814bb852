"""A step's operations in plain torch: what `kernels` must say, and what runs where there is no CUDA.

A product comes in *parts*, [parts, rows, out]: sums over parts of the depth, which whoever reads it adds up in order,
in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by the library, in one part, rounded to x's dtype. x: [rows, in]; weight: [out, in]."""
    return F.linear(x, weight)[None]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, computed in float32. x: [..., n]; weight: float32, [n] or [rows of x, n]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_norm(hidden: Tensor, parts: Tensor, bias: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add a product to hidden, [rows, n], in place; and give the norm of that."""
    hidden.copy_(hidden.float() + _whole(parts, bias))
    return norm(hidden, weight, eps)


def rotate_and_store(parts: Tensor, bias: Tensor | None, cosine: Tensor, sine: Tensor, qk_norm: Tensor | None,
                     eps: float, places: Tensor, cache: Tensor) -> Tensor:
    """Give the rotated queries, [rows, heads, head_dim], and write rotated keys, and values, into a layer's cache.

    parts, bias: the product, out = (heads + 2 * kv_heads) * head_dim. cosine, sine: float32 [rows, head_dim / 2].
    qk_norm: float32 [heads + kv_heads, head_dim], or None. places: int32 [rows], distinct. cache:
    [2 * kv_heads, places, head_dim].
    """
    kv_heads, size = cache.shape[0] // 2, cache.shape[2]
    qkv = _whole(parts, bias).view(len(places), -1, size)
    turning, values = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
    if qk_norm is not None:
        turning = norm(turning, qk_norm, eps)
    low, high = turning.chunk(2, -1)
    cosine, sine = cosine[:, None], sine[:, None]
    turned = torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)
    written = torch.cat((turned[:, -kv_heads:], values), 1).to(cache.dtype)
    cache.index_copy_(1, places.long(), written.transpose(0, 1))
    return turned[:, :-kv_heads].to(cache.dtype).contiguous()


def attend(queries: Tensor, cache: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
    """Give what each row reads of a layer's cache, [rows, heads * head_dim].

    queries: [rows, heads, head_dim]. context: int32 [rows, width]: places of what a row reads, by position; what lies
    behind its length counts nothing. lengths: int32 [rows], 1 or more.

    Sums in float64: how wide the context is filled up then vanishes when the sum is rounded.
    """
    rows, heads, size = queries.shape
    keys, values = cache[:, context.long()].double().chunk(2)  # [kv_heads, rows, width, head_dim]
    grouped = queries.view(rows, len(keys), -1, size).double()
    scores = torch.einsum("mkgd,kmwd->mkgw", grouped, keys) * size**-0.5
    beyond = torch.arange(context.shape[1], device=context.device) >= lengths[:, None]
    weights = scores.masked_fill_(beyond[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("mkgw,kmwd->mkgd", weights, values).to(queries.dtype).reshape(rows, heads * size)


def gate(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) * up, [rows, n]. parts: the product, out = 2 * n, gates first."""
    left, right = _whole(parts, None).chunk(2, -1)
    return (F.silu(left) * right).to(dtype)


def _whole(parts: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [rows, out]."""
    whole = parts[0].float()
    for part in parts[1:]:
        whole = whole + part.float()
    return whole if bias is None else whole + bias.float()
