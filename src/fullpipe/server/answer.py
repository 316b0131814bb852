"""The choices of one HTTP request come from the engine's thread into the event loop here."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from starlette.types import Receive

from fullpipe.messages import Scored
from fullpipe.request import SamplingParams
from fullpipe.service import Service, Ticket, Update

T = TypeVar("T")


class ClientGone(Exception):
    """The connection was closed; nobody reads what would be answered."""


@dataclass(slots=True)
class Choice:
    """Stands for one text that was asked for.

    prompt: which of the request's prompts it answers; tokens: of that. num_tokens: how many came so far;
    reasoning_tokens: those of them that are thoughts. reason: why it ended; None while it runs. error, failure: those
    of its `Update`. silent: nothing is to be said behind the prompt; a token is made all the same, and dropped."""

    index: int
    prompt: int
    ticket: Ticket
    num_tokens: int = 0
    reasoning_tokens: int = 0
    reason: str | None = None
    error: str = ""
    failure: BaseException | None = None
    tokens: Sequence[int] = ()
    silent: bool = False


@dataclass(slots=True)
class News:
    """Tells what is new of one choice: several updates are one if the reader was slower than the engine.

    scores: of the prompt, where they are asked for, with the first tokens."""

    choice: Choice
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    scores: list[Scored | None] = field(default_factory=list)

    def add(self, update: Update) -> None:
        self.scores += update.prompt_logprobs
        if not self.choice.silent:
            self.text += update.text
            self.token_ids += update.token_ids
            self.logprobs += update.logprobs
            self.offsets += update.offsets
            self.choice.num_tokens += len(update.token_ids)
        if update.reason is not None:
            full = self.choice.silent and update.reason == "stop"
            self.choice.reason, self.choice.error = "length" if full else update.reason, update.error or ""
            self.choice.failure = update.failure


class Mailbox(Generic[T]):
    """Anyone may put, one task of the loop takes. Many puts wake the loop once, for waking it is what costs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._bell = asyncio.Event()
        self._rung = False

    def put(self, item: T) -> None:
        """From any thread; never blocks."""
        self._items.append(item)
        self.ring()

    def ring(self) -> None:
        """Wake the taker; from any thread. Without effect once the loop has ended: nobody takes then."""
        # `_rung` falls before the bell sounds, and the taker looks after it: what was put meanwhile is seen.
        if not self._rung:
            self._rung = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._sound)

    async def take(self) -> list[T]:
        """All there is; waits until there is something, or somebody rings."""
        await self._bell.wait()
        self._bell.clear()
        taken = []
        while self._items:
            taken.append(self._items.popleft())
        return taken

    def _sound(self) -> None:
        self._rung = False
        self._bell.set()


class Answer:
    """Watches the connection from its making on; `close` it. The moment that the caller goes, all that runs for him is
    cancelled.

    receive: of the ASGI request, whose body has been read.
    """

    def __init__(self, service: Service[Any], receive: Receive) -> None:
        self.choices: list[Choice] = []
        self._service = service
        self._mail: Mailbox[tuple[int, Update]] = Mailbox()
        self._gone = False
        self._watch = asyncio.create_task(self._watch_connection(receive))

    def submit(self, prompt: int, tokens: Sequence[int], params: SamplingParams, *, priority: int,
               timeout_s: float | None, silent: bool = False) -> None:
        """Ask for one more choice. silent: see `Choice`. Raises what `Service.submit` raises, and `ClientGone`."""
        if self._gone:
            raise ClientGone
        index = len(self.choices)
        deliver = partial(self._deliver, index)
        ticket = self._service.submit(tokens, params, deliver, priority=priority, timeout_s=timeout_s)
        self.choices.append(Choice(index, prompt, ticket, tokens=tokens, silent=silent))

    @property
    def done(self) -> bool:
        return all(choice.reason is not None for choice in self.choices)

    async def news(self) -> list[News]:
        """What is new, at most one entry for each choice, in order of index. Raises `ClientGone`."""
        batch: dict[int, News] = {}
        while not batch:
            mail = await self._mail.take()
            if self._gone:
                raise ClientGone
            for index, update in mail:
                batch.setdefault(index, News(self.choices[index])).add(update)
        return [batch[index] for index in sorted(batch)]

    def close(self) -> None:
        """Cancel what still runs and stop watching."""
        self._watch.cancel()
        self._cancel()

    def _deliver(self, index: int, update: Update) -> None:
        self._mail.put((index, update))

    def _cancel(self) -> None:
        for choice in self.choices:
            if choice.reason is None:
                choice.reason = "abort"
                self._service.cancel(choice.ticket)

    async def _watch_connection(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel()
        self._mail.ring()
