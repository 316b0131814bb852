"""Ray has station processes come to be on the hosts of a cluster, one actor for each.

An actor reserves what its station needs (cores, GPUs, memory) and starts the same worker process as on one machine; it
says how that ended. Ray carries nothing of a token's way. What is sent through it are plain bytes: doors and words.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from fullpipe.errors import MissingExtra, StationFailed, UsageError
from fullpipe.pipeline.frames import Door
from fullpipe.pipeline.launch.base import Launcher, Needs, Process
from fullpipe.pipeline.launch.local import LocalLauncher, LocalProcess

_CONNECT_S = 5.0
_WORDS_S = 0.5
_KILL_S = 0.3  # until an actor whose worker was to be killed goes too
_GLANCE_S = 0.5
_HOW_TO_START = "Start it: `ray start --head` here, and `ray start --address=HEAD:6379` on every other host."


@dataclass(frozen=True, slots=True)
class Node:
    """Is one machine of the cluster, as Ray knows it. here: this process is on it. all, free: its resources, and those
    that nobody has reserved: "CPU", "GPU", "memory" in bytes, ..."""

    id: str
    address: str
    name: str
    here: bool
    all: dict[str, float]
    free: dict[str, float]


class Cluster:
    """Is this process's connection with a Ray cluster.

    address: "HOST:PORT" of its head; None: `RAY_ADDRESS`, else the Ray of this machine.

    Raises MissingExtra without Ray, and UsageError where none runs, or one that will not have us.
    """

    def __init__(self, address: str | None = None) -> None:
        self.ray = _ray()
        address = address or os.environ.get("RAY_ADDRESS") or _here()
        _check_reachable(address)
        with _own_signals():
            self._connect(address)

    def _connect(self, where: str) -> None:
        try:
            self.ray.init(address=where, namespace="fullpipe", log_to_driver=False,
                          configure_logging=False, logging_level="ERROR")
        except BaseException as error:
            self.ray.shutdown()  # of what has been begun
            if isinstance(error, (ConnectionError, RuntimeError)):
                raise _refusal(where, str(error).strip()) from None
            raise

    def nodes(self) -> list[Node]:
        """The machines that are there now."""
        free = self.ray._private.state.available_resources_per_node()
        own = self.ray.get_runtime_context().get_node_id()
        return [Node(one["NodeID"], one["NodeManagerAddress"], one["NodeManagerHostname"], one["NodeID"] == own,
                     one["Resources"], free.get(one["NodeID"], {})) for one in self.ray.nodes() if one["Alive"]]

    def actor(self, kind: type, node: str, *, cpus: float = 0.0, gpus: float = 0.0, memory: int = 0) -> Any:
        """A handle of a new actor on that node; it is asked for at once, and begins when there is room."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return self.ray.remote(kind).options(
            num_cpus=cpus, num_gpus=gpus, memory=memory or None, max_concurrency=8, max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()

    def is_dead(self, error: Exception) -> bool:
        """Whether this says of an actor that it has ended, for ever."""
        return isinstance(error, self.ray.exceptions.ActorDiedError)

    def close(self) -> None:
        """Leave the cluster. Actors that are left end."""
        with _own_signals():
            self.ray.shutdown()


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
        self._ray, self._actor, self._host, self._needs = cluster.ray, actor, host, needs
        self._readable, self._write = os.pipe()
        self._ending = threading.Lock()
        self._ended, self._closed = threading.Event(), False
        self._words = self._tail = ""
        self._killed_at = math.inf

    def note_end(self) -> None:
        """Take in how it ended; it has."""
        try:
            self._words, self._tail = self._ray.get(self.ran)
        except Exception as error:  # Ray has a dozen kinds of them for an actor that is gone
            self._words = self._lost(type(error).__name__)
        with self._ending:
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
            self._ray.kill(self._actor)
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
            return str(self._ray.get(self._actor.log_tail.remote(), timeout=_WORDS_S))
        except Exception:
            return (f"; Ray has not started it yet, or cannot reach {self._host}: it asks for {self._needs.told} there "
                    "(`ray status` shows what is free)")

    def terminate(self) -> None:
        self._actor.terminate.remote()

    def kill(self) -> None:
        """By its actor, who can say then how it ended; with its actor where that does not help (`see_to_its_end`)."""
        if self.alive():
            self._actor.kill.remote()
            self._killed_at = min(self._killed_at, time.monotonic())

    def wait(self, seconds: float | None) -> bool:
        return self._ended.wait(seconds)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)
        with self._ending:
            if not self._closed:
                self._closed = True
                os.close(self._readable)
                os.close(self._write)


class RayLauncher(Launcher):
    """Places the stations of one pipeline. nodes: Ray's id of every host."""

    def __init__(self, cluster: Cluster, nodes: dict[str, str]) -> None:
        self._cluster, self._nodes = cluster, nodes
        self._processes: list[RayProcess] = []
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._watch, name="fullpipe-ray", daemon=True).start()

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
        return process

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        """Wait for ends, with no polling: Ray wakes us. What is new, or to be killed, is seen at the next glance."""
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
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("several hosts need Ray, which is not installed",
                           hint="pip install 'fullpipe[ray]', the same version on every host") from error
    return ray


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
