"""A contact is the head's way to the hosts: who is there, an agent on each, and who starts stations there."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass
from itertools import count
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
_END_S = 2.0


class Contact(ABC):
    """Keeps in touch with the hosts. Any thread may ask, and refresh it.

    head: the name of the host that this process is on. entries: what is known of all hosts that are there, by name;
    a refresh puts others in their place, and leaves alone what somebody is reading. by_ray: whether Ray starts what
    runs there.
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
        """How many of a host's cores may be taken; None: all that it reports, or the host has gone."""
        return entry.cores if (entry := self.entries.get(host)) else None

    def memory(self, host: str) -> int:
        """Bytes of a host that can be reserved for stations; 0: nobody keeps account of them."""
        return 0

    def life(self, host: str) -> str:
        """What is another one when a host has come anew, under its old name."""
        return ""

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
        """The same, with errors in place of answers. timeout_s: for all of them together."""
        until = time.monotonic() + timeout_s
        begun = {host: self._begun(host, request) for host, request in requests.items()}
        return {host: self._awaited(host, answer, until, timeout_s) for host, answer in begun.items()}

    def _begun(self, host: str, request: Request) -> Future[bytes]:
        try:
            return self.begin(host, msgspec.msgpack.encode(request))
        except Exception as error:  # it may have gone since somebody saw it
            failed = Future[bytes]()
            failed.set_exception(ConnectionError("it is not there any more") if isinstance(error, KeyError) else error)
            return failed

    def _awaited(self, host: str, answer: Future[bytes], until: float, timeout_s: float) -> Answer | FullpipeError:
        try:
            return told(answer.result(max(0.0, until - time.monotonic())), host)
        except FullpipeError as error:
            return error
        except TooLate:
            return PipelineError(f"{host} has not answered within {timeout_s:g} s",
                                 hint="Look whether it is up, has a free core, and can be reached from here.")
        except Exception as error:
            self.note_lost(host, error)
            return _lost(host, error)

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
    """Reaches hosts of this machine by a command each that becomes another one there, as `ip netns exec` does.

    prefixes: the command of each host but the head's, by name; entries must have the same names.
    """

    def __init__(self, head: str, entries: Iterable[HostEntry], prefixes: Mapping[str, Sequence[str]]) -> None:
        self.head = head
        self._all = {entry.name: entry for entry in entries}
        self._prefixes = prefixes
        self._agents: dict[str, _Piped] = {}
        self.entries = {}
        self._changing = threading.Lock()
        self._closed = False
        self.refresh()

    def begin(self, host: str, request: bytes) -> Future[bytes]:
        return self._agents[host].begin(request)

    def launcher(self) -> Launcher:
        return LocalLauncher(self._prefixes)

    def life(self, host: str) -> str:
        return str(agent.pid) if (agent := self._agents.get(host)) else ""

    def refresh(self) -> None:
        with self._changing:
            for host, entry in self._all.items():
                known = self._agents.get(host)
                if not self._closed and (known is None or not known.alive):
                    self._agents = {**self._agents, host: _Piped(self._prefixes.get(host, ()))}
                    self.entries = {**self.entries, host: entry}
                    if known:
                        known.close()

    def close(self) -> None:
        with self._changing:
            self._closed = True
        for agent in self._agents.values():
            agent.close()


class _Piped:
    """Is an agent behind a pair of pipes. It may be asked several things at once, from any thread."""

    def __init__(self, prefix: Sequence[str]) -> None:
        self._process = subprocess.Popen([*prefix, sys.executable, "-P", "-m", "fullpipe.cluster.agent"],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.pid = self._process.pid
        self._numbers, self._ended = count(), False
        self._waiting: dict[int, Future[bytes]] = {}
        self._writer = ThreadPoolExecutor(1, "fullpipe-agent")  # what is written to one that hangs may not fit the pipe
        self._reader = threading.Thread(target=self._take_answers, name="fullpipe-agent-answers", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """A process whose pipes are closed has ended, even if the system has not finished with its threads."""
        return not self._ended and self._process.poll() is None

    def begin(self, request: bytes) -> Future[bytes]:
        number, answer = next(self._numbers), Future[bytes]()
        self._waiting[number] = answer
        self._writer.submit(self._write, number, request)
        if self._ended:  # what is written to one that just dies may still find room in the pipe
            self._give_up()
        return answer

    def _write(self, number: int, request: bytes) -> None:
        assert self._process.stdin
        try:
            write(self._process.stdin, number, request)
        except (OSError, ValueError):  # it has ended, or is being closed
            self._ended = True
            self._give_up()

    def _take_answers(self) -> None:
        assert self._process.stdout
        while (taken := read(self._process.stdout)) is not None:
            number, answer = taken
            if waiting := self._waiting.pop(number, None):
                waiting.set_result(answer)
        self._ended = True
        self._give_up()

    def _give_up(self) -> None:
        """Nobody will answer any more what has been asked."""
        for number in list(self._waiting):
            if waiting := self._waiting.pop(number, None):
                waiting.set_exception(ConnectionError("its agent has ended"))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._writer.shutdown(wait=False, cancel_futures=True)
        self._reader.join(_END_S)
        self._give_up()
        if self._reader.is_alive():  # a command that started another process, which has the pipes
            return
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


# ---- by Ray -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _RayHost:
    """Is a host with its node and the handle of its agent."""

    node: Node
    agent: Any


class RayContact(Contact):
    """Reaches the hosts of a Ray cluster, an agent actor on each.

    address: see `Cluster`. wanted: the hosts that take part; None: all nodes of the cluster, by their names. own: what
    is said of the head besides, by the names of a HostEntry.

    Raises what `Cluster` raises, and UsageError for hosts that Ray does not know.
    """

    by_ray = True

    def __init__(self, address: str | None = None, wanted: Sequence[HostEntry] | None = None,
                 own: Mapping[str, Any] | None = None) -> None:
        self._cluster = Cluster(address)
        self._wanted, self._own = wanted, own or {}
        self._hosts: dict[str, _RayHost] = {}
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
        return self._hosts[host].agent.do.remote(request).future()  # type: ignore[no-any-return]

    def launcher(self) -> Launcher:
        return RayLauncher(self._cluster, {name: host.node.id for name, host in self._hosts.items()})

    def refresh(self) -> None:
        with self._changing:
            nodes = self._named(self._cluster.nodes())
            self._hosts = {name: _RayHost(node, self._agent(name, node)) for name, (node, _) in nodes.items()}
            self.entries = {name: entry for name, (_, entry) in nodes.items()}
            self.head = next((name for name, (node, _) in nodes.items() if node.here), self.head)

    def _agent(self, host: str, node: Node) -> Any:
        """The one that there is, if it is of this node; else another one."""
        known = self._hosts.get(host)
        return known.agent if known and known.node.id == node.id else self._cluster.actor(Agent, node.id)

    def cores(self, host: str) -> int | None:
        said = super().cores(host)
        if (known := self._hosts.get(host)) is None:
            return said
        ray = max(1, int(known.node.all.get("CPU", 1)))
        return min(ray, said or ray)

    def memory(self, host: str) -> int:
        return int(known.node.all.get("memory", 0)) if (known := self._hosts.get(host)) else 0

    def life(self, host: str) -> str:
        return known.node.id if (known := self._hosts.get(host)) else ""

    def note_lost(self, host: str, error: Exception) -> None:
        """One that Ray only cannot reach now, it may reach later."""
        super().note_lost(host, error)
        with self._changing:
            known = self._hosts.get(host)
            if known and self._cluster.is_dead(error):
                anew = _RayHost(known.node, self._cluster.actor(Agent, known.node.id))
                self._hosts = {**self._hosts, host: anew}

    def _named(self, nodes: Sequence[Node]) -> dict[str, tuple[Node, HostEntry]]:
        """The hosts that take part, by name."""
        return {entry.name: (node, entry.model_copy(update=self._own) if node.here else entry)
                for node, entry in self._taking_part(nodes)}

    def _taking_part(self, nodes: Sequence[Node]) -> list[tuple[Node, HostEntry]]:
        if self._wanted is not None:
            by_address = {one: node for node in nodes for one in (node.address, node.name)}
            return [(by_address[entry.address], entry) for entry in self._wanted if entry.address in by_address]
        names = [node.name for node in nodes]
        return [(node, HostEntry(name=name, address=node.address)) for node in nodes
                for name in [node.name if names.count(node.name) == 1 else node.address]]

    def close(self) -> None:
        self._cluster.close()
