"""One engine for many callers: requests come in from any thread, the engine runs in one of its own, and stays up.

The engine knows no threads. `Service` owns it: its thread takes what callers have put into the inbox, steps the
engine, and hands each request's news to that request's `deliver`. When a station fails it builds the pipeline anew and
puts every request back in, from its committed tokens: the text goes on as if nothing had happened (DESIGN section 3).
Knows no HTTP.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Literal, Protocol, TypeVar

from fullpipe.engine.loop import Engine, Listener
from fullpipe.engine import Stats
from fullpipe.errors import FullpipeError, Overloaded, StationFailed, Unavailable
from fullpipe.messages import Emitted, Event, Finished
from fullpipe.request import Request, SamplingParams, fitted
from fullpipe.sequences.sequence import Track
from fullpipe.sequences.stats import RequestStats
from fullpipe.text import Detokenizer, Reply

log = logging.getLogger(__name__)

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
    """What a look at the service shows. kv_used: cache slots of requests that run; what is kept to be shared can be had
    at any time. kv_total: all of them (0: unlimited). retry_after_s: seconds after which it may be worth trying again,
    where state is not "ready". last_failure: its reason in one line, "" before the first."""

    state: State
    running: int
    waiting: int
    kv_used: int
    kv_total: int
    restarts: int
    last_failure: str = ""
    retry_after_s: float = 0.0


_IDLE_S = 0.5  # between two looks at stations that have nothing to do
_BUSY_S = 0.1  # of waiting for events before the inbox is looked at again
_CLOSE_S = 15.0  # for the engine's thread to end: a pipeline is closed within about two
_PATIENCE = 5  # failures without a token in between, and then it counts as failed
_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the next try
_STEADY_S = 60.0  # a pipeline that stood so long worked, whether or not anybody asked it for a token
_CHANCES = 3  # a request that ran at so many failures without getting on may be the cause: it goes on alone,
_ALONE = 2  # and after so many more it is. Together no more than _PATIENCE: nobody else is to be ended with it


class Words(Protocol):
    """What a service needs of a tokenizer."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def stream(self) -> Detokenizer: ...


W = TypeVar("W", bound=Words, covariant=True)


@dataclass(frozen=True, slots=True)
class Started(Generic[W]):
    """An engine that was built. words: of the target. vocab: number of real tokens. max_model_len: tokens of prompt and
    answer together."""

    engine: Engine
    words: W
    vocab: int
    max_model_len: int


class Observer:
    """Who watches a service (`metrics.Metrics`, `live.Live`) overrides what it wants to know. Called from the engine's
    thread, but `on_submit` from the caller's."""

    def __call__(self, event: Event) -> None:
        """Every event of the engine."""

    def on_start(self, stats: Stats) -> None:
        """The engine is there, and counts in `stats` for as long as the service lives."""

    def on_submit(self, id: int, prompt_tokens: int, time: float) -> None:
        """A request was taken in. time: seconds of the pipeline's clock."""

    def on_finish(self, id: int, reason: str, prompt_tokens: int, completion_tokens: int, stats: RequestStats,
                  cached_tokens: int) -> None:
        """The last that is told of a request. cached_tokens: of the prompt, taken over and not computed."""

    def on_restart(self, station: str, reason: str) -> None:
        """The pipeline is built anew because of `station`: what was under way is lost, and ids of nodes and flights
        begin again."""

    def on_preempt(self) -> None:
        """A request went back to waiting."""

    def on_engine_time(self, seconds: float) -> None:
        """The service's thread was at work for so long: not waiting for events."""


@dataclass(slots=True)
class _Running:
    """A request between `submit` and its last update. sent: tokens that were delivered. chances, alone: failures that
    are left to it, among others and by itself, if it does not get on; it had `known` tokens at the newest. held: not in
    the engine, for another one is on trial."""

    ticket: Ticket
    request: Request
    reply: Reply
    deliver: Deliver
    track: Track | None = None
    sent: int = 0
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: str | None = None
    known: int = -1
    chances: int = _CHANCES
    alone: int = _ALONE
    held: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.track.tokens) - self.track.num_prompt if self.track else 0

    def unsent(self) -> list[int]:
        return self.track.tokens[self.track.num_prompt + self.sent:] if self.track else []

    @property
    def on_stations(self) -> bool:
        """Whether any station has heard of it. One that waits for admission cannot be why they fail."""
        return not self.held and self.track is not None and (self.track.stages.opened or self.track.draft.opened)


class Service(Generic[W]):
    """start: builds pipeline and engine, with these listeners; called again after every failure. What it raises at the
        first time, the constructor raises.
    max_num_seqs, max_waiting: requests that run, and that wait, beyond which new ones are turned away.
    observers: told of every event, and of what no event tells.

    built: what `start` returned at first; only its engine is another one after a failure. capacity: requests that it
    can have at a time, running and waiting.
    """

    def __init__(self, start: Callable[[Sequence[Listener]], Started[W]], *, max_num_seqs: int = 16,
                 max_waiting: int = 256, observers: Sequence[Observer] = ()) -> None:
        self._start = start
        self.capacity = max_num_seqs + max_waiting
        self._observers = observers
        self._listeners: list[Listener] = [self._hear, *observers]
        self._ids = count()
        self._lock = threading.Lock()  # of what callers change: _running's keys, _state
        self._running: dict[int, _Running] = {}
        self._touched: dict[int, _Running] = {}  # with news
        self._inbox: queue.SimpleQueue[Callable[[Engine | None], None]] = queue.SimpleQueue()
        self._state: State = "starting"
        self._restarts, self._failures, self._preempted = 0, 0, 0
        self._last_failure, self._retry_at = "", 0.0
        self._built_at = math.inf  # of the engine that is there
        self._suspect: _Running | None = None  # runs alone, until it gets on or is the cause
        self._counts = (0, 0, 0)  # running, waiting, slots
        self._stopping = threading.Event()
        self.built = start(self._listeners)
        self._engine: Engine | None = self.built.engine
        self._built_at = time.monotonic()
        self._state = "ready"
        self._thread = threading.Thread(target=self._run, name="fullpipe-engine", daemon=True)
        self._thread.start()

    # ---- any thread --------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: SamplingParams, deliver: Deliver, *, priority: int = 0,
               timeout_s: float | None = None) -> Ticket:
        """Take a request in; from any thread. timeout_s: seconds until its deadline.

        Raises PromptError for a prompt that is empty, too long for the context, or larger than all of the cache
        memory; UsageError for parameters that do not fit the model; Overloaded when the queue is full; Unavailable
        while the service is failed, draining or stopped (both with `retry_after_s`).
        """
        params = fitted(prompt, params, vocab=self.built.vocab, max_model_len=self.built.max_model_len)
        now = time.monotonic()
        eos = frozenset() if params.ignore_eos else self.built.words.eos_ids
        request = Request(next(self._ids), tuple(prompt), params, eos, priority,
                          math.inf if timeout_s is None else now + timeout_s)
        if (engine := self._engine) is not None:
            engine.check_fits(request)
        ticket = Ticket(request.id, len(prompt), RequestStats(started=now))
        one = _Running(ticket, request, Reply(self.built.words.stream(), params.stop), deliver)
        with self._lock:
            self._check_open()
            for observer in self._observers:
                observer.on_submit(request.id, len(prompt), now)
            self._running[request.id] = one
        self._inbox.put(lambda engine: self._enter(engine, one))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more; from any thread. Its rows are free within one step of the engine."""
        self._inbox.put(lambda engine: self._abort(engine, ticket.id))

    def status(self) -> Status:
        running, waiting, used = self._counts
        state = self._state
        wait = max(1.0, self._retry_at - time.monotonic()) if state != "ready" else 0.0
        return Status(state, running, max(waiting, len(self._running) - running), used, self._total(),
                      self._restarts, self._last_failure, wait)

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and wait until all is answered; False when time ran out."""
        with self._lock:
            if self._state != "stopped":
                self._state = "draining"
        end = math.inf if timeout is None else time.monotonic() + timeout
        while self._running and self._thread.is_alive():
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return not self._running

    def close(self, timeout: float = _CLOSE_S) -> None:
        """End everything now; requests that run get the reason "abort". timeout: seconds that the engine's thread may
        take. One that builds a pipeline cannot be stopped: it is left behind, and gives up what it has built."""
        with self._lock:
            self._state = "stopped"
        self._stopping.set()
        self._inbox.put(lambda engine: None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("the engine has not ended within %g s and is left behind; it may be building a pipeline",
                        timeout)
            self._end_all("abort")

    def _total(self) -> int:
        return self.built.engine.ledger.total or 0

    def _check_open(self) -> None:
        if self._state in ("failed", "draining", "stopped"):
            why = f" ({self._last_failure})" if self._state == "failed" else ""
            raise Unavailable(f"the server is {self._state}{why}", retry_after_s=self.status().retry_after_s,
                              hint="Try again later.")
        if len(self._running) >= self.capacity:
            raise Overloaded(f"{len(self._running)} requests are here already", retry_after_s=1.0,
                             hint="Try again in a moment, or start the server with a longer queue.")

    # ---- the engine's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            engine = self._engine or self._rebuild()
            if engine is None:
                continue
            self._engine = engine
            try:
                self._serve(engine)
            except FullpipeError as error:
                self._note_failure(error, ran=True)
            except Exception as error:  # a bug of ours must not leave callers waiting for ever
                log.exception("the engine failed")
                self._note_failure(error, ran=True)
            self._engine = None
            engine.pipeline.close()
        if self._engine is not None:
            self._engine.pipeline.close()
        self._take_inbox(None)
        self._end_all("abort")

    def _serve(self, engine: Engine) -> None:
        while not self._stopping.is_set():
            self._take_inbox(engine, wait=0.0 if engine.busy else _IDLE_S)
            began = time.thread_time()
            engine.step(_BUSY_S if engine.busy else 0.0)
            self._tell_news(engine)
            self._acquit(engine)
            self._note_engine(engine, time.thread_time() - began)

    def _take_inbox(self, engine: Engine | None, wait: float = 0.0) -> None:
        try:
            self._inbox.get(timeout=wait)(engine) if wait else self._inbox.get_nowait()(engine)
            while True:
                self._inbox.get_nowait()(engine)
        except queue.Empty:
            pass

    def _enter(self, engine: Engine | None, one: _Running) -> None:
        if engine is None or one.track is not None or one.request.id not in self._running:
            return  # it enters with the next engine, has entered with it already, or has been cancelled
        one.held = self._suspect not in (None, one)
        if one.held:
            return
        try:
            one.track = engine.submit(one.request, one.reply.judge, one.ticket.stats)
        except FullpipeError as error:
            self._end(one, "error", error.message)

    def _abort(self, engine: Engine | None, id: int) -> None:
        if engine is not None:
            engine.abort(id)
        if (one := self._running.get(id)) and (engine is None or one.held or one.track is None):
            self._end(one, "abort")

    def _hear(self, event: Event) -> None:
        """The engine's events as they happen: a step that fails has told those before the failure."""
        if isinstance(event, Emitted):
            self._failures = 0
            if one := self._running.get(event.request):
                self._touched[event.request] = one
                if one.request.params.logprobs is not None:
                    one.logprobs.append(event.logprobs)
        elif isinstance(event, Finished) and (one := self._running.get(event.request)):
            self._touched[event.request] = one
            one.reason = event.reason

    def _tell_news(self, engine: Engine | None) -> None:
        touched, self._touched = self._touched, {}
        for one in touched.values():
            if one.track is not None:
                one.ticket.cached_tokens = one.track.cached
            if one.reason is not None:
                self._end(one, one.reason)
            else:
                one.deliver(self._update(one))

    def _update(self, one: _Running) -> Update:
        tokens = one.unsent()
        one.sent += len(tokens)
        logprobs, one.logprobs = one.logprobs, []
        return Update(one.reply.fresh(), tokens, logprobs)

    def _end(self, one: _Running, reason: str, error: str | None = None) -> None:
        with self._lock:
            if self._running.pop(one.request.id, None) is None:
                return
        one.reply.finish()
        update = self._update(one)
        update.reason, update.error = reason, error
        for observer in self._observers:
            observer.on_finish(one.request.id, reason, one.ticket.num_prompt, one.sent, one.ticket.stats,
                               one.ticket.cached_tokens)
        one.deliver(update)

    def _end_all(self, reason: str, error: str | None = None) -> None:
        for one in list(self._running.values()):
            self._end(one, reason, error)

    def _note_engine(self, engine: Engine, seconds: float) -> None:
        kept = sum(one.capacity for one in engine.ledger.kept)
        self._counts = (engine.num_running, engine.num_waiting, engine.ledger.used - kept)
        preempted, self._preempted = engine.num_preemptions - self._preempted, engine.num_preemptions
        for observer in self._observers:
            observer.on_engine_time(seconds)
            for _ in range(preempted):
                observer.on_preempt()

    # ---- failures ----------------------------------------------------------------------------------------

    def _note_failure(self, error: Exception, *, ran: bool) -> None:
        """What was emitted before is delivered; who is likely to be the cause is ended; the rest waits. ran: there was
        an engine, and it broke; else none could be built, which is no request's fault."""
        station = error.station if isinstance(error, StationFailed) else "engine"
        whole = error.message if isinstance(error, FullpipeError) else f"{type(error).__name__}: {error}"
        log.error("%s\nthe pipeline is built anew", whole)
        reason = _in_short(whole)
        if ran and time.monotonic() - self._built_at > _STEADY_S:
            self._failures = 0
        self._failures += 1
        self._restarts += 1
        self._last_failure = reason
        self._tell_news(None)
        self._counts, self._preempted = (0, len(self._running), 0), 0
        for observer in self._observers:
            observer.on_restart(station, reason)
        for one in list(self._running.values()):
            if not (ran and one.on_stations):
                continue
            self._charge(one, reason)
        with self._lock:
            if self._state in ("ready", "rebuilding"):
                self._state = "failed" if self._failures >= _PATIENCE else "rebuilding"
        if self._state == "failed":
            self._end_all("error", reason)

    def _charge(self, one: _Running, reason: str) -> None:
        """It ran when the pipeline failed. Bad luck may strike a request thrice, but hardly while it runs alone too,
        which is only until its next token. So nobody is ended for what others did."""
        got_on, one.known = one.num_tokens > one.known, one.num_tokens
        if got_on:
            one.chances, one.alone = _CHANCES - 1, _ALONE  # this one counts
        elif one is self._suspect:
            one.alone -= 1
        else:
            one.chances -= 1
        if one.alone <= 0:
            self._failures = 0  # the cause is found
            self._end(one, "error", f"the pipeline failed {_CHANCES + _ALONE} times while this request ran, at last "
                                    f"alone: {reason}")

    def _put_in(self, engine: Engine, one: _Running) -> None:
        """A request into an engine that does not know it, or behind the one that is on trial."""
        one.held = self._suspect not in (None, one)
        if one.held:
            return
        if one.track is None:
            self._enter(engine, one)
        elif one.track.finished is not None:  # in the step that failed, before that was told
            self._end(one, one.track.finished)
        else:
            engine.adopt(one.track)

    def _acquit(self, engine: Engine) -> None:
        """Once the suspect has got on, or is gone, the others may run again."""
        one = self._suspect
        if one is None or (one.request.id in self._running and one.num_tokens <= one.known):
            return
        self._suspect, one.chances, one.alone = None, _CHANCES, _ALONE
        for other in self._in_order():
            if other.held:
                self._put_in(engine, other)

    def _in_order(self) -> list[_Running]:
        return sorted(self._running.values(), key=lambda one: one.request.id)

    def _rebuild(self) -> Engine | None:
        """A new engine with every request in it; None when that did not work, or when there was no time for it."""
        pause = _PAUSES_S[min(self._failures, len(_PAUSES_S)) - 1] if self._failures else 0.0
        self._retry_at = time.monotonic() + pause
        if self._stopping.wait(pause):
            return None
        try:
            engine = self._start(self._listeners).engine
        except Exception as error:
            self._note_failure(error, ran=False)
            return None
        everyone = self._in_order()
        self._suspect = next((one for one in everyone if one.chances <= 0), None)
        for one in everyone:
            self._put_in(engine, one)
        self._built_at = time.monotonic()
        with self._lock:
            if self._state in ("rebuilding", "failed"):
                self._state = "ready"
        return engine


def _in_short(reason: str) -> str:
    """The line of a failure's reason that callers may see. What follows it is a worker's own log."""
    return reason.partition("\n")[0].removesuffix("; it printed:")
