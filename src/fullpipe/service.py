"""A service is one engine for many callers, in a thread of its own, that stays up when its pipeline fails.

The engine knows no threads. The service's thread takes what callers have put into the inbox, steps the engine, and
hands each request's news to that request's `deliver`. Text is made here, so stop strings are found here. When a station
fails, the service starts another pipeline and attaches the engine to it: the texts go on as if nothing had happened
(DESIGN section 3). `LLM` and the server are its clients. It knows no HTTP.
"""

from __future__ import annotations

import logging
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

from fullpipe.engine import Engine, Listener, RequestStats
from fullpipe.errors import Overloaded, PipelineError, StructureError, UsageError
from fullpipe.events import Emitted, Finished, PromptScored
from fullpipe.messages import Event, Scored
from fullpipe.methods import Method
from fullpipe.models.tokens.checking import check_structure
from fullpipe.options import EngineOptions
from fullpipe.pipeline.base import Pipeline, Remade
from fullpipe.pipeline.guarded import guarded
from fullpipe.request import Request, SamplingParams, fitted
from fullpipe.sequences.calibration import Calibration
from fullpipe.sequences.sequence import Sequence as Running
from fullpipe.supervision import Observer, Recovery, Status, what_failed
from fullpipe.text import Detokenizer, Reply

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Update:
    """News of one request, in order.

    text: what became certain since the last update. token_ids: what was emitted since then. logprobs: parallel to
    token_ids where they are asked for, else empty, and so are offsets: characters of the text that were certain before
    the token; margins: parallel to token_ids (as logprobs, they are those of `Emitted`). prompt_logprobs: come with the
    first token, of every token of the prompt where they are asked for (None: of its first). reason: set on the last
    update only: "stop", "length", "abort", "deadline" or "error". error, failure: what happened, with the reason
    "error", in one line and as it was raised (others may have the same `failure`).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    prompt_logprobs: list[Scored | None] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None
    failure: BaseException | None = None


Deliver = Callable[[Update], None]
"""Called from the engine's thread; must not block. What it raises is logged, and nobody else suffers."""


@dataclass(slots=True)
class Ticket:
    """A request that was taken in. stats: grow while it runs. cached_tokens: of the prompt, taken over from others."""

    id: int
    num_prompt: int
    stats: RequestStats
    cached_tokens: int = 0


_IDLE_S = 0.5  # between two looks at stations that have nothing to do
_BUSY_S = 0.1  # of waiting for events before the inbox is looked at again
_CLOSE_S = 15.0  # for the engine's thread to end: a pipeline is closed within about two


class Words(Protocol):
    """What a service needs of a tokenizer."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def stream(self, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer: ...


W = TypeVar("W", bound=Words, covariant=True)


class Served(Protocol[W]):
    """What a service needs to know of the model behind its pipeline (`assembly.Prepared`)."""

    @property
    def tokenizer(self) -> W: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...


@dataclass(slots=True)
class Asked:
    """A question for `Service.submit_all`. timeout_s: seconds of the pipeline's clock until its deadline."""

    prompt: Sequence[int]
    params: SamplingParams
    deliver: Deliver
    priority: int = 0
    timeout_s: float | None = None


@dataclass(slots=True)
class _Client:
    """A request between `submit` and its last update. fresh: its news since the last one."""

    ticket: Ticket
    request: Request
    reply: Reply
    deliver: Deliver
    fresh: Update = field(default_factory=Update)
    sequence: Running | None = None
    num_tokens: int = 0
    reason: str | None = None
    error: str | None = None
    failure: BaseException | None = None

    def fail(self, why: str, failure: BaseException) -> None:
        """Keep what its caller is told at the end, which somebody else brings about."""
        self.error, self.failure = why, failure

    def take(self, event: Emitted) -> bool:
        """True when a stop string is complete. Of a token that ends the text by itself nothing is to be read, unless
        that is asked for."""
        if not self.num_tokens:
            self._check_scored()
        self.num_tokens += 1
        self.fresh.token_ids.append(event.token)
        self.fresh.margins.append(event.margin)
        if self.request.params.logprobs is not None:
            self.fresh.logprobs.append(event.logprobs)
            self.fresh.offsets.append(self.reply.length)
        ends = event.token in self.request.eos or event.token in self.request.params.stop_token_ids
        return (not ends or self.request.params.include_stop_str_in_output) and self.reply.push(event.token)

    def _check_scored(self) -> None:
        """Raise PipelineError unless it is known by the first token what was asked of the prompt."""
        if self.request.params.prompt_logprobs is None:
            return
        if len(self.request.prompt) == 1:
            self.fresh.prompt_logprobs = [None]
        if not self.fresh.prompt_logprobs:
            raise PipelineError("the stages did not say how likely the prompt is")

    def last(self, reason: str) -> Update:
        """Its last update. Where the rest of the text cannot be made, the reason is another."""
        try:
            self.reply.finish()
        except Exception as error:
            log.exception("the text of request %d failed", self.request.id)
            if self.error is None:
                reason = "error"
                self.fail(what_failed(error)[1], error)
        update = self.news()
        update.reason = reason
        if reason == "error":
            update.error, update.failure = self.error, self.failure
        return update

    def news(self) -> Update:
        news, self.fresh = self.fresh, Update()
        news.text = self.reply.fresh()
        return news

    @property
    def on_stations(self) -> bool:
        """Whether any station has heard of it. One that waits for admission cannot be why they fail."""
        return self.sequence is not None and (self.sequence.stages.opened or self.sequence.draft.opened)


class Service(Generic[W]):
    """Runs one engine, in a thread of its own, for callers in any thread, and starts its pipeline anew when that fails.

    pipeline: nothing is under way in it; the service closes it.
    rebuild: starts another one like it, after a failure; None: the first failure is the end.
    patience_s: of failures in a row, before it gives up; it tries some times in any case.
    max_waiting: requests that wait, beyond those that run, before new ones are turned away; None: as many as come.
    listeners: told of every event; an `Observer` also of what no event tells.
    calibration: how far the draft is believed to begin with; the engine's thread teaches it more.

    max_model_len: tokens of prompt and answer together. capacity: requests at a time.
    """

    def __init__(self, pipeline: Pipeline, method: Method, model: Served[W], *, options: EngineOptions | None = None,
                 rebuild: Callable[[], Remade] | None = None, max_waiting: int | None = None,
                 listeners: Sequence[Listener] = (), calibration: Calibration | None = None,
                 patience_s: float = 0.0) -> None:
        options = options or EngineOptions()
        self.model = model
        self._observers = [one for one in listeners if isinstance(one, Observer)]
        # Ours comes last: it may end a request, which the others must not hear before what it was ended for.
        self.engine = Engine(pipeline, method, options=options, listeners=listeners, owner=self._hear,
                             calibration=calibration)
        self.capacity = (sys.maxsize if max_waiting is None or options.max_num_seqs is None
                         else options.max_num_seqs + max_waiting)
        self._lock = threading.Lock()  # of what callers change: _clients' keys, _calls, the state of recovery
        self._recovery = Recovery(self.engine, rebuild, self._observers, self, self._lock, patience_s)
        self._counts = (0, 0, 0)  # running, waiting, cache slots
        self._ids = count()
        self._clients: dict[int, _Client] = {}
        self._touched: dict[int, _Client] = {}  # with news
        self._calls: set[Future[None]] = set()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for observer in self._observers:
            observer.on_start(self.engine.stats)
        self._thread = threading.Thread(target=self._recovery.run, name="fullpipe-engine", daemon=True)
        self._thread.start()

    # ---- any thread --------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together, within model and cache."""
        longest = self.engine.memory.longest
        return self.model.max_model_len if longest is None else min(self.model.max_model_len, longest)

    def submit(self, prompt: Sequence[int], params: SamplingParams, deliver: Deliver, *, priority: int = 0,
               timeout_s: float | None = None) -> Ticket:
        """Take a request in. timeout_s: seconds of the pipeline's clock until its deadline.

        Raises PromptError for a prompt that is empty, too long for the context, or larger than all of the cache
        memory; UsageError for parameters that do not fit the model; Overloaded when the queue is full; Unavailable
        while the service is failed, draining or stopped (both with `retry_after_s`).
        """
        return self.submit_all([Asked(prompt, params, deliver, priority, timeout_s)])[0]

    def submit_all(self, asked: Sequence[Asked]) -> list[Ticket]:
        """Take several in at the same moment, or none of them. Raises what `submit` raises."""
        now = self.engine.now()
        clients = [self._client(one, now) for one in asked]
        with self._lock:
            self._check_room(len(clients))
            self._clients |= {one.request.id: one for one in clients}
            self._inbox.put(lambda: self._enter(clients, now))
        return [one.ticket for one in clients]

    def _client(self, asked: Asked, now: float) -> _Client:
        prompt, model = asked.prompt, self.model
        params = fitted(prompt, asked.params, vocab=model.vocab_size, max_model_len=self.max_model_len,
                        special=model.tokenizer.special,
                        encode=(lambda text: model.tokenizer.encode(text)) if asked.params.bad_words else None)
        if params.structured is not None:
            check_structure(params.structured, model.tokenizer)
        eos = frozenset() if params.ignore_eos else model.tokenizer.eos_ids
        request = Request(next(self._ids), tuple(prompt), params, eos, asked.priority,
                          math.inf if asked.timeout_s is None else now + asked.timeout_s)
        self.engine.check_fits(request)
        ticket = Ticket(request.id, len(prompt), RequestStats(started=now))
        words = model.tokenizer.stream(prompt, params.skip_special_tokens)
        reply = Reply(words, params.stop, params.min_tokens, params.include_stop_str_in_output)
        return _Client(ticket, request, reply, asked.deliver)

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more. Its rows are free within one step of the engine."""
        self._inbox.put(lambda: self.engine.end(ticket.id, "abort"))

    def call(self, action: Callable[[Engine], None]) -> None:
        """Do this between two steps of the engine, and wait until it is done.

        Raises UsageError where the action does and the engine is whole. Whatever else it raises counts as a failure of
        the pipeline, which is started anew; then PipelineError is raised here. Raises Unavailable as `submit` does, and
        where the service fails or stops before it comes to the action.
        """
        done: Future[None] = Future()
        with self._lock:
            self._recovery.check_open()
            self._calls.add(done)
            self._inbox.put(lambda: self._act(action, done))
        try:
            done.result()
        except CancelledError:
            raise self._recovery.refusal() from None

    def recut(self, why: str, patience_s: float = 60.0) -> None:
        """Have the pipeline exchanged for another one, which `rebuild` starts, when nobody waits for an answer, or in
        so many seconds. Texts do not change, and nothing counts as failed."""
        self._recovery.recut(why, patience_s)

    def check_length(self, asked: int | None) -> str | None:
        """What its owner should know where the cache holds shorter texts than the model does; None: nothing.

        asked: the length that was asked for, if one was. Raises UsageError where that cannot be held, or no text can.
        """
        longest, wanted = self.max_model_len, self.model.max_model_len
        if longest < 2 or (asked is not None and longest < wanted):
            memory = self.engine.memory
            raise UsageError(f"{memory.total} cache slots hold {longest} tokens and the guesses beside them, "
                             f"not {wanted}", hint=f"Give more `{memory.bound_by}`, or a smaller `max_model_len`.")
        if longest == wanted:
            return None
        return (f"the cache holds {longest} tokens of a text, the model {wanted}: longer ones are refused "
                f"({self.engine.memory.bound_by})")

    @property
    def busy(self) -> bool:
        return bool(self._clients)

    def status(self) -> Status:
        recovery, (running, waiting, used) = self._recovery, self._counts
        if recovery.state in ("rebuilding", "failed"):
            running, waiting, used = 0, 0, 0
        return Status(recovery.state, running, max(waiting, len(self._clients) - running), used,
                      self.engine.memory.total or 0, recovery.supervision.restarts, recovery.supervision.last_failure,
                      recovery.retry_after_s)

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and wait until all is answered; False when time ran out."""
        self._recovery.turn("draining")
        end = math.inf if timeout is None else time.monotonic() + timeout
        while self._clients and self._thread.is_alive():
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return not self._clients

    def close(self, timeout: float = _CLOSE_S) -> None:
        """End everything now; requests that run get the reason "abort". timeout: seconds that the engine's thread may
        take. One that starts a pipeline cannot be stopped: it is left behind, and gives up what it has started."""
        self._recovery.turn("stopped")
        self._inbox.put(lambda: None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("the engine has not ended within %g s and is left behind; it may be starting a pipeline",
                        timeout)
            self.give_up_all("abort")

    def _check_room(self, more: int) -> None:
        self._recovery.check_open()
        if len(self._clients) + more > self.capacity:
            raise Overloaded(f"{len(self._clients)} requests are here, and no more are taken", retry_after_s=1.0,
                             hint="Try again in a moment. A longer queue is `max_waiting`.")

    # ---- the engine's thread -----------------------------------------------------------------------------

    def step(self) -> None:
        engine = self.engine
        self._take_inbox(wait=0.0 if engine.busy else _IDLE_S)
        began = time.thread_time()
        engine.step(_BUSY_S if engine.busy else 0.0)
        self.tell_news()
        engine.isolate(self._recovery.supervision.suspect)
        self._counts = engine.num_running, engine.num_waiting, engine.memory.used
        for observer in self._observers:
            guarded("an observer", observer.on_engine_time, time.thread_time() - began)

    def _take_inbox(self, wait: float) -> None:
        try:
            self._inbox.get(timeout=wait)() if wait else self._inbox.get_nowait()()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _act(self, action: Callable[[Engine], None], done: Future[None]) -> None:
        with self._lock:
            self._calls.discard(done)
        if not done.set_running_or_notify_cancel():
            return
        try:
            action(self.engine)
        except BaseException as error:
            if isinstance(error, UsageError) and not self.engine.broken:
                done.set_exception(error)
                return
            told = PipelineError(what_failed(error)[1])
            told.__cause__ = error
            done.set_exception(told)
            raise  # recovery must know
        done.set_result(None)

    def _enter(self, clients: list[_Client], arrived: float) -> None:
        for one in clients:
            if one.request.id not in self._clients:
                continue  # it has ended, with everything else
            try:
                one.sequence = self.engine.submit(one.request, arrived=arrived)
            except Exception as error:
                one.fail(what_failed(error)[1], error)
                self._leave(one, "error")
            else:
                one.ticket.stats = self.engine.stats.of(one.request.id)

    def _hear(self, event: Event) -> None:
        """The engine's events as they happen: a step that fails has told those before the failure."""
        if isinstance(event, PromptScored) and event.request in self._clients:
            self._clients[event.request].fresh.prompt_logprobs = [None, *event.scores]  # it goes with the first token
        if not isinstance(event, (Emitted, Finished)) or (one := self._clients.get(event.request)) is None:
            return
        self._touched[event.request] = one
        if isinstance(event, Finished):
            one.reason = event.reason
            if why := event.detail.get("why"):
                one.fail(why, StructureError(why, param="structured"))
            return
        try:
            ends = "stop" if one.take(event) else None
        except Exception as error:  # its text cannot be made
            log.exception("the text of request %d failed", event.request)
            one.fail(what_failed(error)[1], error)
            ends = "error"
        if ends:
            self.engine.end(event.request, ends)

    def _leave(self, one: _Client, reason: str) -> None:
        """The last that a caller hears."""
        with self._lock:
            if self._clients.pop(one.request.id, None) is None:
                return
        self._recovery.supervision.forget(one.request.id)
        update, ticket = one.last(reason), one.ticket
        for observer in self._observers:
            guarded("an observer", observer.on_finish, ticket.id, update.reason or reason, ticket.num_prompt,
                    one.num_tokens, ticket.stats, ticket.cached_tokens)
        guarded("a caller", one.deliver, update)

    # ---- what recovery asks (`supervision.Callers`) ---------------------------------------------------------

    def tell_news(self) -> None:
        while self._touched:
            id = next(iter(self._touched))
            one = self._touched.pop(id)
            if one.fresh.token_ids:
                self._recovery.supervision.got_on(id)
            if one.sequence is not None:
                one.ticket.cached_tokens = one.sequence.cached
            if one.reason is not None:
                self._leave(one, one.reason)
            elif id in self._clients:
                guarded("a caller", one.deliver, one.news())

    def on_stations(self) -> dict[int, int]:
        return {id: one.num_tokens for id, one in list(self._clients.items()) if one.on_stations}

    def give_up(self, id: int, why: str, failure: BaseException) -> None:
        if one := self._clients.get(id):
            one.fail(why, failure)
            guarded("ending a request", self.engine.end, id, "error")

    def give_up_all(self, reason: str, why: str | None = None, failure: BaseException | None = None) -> None:
        for one in list(self._clients.values()):
            if why is not None and failure is not None:
                one.fail(why, failure)
            guarded("ending a request", self.engine.end, one.request.id, reason)
            self._leave(one, reason)
        with self._lock:
            calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()
