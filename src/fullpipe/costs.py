"""A cost curve says what a row more costs: seconds of a station by rows."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fullpipe.errors import UsageError

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows at which a curve is measured


class CostCurve:
    """Gives seconds by rows: straight between the points that are known, constant before the first, and on along the
    last piece.

    points: rows -> seconds. What was measured wavers, and a curve that fell would make rows worth having for their own
    sake: each point counts as at least as slow as those before it.

    Raises UsageError for a curve without points, for rows that are not whole and above 0, and for seconds that are
    negative or not finite.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        given = points.items() if isinstance(points, Mapping) else ()
        if not given or not all(_is_point(rows, seconds) for rows, seconds in given):
            raise UsageError(f"{points!r:.100} is no cost curve: it needs points of at least one row, and seconds of 0 "
                             "or more", hint="Write {rows: seconds, ...}, such as {1: 0.004, 64: 0.006}.")
        self.rows = sorted(points)
        self.seconds: list[float] = []
        for rows in self.rows:
            self.seconds.append(max(points[rows], self.seconds[-1] if self.seconds else 0.0))
        # Methods ask for the same few numbers of rows dozens of times a step.
        self._known: dict[int, float] = {}
        self._marginals: dict[int, float] = {}

    @property
    def points(self) -> dict[int, float]:
        """Its seconds by rows; `CostCurve` makes the same curve of them."""
        return dict(zip(self.rows, self.seconds))

    @classmethod
    def of(cls, seconds: Callable[[int], float], knots: Iterable[int] = KNOTS) -> CostCurve:
        """From a function that gives seconds by rows."""
        return cls({rows: seconds(rows) for rows in knots})

    @classmethod
    def slowest(cls, curves: Iterable[CostCurve]) -> CostCurve:
        """Of several stations in a row: that of the slowest at each number of rows, which the others wait for."""
        curves = list(curves)
        return curves[0] if all(curve is curves[0] for curve in curves) else cls._joined(curves, max)

    @classmethod
    def in_turn(cls, curves: Iterable[CostCurve]) -> CostCurve:
        """Of several stations on one device: all of them, one after another."""
        return cls._joined(list(curves), math.fsum)

    @classmethod
    def _joined(cls, curves: Sequence[CostCurve], join: Callable[[list[float]], float]) -> CostCurve:
        knots = sorted({rows for curve in curves for rows in curve.rows})
        return cls({rows: join([curve(rows) for curve in curves]) for rows in knots})

    def __call__(self, rows: float) -> float:
        """Seconds of a flight of so many rows; 0 without rows."""
        if not isinstance(rows, int):
            return self._read(rows)
        known = self._known.get(rows)
        if known is None:
            known = self._known[rows] = self._read(rows)
        return known

    def _read(self, rows: float) -> float:
        if rows <= 0:
            return 0.0
        piece = min(bisect_left(self.rows, rows), len(self.rows) - 1)
        if not piece:
            return self.seconds[0]
        return self.seconds[piece] + (rows - self.rows[piece]) * self._slope(piece)

    def marginal(self, rows: int) -> float:
        """Seconds that a row more takes where there are `rows` already."""
        known = self._marginals.get(rows)
        if known is None:
            piece = min(bisect_right(self.rows, rows), len(self.rows) - 1)
            known = self._marginals[rows] = self._slope(piece) if piece else 0.0
        return known

    def most_rows(self, seconds: float, limit: int) -> int:
        """The most rows, up to `limit`, that take no longer than `seconds`; 0 when not even one does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self(middle) <= seconds else (low, middle - 1)
        return low

    def _slope(self, piece: int) -> float:
        """Seconds per row between point `piece` and the one before."""
        return (self.seconds[piece] - self.seconds[piece - 1]) / (self.rows[piece] - self.rows[piece - 1])


def _is_point(rows: object, seconds: object) -> bool:
    return (isinstance(rows, int) and rows >= 1
            and isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0)


@dataclass(slots=True)
class Machine:
    """Tells a method what it may know of the stations that it chooses for.

    stage: seconds of the slowest stage by rows of a flight; None: rows cost nothing, as far as anybody knows.
    draft: seconds of a draft call by rows of a job; None: no matter.
    link_s: seconds that a traversal of the pipeline spends on links.
    shared: the draft sits on the device of stage 0, so that one waits for the other.
    draft_link_s: seconds that a draft job spends on links, there and back.
    reads_taps: the draft reads hidden states, and an answer may have to wait until the node has been launched.
    stages: of every stage, in order; `stage` is then their slowest. Left out: each is like `stage`.
    devices: where every stage sits; stages of one device take turns. Left out: each has its own.

    gap: seconds from flight to flight, by rows, when the pipeline is full: `stage`, or more where stages take turns.
    num_devices: of the stages; as many work at the same time.
    """

    num_stages: int
    stage: CostCurve | None = None
    draft: CostCurve | None = None
    link_s: float = 0.0
    shared: bool = False
    draft_link_s: float = 0.0
    stages: Sequence[CostCurve] = ()
    devices: Sequence[str] = ()
    reads_taps: bool = False
    gap: CostCurve | None = field(init=False, default=None)
    num_devices: int = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.stages) in (0, self.num_stages) and len(self.devices) in (0, self.num_stages)
        self.num_devices = len(set(self.devices)) or self.num_stages
        if self.stages:
            self.know(self.stages)
        elif self.stage:
            self.know([self.stage] * self.num_stages)

    def know(self, stages: Sequence[CostCurve]) -> None:
        """Take these for the curves of the stages."""
        self.stages = tuple(stages)
        self.stage = self.gap = CostCurve.slowest(stages)
        by_device: dict[str, list[CostCurve]] = defaultdict(list)
        for device, curve in zip(self.devices, stages):
            by_device[device].append(curve)
        if any(len(curves) > 1 for curves in by_device.values()):
            self.gap = CostCurve.slowest(CostCurve.in_turn(curves) for curves in by_device.values())

    def observe(self, event: object) -> None:
        """Take note of a landing, or of an answer of the draft. One whose curves are given is certain of them."""
