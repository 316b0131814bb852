"""Rotary embedding: frequencies, and the ways of scaling them for longer texts. No torch.

Scalings that depend on how long the text has become (dynamic, longrope) are unknown here: a key that is cached would
have to be rotated anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fullpipe.errors import UnsupportedModel

KINDS = ("linear", "llama3", "yarn")

Frequencies = tuple[float, ...]
"""Radians per position, one for each pair of numbers in a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding: the inverse frequencies, already scaled, and the factor on cosine and sine.

    inv_freq: head_dim / 2 numbers, radians per position.
    """

    inv_freq: Frequencies
    attention_factor: float = 1.0


def plain(theta: float, head_dim: int) -> Frequencies:
    """The frequencies without scaling."""
    return tuple(theta ** (-i / head_dim) for i in range(0, head_dim, 2))


def linear(frequencies: Frequencies, factor: float) -> Frequencies:
    """All divided by the factor."""
    return tuple(f / factor for f in frequencies)


def llama3(frequencies: Frequencies, factor: float, *, original: int, low: float, high: float) -> Frequencies:
    """Slow frequencies divided by `factor`, fast ones kept, a linear blend (in turns per context) between.

    original: positions of the model before it was stretched.
    """
    def scaled(f: float) -> float:
        turns = original * f / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - keep) * f / factor + keep * f

    return tuple(scaled(f) for f in frequencies)


def yarn(frequencies: Frequencies, factor: float, *, theta: float, original: int, beta_fast: float, beta_slow: float,
         truncate: bool = True) -> Frequencies:
    """Dimensions that turn often are kept, those that turn rarely are divided, a linear ramp between."""
    dim = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001

    def scaled(i: int, f: float) -> float:
        divide = min(max((i - low) / span, 0.0), 1.0)
        return divide * f / factor + (1 - divide) * f

    return tuple(scaled(i, f) for i, f in enumerate(frequencies))


def yarn_attention(factor: float, weight: float = 1.0) -> float:
    """What cosine and sine are multiplied with, where the model's files do not say."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def unknown(what: str) -> UnsupportedModel:
    """The error for a rotary embedding that we do not compute."""
    return UnsupportedModel(
        f"{what} is not supported", hint=f"Supported are models with rotary embedding over whole heads, unscaled or "
        f"scaled as {', '.join(KINDS[:-1])} or {KINDS[-1]}: whatever does not change with the length of the text.")
