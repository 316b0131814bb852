"""A network does this to messages: each link takes time for every byte, and time for the way. No torch.

A link is a `Link`; who is connected by which is said by `Links`; `Wire` is one direction of a link in
use, and tells when what is sent now arrives. The in-process pipeline puts these times on its virtual
clock, worker processes really wait for them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fullpipe.errors import UsageError

_BITS_PER_BYTE, _MEGA = 8, 1e6


@dataclass(frozen=True, slots=True)
class Link:
    """Takes time for messages.

    latency_s: seconds from a message's last byte leaving to its arriving.

    bandwidth: bytes per second; infinite: a message of any size leaves at once.

    Raises `UsageError` for a latency that is negative or not finite, and a bandwidth that is not above 0.
    """

    latency_s: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise UsageError(f"a link's latency must be 0 s or more (got {self.latency_s:g} s)",
                             hint="Give the one-way latency; 0 for stations on one machine.")
        if not self.bandwidth > 0:
            raise UsageError(f"a link's bandwidth must be above 0 bytes per second (got {self.bandwidth:g})",
                             hint="Leave it out for a link that is never the bottleneck.")

    @classmethod
    def of(cls, latency_ms: float = 0.0, mbit: float | None = None) -> Link:
        """The same in the units of users: milliseconds, and megabits (10^6) per second; None: unlimited."""
        return cls(latency_ms / 1e3, math.inf if mbit is None else mbit * _MEGA / _BITS_PER_BYTE)

    @property
    def instant(self) -> bool:
        """Whether messages arrive when they are sent."""
        return self.latency_s == 0 and math.isinf(self.bandwidth)

    def occupied_s(self, size: int) -> float:
        """Seconds for which a message of `size` bytes keeps those behind it from leaving."""
        return size / self.bandwidth

    def window(self, service_s: float) -> int:
        """How many flights may be on this link or waiting behind it, not yet started by the next station.

        One may wait, and as many as the sender makes within the latency are on their way: 1 + ceil(latency /
        service). With less the latency would limit the throughput; with more, flights chosen long ago
        would pile up at a slow successor. service_s: seconds that the sender takes for a flight.
        """
        if self.latency_s == 0:
            return 1
        ahead = self.latency_s / service_s if service_s > 0 else math.inf
        return sys.maxsize if math.isinf(ahead) else 1 + math.ceil(ahead)


INSTANT = Link()


@dataclass(frozen=True, slots=True)
class Links:
    """Says by which links a pipeline of n stages is connected. What is left out is instant.

    stage_hops: from stage i to stage i + 1, n - 1 of them.
    to_first: between engine and stage 0, both ways: flights go down it, `Ready` comes up. Instant when the
        engine sits with stage 0.
    landing: from the last stage to the engine.
    draft: between engine and draft station, both ways. Instant when the draft sits with the engine.
    taps: from stage k to the draft station, by which hidden states go to a draft that reads them; n of them, or none
        where all are instant.
    """

    stage_hops: Sequence[Link]
    to_first: Link = INSTANT
    landing: Link = INSTANT
    draft: Link = INSTANT
    taps: Sequence[Link] = ()

    @classmethod
    def even(cls, num_stages: int, link: Link) -> Links:
        """The same link on every hop from machine to machine; engine and draft sit with stage 0.

        With one stage there is no other machine, so nothing is delayed.
        """
        if num_stages < 2:
            return cls([])
        return cls([link] * (num_stages - 1), landing=link, taps=[INSTANT, *[link] * (num_stages - 1)])

    def check(self, num_stages: int) -> None:
        """Raises `UsageError` unless these are the links of a pipeline of `num_stages` stages."""
        if len(self.stage_hops) != num_stages - 1:
            raise UsageError(f"{num_stages} stages need {num_stages - 1} links between them "
                             f"(got {len(self.stage_hops)})", hint="Give one link per hop from stage to stage.")
        if len(self.taps) not in (0, num_stages):
            raise UsageError(f"{num_stages} stages have {num_stages} links to the draft (got {len(self.taps)})",
                             hint="Give one per stage for its taps, or none where all are instant.")

    def inward(self, stage: int) -> Link:
        """The link by which flights reach a stage."""
        return self.stage_hops[stage - 1] if stage else self.to_first

    def tap(self, stage: int) -> Link:
        """The link by which a stage's hidden states reach the draft station."""
        return self.taps[stage] if self.taps else INSTANT

    def cancel_s(self, stage: int) -> float:
        """Seconds that a `cancel` takes to a stage.

        The engine has a connection of its own to every station, which is how a cancel overtakes, and all
        stations are on one network: so it takes one latency, that of the link into the station. Its few
        bytes occupy nothing.
        """
        return self.inward(stage).latency_s

    @property
    def traversal_s(self) -> float:
        """Seconds that a flight of no size spends on links, from the engine through all stages and back."""
        return sum(link.latency_s for link in (*self.stage_hops, self.to_first, self.landing))

    @property
    def draft_s(self) -> float:
        """Seconds that a draft job spends on them, there and back."""
        return 2 * self.draft.latency_s

    @property
    def longest_s(self) -> float:
        """The largest latency of any link, in seconds."""
        return max(link.latency_s for link in (*self.stage_hops, self.to_first, self.landing, self.draft,
                                                   *self.taps))


@dataclass(frozen=True, slots=True)
class StationLinks:
    """Says by which links one station is connected.

    inward: by which flights or jobs come. ready: on which stage 0 says that it is free. answer: on which landings or
    drafts go to the engine. cancel_s: seconds that a `cancel` takes. taps: by which each stage's hidden states come to
    the draft station; none elsewhere.
    """

    inward: Link
    ready: Link
    answer: Link
    cancel_s: float
    taps: Sequence[Link] = ()

    @property
    def instant(self) -> bool:
        links = (self.inward, self.ready, self.answer, *self.taps)
        return not self.cancel_s and all(link.instant for link in links)

    @classmethod
    def of(cls, links: Links, rank: int, num_stages: int) -> StationLinks:
        """Those of stage `rank`, or of the draft station, whose rank is the number of stages."""
        if rank == num_stages:
            return cls(links.draft, INSTANT, links.draft, links.draft.latency_s, links.taps)
        return cls(links.inward(rank), links.to_first, links.landing, links.cancel_s(rank))

    def tap(self, stage: int) -> Link:
        """By which a stage's hidden states come."""
        return self.taps[stage] if self.taps else INSTANT


class Wire:
    """Is one direction of a link in use. Messages leave one after another and arrive in that order; several
    may be on their way at once."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._free = -math.inf  # when the last message had left

    def arrival(self, sent: float, size: int) -> float:
        """When a message of `size` bytes arrives that was handed to the link at `sent`; calls in order of
        sending. Both in seconds of one clock."""
        self._free = max(sent, self._free) + self.link.occupied_s(size)
        return self._free + self.link.latency_s
