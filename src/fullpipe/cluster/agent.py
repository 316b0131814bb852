"""An agent runs on each host for the head: it looks at the host, measures it, and answers who measures links to it.

    python -m fullpipe.cluster.agent          takes requests from standard input, and ends with it

Requests and answers are msgpack structs. An agent keeps nothing but what is kept on the host's disk. It may be asked
several things at once: whoever only asks whether it is there waits for no measurement.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec
from msgspec import Struct

from fullpipe.cluster.links import Pair
from fullpipe.cluster.profile import Profile
from fullpipe.cluster.reach import Echo, measure
from fullpipe.cluster.report import HostReport, Look
from fullpipe.errors import FullpipeError, PipelineError, by_name
from fullpipe.models.partial import Chunk, Manifest
from fullpipe.models.ranges import Range
from fullpipe.pipeline.keys import RunKeys

SAME_EVERYWHERE = "Its Fullpipe seems to be another one: install the same commit on all hosts."
"""The way out where hosts do not understand each other."""

_NUMBER_AND_SIZE = struct.Struct("<QQ")
_MOST_ECHOES = 4
_AT_ONCE = 8
_STRANGERS = ("ValidationError", "DecodeError", "ImportError", "ModuleNotFoundError")  # of an agent with other words


class Ping(Struct, tag=True):
    """Asks whether anybody is there."""


class DoLook(Struct, tag=True):
    """Asks what the host is and has."""

    asked: Look


class Listen(Struct, tag=True):
    """Has the agent listen for those who measure the way to it, until `Deafen` with these keys."""

    address: str
    port: int
    keys: RunKeys


class Deafen(Struct, tag=True):
    """Ends that. public: the key that came with `Listen`."""

    public: bytes


class Reach(Struct, tag=True):
    """Asks for the way from here to another host's agent, which listens. quick: whether there is one, and no more."""

    name: str
    address: str
    port: int
    keys: RunKeys
    timeout_s: float
    quick: bool


class Opening(Struct):
    """Is what `open_model` reads of a model that the host does not have."""

    manifest: Manifest
    parts: list[tuple[Range, bytes, bytes]]


class Measure(Struct, tag=True, kw_only=True):
    """Asks for what stations cost on the host.

    models: target, and draft model if there is one: where each lies on the host, or its opening.
    """

    models: list[str | Opening]
    threads: int
    dtype: str
    quantization: str | None
    device: str


Request = Ping | DoLook | Listen | Deafen | Reach | Measure


class Failed(Struct):
    """Is an answer where something went wrong. kind: of the error."""

    kind: str
    message: str
    hint: str | None


class Answer(Struct):
    """Is what an agent answers: one of these is set."""

    failed: Failed | None = None
    report: HostReport | None = None
    port: int | None = None
    pair: Pair | None = None
    profile: str | None = None
    processor: str | None = None


class Agent:
    """Does on its host what the head asks for."""

    def __init__(self) -> None:
        self._echoes: dict[bytes, Echo] = {}  # by public key: somebody may look at the hosts while another one does
        self._listening = threading.Lock()
        self._measuring = threading.Lock()  # two measurements would disturb each other

    def do(self, request: bytes) -> bytes:
        """The answer to a request; both are msgpack. Never raises."""
        try:
            answer = self._done(msgspec.msgpack.decode(request, type=Request))
        except Exception as error:
            message = error.message if isinstance(error, FullpipeError) else str(error)
            answer = Answer(Failed(type(error).__name__, message, getattr(error, "hint", None)))
        return msgspec.msgpack.encode(answer)

    def _done(self, request: Request) -> Answer:
        match request:
            case Ping():
                return Answer()
            case DoLook(asked):
                from fullpipe.cluster.look import look

                return Answer(report=look(asked), processor=_processor())
            case Listen(address, port, keys):
                return Answer(port=self._listen(address, port, keys))
            case Deafen(public):
                self._deafen(public)
                return Answer()
            case Reach(name, address, port, keys, timeout_s, quick):
                return Answer(pair=measure(address, port, keys, name=name, timeout_s=timeout_s, quick=quick))
            case Measure():
                with self._measuring:
                    return Answer(profile=_measured(request).model_dump_json())

    def _listen(self, address: str, port: int, keys: RunKeys) -> int:
        with self._listening:
            while len(self._echoes) >= _MOST_ECHOES:  # those of a head that is gone
                self._echoes.pop(next(iter(self._echoes))).close()
            echo = self._echoes[keys.public] = Echo(address, port, keys)
            return echo.port

    def _deafen(self, public: bytes) -> None:
        with self._listening:
            if echo := self._echoes.pop(public, None):
                echo.close()


def _measured(asked: Measure) -> Profile:
    from fullpipe.cluster.quick import quick_profile

    paths = [one if isinstance(one, str) else _opened(one) for one in asked.models]
    return quick_profile(paths[0], paths[1] if len(paths) > 1 else None, asked.threads, dtype=asked.dtype,
                         quantization=asked.quantization, device=asked.device)


def _opened(opening: Opening) -> str:
    """Where the model lies here, of which only the opening must be."""
    from fullpipe.hub.cache import from_head_folder
    from fullpipe.models.copies import Copy

    with Copy(from_head_folder(opening.manifest.digest), opening.manifest) as copy:
        for place, data, checksum in opening.parts:
            copy.write(Chunk(place, data, checksum))
        return str(copy.path)


def _processor() -> str:
    """The same for two hosts that share cores, as containers and network namespaces of one machine may."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {sorted(os.sched_getaffinity(0))}"


def told(answer: bytes, host: str) -> Answer:
    """An agent's answer. Raises what went wrong on the host, by type where it is one of ours, with the host's name."""
    found = msgspec.msgpack.decode(answer, type=Answer)
    if (failed := found.failed) is None:
        return found
    if ours := by_name(failed.kind, f"{host}: {failed.message}", failed.hint):
        raise ours
    if failed.kind in _STRANGERS:
        raise PipelineError(f"{host} does not understand this host: {failed.message}", hint=SAME_EVERYWHERE)
    raise PipelineError(f"{host}: {failed.kind}: {failed.message}", hint=failed.hint)


# ---- over pipes -------------------------------------------------------------------------------------------------


def write(file: IO[bytes], number: int, message: bytes) -> None:
    """number: of the request, which its answer has too. Only one thread may write at a time."""
    file.write(_NUMBER_AND_SIZE.pack(number, len(message)) + message)
    file.flush()


def read(file: IO[bytes]) -> tuple[int, bytes] | None:
    """The next message and its number; None at the end."""
    head = file.read(_NUMBER_AND_SIZE.size)
    if len(head) < _NUMBER_AND_SIZE.size:
        return None
    number, size = _NUMBER_AND_SIZE.unpack(head)
    body = file.read(size)
    return (number, body) if len(body) == size else None


def main() -> None:
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints here must not stand among the answers
    agent, writing, doing = Agent(), threading.Lock(), ThreadPoolExecutor(_AT_ONCE, "fullpipe-agent")

    def do(number: int, request: bytes) -> None:
        answer = agent.do(request)
        with writing:
            write(answers, number, answer)

    while (next_ := read(asked)) is not None:
        doing.submit(do, *next_)
    os._exit(0)  # nobody waits any more for what is being done


if __name__ == "__main__":
    main()
