"""What stations take, corrected by what they took.

A curve that was measured before any request came, or not at all, is right about another hour, another context, another
load of the machine. Every leg that comes back says what its rows took, and the curve follows: as a whole by what all
legs say, so that numbers of rows that nobody tries any more are drawn along, and at its own rows besides.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from fullpipe.costs import CostCurve, Machine
from fullpipe.messages import Drafted, Landed, steps

# Shares of a leg's error by which all knots follow, and those of its rows besides. More often a station has become
# slower as a whole than at some rows alone.
_ALL_FOLLOW, _OWN_FOLLOW = 0.12, 0.06
# As much of an error, as a logarithm, is believed of a single leg, which so moves the curve by less than is told; twice
# as much of the second in a row that is off to the same side, and so on.
_MOST = 0.27
_SAME = 1e-6  # a leg is a difference of two times, which rounding lets waver
_TOLD = 0.05  # a curve that is off by less is not told anew
# What is held of some rows alone is forgotten by this factor a leg: else rows that seemed dear once, and were avoided
# since, would seem dear for ever.
_KEEP = 1 - 1 / 1000
_LOOK_AGAIN = 256  # legs after which it is done, though they say nothing new
_NEAR = 1.25  # rows within this factor of a knot count as the knot's
_APART = 2.0  # knots further apart leave room for another
_LEAST_S = 1e-7  # a station that takes no time at all still takes some


def learning(machine: Machine) -> Machine:
    """The same where it has curves or learns them; else one that does."""
    return machine if machine.stage or isinstance(machine, LiveMachine) else LiveMachine(machine)


class LiveMachine(Machine):
    """A machine whose curves follow the legs that come back. machine: where it begins; without curves they are known
    after some flights.

    Where legs take what the curves say, the curves stay the objects they are. What links take stays as given: from
    outside, a flight's way cannot be told from its waiting for a busy station.
    """

    __slots__ = ("_draft", "_stages")

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.num_stages, machine.stage, machine.draft, machine.link_s, machine.shared,
                         machine.draft_link_s, machine.stages, machine.devices, machine.reads_taps)
        self._stages = [LiveCurve(curve) for curve in self.stages] or \
            [LiveCurve(None) for _ in range(self.num_stages)]
        self._draft = LiveCurve(self.draft)

    def observe(self, event: object) -> None:
        match event:
            case Landed() if not event.prompts:  # what scoring them took, no other flight's rows take
                changed = [stage.observe(len(leg.nodes), leg.end - leg.start)
                           for stage, leg in zip(self._stages, event.legs)]
                curves = [stage.curve for stage in self._stages if stage.curve] if any(changed) else []
                if len(curves) == self.num_stages:
                    self.know(curves)
            case Drafted():
                rows, seconds = len(event.leg.nodes), event.leg.end - event.leg.start
                if alone := steps(event.expansions):
                    # A chain's steps are calls of one row each; what the first call took is not known apart.
                    rows, seconds = (1, seconds / (1 + alone)) if rows == 1 else (0, 0.0)
                if self._draft.observe(rows, seconds):
                    self.draft = self._draft.curve


class LiveCurve:
    """The curve of one station: at each knot the seconds where it began, times a factor of all, times one of its own.

    A leg of rows where no knot is near makes one, once a second leg agrees that there should be: the quicker of the two
    says how long it takes, for what disturbs a machine only ever adds.

    curve: what is told; None: nothing is known yet.
    """

    __slots__ = ("_above", "_begun", "_common", "_legs", "_off", "_once", "_own", "_rows",
                 "_run", "_told", "curve")

    def __init__(self, curve: CostCurve | None) -> None:
        self.curve = curve
        self._rows = list(curve.rows) if curve else []
        self._begun = [max(seconds, _LEAST_S) for seconds in curve.seconds] if curve else []
        self._told = list(self._begun)
        self._common, self._own = 0.0, [0.0] * len(self._rows)  # logarithms
        self._once: dict[int, float] = {}  # seconds by rows, seen once where no knot is near
        self._run, self._above = 0, False  # legs in a row that are far off, and to which side
        self._off = 0.0  # at most so far the knots are from those told, as a share
        self._legs = 0  # since that was done

    def observe(self, rows: int, seconds: float) -> bool:
        """Follow a leg. Whether the curve is another one now."""
        if not rows:
            return False
        seconds = max(seconds, _LEAST_S)
        if not self._rows:
            return self._meet(rows, seconds)
        knot = min(bisect_left(self._rows, rows), len(self._rows) - 1)
        predicted, share = self._predict(knot, rows)
        error = math.log(seconds / predicted)
        if abs(error) >= _SAME:
            if not self._is_near(knot, rows):
                return self._meet(rows, seconds)
            self._follow(knot, min(share, 1.0), self._believed(error))
        self._legs += 1
        return (self._off > _TOLD or self._legs >= _LOOK_AGAIN) and self._tell()

    def _predict(self, knot: int, rows: int) -> tuple[float, float]:
        """Seconds of so many rows, read as a `CostCurve` is, and the share of that knot, not the one before, in them.

        knot: the first with as many rows, or the last.
        """
        after = self._seconds(knot)
        if not knot:
            return after, 1.0
        before, first = self._seconds(knot - 1), self._rows[knot - 1]
        share = (rows - first) / (self._rows[knot] - first)
        return max(before + share * (after - before), min(before, after)), share

    def _seconds(self, knot: int) -> float:
        return self._begun[knot] * math.exp(self._common + self._own[knot])

    def _is_near(self, knot: int, rows: int) -> bool:
        """Whether the knots around these rows may answer for them."""
        after, before = self._rows[knot], self._rows[knot - 1] if knot else 0
        return max(rows, after) <= _NEAR * min(rows, after) or rows <= _NEAR * before \
            or (rows < after <= _APART * before)

    def _believed(self, error: float) -> float:
        if abs(error) <= _MOST:
            self._run = 0
            return error
        self._run = self._run + 1 if (error > 0) == self._above else 1
        self._above = error > 0
        return math.copysign(min(abs(error), _MOST * self._run), error)

    def _follow(self, knot: int, share: float, error: float) -> None:
        self._common += _ALL_FOLLOW * error
        self._own[knot] += share * _OWN_FOLLOW * error
        if knot:
            self._own[knot - 1] += (1 - share) * _OWN_FOLLOW * error
        self._off += (_ALL_FOLLOW + _OWN_FOLLOW) * abs(error)

    def _meet(self, rows: int, seconds: float) -> bool:
        """A leg of rows that no knot answers for."""
        near = next((one for one in self._once if max(rows, one) <= _NEAR * min(rows, one)), None)
        if near is None:
            self._once[rows] = seconds
            return False
        place = bisect_left(self._rows, near)
        self._rows.insert(place, near)
        self._begun.insert(place, min(self._once.pop(near), seconds) / math.exp(self._common))
        self._own.insert(place, 0.0)
        self._told.insert(place, 0.0)
        return self._tell()

    def _tell(self) -> bool:
        """Make the curve anew, if it differs by enough from what was told."""
        kept = _KEEP**self._legs
        self._own, self._legs = [own * kept for own in self._own], 0
        now = [self._seconds(knot) for knot in range(len(self._rows))]
        self._off = max(abs(new - old) / new for new, old in zip(now, self._told))
        if self._off <= _TOLD:
            return False
        self.curve, self._told, self._off = CostCurve(dict(zip(self._rows, now))), now, 0.0
        return True
