"""A test double of `Service`: answers with scripted tokens from a thread of its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fullpipe.engine import RequestStats
from fullpipe.events import Emitted, Fate
from fullpipe.messages import ArenaId, Scored
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.request import SamplingParams
from fullpipe.service import Deliver, Ticket, Update
from fullpipe.supervision import Status
from fullpipe.text import Reply

Script = Callable[[Sequence[int], SamplingParams], Sequence[int]]


@dataclass(slots=True)
class _Job:
    ticket: Ticket
    params: SamplingParams
    deliver: Deliver
    tokens: list[int]
    reply: Reply
    prompt: list[int]


def scores_of(prompt: Sequence[int], count: int) -> list[Scored | None]:
    """What the fake service says of a prompt: every token was the second likeliest."""
    others = [(other, -0.1 - other) for other in range(count)]
    return [None, *(Scored(ArenaId(0), position, 2, [(token, -0.25), *others])
                    for position, token in enumerate(prompt[1:], 1))]


class FakeService:
    """Each step of its thread gives every request one more token of what `script` says for prompt and parameters.

    refuse: what `submit` raises. fail_after: so many tokens, then `fail_with`. hold_at: after so many tokens a request
    waits until it is cancelled. capacity: requests that it says it can have. submitted, cancelled: all that came, in
    order; `changed` is notified of both.
    """

    def __init__(self, tokenizer: Tokenizer, script: Script) -> None:
        self.script = script
        self.refuse: Exception | None = None
        self.fail_after: int | None = None
        self.fail_with = "error"
        self.capacity = 1000
        self.hold_at: float = math.inf
        self.now = Status("ready", 0, 0, 0, 0, 0)
        self.submitted: list[tuple[list[int], SamplingParams, int, float | None]] = []
        self.cancelled: list[int] = []
        self.changed = threading.Condition()
        self._tokenizer = tokenizer
        self._jobs: dict[int, _Job] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fake service")
        self._thread.start()

    def submit(self, prompt: Sequence[int], params: SamplingParams, deliver: Deliver, *, priority: int = 0,
               timeout_s: float | None = None) -> Ticket:
        if self.refuse is not None:
            raise self.refuse
        with self.changed:
            ticket = Ticket(len(self.submitted), len(prompt), RequestStats(started=0.0), cached_tokens=2)
            self.submitted.append((list(prompt), params, priority, timeout_s))
            tokens = list(self.script(prompt, params))
            reply = Reply(self._tokenizer.stream(prompt, params.skip_special_tokens), params.stop,
                          include_stop=params.include_stop_str_in_output)
            self._jobs[ticket.id] = _Job(ticket, params, deliver, tokens, reply, list(prompt))
            self.changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        with self.changed:
            self.cancelled.append(ticket.id)
            self._jobs.pop(ticket.id, None)
            self.changed.notify_all()

    def status(self) -> Status:
        return self.now

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=10)

    def go_on(self) -> None:
        """No request is held any more."""
        with self.changed:
            self.hold_at = math.inf
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._closed or any(map(self._can_go_on, self._jobs.values())))
                if self._closed:
                    return
                for job in [job for job in self._jobs.values() if self._can_go_on(job)]:
                    self._step(job)

    def _can_go_on(self, job: _Job) -> bool:
        return job.ticket.stats.num_emitted < self.hold_at

    def _step(self, job: _Job) -> None:
        stats, params = job.ticket.stats, job.params
        if stats.num_emitted == self.fail_after:
            return self._end(job, Update(reason=self.fail_with, error="stage 1 spoke nonsense"))
        if not job.tokens:
            return self._end(job, Update(reason="stop"))
        token = job.tokens.pop(0)
        full = stats.num_emitted + 1 == params.max_tokens
        offset = job.reply.length
        stopped = "stop" if job.reply.push(token) else None
        stats.on_launch(0.0, 2)
        fate: Fate = "last" if full else "hit" if stats.num_emitted % 2 == 0 else "miss"
        stats.on_emit(Emitted(float(stats.num_emitted), job.ticket.id, -1, token, 0, fate))
        update = Update(token_ids=[token])
        if params.prompt_logprobs is not None and stats.num_emitted == 1:
            update.prompt_logprobs = scores_of(job.prompt, params.prompt_logprobs)
        if params.logprobs is not None:
            update.offsets = [offset]
            update.logprobs = [[(token, -0.5), *((other, -1.0 - other) for other in range(params.logprobs))]]
        if stopped or full:
            update.reason = stopped or "length"
            return self._end(job, update)
        update.text = job.reply.fresh()
        return job.deliver(update)

    def _end(self, job: _Job, update: Update) -> None:
        del self._jobs[job.ticket.id]
        job.reply.finish()
        update.text = job.reply.fresh()
        job.deliver(update)
