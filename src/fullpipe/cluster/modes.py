"""A mode is one way to decode on a layout: so many rows a flight, so many levels of the tree in it. Its seconds per
token are linear in what the layout takes.

With period P from flight to flight, T1 and Tw seconds of a flight of one row and of w rows through all stages and
links, q the probability of a hit, and l levels of the tree in each flight,

    t = q P / l + (1 - q) (T1 / 2 + Tw / 2 + P / 2)

for `fullpipe`: a hit costs its share of a period; a miss the way through the pipeline (the root sets off alone, or with
guesses where they are there) and half a period, for which stage 0 is busy with what has died. Where the draft and all
stages take turns on one device, drafting k tokens and verifying them at once may be better:

    t = (k d + Tk) / (1 + p + ... + p^k)

`pp` is T1. On the virtual clock the engine takes within 20% of this on 463 of 468 layouts, from 1 to 8 stages, 0.1 to
100 ms apart, with best guesses right 40% to 88% of the time; 5% off in the mean (tests/cluster/test_predict.py has
some like them). The others are quicker than said, four of them a single stage with a draft beside it. Who works in turn
with whom is the layout's matter (`layout.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fullpipe.cluster.acceptance import Acceptance

Floats = NDArray[np.float64]

WIDTHS = (1, 2, 4, 8, 16, 32)  # rows of flights that are measured and compared
CONTEXT = 256  # tokens before the rows, in all predictions
_LEVELS = (1, 2, 3, 4, 6, 8, 16)
_DEPTHS = (1, 3, 7)  # guesses that are verified at once; with the root they are rows that were measured
ENGINE_S = 5e-4  # of the engine itself for a token
_MOST_CHAIN = 24  # levels that a draft far away goes on by itself
_LEAST_DOUBT = 0.01


@dataclass(frozen=True, slots=True)
class Mode:
    """seconds per token = period * P + first * T1 + wide * Tw + fixed.

    width: rows of a flight. levels: of the tree in a flight. asks: seconds that the draft computes for a flight.
    chain: and with its way there and back, which no period is shorter than. hit: see above.
    """

    method: str
    width: int
    levels: int
    period: float
    first: float
    wide: float
    fixed: float = ENGINE_S
    asks: float = 0.0
    chain: float = 0.0
    hit: float = 0.0


@dataclass(frozen=True)
class Modes:
    """Several modes in columns."""

    modes: tuple[Mode, ...]

    def __len__(self) -> int:
        return len(self.modes)

    def column(self, name: str) -> Floats:
        return np.array([getattr(mode, name) for mode in self.modes], dtype=np.float64)

    @cached_property
    def at(self) -> NDArray[np.intp]:
        """Of each mode the index of its width in WIDTHS."""
        return np.array([WIDTHS.index(mode.width) for mode in self.modes], dtype=np.intp)

    @cached_property
    def period(self) -> Floats:
        return self.column("period")

    @cached_property
    def first(self) -> Floats:
        return self.column("first")

    @cached_property
    def wide(self) -> Floats:
        return self.column("wide")

    @cached_property
    def fixed(self) -> Floats:
        return self.column("fixed")

    @cached_property
    def asks(self) -> Floats:
        return self.column("asks")

    @cached_property
    def chain(self) -> Floats:
        return self.column("chain")

    def beside(self, others: Modes) -> Modes:
        return Modes(self.modes + others.modes)

    def only(self, kept: Sequence[int]) -> Modes:
        return Modes(tuple(self.modes[index] for index in kept))


PP = Modes((Mode("pp", 1, 1, period=0.0, first=1.0, wide=0.0),))


def fullpipe_modes(call: Callable[[float], float], way_s: float, acceptance: Acceptance, most: int | None) -> Modes:
    """The modes of `fullpipe` with a draft. call: seconds of a call by rows. way_s: to the draft's host and back.
    most: rows of a flight; None: any."""
    return Modes(tuple(_steady(call, way_s, acceptance, width, levels) for width in WIDTHS
                       for levels in _LEVELS if levels <= width <= (most or WIDTHS[-1])))


def _steady(call: Callable[[float], float], way_s: float, acceptance: Acceptance, width: int, levels: int) -> Mode:
    guesses = width / levels
    hit, one = acceptance.hit(guesses), call(guesses)
    doubt = max(1 - acceptance.best, _LEAST_DOUBT)
    per_way = min(max(math.sqrt(way_s / (doubt * max(one, 1e-9))), 1.0), _MOST_CHAIN)
    return Mode("fullpipe", width, levels, period=hit / levels + (1 - hit) / 2, first=(1 - hit) / 2, wide=(1 - hit) / 2,
                asks=levels * one, chain=levels * (one + way_s / per_way), hit=hit)


def in_turn_modes(call: Callable[[float], float], way_s: float, acceptance: Acceptance, most: int | None,
                  method: str = "fullpipe") -> Modes:
    """Draft some tokens, verify them all, begin again."""
    modes = []
    for depth in _DEPTHS:
        if depth + 1 <= (most or WIDTHS[-1]):
            tokens = sum(acceptance.best**k for k in range(depth + 1))
            fixed = (depth * call(1) + way_s) / tokens + ENGINE_S
            modes.append(Mode(method, depth + 1, depth, period=0.0, first=0.0, wide=1 / tokens, fixed=fixed,
                              asks=depth * call(1), hit=acceptance.best))
    return Modes(tuple(modes))
