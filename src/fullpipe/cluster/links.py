"""A pair says what the network does between two hosts, as it was measured. Who measures is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from fullpipe.errors import UsageError


class Pair(msgspec.Struct, frozen=True):
    """Is the way from one host to another. latency_s: one way. bandwidth: bytes per second."""

    latency_s: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.latency_s < math.inf and self.bandwidth > 0):
            raise UsageError(f"no link takes {self.latency_s:g} s and {self.bandwidth:g} bytes per second",
                             hint="The latency is 0 s or more, the bandwidth above 0.")


Pairs = Mapping[tuple[str, str], Pair]
"""By the hosts' names: from, to."""

HERE = Pair()
"""Of a host and itself."""


def between(pairs: Pairs, a: str, b: str) -> Pair:
    """The way from a to b; where only the way back was measured, that. Raises UsageError where neither was."""
    if a == b:
        return HERE
    found = pairs.get((a, b)) or pairs.get((b, a))
    if found is None:
        raise UsageError(f"nothing is known of the way from {a} to {b}",
                         hint="Every pair of hosts must be able to reach each other; measure again when they can.")
    return found
