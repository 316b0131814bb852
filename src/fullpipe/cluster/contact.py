"""A contact is the head's way to the hosts: who is there, an agent on each, and who starts stations there."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from typing import Any

import msgspec

from fullpipe.cluster.agent import SAME_EVERYWHERE, Agent, Answer, Ping, Request, read, told, write
from fullpipe.cluster.hosts import HostEntry
from fullpipe.errors import FullpipeError, PipelineError, UsageError
from fullpipe.pipeline.launch.base import Launcher
from fullpipe.pipeline.launch.local import LocalLauncher
from fullpipe.pipeline.launch.ray import Cluster, Node, RayLauncher

log = logging.getLogger(__name__)

_PING_S = 1.0


class Contact(ABC):
    """Keeps in touch with the hosts.

    head: the name of the host that this process is on. entries: what is known of all hosts that are there, by name.
    by_ray: whether Ray starts what runs there.
    """

    head: str
    entries: dict[str, HostEntry]
    by_ray = False

    @abstractmethod
    def begin(self, host: str, request: bytes) -> Future[bytes]:
        """Have a host's agent do something."""

    @abstractmethod
    def launcher(self) -> Launcher:
        """One that starts the stations of a pipeline on these hosts."""

    @abstractmethod
    def refresh(self) -> None:
        """Take in who has come, and leave out who has gone."""

    @abstractmethod
    def close(self) -> None:
        """End the agents."""

    def cores(self, host: str) -> int | None:
        """How many of a host's cores may be taken; None: all that it reports."""
        return self.entries[host].cores

    def ask(self, host: str, request: Request, timeout_s: float) -> Answer:
        """What a host's agent answers. Raises what went wrong there, and PipelineError where nothing comes."""
        return self.ask_all({host: request}, timeout_s)[host]

    def ask_all(self, requests: Mapping[str, Request], timeout_s: float) -> dict[str, Answer]:
        """The same for several hosts at once. The first error is raised."""
        answers = self.try_all(requests, timeout_s)
        for answer in answers.values():
            if isinstance(answer, FullpipeError):
                raise answer
        return answers  # type: ignore[return-value]

    def try_all(self, requests: Mapping[str, Request], timeout_s: float) -> dict[str, Answer | FullpipeError]:
        """The same, with errors in place of answers."""
        begun = {host: self.begin(host, msgspec.msgpack.encode(request)) for host, request in requests.items()}
        found: dict[str, Answer | FullpipeError] = {}
        for host, answer in begun.items():
            try:
                found[host] = told(answer.result(timeout_s), host)
            except FullpipeError as error:
                found[host] = error
            except TooLate:
                found[host] = PipelineError(f"{host} has not answered within {timeout_s:g} s",
                                            hint="Look whether it is up, has a free core, and can be reached from "
                                                 "here.")
            except Exception as error:
                self.note_lost(host, error)
                found[host] = _lost(host, error)
        return found

    def note_lost(self, host: str, error: Exception) -> None:
        """An agent has not answered, and will not: see to it that there is one again, if the host is there."""
        log.debug("the agent on %s is lost: %s", host, error)

    def await_agents(self, timeout_s: float) -> None:
        """Return when all hosts answer. Raises PipelineError, which names those that do not."""
        found = self.try_all({host: Ping() for host in self.entries}, timeout_s)
        silent = {host: error for host, error in found.items() if isinstance(error, FullpipeError)}
        if len(silent) == 1:
            raise next(iter(silent.values()))
        if silent:
            raise PipelineError(f"{', '.join(silent)} have not answered within {timeout_s:g} s",
                                hint="Look whether they are up, have a free core, and can be reached from here.")

    def answering(self, timeout_s: float = _PING_S) -> list[str]:
        """The hosts whose agents answer at once."""
        found = self.try_all({host: Ping() for host in self.entries}, timeout_s)
        return [host for host, answer in found.items() if isinstance(answer, Answer)]


def _lost(host: str, error: Exception) -> PipelineError:
    """The error for an agent that is gone, or speaks what nobody here understands."""
    what = str(error).strip().partition("\n")[0]
    if isinstance(error, msgspec.MsgspecError) or "ModuleNotFoundError" in str(error):
        return PipelineError(f"{host} is not understood here: {what}", hint=SAME_EVERYWHERE)
    return PipelineError(f"{host} is lost: {what or type(error).__name__}",
                         hint="Look whether it is up and can be reached from here.")


# ---- by commands ------------------------------------------------------------------------------------------------


class CommandContact(Contact):
    """Reaches hosts by a command each that runs another command there, such as `ssh`, or `ip netns exec`.

    prefixes: the command of each host but the head's, by name; entries must have the same names.
    """

    def __init__(self, head: str, entries: Iterable[HostEntry], prefixes: Mapping[str, Sequence[str]]) -> None:
        self.head = head
        self._all = {entry.name: entry for entry in entries}
        self._prefixes = prefixes
        self._agents: dict[str, _Piped] = {}
        self.entries = {}
        self.refresh()

    def begin(self, host: str, request: bytes) -> Future[bytes]:
        return self._agents[host].begin(request)

    def launcher(self) -> Launcher:
        return LocalLauncher(self._prefixes)

    def refresh(self) -> None:
        for host, entry in self._all.items():
            if host in self._agents and not self._agents[host].alive:
                self._agents.pop(host).close()
                self.entries.pop(host, None)
            if host not in self._agents:
                self._agents[host] = _Piped(self._prefixes.get(host, ()))
                self.entries[host] = entry

    def close(self) -> None:
        for agent in self._agents.values():
            agent.close()


class _Piped:
    """Is an agent behind a pair of pipes."""

    def __init__(self, prefix: Sequence[str]) -> None:
        self._process = subprocess.Popen([*prefix, sys.executable, "-P", "-m", "fullpipe.cluster.agent"],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._caller = ThreadPoolExecutor(1, "fullpipe-agent")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def begin(self, request: bytes) -> Future[bytes]:
        return self._caller.submit(self._call, request)

    def _call(self, request: bytes) -> bytes:
        assert self._process.stdin and self._process.stdout
        write(self._process.stdin, request)
        if (answer := read(self._process.stdout)) is None:
            raise ConnectionError("its agent has ended")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._caller.shutdown(wait=False, cancel_futures=True)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


# ---- by Ray -----------------------------------------------------------------------------------------------------


class RayContact(Contact):
    """Reaches the hosts of a Ray cluster, an agent actor on each.

    address: see `Cluster`. wanted: the hosts that take part; None: all nodes of the cluster, by their names.

    Raises what `Cluster` raises, and UsageError for hosts that Ray does not know.
    """

    by_ray = True

    def __init__(self, address: str | None = None, wanted: Sequence[HostEntry] | None = None) -> None:
        self._cluster = Cluster(address)
        self._wanted = wanted
        self._nodes: dict[str, Node] = {}
        self._agents: dict[str, Any] = {}
        self.entries = {}
        self.head = ""
        self._changing = threading.Lock()
        try:
            self.refresh()
            if wanted and (missing := [entry for entry in wanted if entry.name not in self.entries]):
                raise UsageError("Ray has no host at the address of "
                                 f"{', '.join(f'{entry.name} ({entry.address})' for entry in missing)}",
                                 hint=f"It has {', '.join(node.address for node in self._cluster.nodes())}. Start Ray "
                                      "on what is missing: `ray start --address=HEAD:6379`; or leave it out of the "
                                      "hosts file.")
            if not self.head:
                raise UsageError("this machine is none of the hosts", hint="Run it on one of them, and name that in "
                                 "the hosts file too.")
        except BaseException:
            self.close()
            raise

    def begin(self, host: str, request: bytes) -> Future[bytes]:
        return self._agents[host].do.remote(request).future()  # type: ignore[no-any-return]

    def launcher(self) -> Launcher:
        return RayLauncher(self._cluster, {name: node.id for name, node in self._nodes.items()})

    def refresh(self) -> None:
        with self._changing:
            nodes = self._named(self._cluster.nodes())
            for host, known in list(self._nodes.items()):
                if host not in nodes or nodes[host][0].id != known.id:
                    self._leave_out(host)
            for host, (node, entry) in nodes.items():
                if host not in self._agents:
                    self._agents[host] = self._cluster.actor(Agent, node.id)
                self._nodes[host], self.entries[host] = node, entry
                if node.here:
                    self.head = host

    def cores(self, host: str) -> int | None:
        ray = max(1, int(self._nodes[host].all.get("CPU", 1)))
        return min(ray, self.entries[host].cores or ray)

    def note_lost(self, host: str, error: Exception) -> None:
        """One that Ray only cannot reach now, it may reach later."""
        super().note_lost(host, error)
        with self._changing:
            if self._cluster.is_dead(error) and host in self._nodes:
                self._agents[host] = self._cluster.actor(Agent, self._nodes[host].id)

    def _leave_out(self, host: str) -> None:
        self._agents.pop(host, None)
        self._nodes.pop(host, None)
        self.entries.pop(host, None)

    def _named(self, nodes: Sequence[Node]) -> dict[str, tuple[Node, HostEntry]]:
        if self._wanted is not None:
            by_address = {one: node for node in nodes for one in (node.address, node.name)}
            return {entry.name: (by_address[entry.address], entry) for entry in self._wanted
                    if entry.address in by_address}
        names = [node.name for node in nodes]
        return {name: (node, HostEntry(name=name, address=node.address)) for node in nodes
                for name in [node.name if names.count(node.name) == 1 else node.address]}

    def close(self) -> None:
        self._cluster.close()
