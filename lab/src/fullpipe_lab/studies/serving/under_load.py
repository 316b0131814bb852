"""Clients keep a server under load while something is done to it, and compare every answer with the undisturbed one.

What is asked is fixed: greedy and sampled, streamed and not, of several lengths, some that begin alike. What a server
answers before anything is done to it is what it must say ever after.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import httpx

from fullpipe.errors import FullpipeError
from fullpipe.prompts import bundled
from fullpipe_lab.studies.serving.processes import Ask, Reply, ask
from fullpipe_lab.studies.serving.servers import MODEL_NAME

_LIMIT_S = 300.0  # for one answer, rebuilding included
COMMON = ("You are a careful assistant. Answer in complete sentences, name your sources where you have any, and say "
          "so when you do not know. Keep to the question that was asked, and be brief. ")


# ---- what is asked ---------------------------------------------------------------------------------------

_STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
_GREEDY: dict[str, Any] = {"temperature": 0}
# Fields beside model, prompt and seed; "chat" and "common" are ours. Cycled over the prompts.
_KINDS: tuple[dict[str, Any], ...] = (
    {"chat": True, "max_tokens": 96, **_GREEDY, **_STREAM},
    {"chat": True, "max_tokens": 160, "temperature": 1.0, "common": True, **_STREAM},
    {"chat": False, "max_tokens": 24, **_GREEDY},
    {"chat": True, "max_tokens": 64, "temperature": 0.8, "top_p": 0.9, **_STREAM},
    {"chat": True, "max_tokens": 48, "common": True, **_GREEDY},
    {"chat": False, "max_tokens": 72, "temperature": 0.7, "n": 2, **_STREAM},
    {"chat": True, "max_tokens": 128, "repetition_penalty": 1.2, **_GREEDY, **_STREAM},
    {"chat": True, "max_tokens": 40, "temperature": 1.3, "top_k": 40, "common": True, "logprobs": True,
     "top_logprobs": 2, **_STREAM},
    {"chat": False, "max_tokens": 80, "temperature": 1.0, "stop": ["\n\n", "."], **_STREAM},
    {"chat": True, "max_tokens": 8, **_GREEDY, **_STREAM},
)


def asks(number: int) -> list[Ask]:
    """The first so many requests; the same at any time."""
    made = []
    for place, (prompt, kind) in enumerate(zip(islice(cycle(bundled()), number), cycle(_KINDS))):
        body = {"model": MODEL_NAME, "seed": 1000 + place,
                **{key: value for key, value in kind.items() if key not in ("chat", "common")}}
        text = (COMMON if kind.get("common") else "") + prompt.text
        body |= {"messages": [{"role": "user", "content": text}]} if kind["chat"] else {"prompt": text}
        made.append(Ask(f"{place}/{prompt.id}", kind["chat"], body))
    return made


# ---- the load ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sample:
    """A request under load. Seconds since the load began. strikes: while it was under way; retries: of refusals."""

    ask: str
    sent_s: float
    end_s: float
    strikes: int
    retries: int
    tokens: int | None
    fault: str


@dataclass(slots=True)
class Pending:
    """A request that is under way at a client."""

    sent: float
    begun: bool = False


@dataclass
class Load:
    """What clients ask and are answered. expected: of each ask, what it must answer. texts_at, struck_at: when text
    came, and when something was done, seconds of `time.monotonic`. gate: where it is shut, clients ask nothing more."""

    client: httpx.AsyncClient
    url: str
    expected: dict[str, Reply] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    pending: dict[int, Pending] = field(default_factory=dict)
    texts_at: list[float] = field(default_factory=list)
    struck_at: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def now(self) -> float:
        return time.monotonic() - self.started

    def fault(self, what: str) -> None:
        """Something is not as it must be."""
        self.faults.append(what)
        say(f"    FAULT {what[:500]}")


# ---- the clients -----------------------------------------------------------------------------------------


async def keep_asking(load: Load, own: int, what: Iterable[Ask], enough: asyncio.Event) -> None:
    """One request after another until it is enough; the last one is waited for."""
    for one in what:
        await load.gate.wait()
        if enough.is_set():
            return
        await _one(load, own, one)


async def _one(load: Load, own: int, what: Ask) -> None:
    here = load.pending[own] = Pending(time.monotonic())
    retries = 0

    def on_text(now: float) -> None:
        here.begun = True
        load.texts_at.append(now)

    while True:
        reply = await ask(load.client, load.url, what, _LIMIT_S, on_text)
        if not reply.turned_away or retries >= 20:
            break
        retries += 1
        await asyncio.sleep(min(float(reply.retry_after or 1), 5.0))
    del load.pending[own]
    fault = reply.error or reply.differs(load.expected[what.name])
    end = time.monotonic()
    load.samples.append(Sample(what.name, here.sent - load.started, end - load.started,
                                sum(here.sent < at < end for at in load.struck_at), retries, reply.tokens, fault))
    if fault:
        load.fault(f"request {what.name}: {fault}")


async def undisturbed(load: Load, what: Sequence[Ask], clients: int) -> None:
    """Every ask once, with as many under way as later. Raises FullpipeError where one fails with nothing done to it."""
    left = iter(what)

    async def worker() -> None:
        for one in left:
            reply = await ask(load.client, load.url, one, _LIMIT_S)
            if reply.error:
                raise FullpipeError(f"{one.name} fails on a server to which nothing was done: {reply.error}")
            load.expected[one.name] = reply

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(worker())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
