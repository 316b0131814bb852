"""Ranges of bytes in the files of a model: what is needed, what is there, what is missing. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

from msgspec import Meta, Struct

CHUNK = 1 << 20
"""Bytes that are asked for at a time, at most."""

_Count = Annotated[int, Meta(ge=0)]


class Range(Struct, frozen=True, order=True, array_like=True):
    """Bytes start..stop (exclusive, and at least one) of a file, which goes by its number in the `Manifest`."""

    file: _Count
    start: _Count
    stop: _Count

    @property
    def size(self) -> int:
        return self.stop - self.start


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as there can be, in order; empty ranges go."""
    out: list[Range] = []
    for one in sorted(one for one in ranges if one.size > 0):
        last = out[-1] if out else None
        if last is not None and last.file == one.file and one.start <= last.stop:
            out[-1] = Range(last.file, last.start, max(last.stop, one.stop))
        else:
            out.append(one)
    return out


def without(ranges: Iterable[Range], others: Iterable[Range]) -> list[Range]:
    """What of these ranges is in none of the others, merged."""
    cuts, out = merged(others), list[Range]()
    for one in merged(ranges):
        start = one.start
        for cut in cuts:
            if cut.file != one.file or cut.stop <= start or cut.start >= one.stop:
                continue
            out.append(Range(one.file, start, cut.start))
            start = cut.stop
        out.append(Range(one.file, start, one.stop))
    return [one for one in out if one.size > 0]


def total(ranges: Iterable[Range]) -> int:
    """How many bytes they are, counted once for each range."""
    return sum(one.size for one in ranges)


def chunks(ranges: Iterable[Range], size: int = CHUNK) -> Iterator[Range]:
    """The ranges in pieces of at most so many bytes."""
    for one in ranges:
        for start in range(one.start, one.stop, size):
            yield Range(one.file, start, min(start + size, one.stop))
