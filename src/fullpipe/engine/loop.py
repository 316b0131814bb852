"""The one loop: send what can be sent, wait, act on what happened.

Knows requests, trees, slots and a method. Knows no torch, no processes and no kind of clock: whether the pipeline is
this process, eight machines or a simulation cannot be told from here. Read `Engine.step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fullpipe.engine.flights import Flights
from fullpipe.engine.jobs import Jobs
from fullpipe.engine.memory import Memory
from fullpipe.engine.scheduler import Scheduler
from fullpipe.engine.stats import Stats
from fullpipe.errors import PipelineError, StationFailed, UsageError
from fullpipe.messages import (
    Admitted,
    Asked,
    Attached,
    Died,
    Drafted,
    Emitted,
    Event,
    Failed,
    Fate,
    Finished,
    Landed,
    Preempted,
    Ready,
    Submitted,
)
from fullpipe.methods.base import Method
from fullpipe.options import EngineOptions
from fullpipe.request import Request
from fullpipe.sequences.blocks import Kept
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node

if TYPE_CHECKING:
    from fullpipe.pipeline.base import Pipeline

log = logging.getLogger(__name__)

Listener = Callable[[Event], None]

_AFTER_FAILURE = "What was emitted is kept. Start again; if the station was only slow, allow it a longer time-out."


class Engine:
    """Drives requests through a pipeline with a method.

    listeners: called with every event, the engine's own included, as it happens. All news leave this way. One that
    raises is dropped and logged. `end` may be called from inside one.
    """

    def __init__(self, pipeline: Pipeline, method: Method, *, options: EngineOptions | None = None,
                 listeners: Iterable[Listener] = ()) -> None:
        self.pipeline, self.stats = pipeline, Stats()
        self.method = self._checked(method)
        options = self._options = options or EngineOptions()
        self._listeners: tuple[Listener, ...] = (self.stats, *listeners)
        self._memory = Memory(options, self._for_guesses(), self._close)
        self._scheduler = Scheduler(options, self._memory)
        self._begin()

    def _begin(self) -> None:
        self._flights = Flights(self._options, self.pipeline.newest_flight)
        self._jobs = Jobs(self._options, self.pipeline.newest_job)
        self._logprobs: dict[int, list[tuple[int, float]]] = {}  # by node that has landed, until its turn or its death
        self._stage_ready = self.pipeline.newest_flight >= 0  # who used it before has taken its last `Ready`
        self._draft_ready = True
        self._broken = False  # once a step ended in the middle: nobody knows what the stations hold
        self._now = self.pipeline.now()

    # ---- the loop ----------------------------------------------------------------------------------------

    def step(self, wait: float | None = None) -> None:
        """Send what can be sent, wait for the next events, act on them, and send again.

        wait: seconds to wait at most (None: until something happens); so an engine that has nothing to do notices
        that a station is gone.

        Raises StationFailed when a stage or the draft is gone. After an exception of any kind, Ctrl-C included, the
        engine takes nothing more until it is attached to another pipeline.
        """
        try:
            self._send()
            for event in self.pipeline.events(wait):
                self._now = event.time
                self._tell(event)
                self._act(event)
            self._end_overdue()
            self._send()
        except BaseException:
            self._broken = True
            raise

    def _send(self) -> None:
        self._admit()
        if self._stage_ready:
            self._make_room()
            if made := self._flights.next(self.method, self._scheduler.running.values()):
                self._stage_ready = False
                flight, told = made
                told.time = self._now
                self._tell(told)
                self.pipeline.launch(flight)
        if self._draft_ready and self.pipeline.has_draft and (
                asked := self._jobs.next(self.method, self._scheduler.running.values())):
            self._draft_ready = False
            job, rows = asked
            self._tell(Asked(self._now, job.id, rows))
            self.pipeline.draft(job)

    def _act(self, event: Event) -> None:
        match event:
            case Ready():
                self._stage_ready = True
            case Landed():
                self._on_landed(event)
            case Drafted():
                self._draft_ready = True
                self._jobs.answered(event)
            case Failed():
                raise StationFailed(event.station, event.reason, hint=event.hint or _AFTER_FAILURE)

    def _on_landed(self, event: Landed) -> None:
        if event.logprobs:
            self._logprobs.update((node, said) for node, said in zip(event.nodes, event.logprobs)
                                  if said and node in self._flights.launched)
        margins = dict(zip(event.nodes, event.margins))
        for sequence in self._flights.landed(event):
            self._commit(sequence, margins)

    def _commit(self, sequence: Sequence, margins: dict[int, float]) -> None:
        """Apply the commit rule for as long as the root has landed."""
        while sequence.finished is None:
            root = sequence.tree.root
            step = sequence.advance()
            if step is None:
                return
            self._jobs.asked.pop(root.id, None)  # what follows it is known
            self._drop(sequence, step.dead)
            reason = _end_of_text(sequence, step.token)
            fate: Fate = "last" if reason else "hit" if step.hit else "miss"
            sequence.waiting_since = self._now
            self._tell(Emitted(self._now, sequence.request.id, root.id, step.token, root.position + 1, fate,
                               margins.get(root.id), step.altered, self._logprobs.pop(root.id, [])))
            if reason and sequence.finished is None:
                self._finish(sequence, reason)

    # ---- requests in and out -----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.num_running or self.num_waiting)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def kv_used(self) -> int:
        """Cache slots of the requests that run."""
        return self._memory.used

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and answer together that fit into all of the cache memory; None: no bound."""
        return self._memory.longest

    def now(self) -> float:
        """Seconds of the pipeline's clock."""
        return self.pipeline.now()

    def check_fits(self, request: Request) -> None:
        """Raise PromptError for a request that would need more than all of the cache memory. From any thread."""
        self._scheduler.check_fits(request)

    def submit(self, request: Request, *, arrived: float | None = None) -> Sequence:
        """Take a request in; it waits until it can run. arrived: when it came, if that was earlier than now.

        Raises PromptError for one that would need more than all of the cache memory.
        """
        self._check_whole()
        assert request.id not in {one.request.id for one in self.unfinished()}, "request ids must be unique"
        sequence = Sequence(request, self.now() if arrived is None else arrived)
        self._scheduler.add(sequence)
        self._tell(Submitted(self.now(), request.id, len(request.prompt), sequence.arrived))
        return sequence

    def end(self, request: int, reason: str = "abort") -> None:
        """End a request now; what it had in flight is cancelled. Unknown or finished ids are ignored."""
        if sequence := self._scheduler.running.get(request) or self._scheduler.waiting.get(request):
            self._finish(sequence, reason)

    def listen(self, listener: Listener) -> None:
        """Call this one too with every event, from now on."""
        self._listeners += (listener,)

    def unfinished(self) -> list[Sequence]:
        """All sequences, in the order in which they came; valid after a failure too."""
        return self._scheduler.unfinished()

    def isolate(self, request: int | None) -> None:
        """Admit this request alone from now on; None: everybody again. Those that run go on."""
        self._scheduler.only = request

    def attach(self, pipeline: Pipeline) -> None:
        """Go on with another pipeline. Every request waits to be admitted there, and goes on from its committed tokens:
        text is a function of what stands before, so nothing is lost. The caller closes the pipeline before."""
        for sequence in self._scheduler.running.values():
            sequence.tree.clear()
        self.pipeline = pipeline
        self._checked(self.method)
        self._scheduler.forget_stations()
        self._begin()
        self._tell(Attached(self._now))

    def use(self, method: Method) -> None:
        """Change the method while no request runs; what is left in the pipeline is waited for."""
        self.drain()
        self.method = self._checked(method)
        self._memory.for_guesses = self._for_guesses()

    def drain(self) -> None:
        """Wait until the stations are empty and have closed the arenas of finished requests."""
        self._check_whole()
        if self.busy:
            raise UsageError("another request is running", hint="Wait for it, or close its stream first.")
        self._memory.give_up_kept()
        while self._flights.under_way or self._flights.closes or self._jobs.closes or not self._draft_ready:
            self.step()

    # ---- inside ------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in self._scheduler.admit(self._now) if self._scheduler.waiting else ():
            self._tell(Admitted(self._now, sequence.request.id, sequence.cached))

    def _make_room(self) -> None:
        """Let arenas grow; where there is no memory left, the youngest request goes back to waiting."""
        for sequence in list(self._scheduler.running.values()):
            while sequence.request.id in self._scheduler.running and (
                    youngest := self._scheduler.make_room(sequence, self.method.least_slots)):
                self._drop(youngest, youngest.tree.clear())
                self._scheduler.send_back(youngest)
                self._tell(Preempted(self._now, youngest.request.id))

    def _end_overdue(self) -> None:
        for sequence in self._scheduler.overdue(self.now()):
            self._finish(sequence, "deadline")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finished = reason
        if sequence.request.id in self._scheduler.running:
            self._drop(sequence, sequence.tree.clear())
        self._scheduler.remove(sequence, keep=not self._broken)
        self._tell(Finished(self._now, sequence.request.id, reason))
        self.stats.forget(sequence.request.id)

    def _drop(self, sequence: Sequence, dead: list[Node]) -> None:
        """Nobody needs these nodes any more: call back what is on its way."""
        if not dead:
            return
        if self._logprobs:
            for node in dead:
                self._logprobs.pop(node.id, None)
        launched, asked = self._flights.launched, self._jobs.asked
        unneeded = [node.id for node in dead  # in flight, or asked about: the draft may be waiting for them
                    if (launched.pop(node.id, None) is not None) | (asked.pop(node.id, None) is not None)]
        if unneeded and not self._broken:
            self.pipeline.cancel(unneeded)
        self._tell(Died(self._now, sequence.request.id, [node.id for node in dead]))

    def _close(self, kept: Kept) -> None:
        """Have the stations close an arena. The draft has been told that it will be, whether it was opened there or
        not (`Opening.drafts`)."""
        if kept.in_stages:
            self._flights.closes.append(kept.arena)
        if kept.in_draft or (kept.in_stages and self.method.needs_draft):
            self._jobs.closes.append(kept.arena)

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed and is dropped")
                self._listeners = tuple(one for one in self._listeners if one is not listener)

    def _for_guesses(self) -> int:
        """Slots of a request beyond prompt and answer."""
        spare = self._options.spare_slots
        return max(64 + 4 * self.pipeline.num_stages * self.method.width if spare is None else spare,
                   self.method.least_slots)

    def _checked(self, method: Method) -> Method:
        if method.needs_draft and not self.pipeline.has_draft:
            raise UsageError(f"the method {method.name} needs a draft",
                             hint="Name one (a model, or ngram), or use the method pp.")
        return method

    def _check_whole(self) -> None:
        if self._broken:
            raise PipelineError("the pipeline stopped in the middle of a step and cannot go on",
                                hint="Attach another one (a new LLM).")

    def check(self) -> None:
        """Raise AssertionError unless every tree, slot and table is as it must be (tests, idle servers)."""
        self._scheduler.check()
        self._flights.check(self._scheduler.running.values())
        self._jobs.check()


def _end_of_text(sequence: Sequence, token: int) -> str | None:
    """Why the text ends with this token, if it does."""
    request = sequence.request
    if token in request.eos or token in request.params.stop_token_ids:
        return "stop"
    return "length" if sequence.left <= 0 else None
