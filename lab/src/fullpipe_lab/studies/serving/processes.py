"""A real server under trial: which of its processes is which, what they hold, and requests whose every end is told.

No torch. What is asked is an `Ask`, what came of it a `Reply`; nothing is raised over what a server does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from fullpipe.server.openai_stream import events
from fullpipe_lab.studies.serving.servers import Contender, Setup, read_counters

_WORKER = "fullpipe.pipeline.worker"
_DETAIL = 300  # characters of what a server says about an error
RESTARTS = "fullpipe_restarts_total"


def server_of(draft: str, stages: int, options: Iterable[str] = ()) -> Contender:
    """`fullpipe serve` with stage processes; its log has warnings and worse."""
    own = ("--draft", draft, "--stages", str(stages), "--log-level", "warning")
    return Contender("trial", "Fullpipe", (*own, *options))


def setup_of(model: str, max_len: int, max_seqs: int) -> Setup:
    """In fp32: there a text must be the same to the letter, whoever else is served and whatever fails."""
    return Setup(Path(model), "", "float32", max_len, max_seqs)


# ---- processes -------------------------------------------------------------------------------------------


def station_names(num_stages: int) -> list[str]:
    """In the order in which their processes are started."""
    return [*(f"stage {index}" for index in range(num_stages)), "draft"]


def workers(server: int, num_stages: int) -> dict[str, psutil.Process]:
    """The server's station processes that live, by name; while it starts them, those that are there.

    Nothing about a worker says what it is: its name comes over its control connection. But they are started one after
    the other, stage 0 first. Whoever relies on this compares with the name that the server tells.
    """
    found: list[tuple[float, int, psutil.Process]] = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(server).children():
            with suppress(psutil.NoSuchProcess):  # a dead one has no command line
                if _WORKER in process.cmdline():
                    found.append((process.create_time(), process.pid, process))
    return {name: process for name, (_, _, process) in zip(station_names(num_stages), sorted(found))}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process. rss, pss: bytes; pss counts pages that several share in parts."""

    rss: int
    pss: int
    fds: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> Footprint:
        """Raises psutil.Error where it has ended."""
        with process.oneshot():
            memory = process.memory_full_info()
            return cls(memory.rss, memory.pss, process.num_fds(), process.num_threads())


# ---- requests --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to the API. chat: else a completion."""

    name: str
    chat: bool
    body: dict[str, Any]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(slots=True)
class Reply:
    """What came of an ask. texts, reasons, spelled (the tokens that log-probabilities name): by index of the choice.

    tokens: of all choices, as `usage` counts them. error: "" for a whole answer. retry_after: the header. begun: when
    the first text came, seconds of `time.monotonic`.
    """

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    spelled: dict[int, list[str]] = field(default_factory=dict)
    tokens: int | None = None
    error: str = ""
    retry_after: str | None = None
    begun: float | None = None

    def fail(self, what: object) -> None:
        """The first failure counts."""
        self.error = self.error or str(what)[:_DETAIL] or type(what).__name__

    @property
    def turned_away(self) -> bool:
        """Refused at the door, and told when to come back."""
        return self.status == 503 and self.retry_after is not None

    def differs(self, other: Reply) -> str:
        """In what it is not the other's equal; "" if it is."""
        for name in ("texts", "reasons", "tokens", "spelled"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r}, not {theirs!r}"
        return ""


async def ask(client: httpx.AsyncClient, url: str, what: Ask, limit_s: float,
              on_text: Callable[[float], None] = lambda now: None) -> Reply:
    """Send it and read the answer to its end. on_text: told when text came."""
    reply = Reply()
    try:
        async with asyncio.timeout(limit_s), client.stream("POST", url + what.path, json=what.body) as response:
            reply.status, reply.retry_after = response.status_code, response.headers.get("retry-after")
            if response.status_code != 200:
                reply.fail(f"status {response.status_code}: {(await response.aread()).decode(errors='replace')}")
            elif what.streamed:
                await _read_stream(response, reply, on_text)
            else:
                _take(reply, json.loads(await response.aread()), on_text)
    except TimeoutError:
        reply.fail(f"no end after {limit_s:g} s")
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        reply.fail(f"{type(error).__name__}: {error}")
    if not reply.error and (reply.tokens is None or len(reply.reasons) != (what.body.get("n") or 1)):
        reply.fail("the answer has no end, or no usage")
    return reply


async def _read_stream(response: httpx.Response, reply: Reply, on_text: Callable[[float], None]) -> None:
    done = False
    async for data in events(response.aiter_bytes()):
        if data == b"[DONE]":
            done = True
        else:
            _take(reply, json.loads(data), on_text)
    if not done:
        reply.fail("the stream ended without [DONE]")


def _take(reply: Reply, value: dict[str, Any], on_text: Callable[[float], None]) -> None:
    """A chunk of a stream, or a whole answer."""
    if (error := value.get("error")) is not None:
        reply.fail(f"error event: {error}")
    for choice in value.get("choices") or ():
        index = choice["index"]
        piece = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        if piece:
            now = time.monotonic()
            reply.begun = reply.begun or now
            on_text(now)
        reply.texts[index] = reply.texts.get(index, "") + piece
        if said := choice.get("logprobs"):
            tokens = said["tokens"] if "tokens" in said else [token["token"] for token in said["content"]]
            reply.spelled.setdefault(index, []).extend(tokens)
        if choice.get("finish_reason"):
            reply.reasons[index] = choice["finish_reason"]
    if usage := value.get("usage"):
        reply.tokens = int(usage["completion_tokens"])


# ---- what the server says of itself ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Readiness:
    """/ready: its status, and the state and number of restarts that it names."""

    status: int
    state: str
    running: int
    waiting: int
    restarts: int
    last_failure: str


async def readiness(client: httpx.AsyncClient, url: str) -> Readiness:
    """Raises httpx.HTTPError where nobody answers."""
    response = await client.get(url + "/ready")
    said = response.json()
    return Readiness(response.status_code, **{name: said[name] for name in (
        "state", "running", "waiting", "restarts", "last_failure")})


async def restarts_by_station(client: httpx.AsyncClient, url: str) -> dict[str, int]:
    """As /metrics counts them."""
    counters = read_counters((await client.get(url + "/metrics")).raise_for_status().text)
    prefix = RESTARTS + "{station="
    return {key.removeprefix(prefix).removesuffix("}"): int(value)
            for key, value in counters.items() if key.startswith(prefix)}


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that all trials of a server take."""
    parser.add_argument("--model", default="smollm2-135m", help="catalogue name, GGUF file, or transformers folder")
    parser.add_argument("--draft", default="ngram", help="as `fullpipe serve` takes it")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON receipt")
    parser.add_argument("--log", type=Path, help="where the server's log goes")
