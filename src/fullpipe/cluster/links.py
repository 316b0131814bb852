"""What a link between two hosts was measured to be."""

from __future__ import annotations

import msgspec


class Pair(msgspec.Struct, frozen=True):
    """Is the way from one host to another. latency_s: seconds of one way. bandwidth: bytes per second."""

    latency_s: float
    bandwidth: float
