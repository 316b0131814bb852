"""Engine and workers tell each other these things: a struct for each kind of message, sent as msgpack.

No message holds a moment. Every process has a clock of its own, so what is told of time is how long something took
(`Stay`); where that lies on the engine's clock the pipeline works out (`legs`).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from fullpipe.messages import Expansion, Flight, Landed
from fullpipe.models.partial import Manifest
from fullpipe.models.ranges import Range
from fullpipe.pipeline.keys import RunKeys
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


class Door(Struct):
    """Is what a launcher hands to the process that it starts: whom to call, and where to listen.

    name, rank: of the station; the draft's number is behind those of the stages. engine: endpoint of the engine's
    socket. listen: endpoints of the station's own, for those who bring hidden states; none where nobody does.
    silence_s: without any sign of life, after which a connection counts as lost. patience_s: seconds without one to the
    engine after which the process ends by itself. start_timeout: seconds for which it
    waits to be told what it is to be. parent: the process that starts it, without which it ends.
    """

    name: str
    rank: int
    engine: str
    keys: RunKeys
    listen: list[str]
    silence_s: float
    patience_s: float
    start_timeout: float
    parent: int = 0


class Fetch(Struct):
    """Names what a station reads of a model that its host does not have. path: on the engine's host. folder: where the
    copies of all models are kept on this one."""

    path: str
    folder: str
    manifest: Manifest
    ranges: list[Range]


class Setup(Struct, tag_field="kind", tag=True):
    """Tells a process what it is to be; the first message that it gets.

    stages: how many there are. next: endpoint of the stage behind it; "" for none. tapping: ranks of the stages that
    send hidden states to the draft. taps: endpoint of the draft, for those. paths: where models that the spec names by
    the engine's host's paths lie on this one. fetch: those that lie nowhere here, and come from there. pace: least
    seconds of work by rows.
    """

    name: str
    rank: int
    stages: int
    next: str
    tapping: list[int]
    taps: str
    spec: StationSpec
    paths: dict[str, str]
    fetch: list[Fetch]
    links: StationLinks
    pace: dict[int, float] | None
    threads: int
    beat_s: float

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


class Part(Struct, tag_field="kind", tag=True):
    """Stands before bytes of a model. checksum: of them."""

    range: Range
    checksum: bytes


ToWorker = Setup | Part | Work | Cancel | Stop


# ---- from a worker -------------------------------------------------------------------------------------------


class Hello(Struct, tag_field="kind", tag=True):
    """The process is there. listens: endpoints at which the other stations can reach it."""

    listens: list[str] = []


class Up(Struct, tag_field="kind", tag=True):
    """The station is built. cache_slots: for how many slots it has room; None: for as many as anybody names."""

    cache_slots: int | None = None


class Want(Struct, tag_field="kind", tag=True):
    """Asks for bytes of a model. path: on the engine's host."""

    path: str
    range: Range


class Fetched(Struct, tag_field="kind", tag=True):
    """Tells how many bytes of a model are here, of those that are needed."""

    path: str
    done: int
    needed: int


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
    """The connection to a neighbouring worker broke; or the one to the engine did, and has been made again: what was on
    its way to here is lost."""

    message: str


class Broken(Struct, tag_field="kind", tag=True):
    """An error ended the station. error: the name of its type."""

    error: str
    message: str
    hint: str | None = None


FromWorker = Hello | Want | Fetched | Up | Free | Answered | Guessed | Beat | Lost | Broken


# ---- from worker to worker -----------------------------------------------------------------------------------


class Hop(Struct, array_like=True):
    """Stands before the tensors that go to the next stage, a row of each for every row of the flight. stays: at the
    stages that it has passed."""

    flight: Flight
    stays: list[Stay]


class TapHop(Struct, array_like=True):
    """Stands before the hidden states of a `Tap`."""

    flight: Flight
    layers: list[int]


class Come(Struct, array_like=True):
    """Lets the next flight come: the one before has been started. held: seconds from its coming to that. worked: what
    this station took for a flight of late."""

    held: Seconds
    worked: Seconds
