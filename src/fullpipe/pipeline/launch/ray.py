"""Ray has station processes come to be on the hosts of a cluster, one actor for each.

An actor reserves what its station needs (cores, GPUs, memory) and starts the same worker process as on one machine; it
says how that ended. Ray carries nothing of a token's way. What is sent through it are plain bytes: doors and words.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from fullpipe.errors import MissingExtra, PipelineError, StationFailed, UsageError
from fullpipe.pipeline.frames import Door
from fullpipe.pipeline.guarded import guarded
from fullpipe.pipeline.launch.base import Launcher, Needs, Process
from fullpipe.pipeline.launch.local import LocalLauncher, LocalProcess

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
_WORDS_S = 0.5
_KILL_S = 0.3  # until an actor whose worker was to be killed goes too
_GLANCE_S = 0.5
# Ray shows an actor only the GPUs that it gives it, counted from 0 again; a station is told a name ("cuda:1") that its
# host's agent gave, which sees all. So it sees all too: Ray counts how many are taken, and the plan says which.
_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
_HOW_TO_START = "Start it: `ray start --head` here, and `ray start --address=HEAD:6379` on every other host."


@dataclass(frozen=True, slots=True)
class Node:
    """Is one machine of the cluster, as Ray knows it. here: this process is on it. all: its resources: "CPU", "GPU",
    "memory" in bytes, ..."""

    id: str
    address: str
    name: str
    here: bool
    all: dict[str, float]


@dataclass(slots=True)
class _Session:
    """Is the connection of this process with Ray. There can be one; all who want the same share it.

    address: as it was asked for. identity: tells it from one that somebody else makes later. owners: how many share it.
    """

    ray: Any
    address: str
    identity: tuple[str, str]
    owners: int = 1
    current: ClassVar[_Session | None] = None
    changing: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def shared(cls, ray: Any, address: str) -> _Session:
        """Raises UsageError where none can be made."""
        with cls.changing:
            if not ray.is_initialized():
                _check_reachable(address)
                with _own_signals():
                    _connect(ray, address)
                cls.current = cls(ray, address, _identity(ray))
                return cls.current
            own = cls.current
            if own is None or not own.stands:
                raise UsageError("this process uses Ray already, for something else",
                                 hint="Call `ray.shutdown()` first, or use Fullpipe in a process of its own.")
            if address not in (own.address, own.identity[0]):
                raise UsageError(f"this process is in the Ray cluster at {own.address}, and can be in no other",
                                 hint=f"Close what uses that one first, or use {address} in a process of its own.")
            own.owners += 1
            return own

    @property
    def stands(self) -> bool:
        """Whether it has not been ended, by anybody."""
        return bool(self.ray.is_initialized()) and _identity(self.ray) == self.identity

    def leave(self) -> bool:
        """One of the owners goes. Returns whether he was the last: then it has ended."""
        with self.changing:
            self.owners -= 1
            if self.owners == 0 and self.stands:
                with _own_signals():
                    self.ray.shutdown()
            return self.owners == 0


class Cluster:
    """Is membership in a Ray cluster; several of one process share its connection, which ends with the last of them.

    address: "HOST:PORT" of its head; None: `RAY_ADDRESS`, else the Ray of this machine.

    Raises MissingExtra without Ray, and UsageError where none runs, one that will not have us, or where this process
    uses Ray otherwise.
    """

    def __init__(self, address: str | None = None) -> None:
        self._ray = _ray()
        self._session = _Session.shared(self._ray, address or os.environ.get("RAY_ADDRESS") or _here())
        self._actors: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False

    @property
    def ray(self) -> Any:
        """The library, which would begin a Ray of its own for whoever calls it without a connection. Raises
        PipelineError when this one is closed."""
        if self._closed or not self._session.stands:
            raise PipelineError("the connection with Ray is closed", hint="Make another `LLM`.")
        return self._ray

    def nodes(self) -> list[Node]:
        """The machines that are there now."""
        own = self.ray.get_runtime_context().get_node_id()
        return [Node(one["NodeID"], one["NodeManagerAddress"], one["NodeManagerHostname"], one["NodeID"] == own,
                     one["Resources"]) for one in self.ray.nodes() if one["Alive"]]

    def actor(self, kind: type, node: str, *, cpus: float = 0.0, gpus: float = 0.0, memory: int = 0) -> Any:
        """A handle of a new actor on that node; it is asked for at once, and begins when there is room."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self.ray.remote(kind).options(
            num_cpus=cpus, num_gpus=gpus, memory=memory or None, max_concurrency=8, max_restarts=0,
            runtime_env=_ALL_GPUS if gpus else None,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        self._actors.add(actor)
        return actor

    def is_dead(self, error: Exception) -> bool:
        """Whether this says of an actor that it has ended, for ever."""
        return isinstance(error, self._ray.exceptions.ActorDiedError)

    def close(self) -> None:
        """Leave the cluster. Actors that are left end. May be called again."""
        if self._closed:
            return
        self._closed = True
        if not self._session.leave() and self._session.stands:
            for actor in list(self._actors):
                guarded("ending an actor", self._ray.kill, actor)


class StationActor:
    """Runs on the host of a station: starts its worker, and waits for its end."""

    def __init__(self) -> None:
        self._launcher = LocalLauncher()
        self._process: LocalProcess | None = None
        self._told_to_end = threading.Event()

    def run(self, door: bytes, threads: int) -> tuple[str, str]:
        """Start the worker, wait until it has ended, and return its last words, and the tail of its log."""
        process = self._launcher.start(msgspec.json.decode(door, type=Door), "", Needs(threads))
        assert isinstance(process, LocalProcess)
        self._process = process
        if self._told_to_end.is_set():
            process.kill()
        process.wait(None)
        words = process.last_words(), process.log_tail()
        self._process = None
        process.close()
        return words

    def log_tail(self) -> str:
        return self._process.log_tail() if self._process else ""

    def pid(self) -> int:
        """Of the worker; 0: there is none now."""
        return self._process.pid if self._process else 0

    def terminate(self) -> None:
        self._told_to_end.set()
        if process := self._process:
            process.terminate()

    def kill(self) -> None:
        self._told_to_end.set()
        if process := self._process:
            process.kill()


class RayProcess(Process):
    """Is a worker behind an actor.

    ran: what Ray has when the worker has ended.
    """

    def __init__(self, cluster: Cluster, actor: Any, ran: Any, host: str, needs: Needs) -> None:
        self.ran = ran
        self._cluster, self._actor, self._host, self._needs = cluster, actor, host, needs
        self._readable, self._write = os.pipe()
        self._ending = threading.Lock()
        self._ended, self._closed = threading.Event(), False
        self._words = self._tail = ""
        self._killed_at = math.inf

    def note_end(self) -> None:
        """Take in how it ended; it has."""
        try:
            words, tail = self._cluster.ray.get(self.ran)
        except Exception as error:  # Ray has a dozen kinds of them for an actor that is gone
            words, tail = self._lost(type(error).__name__), ""
        self.end(words, tail)

    def end(self, words: str, tail: str = "") -> None:
        """It counts as ended from now on."""
        with self._ending:
            self._words, self._tail = words, tail
            self._ended.set()
            if not self._closed:
                os.write(self._write, b"!")

    def _lost(self, kind: str) -> str:
        if "Unschedulable" in kind:
            return (f"{self._host} does not have what it asks for: {self._needs.told} (`ray status` shows what hosts "
                    "have, and what is free)")
        return f"Ray lost it or {self._host} ({kind})"

    def see_to_its_end(self) -> float:
        """End the actor too if the worker was to be killed and still runs. Returns the seconds until there may be
        something to do."""
        left = self._killed_at + _KILL_S - time.monotonic()
        if left <= 0:
            self._killed_at = math.inf
            guarded(f"ending an actor on {self._host}", self._end_actor)
        return left if 0 < left < math.inf else math.inf

    def fileno(self) -> int:
        return self._readable

    def alive(self) -> bool:
        return not self._ended.is_set()

    def last_words(self) -> str:
        self._ended.wait(_WORDS_S)
        return self._words or "closed its connection but still runs, as far as Ray knows" + self.log_tail()

    def log_tail(self) -> str:
        if self._ended.is_set():
            return self._tail
        try:
            return str(self._cluster.ray.get(self._actor.log_tail.remote(), timeout=_WORDS_S))
        except Exception:
            return (f"; Ray has not started it yet, or cannot reach {self._host}: it asks for {self._needs.told} there "
                    "(`ray status` shows what is free)")

    def terminate(self) -> None:
        guarded(f"ending a worker on {self._host}", self._actor.terminate.remote)

    def kill(self) -> None:
        """By its actor, who can say then how it ended; with its actor where that does not help (`see_to_its_end`)."""
        if self.alive():
            self._killed_at = min(self._killed_at, time.monotonic())
            guarded(f"killing a worker on {self._host}", self._actor.kill.remote)

    def _end_actor(self) -> None:
        self._cluster.ray.kill(self._actor)

    def wait(self, seconds: float | None) -> bool:
        return self._ended.wait(seconds)

    def close(self) -> None:
        with self._ending:
            if self._closed:
                return
            self._closed = True
            os.close(self._readable)
            os.close(self._write)
        with contextlib.suppress(Exception):
            self._end_actor()


class RayLauncher(Launcher):
    """Places the stations of one pipeline. nodes: Ray's id of every host."""

    def __init__(self, cluster: Cluster, nodes: dict[str, str]) -> None:
        self._cluster, self._nodes = cluster, nodes
        self._processes: list[RayProcess] = []
        self._changed = threading.Condition()
        self._closed = False
        self._blind = ""  # why nobody watches any more
        threading.Thread(target=self._watch_or_end, name="fullpipe-ray", daemon=True).start()

    def start(self, door: Door, host: str, needs: Needs) -> Process:
        if host not in self._nodes:
            raise StationFailed(door.name, f"Ray has no host {host!r}",
                                hint=f"It has: {', '.join(sorted(self._nodes))}.")
        actor = self._cluster.actor(StationActor, self._nodes[host], cpus=needs.cpus or needs.threads, gpus=needs.gpus,
                                    memory=needs.memory)
        ran = actor.run.remote(msgspec.json.encode(door), needs.threads)
        process = RayProcess(self._cluster, actor, ran, host, needs)
        with self._changed:
            self._processes.append(process)
            self._changed.notify()
            if self._blind:
                process.end(self._blind)
        return process

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
            processes, self._processes = self._processes, []
        for process in processes:  # one whose start was interrupted nobody else knows
            process.close()

    def _watch_or_end(self) -> None:
        try:
            self._watch()
        except Exception as error:
            with self._changed:
                if not self._closed:
                    log.exception("nobody watches what Ray runs any more")
                self._blind = f"Ray says nothing of it any more ({type(error).__name__})"
                for one in self._processes:
                    if one.alive():
                        one.end(self._blind)

    def _watch(self) -> None:
        """Wait for ends: Ray wakes us. Of what has been started meanwhile, or is to be killed, it knows nothing: that
        is seen at the next glance, twice a second."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(one.alive() for one in self._processes))
                if self._closed:
                    return
                running = {one.ran: one for one in self._processes if one.alive()}
            patience = min([_GLANCE_S, *(one.see_to_its_end() for one in running.values())])
            ended, _ = self._cluster.ray.wait(list(running), num_returns=1, timeout=patience, fetch_local=True)
            for ran in ended:
                running[ran].note_end()


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of its own future
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # else one that refuses us is asked for 20 s
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a call that comes too late starts a Ray
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("several hosts need Ray, which is not installed",
                           hint="pip install 'fullpipe[ray]', the same version on every host") from error
    return ray


def _connect(ray: Any, where: str) -> None:
    try:
        ray.init(address=where, namespace="fullpipe", log_to_driver=False, configure_logging=False,
                 logging_level="ERROR")
    except BaseException as error:
        ray.shutdown()  # of what has been begun
        if isinstance(error, (ConnectionError, RuntimeError)):
            raise _refusal(where, str(error).strip()) from None
        raise


def _identity(ray: Any) -> tuple[str, str]:
    """Of a connection: the address of its head, and the number that this driver has there."""
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_job_id()


def _here() -> str:
    """The head of this machine's Ray, as Ray itself finds it: the last that was started, else one that runs. What it
    finds may be gone. Raises UsageError where there is none, or several."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die("auto"))
    except ConnectionError as error:
        raise _refusal("this machine", str(error)) from None


def _refusal(where: str, what: str) -> UsageError:
    """The error for what Ray says when it does not connect."""
    if "not find any running Ray" in what:
        return UsageError(f"no Ray runs at {where}", hint=_HOW_TO_START)
    if "multiple active Ray" in what:
        return UsageError(f"several Rays run at {where}", hint="Name the head of one: `ray_address=HOST:6379`.")
    if "ersion mismatch" in what:
        return UsageError(f"the Ray at {where} is of another version: {what.partition(chr(10))[0]}",
                          hint="All hosts need one version of Ray and of Python.")
    return UsageError(f"the Ray at {where} does not take us: {what.partition(chr(10))[0]}",
                      hint="With token authentication RAY_AUTH_MODE and RAY_AUTH_TOKEN must be the same here as where "
                           "Ray was started. Whether it still runs `ray status` tells.")


def _check_reachable(address: str | None) -> None:
    """Ray itself waits for minutes. Raises UsageError."""
    if not address or address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"{address!r} is no address of a Ray head", hint="Write HOST:PORT, such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise UsageError(f"no Ray answers at {address}: {error.strerror or error}", hint=_HOW_TO_START) from None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts its own handlers in place; ours come back."""
    main = threading.current_thread() is threading.main_thread()
    kept: dict[int, Callable[..., Any] | int | None] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
