"""Worker processes are started here, one per station on this machine.

What they need has no name anywhere that could be left behind: workers are reached through socket pairs that they
inherit (nobody else can connect, so there is nothing to authenticate), the workers' meeting point for gloo is an
inherited socket listening on 127.0.0.1, and their logs are files that have no path.

However this process ends, its workers end: they die with the thread that started them (Linux), and
anywhere when their control connection closes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fullpipe import errors
from fullpipe.errors import FullpipeError, StationFailed
from fullpipe.pipeline.fleet import Fleet, News, Worker
from fullpipe.pipeline.frames import Beat, Broken, FromWorker, Setup, Up
from fullpipe.pipeline.links import Links, StationLinks
from fullpipe.pipeline.wire import Channel
from fullpipe.stations.spec import StationSpec

# Hidden states of all sizes come and go for as long as a server runs; left to itself malloc takes ever larger ones from
# a heap that fragments, and gives nothing back. The user's own settings come first.
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(2 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20)}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Says what is to be started.

    stages: one spec per stage, in order. One whose `args` have `taps` sends hidden states to the draft station.
    draft: its spec, or None for none.
    links: emulated ones. pace: least seconds of work by rows, of the stations that are paced.
    threads: compute threads of each worker. beat_s: seconds between the signs of life that each worker sends.
    start_timeout: seconds that all of this may take, the loading of weights included.
    """

    stages: Sequence[StationSpec]
    draft: StationSpec | None
    links: Links
    pace: Mapping[str, dict[int, float]]
    threads: int
    beat_s: float
    start_timeout: float

    @property
    def names(self) -> list[str]:
        return [*(f"stage {rank}" for rank in range(len(self.stages))), *(["draft"] if self.draft else [])]

    @property
    def devices(self) -> list[str]:
        """Where each station computes: on a GPU, which others may share, or on a core of its own. Of several drafts the
        first one with a GPU counts."""
        specs = [*self.stages, *([self.draft] if self.draft else [])]
        return [next(_gpus(spec), f"core of {name}") for name, spec in zip(self.names, specs)]

    @property
    def tapping(self) -> list[int]:
        """Ranks of the stages that send hidden states to the draft."""
        return [rank for rank, spec in enumerate(self.stages) if self.draft and spec.args.get("taps")]

    def setups(self, port: int, listener: int) -> list[Setup]:
        """One for each worker, who meet at `port`, served by the first on the inherited socket `listener`."""
        specs = [*self.stages, *([self.draft] if self.draft else [])]
        return [Setup(name, rank, len(specs), len(self.stages), self.tapping, spec,
                      StationLinks.of(self.links, rank, len(self.stages)), self.pace.get(name), self.threads,
                      self.beat_s, self.start_timeout, os.getpid(), port, listener if rank == 0 else None)
                for rank, (name, spec) in enumerate(zip(self.names, specs))]


def start_fleet(layout: Layout) -> Fleet:
    """Start one process per station and return when all are ready.

    Raises what a worker raised while building its station, by type when it is one of ours, its message
    beginning with the station's name; `StationFailed` for anything else. Nothing is left behind then.
    """
    fleet = Fleet()
    try:
        _spawn(fleet, layout)
        _await_ready(fleet, layout.start_timeout)
    except BaseException:
        fleet.close()
        raise
    return fleet


def _spawn(fleet: Fleet, layout: Layout) -> None:
    meeting = socket.create_server(("127.0.0.1", 0), backlog=128)
    setups = layout.setups(meeting.getsockname()[1], meeting.fileno())
    with meeting:  # the first stage has its own copy by the end
        _start_processes(fleet, setups)
    for worker, setup in zip(fleet.workers, setups):
        with contextlib.suppress(OSError):  # a process that died at once is seen by _await_ready
            worker.channel.send(setup)


def _start_processes(fleet: Fleet, setups: Sequence[Setup]) -> None:
    """Start all processes from a thread that lives as long as the fleet.

    Linux sends the parent-death signal when the *thread* that started a child ends; a user may well
    build a pipeline in a thread that does not last.
    """
    outcome: list[BaseException] = []

    def start_and_stay() -> None:
        try:
            for setup in setups:
                if not fleet.closed:  # by a Ctrl-C, say
                    fleet.add(start_process(setup))
        except BaseException as error:
            outcome.append(error)
        finally:
            fleet.starting_done.set()
        fleet.ended.wait()

    fleet.starting_done.clear()
    threading.Thread(target=start_and_stay, name="fullpipe-starter", daemon=True).start()
    fleet.starting_done.wait()
    if outcome:
        raise outcome[0]


def start_process(setup: Setup) -> Worker:
    """A process that waits for its setup."""
    ours, theirs = socket.socketpair()
    log = tempfile.TemporaryFile(prefix="fullpipe-")  # noqa: SIM115 - the fleet closes it
    environment = {**ALLOCATION, **os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(setup.threads))}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        process = subprocess.Popen(
            # -P: files in the current folder must not shadow modules of the worker.
            [sys.executable, "-P", "-m", "fullpipe.pipeline.worker"], stdin=theirs.fileno(), stdout=log, stderr=log,
            pass_fds=[] if setup.listener is None else [setup.listener], env=environment,
            start_new_session=True)  # so that Ctrl-C in the terminal reaches the user's process alone
    except BaseException:
        ours.close()
        log.close()
        raise
    finally:
        theirs.close()
    ours.settimeout(setup.start_timeout)
    return Worker(setup.name, process, Channel(ours, FromWorker), log, time.monotonic())


def _await_ready(fleet: Fleet, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    missing = {worker.name for worker in fleet.workers}
    while missing:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            names = ", ".join(worker.name for worker in fleet.workers if worker.name in missing)
            raise StationFailed(names, f"not ready after {timeout:g} s",
                                hint="Loading may just be slow here: give a longer `start_timeout`.")
        for worker, news in fleet.receive(remaining):
            _check_starting(worker, news)
            if isinstance(news, Up):
                worker.cache_slots = news.cache_slots
                missing.discard(worker.name)


def _check_starting(worker: Worker, news: News) -> None:
    """Raises unless it is something that a worker says while all goes well."""
    match news:
        case Up() | Beat():
            pass
        case Broken(error, message, hint):
            raise _as_error(worker, error, message, hint)
        case EOFError():
            raise StationFailed(worker.name, worker.how_it_ended())
        case _:
            raise StationFailed(worker.name, f"answers nonsense: {news!s:.200}{worker.log_tail()}")


def _as_error(worker: Worker, error: str, message: str, hint: str | None) -> FullpipeError:
    """The error that a worker reported, of the same type when it is one of ours."""
    kind = getattr(errors, error, None)
    if isinstance(kind, type) and issubclass(kind, FullpipeError) and kind is not StationFailed:
        return kind(f"{worker.name}: {message}", hint=hint)
    return StationFailed(worker.name, f"{error}: {message}{worker.log_tail()}")


def _gpus(spec: StationSpec) -> Iterator[str]:
    """Those of a station: of a mix each of its drafts may have one."""
    if device := spec.args.get("device"):
        yield device
    for draft in spec.args.get("drafts", []):
        yield from _gpus(StationSpec(**draft))
