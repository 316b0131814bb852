"""A lane is one direction of a lab's link: it says when a packet arrives, if it does."""

from __future__ import annotations

import math
import random

import msgspec

from fullpipe.errors import UsageError

_MOST_QUEUED_S = 1.0
_BITS_PER_BYTE, _MEGA = 8, 1e6


class Shape(msgspec.Struct, frozen=True):
    """Says what a link does to packets, in each direction.

    delay_ms, jitter_ms: one way; each packet takes `delay_ms` give or take up to `jitter_ms`. loss: share of packets
    that are lost; 1 cuts the link. mbit: 10^6 bits per second; 0: no bound.

    Raises `UsageError` for what no link can be.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    mbit: float = 0.0

    def __post_init__(self) -> None:
        for name in ("delay_ms", "jitter_ms", "mbit"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise UsageError(f"a link's {name} must be 0 or more (got {value:g})", param=name,
                                 hint="Leave it out for a link without.")
        if not 0 <= self.loss <= 1:
            raise UsageError(f"a link's loss must be from 0 to 1 (got {self.loss:g})", param="loss",
                             hint="0.05 loses one packet in twenty, 1 all of them.")


PERFECT = Shape()


class Count(msgspec.Struct, frozen=True):
    """Tells what one direction of a link has carried, packets with their headers, and how many it lost."""

    packets: int = 0
    bytes: int = 0
    dropped: int = 0


class Lane:
    """Is one direction of a link in use. Its packets arrive in the order in which they came.

    A packet leaves when those before it have; a lane that is further behind than a second drops, as a router does.
    """

    __slots__ = ("_busy_until", "_chance", "_last_due", "bytes", "dropped", "packets", "shape")

    def __init__(self, shape: Shape, chance: random.Random) -> None:
        self.shape = shape
        self.packets = self.bytes = self.dropped = 0
        self._chance = chance
        self._busy_until = self._last_due = -math.inf

    def due(self, now: float, size: int) -> float | None:
        """When a packet of `size` bytes that has come `now` arrives, in seconds of the same clock; None: never."""
        shape, leaves = self.shape, now
        if shape.loss and self._chance.random() < shape.loss:
            self.dropped += 1
            return None
        if shape.mbit:
            leaves = max(now, self._busy_until) + size * _BITS_PER_BYTE / (shape.mbit * _MEGA)
            if leaves - now > _MOST_QUEUED_S:
                self.dropped += 1
                return None
            self._busy_until = leaves
        self.packets += 1
        self.bytes += size
        way_ms = shape.delay_ms
        if shape.jitter_ms:
            way_ms = max(0.0, way_ms + self._chance.uniform(-shape.jitter_ms, shape.jitter_ms))
        self._last_due = max(leaves + way_ms / 1e3, self._last_due)
        return self._last_due

    @property
    def count(self) -> Count:
        return Count(self.packets, self.bytes, self.dropped)
