"""How long an imagined device takes for a flight, by its number of rows. No torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from fullpipe.errors import UsageError

_EXAMPLE = 'Write {"rows": seconds, ...}, such as {1: 0.004, 64: 0.006}.'


class Pace:
    """Straight lines through the points of a curve {rows: seconds}; keys may be strings, as JSON has them.

    Fewer rows than the first point take as long as it; beyond the last point its line goes on (level where it
    fell). No rows take no time. Raises `UsageError` for a curve without points, rows below 1 and seconds
    that are negative or not finite.
    """

    def __init__(self, curve: Mapping[Any, float]) -> None:
        try:
            points = sorted((int(rows), float(seconds)) for rows, seconds in curve.items())
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"not a curve of seconds by rows: {curve!r} ({error})", hint=_EXAMPLE) from None
        if not points:
            raise UsageError("a device's curve needs at least one point", hint=_EXAMPLE)
        for rows, seconds in points:
            if rows < 1 or not (math.isfinite(seconds) and seconds >= 0):
                raise UsageError(f"a device cannot take {seconds:g} s for {rows} rows", hint=_EXAMPLE)
        self._rows = [rows for rows, _ in points]
        self._seconds = [seconds for _, seconds in points]

    def seconds(self, rows: int) -> float:
        """What a flight of so many rows takes."""
        if rows < 1:
            return 0.0
        if rows <= self._rows[0] or len(self._rows) == 1:
            return self._seconds[0]
        after = min(bisect_right(self._rows, rows), len(self._rows) - 1)
        slope = (self._seconds[after] - self._seconds[after - 1]) / (self._rows[after] - self._rows[after - 1])
        if rows > self._rows[-1]:
            return self._seconds[-1] + max(slope, 0.0) * (rows - self._rows[-1])
        return self._seconds[after - 1] + slope * (rows - self._rows[after - 1])

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values; `Pace(values)` reads them back."""
        return {str(rows): seconds for rows, seconds in zip(self._rows, self._seconds)}
