"""A pipeline's stations are started here: each process says hello, is told what to be, builds it, and is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fullpipe import errors
from fullpipe.errors import FullpipeError, StationFailed
from fullpipe.pipeline.fleet import Fleet, News, Worker
from fullpipe.pipeline.frames import Beat, Broken, Door, Hello, Setup, Up
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Launcher, Needs
from fullpipe.pipeline.links import Links, StationLinks
from fullpipe.pipeline.net import Net, local_endpoint
from fullpipe.stations.spec import StationSpec

_LEAST_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Says where a station runs. host: its name; "" for this machine, which the engine's process is on. address: at
    which other hosts reach it. port: that it listens on there, if any station of another host brings it something;
    0: any that is free. needs: what its process takes there; without threads, as many as the layout says."""

    host: str = ""
    address: str = ""
    port: int = 0
    needs: Needs = field(default_factory=lambda: Needs(threads=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Says what is to be started.

    stages: one spec per stage, in order. One whose `args` have `taps` sends hidden states to the draft station.
    draft: its spec, or None for none.
    places: of every station, the draft last; none: all are on this machine. head: where hosts reach the engine.
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
    places: Sequence[Place] = ()
    head: Place = field(default_factory=Place)

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
        return [next(_gpus(spec), f"core of {name}") for name, spec in zip(self.names, self.specs)]

    @property
    def tapping(self) -> list[int]:
        """Ranks of the stages that send hidden states to the draft."""
        return [rank for rank, spec in enumerate(self.stages) if self.draft and spec.args.get("taps")]

    def needs(self, place: Place) -> Needs:
        """What a station's process takes of its host."""
        return replace(place.needs, threads=place.needs.threads or self.threads)

    def place(self, rank: int) -> Place:
        return self.places[rank] if self.places else Place()

    @property
    def engine_endpoints(self) -> list[str]:
        """Where the engine listens: for this machine, and for others where there are some."""
        far = any(place.host != self.head.host for place in self.places)
        return [local_endpoint(), *([f"tcp://{self.head.address}:{self.head.port or '*'}"] if far else [])]

    def listens(self, rank: int) -> list[str]:
        """Where a station listens: for the stations of its host, and for those of others."""
        bringers = [rank - 1] if 0 < rank < len(self.stages) else self.tapping if rank == len(self.stages) else []
        here = self.place(rank)
        near = [local_endpoint()] if any(self.place(one).host == here.host for one in bringers) else []
        far = any(self.place(one).host != here.host for one in bringers)
        return near + ([f"tcp://{here.address}:{here.port or '*'}"] if far else [])

    def endpoint(self, bringer: int, worker: Worker, rank: int) -> str:
        """Where one station reaches another one."""
        near = self.place(bringer).host == self.place(rank).host
        return next(one for one in worker.listens if one.startswith("ipc:") == near)

    def doors(self, endpoints: Sequence[str], keys: RunKeys) -> Iterator[tuple[Door, Place]]:
        """What each process is handed. endpoints: at which the engine listens."""
        for rank, name in enumerate(self.names):
            place = self.place(rank)
            kind = "ipc:" if place.host == self.head.host else "tcp:"
            engine = next(one for one in endpoints if one.startswith(kind))
            yield Door(name, rank, engine, keys, self.listens(rank), max(_LEAST_PATIENCE_S, 2 * self.silence_s),
                       self.start_timeout), place

    def setup(self, rank: int, workers: Sequence[Worker]) -> Setup:
        """What a station is told; all have said where they listen."""
        last, draft = len(self.stages) - 1, len(self.stages)
        onward = self.endpoint(rank, workers[rank + 1], rank + 1) if rank < last else ""
        taps = self.endpoint(rank, workers[draft], draft) if rank in self.tapping else ""
        name = self.names[rank]
        return Setup(name, rank, len(self.stages), onward, self.tapping, taps, self.specs[rank],
                     StationLinks.of(self.links, rank, len(self.stages)), self.pace.get(name),
                     self.needs(self.place(rank)).threads, self.beat_s)


def start_fleet(layout: Layout, launcher: Launcher, say: Callable[[str], None]) -> Fleet:
    """Start one process per station and return when all are ready. say: told what takes long.

    Raises what a worker raised while building its station, by type when it is one of ours, its message
    beginning with the station's name; `StationFailed` for anything else. Nothing is left behind then.
    """
    keys = RunKeys.new()
    fleet = Fleet(Net(keys, layout.silence_s), layout.engine_endpoints, launcher)
    deadline = time.monotonic() + layout.start_timeout
    try:
        for door, place in layout.doors(fleet.endpoints, keys):
            process = launcher.start(door, place.host, layout.needs(place))
            fleet.add(Worker(door.name, process, time.monotonic(), place.host))
        _Starting(fleet, layout, deadline).run()
    except BaseException:
        fleet.close()
        raise
    return fleet


class _Starting:
    """Leads the workers of a fleet from their hello to their being up."""

    def __init__(self, fleet: Fleet, layout: Layout, deadline: float) -> None:
        self._fleet, self._layout, self._deadline = fleet, layout, deadline

    def run(self) -> None:
        self._await(Hello)
        for rank, worker in enumerate(self._fleet.workers):
            self._fleet.send(worker, self._layout.setup(rank, self._fleet.workers))
        self._await(Up)

    def _await(self, kind: type[Hello] | type[Up]) -> None:
        """Return when all have said that."""
        missing = {worker.name for worker in self._fleet.workers}
        while missing:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                self._give_up([worker for worker in self._fleet.workers if worker.name in missing], kind)
            for worker, news in self._fleet.receive(remaining):
                self._take(worker, news)
                if isinstance(news, kind):
                    missing.discard(worker.name)

    def _take(self, worker: Worker, news: News) -> None:
        """Raises unless it is something that a worker says while all goes well."""
        match news:
            case Hello(listens):
                worker.listens = listens
            case Up(slots):
                worker.cache_slots = slots
            case Beat():
                pass
            case Broken(error, message, hint):
                raise _as_error(worker, error, message, hint)
            case EOFError():
                raise StationFailed(worker.label, worker.how_it_ended())
            case _:
                raise StationFailed(worker.label, f"answers nonsense: {news!s:.200}{worker.log_tail()}")

    def _give_up(self, missing: Sequence[Worker], kind: type[Hello] | type[Up]) -> None:
        names = ", ".join(worker.label for worker in missing)
        seconds = self._layout.start_timeout
        if kind is Hello and any(worker.host for worker in missing):
            raise StationFailed(names, f"did not reach the engine at {self._fleet.endpoints[-1]} within {seconds:g} s",
                                hint="Can those hosts reach this address and port? `host_ip` and `interface` choose "
                                     "another address.")
        raise StationFailed(names, f"not ready after {seconds:g} s",
                            hint="Loading may just be slow here: give a longer `start_timeout`.")


def _as_error(worker: Worker, error: str, message: str, hint: str | None) -> FullpipeError:
    """The error that a worker reported, of the same type when it is one of ours."""
    kind = getattr(errors, error, None)
    if isinstance(kind, type) and issubclass(kind, FullpipeError) and kind is not StationFailed:
        return kind(f"{worker.label}: {message}", hint=hint)
    return StationFailed(worker.label, f"{error}: {message}{worker.log_tail()}")


def _gpus(spec: StationSpec) -> Iterator[str]:
    """Those of a station: of a mix each of its drafts may have one."""
    if device := spec.args.get("device"):
        yield device
    for draft in spec.args.get("drafts", []):
        yield from _gpus(StationSpec(**draft))
