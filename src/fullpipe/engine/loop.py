"""The one loop: send what can be sent, wait, act on what happened.

Knows requests, trees, slots and a method. Knows no torch, no processes and no kind of clock: whether the pipeline is
this process, eight machines or a simulation cannot be told from here. Read `Loop.step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fullpipe.engine.flights import Flights
from fullpipe.engine.jobs import Jobs
from fullpipe.engine.memory import Memory
from fullpipe.engine.scheduler import Scheduler
from fullpipe.engine.scores import gathered
from fullpipe.engine.stats import Stats
from fullpipe.errors import PipelineError, StationFailed, UsageError
from fullpipe.events import Admitted, Asked, Died, Emitted, Fate, Finished, Preempted, PromptScored
from fullpipe.messages import Drafted, Event, Failed, Landed, Ready
from fullpipe.methods.base import Load, Method
from fullpipe.options import EngineOptions
from fullpipe.sequences.calibration import Calibration
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node

if TYPE_CHECKING:
    from fullpipe.pipeline.base import Pipeline

log = logging.getLogger(__name__)

Listener = Callable[[Event], None]

_STUCK = "the text cannot be held to its structure any further"
_AFTER_FAILURE = "What was emitted is kept. Start again; if the station was only slow, allow it a longer time-out."


class Loop:
    """Holds the data of an engine and goes round; `engine.Engine` adds what its users call."""

    def __init__(self, pipeline: Pipeline, method: Method, *, options: EngineOptions | None = None,
                 listeners: Iterable[Listener] = (), owner: Listener | None = None,
                 calibration: Calibration | None = None) -> None:
        self.pipeline, self.stats = pipeline, Stats()
        self.calibration = calibration or Calibration()
        self.method = self._checked(method, pipeline)
        options = self._options = options or EngineOptions()
        self._listeners, self._owner = tuple(listeners), owner
        self._memory = Memory(options, self._for_guesses(), pipeline.cache_slots)
        self._scheduler = Scheduler(options, self._memory)
        self._begin()

    def _begin(self, newest_flight: int = -1, newest_job: int = -1) -> None:
        """Nothing is on the stations. newest_flight, newest_job: ids that have been used."""
        self.method.meet(self.pipeline.machine())
        self._flights = Flights(self._options, max(self.pipeline.newest_flight, newest_flight))
        self._jobs = Jobs(self._options, max(self.pipeline.newest_job, newest_job), self.calibration)
        self._logprobs: dict[int, list[tuple[int, float]]] = {}  # by node that has landed, until its turn or its death
        self._stage_ready = self.pipeline.newest_flight >= 0  # who used it before has taken its last `Ready`
        self._draft_ready = True
        self.broken = False  # once a step ended in the middle: nobody knows what the stations hold
        self._now = self.pipeline.now()

    # ---- the loop ----------------------------------------------------------------------------------------

    def step(self, wait: float | None = None) -> None:
        """Send what can be sent, wait for the next events, act on them, and send again.

        wait: seconds to wait at most (None: until something happens); so an engine that has nothing to do notices
        that a station is gone.

        Raises StationFailed when a stage or the draft is gone. After an exception of any kind, Ctrl-C included, the
        engine takes nothing more until it is attached to another pipeline.
        """
        self._check_whole()
        self._now = self.pipeline.now()  # nothing may have happened for long
        try:
            self._send()
            for event in self.pipeline.events(wait):
                self._now = event.time
                self._tell(event)
                self._act(event)
            self._end_overdue()
            self._send()
        except BaseException:
            self.broken = True
            raise

    def _send(self) -> None:
        self._admit()
        if self._stage_ready:
            self._make_room()
            if made := self._flights.next(self.method, self._scheduler.running.values(), self._load()):
                self._stage_ready = False
                flight, told = made
                told.time = self._now
                self._tell(told)
                self.pipeline.launch(flight)
        if self._draft_ready and self.pipeline.has_draft and (
                asked := self._jobs.next(self.method, self._scheduler.running.values(), self._load())):
            self._draft_ready = False
            job, rows = asked
            self._tell(Asked(self._now, job.id, rows))
            self.pipeline.draft(job)

    def _load(self) -> Load:
        return Load(len(self._scheduler.running), 0, len(self._flights.under_way), self._now, *self._jobs.out)

    def _act(self, event: Event) -> None:
        match event:
            case Ready():
                self._stage_ready = True
            case Landed():
                self.method.observe(event)
                self._on_landed(event)
            case Drafted():
                self.method.observe(event)
                self._draft_ready = True
                self.method.answered(self._jobs.answered(event, self.method.floor))
            case Failed():
                raise StationFailed(event.station, event.reason, hint=event.hint or _AFTER_FAILURE)

    def _on_landed(self, event: Landed) -> None:
        for request, scores in gathered(event, self._scheduler.running.values()):
            self._tell(PromptScored(self._now, request, scores))
        if event.logprobs:
            self._logprobs.update((node, said) for node, said in zip(event.nodes, event.logprobs)
                                  if said and node in self._flights.launched)
        margins = dict(zip(event.nodes, event.margins))
        for sequence in self._flights.landed(event):
            self._commit(sequence, margins)

    def _commit(self, sequence: Sequence, margins: dict[int, float | None]) -> None:
        """Apply the commit rule for as long as the root has landed."""
        while sequence.finished is None:
            root = sequence.tree.root
            if (why := sequence.tree.stuck) is not None:
                self._finish(sequence, "error", why=f"{_STUCK}: {why}")
                return
            step = sequence.advance()
            if step is None:
                return
            self._jobs.asked.pop(root.id, None)  # what follows it is known
            self.calibration.learn(root, sequence.tree.root)
            self._drop(sequence, step.dead)
            reason = _end_of_text(sequence, step.token)
            fate: Fate = "last" if reason else "hit" if step.hit else "miss"
            sequence.waiting_since = self._now
            self._tell(Emitted(self._now, sequence.request.id, root.id, step.token, root.position + 1, fate,
                               margins.get(root.id), step.altered, self._logprobs.pop(root.id, [])))
            if reason and sequence.finished is None:
                self._finish(sequence, reason)

    def _admit(self) -> None:
        for sequence in self._scheduler.admit(self._now) if self._scheduler.waiting else ():
            self._tell(Admitted(self._now, sequence.request.id, sequence.cached))

    def _make_room(self) -> None:
        """Let sequences grow; where there is no memory left, the youngest request goes back to waiting."""
        for sequence in list(self._scheduler.running.values()):
            while sequence.request.id in self._scheduler.running and (
                    youngest := self._scheduler.make_room(sequence, self.method.least_slots)):
                self._drop(youngest, youngest.tree.clear())
                self._close(youngest)
                self._scheduler.send_back(youngest)
                self._tell(Preempted(self._now, youngest.request.id))

    def _end_overdue(self) -> None:
        for sequence in self._scheduler.overdue(self.pipeline.now()):
            self._finish(sequence, "deadline")

    def _finish(self, sequence: Sequence, reason: str, **detail: str) -> None:
        sequence.finished = reason
        if sequence.request.id in self._scheduler.running:
            self._drop(sequence, sequence.tree.clear())
            self._close(sequence)
        self._scheduler.remove(sequence, keep=not self.broken)
        self._tell(Finished(self._now, sequence.request.id, reason, {**detail}))
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
        if unneeded and not self.broken:
            self.pipeline.cancel(unneeded)
        self._tell(Died(self._now, sequence.request.id, [node.id for node in dead]))

    def _close(self, sequence: Sequence) -> None:
        """Have the stations forget a sequence, opened there or not: a draft that reads hidden states waits for both
        ends to know that it is over."""
        known = sequence.stages.opened or sequence.draft.opened
        if known:
            self._flights.closes.append(sequence.arena)
        if sequence.draft.opened or (known and self.method.needs_draft):
            self._jobs.closes.append(sequence.arena)

    def _tell(self, event: Event) -> None:
        """Count it, tell those who watch, and last who owns the engine, who may end a request for it."""
        self.stats(event)
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed and is dropped")
                self._listeners = tuple(one for one in self._listeners if one is not listener)
        if self._owner is not None:
            self._owner(event)

    def _for_guesses(self) -> int:
        """Slots of a request beyond prompt and answer."""
        spare = self._options.spare_slots
        return max(64 + 4 * self.pipeline.num_stages * self.method.spare_slots if spare is None else spare,
                   self.method.least_slots)

    def _checked(self, method: Method, pipeline: Pipeline) -> Method:
        if method.needs_draft and not pipeline.has_draft:
            raise UsageError(f"the method {method.name} needs a draft",
                             hint="Name one (a model, or ngram), or use the method pp.")
        return method

    def _check_whole(self) -> None:
        if self.broken:
            raise PipelineError("the pipeline stopped in the middle of a step and cannot go on",
                                hint="Attach another one (a new LLM).")


def _end_of_text(sequence: Sequence, token: int) -> str | None:
    """Why the text ends with this token, if it does."""
    request = sequence.request
    if token in request.eos or token in request.params.stop_token_ids:
        return "stop"
    return "length" if sequence.left <= 0 else None
