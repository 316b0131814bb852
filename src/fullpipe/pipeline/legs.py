"""A flight was at which station when, on the engine's clock."""

from __future__ import annotations

from collections.abc import Sequence

from fullpipe.messages import Leg
from fullpipe.pipeline.frames import Stay


class Legs:
    """Places what workers report as durations (`Stay`) on the clock of the engine's process.

    Known are, on this clock, when the flight was sent and when its answer came, and how long it was held, waited and
    was computed at each station, measured there. Clocks tick alike, though they show different times, so what is left
    of the whole was spent on the hops, or waiting unseen in a socket for the station to finish the flight before. The
    latter is made good first: no leg begins before the station's previous one has ended. The rest is spread evenly
    over the hops, which all do the same thing: an emulated link, the one reason for a great difference, is told apart
    (`Stay.carried`). So a leg is misplaced by less than the real hops take together, it is exactly as long as it was,
    and legs are in order: what figures and pictures are made of. Nothing decides anything by them.
    """

    def __init__(self, stations: Sequence[str]) -> None:
        self._stations = stations
        self._ends = [0.0] * len(stations)  # of each station's newest leg

    def place(self, sent: float, came: float, stays: Sequence[Stay], carried: float) -> list[Leg]:
        """The legs of the next flight. carried: seconds for which an emulated link held the answer."""
        unseen, moment = [], sent
        for stay, end in zip(stays, self._ends):
            moment += stay.carried + stay.waited
            unseen.append(max(0.0, end - moment))
            moment += unseen[-1] + stay.worked + stay.held
        hop = max(0.0, came - carried - moment) / (len(stays) + 1)
        legs, moment = [], sent
        for index, stay in enumerate(stays):
            start = min(moment + hop + stay.carried + stay.waited + unseen[index], came)
            end = min(start + stay.worked, came)
            legs.append(Leg(self._stations[index], start, end, stay.nodes))
            self._ends[index], moment = end, end + stay.held
        return legs
