"""Engine and workers tell each other these things: a struct for each kind of message, sent as msgpack.

No message holds a moment. Every process has a clock of its own, so what is told of time is how long something took
(`Stay`); where that lies on the engine's clock the pipeline works out (`legs`).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from fullpipe.messages import Expansion, Flight, Landed
from fullpipe.pipeline.links import StationLinks
from fullpipe.stations.spec import StationSpec

Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]


class Stay(Struct, array_like=True):
    """Tells of one flight's stay at one station, in seconds of that station's own clock.

    carried: for which it was held back, because the emulated link to here takes so long.
    waited: from then until work on it began. worked: until the work was done. held: until the next station let it come.
    nodes: of the rows that were computed.
    """

    carried: Seconds
    waited: Seconds
    worked: Seconds
    held: Seconds
    nodes: list[int]


# ---- to a worker ---------------------------------------------------------------------------------------------


class Setup(Struct, tag_field="kind", tag=True):
    """Tells a process what it is to be; its first message.

    rank: its number, the draft's behind those of the stages. world: how many there are. tapping: ranks of the stages
    that send hidden states to the draft. pace: least seconds of work by rows. parent: the engine's process.
    port, listener: where the workers meet, and the inherited socket that the first one serves it on.
    """

    name: str
    rank: int
    world: int
    stages: int
    tapping: list[int]
    spec: StationSpec
    links: StationLinks
    pace: dict[int, float] | None
    threads: int
    beat_s: float
    start_timeout: float
    parent: int
    port: int
    listener: int | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it is the last stage."""
        return self.rank == self.stages - 1


class Work(Struct, tag_field="kind", tag=True):
    """Brings a flight to the first stage, or a job to the draft."""

    flight: Flight


class Cancel(Struct, tag_field="kind", tag=True):
    nodes: list[int]


class Stop(Struct, tag_field="kind", tag=True):
    pass


ToWorker = Setup | Work | Cancel | Stop


# ---- from a worker -------------------------------------------------------------------------------------------


class Up(Struct, tag_field="kind", tag=True):
    """The station is built. cache_slots: for how many slots it has room; None: for as many as anybody names."""

    cache_slots: int | None = None


class Free(Struct, tag_field="kind", tag=True):
    """Stage 0 can take another flight."""


class Answered(Struct, tag_field="kind", tag=True):
    """Brings the last stage's answer to a flight. stays: at each stage. carried: seconds for which the emulated link to
    the engine held it."""

    landed: Landed
    stays: list[Stay]
    carried: Seconds = 0.0


class Guessed(Struct, tag_field="kind", tag=True):
    """Brings the draft's answer to a job. taps, tap_bytes: what had come from the stages by then. carried: as above."""

    job: int
    expansions: list[Expansion]
    stay: Stay
    taps: int = 0
    tap_bytes: int = 0
    carried: Seconds = 0.0


class Beat(Struct, tag_field="kind", tag=True):
    """The process lives. done: the flight or job that it finished last, -1 for none. waits: it has a job whose hidden
    states have not come."""

    done: int
    waits: bool = False


class Lost(Struct, tag_field="kind", tag=True):
    """The connection to a neighbouring worker broke."""

    message: str


class Broken(Struct, tag_field="kind", tag=True):
    """An error ended the station. error: the name of its type."""

    error: str
    message: str
    hint: str | None = None


FromWorker = Up | Free | Answered | Guessed | Beat | Lost | Broken


# ---- from worker to worker -----------------------------------------------------------------------------------


class Hop(Struct, array_like=True):
    """Stands before the hidden rows that go to the next stage. stays: at the stages behind it."""

    flight: Flight
    stays: list[Stay]


class TapHop(Struct, array_like=True):
    """Stands before the hidden states of a `Tap`."""

    flight: Flight
    layers: list[int]
