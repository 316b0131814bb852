"""The engine: requests in, news out, over any pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fullpipe.engine.loop import Listener, Loop
from fullpipe.engine.memory import Memory
from fullpipe.errors import UsageError
from fullpipe.events import Attached, Submitted
from fullpipe.methods.base import Method
from fullpipe.request import Request
from fullpipe.sequences.sequence import Sequence

if TYPE_CHECKING:
    from fullpipe.pipeline.base import Pipeline


class Engine(Loop):
    """Drives requests through a pipeline with a method: `submit` them, then `step` while it is `busy`.

    listeners: called with every event, the engine's own included, as it happens. All news leave this way. One that
    raises is dropped and logged. owner: called last; it may call `end` there, and what it raises breaks the step.
    calibration: how far the draft is believed to begin with; it learns. None: at its word.
    """

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
    def memory(self) -> Memory:
        """What there is of cache memory, and how much of it is used."""
        return self._memory

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
        self._now = self.now()
        assert request.id not in {one.request.id for one in self.unfinished()}, "request ids must be unique"
        sequence = Sequence(request, self.now() if arrived is None else arrived)
        self._scheduler.add(sequence)
        self._tell(Submitted(self._now, request.id, len(request.prompt), sequence.arrived))
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

    def attach(self, pipeline: Pipeline, method: Method | None = None) -> None:
        """Go on with another pipeline, and with another method if it needs one. Every request waits to be admitted
        there, and goes on from its committed tokens: text is a function of what stands before, so nothing is lost. The
        caller closes the pipeline before, and ends what does not fit into the new one's cache (`check_fits`).

        Raises UsageError, and nothing is changed, where that has no draft for the method, or no room for a block."""
        newest = self.pipeline.newest_flight, self.pipeline.newest_job
        checked = self._checked(method or self.method, pipeline)
        self._scheduler.forget_stations(pipeline.cache_slots)
        self.pipeline, self.method = pipeline, checked
        self._memory.for_guesses = self._for_guesses()
        self._begin(*newest)
        self._tell(Attached(self._now))

    def use(self, method: Method) -> None:
        """Change the method while no request runs; what is left in the pipeline is waited for."""
        self.drain()
        self.method = self._checked(method, self.pipeline)
        self.method.meet(self.pipeline.machine())
        self._memory.for_guesses = self._for_guesses()

    def drain(self) -> None:
        """Wait until the stations are empty and have closed the arenas of finished requests."""
        self._check_whole()
        if self.busy:
            raise UsageError("another request is running", hint="Wait for it, or close its stream first.")
        self._memory.give_up_kept()
        while self._flights.under_way or self._flights.closes or self._jobs.closes or not self._draft_ready:
            self.step()

    def check(self) -> None:
        """Raise AssertionError unless every tree, slot and table is as it must be (tests, idle servers)."""
        self._scheduler.check()
        self._flights.check(self._scheduler.running.values())
        self._jobs.check()
