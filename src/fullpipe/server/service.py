"""One engine for many callers: requests come in from any thread, the engine runs in one of its own, and stays up.

The engine knows no threads. `Service` owns it: its thread takes what callers have put into the inbox, steps the
engine, and hands each request's news to that request's `deliver`. When a station fails it builds the pipeline anew and
puts every request back in, from its committed tokens: the text goes on as if nothing had happened (DESIGN section 3).
Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fullpipe.request import SamplingParams
from fullpipe.stats import RequestStats

State = Literal["starting", "ready", "rebuilding", "failed", "draining", "stopped"]


@dataclass(slots=True)
class Update:
    """News of one request, in order.

    text: what became certain since the last update. token_ids: what was emitted since then. logprobs: parallel to
    token_ids where the request asks for them, else empty (`Emitted.logprobs`). reason: set on the last update only:
    "stop", "length", "abort", "deadline" or "error". error: what happened, with the reason "error".
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None


Deliver = Callable[[Update], None]
"""Called from the engine's thread; must not block."""


@dataclass(slots=True)
class Ticket:
    """A request that was taken in. stats: grow while it runs. cached_tokens: of the prompt, taken over from others."""

    id: int
    num_prompt: int
    stats: RequestStats
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """What a look at the service shows. kv_used, kv_total: cache slots (0: unlimited). retry_after_s: seconds after which
    it may be worth trying again, where state is not "ready". last_failure: station and reason, "" before the first."""

    state: State
    running: int
    waiting: int
    kv_used: int
    kv_total: int
    restarts: int
    last_failure: str = ""
    retry_after_s: float = 0.0


class Service:
    def submit(self, prompt: Sequence[int], params: SamplingParams, deliver: Deliver, *, priority: int = 0,
               timeout_s: float | None = None) -> Ticket:
        """Take a request in; from any thread. timeout_s: seconds until its deadline.

        Raises PromptError for a prompt that is empty, too long for the context, or larger than all of the cache
        memory; UsageError for parameters that do not fit the model; Overloaded when the queue is full; Unavailable
        while the service is failed, draining or stopped (both with `retry_after_s`).
        """
        raise NotImplementedError

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more; from any thread. Its rows are free within one step of the engine."""
        raise NotImplementedError

    def status(self) -> Status:
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and wait until all is answered; False when time ran out."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything now; requests that run get the reason "abort"."""
        raise NotImplementedError
