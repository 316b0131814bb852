"""A pipeline's stations are started here: each process says hello, is told what to be, builds it, and is up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fullpipe.errors import FullpipeError, StationFailed, UsageError, by_name
from fullpipe.models.partial import Source
from fullpipe.models.ranges import Range
from fullpipe.pipeline.fleet import Fleet, News, Worker
from fullpipe.pipeline.frames import Beat, Broken, Door, Fetch, Fetched, Hello, Lost, Part, Setup, Up, Want
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Launcher, Needs
from fullpipe.pipeline.launch.local import LocalLauncher
from fullpipe.pipeline.links import Links, StationLinks
from fullpipe.pipeline.net import Net, local_endpoint, tcp_endpoint
from fullpipe.stations.spec import StationSpec

log = logging.getLogger(__name__)

_LEAST_PATIENCE_S = 5.0
_TOLD_EVERY_S = 2.0
_HELLO_S = 60.0  # for a process on another host to come to be; what takes long comes later
_LOOK_S = 1.0
_SILENT_S = 15.0  # one that builds its station may be busy for a while without a sign of life, but not so long


@dataclass(frozen=True, slots=True)
class Place:
    """Says where a station runs. host: its name; "" for this machine, if it has none. address: at which other hosts
    reach it. port: of the first on that host to whom others bring something; the second takes the next one; 0: any that
    is free. needs: what its process takes there; without threads, as many as the layout says. device: what it computes
    on, if other stations do so too: those take turns. paths: where its models lie there, by where they lie here. fetch:
    what it gets from here."""

    host: str = ""
    address: str = ""
    port: int = 0
    needs: Needs = field(default_factory=lambda: Needs(threads=0))
    device: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    fetch: Sequence[Fetch] = ()


@dataclass(frozen=True, slots=True)
class Hosting:
    """Says where stations run, and who starts them there.

    places: of every station, the draft last; none: all are on this machine. head: where hosts reach the engine.
    launcher: makes who starts the processes of a pipeline, and is closed with it.
    link_s, draft_link_s: what real links take, as measured: seconds of a traversal, and of a draft job there and back.
    sources: models that hosts are given parts of, by where they lie here. say: told what takes long.
    """

    places: Sequence[Place] = ()
    head: Place = field(default_factory=Place)
    launcher: Callable[[], Launcher] = LocalLauncher
    link_s: float = 0.0
    draft_link_s: float = 0.0
    sources: Mapping[str, Source] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None

    def place(self, rank: int) -> Place:
        return self.places[rank] if self.places else Place()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Says what is to be started.

    stages: one spec per stage, in order. One whose `args` have `taps` sends hidden states to the draft station.
    draft: its spec, or None for none.
    links: emulated ones. pace: least seconds of work by rows, of the stations that are paced.
    threads: compute threads of each worker. beat_s: seconds between the signs of life that each worker sends.
    silence_s: without any, after which a connection between hosts counts as lost.
    start_timeout: seconds that all of this may take, the loading of weights included.
    """

    stages: Sequence[StationSpec]
    draft: StationSpec | None
    links: Links
    pace: Mapping[str, dict[int, float]]
    threads: int
    beat_s: float
    silence_s: float
    start_timeout: float
    hosting: Hosting = field(default_factory=Hosting)

    @property
    def names(self) -> list[str]:
        return [*(f"stage {rank}" for rank in range(len(self.stages))), *(["draft"] if self.draft else [])]

    @property
    def specs(self) -> list[StationSpec]:
        return [*self.stages, *([self.draft] if self.draft else [])]

    @property
    def devices(self) -> list[str]:
        """Where each station computes: on a GPU, which others may share, or on a core of its own. Of several drafts the
        first one with a GPU counts."""
        return [self.hosting.place(rank).device or next(_gpus(spec), f"core of {name}")
                for rank, (name, spec) in enumerate(zip(self.names, self.specs))]

    @property
    def tapping(self) -> list[int]:
        """Ranks of the stages that send hidden states to the draft."""
        return [rank for rank, spec in enumerate(self.stages) if self.draft and spec.args.get("taps")]

    def needs(self, rank: int) -> Needs:
        """What a station's process takes of its host."""
        needs = self.hosting.place(rank).needs
        return replace(needs, threads=needs.threads or self.threads)

    @property
    def engine_endpoints(self) -> list[str]:
        """Where the engine listens: for this machine, and for others where there are some."""
        return [local_endpoint(), *([_tcp(self.hosting.head, 0)] if self._is_far else [])]

    @property
    def _is_far(self) -> bool:
        """Whether any station is on another host than the engine."""
        return any(place.host != self.hosting.head.host for place in self.hosting.places)

    def listens(self, rank: int) -> list[str]:
        """Where a station listens: for the stations of its host, and for those of others."""
        here, hosts = self.hosting.place(rank), self._bringers(rank)
        return [*([local_endpoint()] if here.host in hosts else []),
                *([_tcp(self._addressed(here), self._listeners_before(rank))] if hosts - {here.host} else [])]

    def _bringers(self, rank: int) -> set[str]:
        """The hosts of the stations that bring a station something."""
        bringers = [rank - 1] if 0 < rank < len(self.stages) else self.tapping if rank == len(self.stages) else []
        return {self.hosting.place(one).host for one in bringers}

    def _listeners_before(self, rank: int) -> int:
        """How many of a station's host listen for others before it: the engine, then stages, then the draft."""
        host = self.hosting.place(rank).host
        engine = self._is_far and host == self.hosting.head.host
        return engine + sum(self.hosting.place(one).host == host and bool(self._bringers(one) - {host})
                            for one in range(rank))

    def _addressed(self, place: Place) -> Place:
        """With an address: of the engine's host there is one in any case."""
        head = self.hosting.head
        return place if place.address or place.host != head.host else replace(place, address=head.address)

    def endpoint(self, bringer: int, worker: Worker, rank: int) -> str:
        """Where one station reaches another one."""
        near = self.hosting.place(bringer).host == self.hosting.place(rank).host
        return next(one for one in worker.listens if one.startswith("ipc:") == near)

    def door(self, rank: int, endpoints: Sequence[str], keys: RunKeys) -> Door:
        """What a process is handed. endpoints: at which the engine listens."""
        kind = "ipc:" if self.hosting.place(rank).host == self.hosting.head.host else "tcp:"
        engine = next(one for one in endpoints if one.startswith(kind))
        return Door(self.names[rank], rank, engine, keys, self.listens(rank), self.silence_s,
                    max(_LEAST_PATIENCE_S, self.silence_s), self.start_timeout)

    def setup(self, rank: int, workers: Sequence[Worker]) -> Setup:
        """What a station is told; all have said where they listen."""
        last, draft = len(self.stages) - 1, len(self.stages)
        name, place = self.names[rank], self.hosting.place(rank)
        return Setup(
            name, rank, len(self.stages), next=self.endpoint(rank, workers[rank + 1], rank + 1) if rank < last else "",
            tapping=self.tapping, taps=self.endpoint(rank, workers[draft], draft) if rank in self.tapping else "",
            spec=self.specs[rank], paths=dict(place.paths), fetch=list(place.fetch),
            links=StationLinks.of(self.links, rank, len(self.stages)), pace=self.pace.get(name),
            threads=self.needs(rank).threads, beat_s=self.beat_s)


def start_fleet(layout: Layout) -> Fleet:
    """Start one process per station and return when all are ready.

    Raises what a worker raised while building its station, by type when it is one of ours, its message
    beginning with the station's name; `StationFailed` for anything else. Nothing is left behind then.
    """
    keys = RunKeys.new()
    launcher = layout.hosting.launcher()
    fleet = Fleet(Net(keys, layout.silence_s), layout.engine_endpoints, launcher)
    deadline = time.monotonic() + layout.start_timeout
    try:
        for rank, name in enumerate(layout.names):
            host = layout.hosting.place(rank).host
            process = launcher.start(layout.door(rank, fleet.endpoints, keys), host, layout.needs(rank))
            fleet.add(Worker(name, process, time.monotonic(), host))
        _Starting(fleet, layout, deadline).run()
    except BaseException:
        fleet.close()
        raise
    return fleet


class _Starting:
    """Leads the workers of a fleet from their hello to their being up."""

    def __init__(self, fleet: Fleet, layout: Layout, deadline: float) -> None:
        self._fleet, self._layout, self._deadline = fleet, layout, deadline
        self._told_at: dict[str, float] = {}
        self._begun, self._told = deadline - layout.start_timeout, time.monotonic()

    def run(self) -> None:
        self._await(Hello)
        for rank, worker in enumerate(self._fleet.workers):
            self._fleet.send(worker, self._layout.setup(rank, self._fleet.workers))
        self._told = time.monotonic()
        self._await(Up)

    def _await(self, kind: type[Hello] | type[Up]) -> None:
        """Return when all have said that."""
        missing = {worker.name for worker in self._fleet.workers}
        while missing:
            remaining = self._until(kind) - time.monotonic()
            if remaining <= 0:
                self._give_up([worker for worker in self._fleet.workers if worker.name in missing], kind)
            if kind is Up:
                self._check_signs_of_life()
            for worker, news in self._fleet.receive(min(remaining, _LOOK_S)):
                self._take(worker, news)
                if isinstance(news, kind):
                    missing.discard(worker.name)

    def _until(self, kind: type[Hello] | type[Up]) -> float:
        """Until when all must have said that."""
        far = kind is Hello and any(worker.host for worker in self._fleet.workers)
        return min(self._deadline, self._begun + _HELLO_S) if far else self._deadline

    def _check_signs_of_life(self) -> None:
        """They beat from when they were told what to be."""
        limit = max(_SILENT_S, 3 * self._layout.silence_s)
        for worker in self._fleet.workers:
            if time.monotonic() - max(worker.heard, self._told) > limit:
                raise StationFailed(worker.label, f"no sign of life for {limit:g} s while it was started")

    def _take(self, worker: Worker, news: News) -> None:
        """Raises unless it is something that a worker says while all goes well."""
        match news:
            case Hello(listens):
                worker.listens = listens
            case Up(slots):
                worker.cache_slots = slots
            case Want(path, wanted):
                self._give(worker, path, wanted)
            case Fetched(path, done, needed):
                self._tell(worker, path, done, needed)
            case Beat():
                pass
            case Broken(error, message, hint):
                raise _as_error(worker, error, message, hint)
            case EOFError():
                raise StationFailed(worker.label, worker.how_it_ended())
            case Lost(message):
                raise StationFailed(worker.label, message)
            case _:
                raise StationFailed(worker.label, f"answers nonsense: {news!s:.200}{worker.log_tail()}")

    def _give(self, worker: Worker, path: str, wanted: Range) -> None:
        """Send a host bytes of a model. Raises DamagedModel when its files were changed meanwhile."""
        try:
            chunk = self._layout.hosting.sources[path].read(wanted)
        except (KeyError, UsageError):
            raise StationFailed(worker.label, f"asks for bytes {wanted.start} to {wanted.stop} of {path}, file "
                                f"{wanted.file}, which it has no reason to{worker.log_tail()}",
                                hint="Does its host have the same version of Fullpipe?") from None
        self._fleet.send(worker, Part(chunk.range, chunk.checksum), chunk.data)

    def _tell(self, worker: Worker, path: str, done: int, needed: int) -> None:
        """Say how far a host has its weights, now and then. Loading has time for as long as they come."""
        now = time.monotonic()
        self._deadline = max(self._deadline, now + self._layout.start_timeout / 2)
        if done == needed or now - self._told_at.get(worker.name, -_TOLD_EVERY_S) >= _TOLD_EVERY_S:
            self._told_at[worker.name] = now
            name = path.rpartition("/")[2]
            self._layout.hosting.say(f"{worker.label} gets {name} from here: {done >> 20} of {needed >> 20} MiB")

    def _give_up(self, missing: Sequence[Worker], kind: type[Hello] | type[Up]) -> None:
        names = ", ".join(worker.label for worker in missing)
        seconds = self._until(kind) - self._begun
        if kind is Hello and any(worker.host for worker in missing):
            tail = next(filter(None, (worker.log_tail() for worker in missing)), "")
            raise StationFailed(names, f"did not reach the engine at {self._fleet.endpoints[-1]} within {seconds:g} s"
                                f"{tail}",
                                hint="Can those hosts reach this address and port? `host_ip` and `interface` choose "
                                     "another address.")
        raise StationFailed(names, f"not ready after {seconds:g} s",
                            hint="Loading may just be slow here: give a longer `start_timeout`.")


def _as_error(worker: Worker, error: str, message: str, hint: str | None) -> FullpipeError:
    """The error that a worker reported, of the same type when it is one of ours."""
    ours = by_name(error, f"{worker.label}: {message}", hint) if error != StationFailed.__name__ else None
    return ours or StationFailed(worker.label, f"{error}: {message}{worker.log_tail()}")


def _tcp(place: Place, before: int) -> str:
    """An endpoint there. before: how many of its host listen already."""
    return tcp_endpoint(place.address, place.port + before if place.port else 0)


def _gpus(spec: StationSpec) -> Iterator[str]:
    """Those of a station: of a mix each of its drafts may have one."""
    if device := spec.args.get("device"):
        yield device
    for draft in spec.args.get("drafts", []):
        yield from _gpus(StationSpec(**draft))
