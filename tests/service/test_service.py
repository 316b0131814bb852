"""The service over scripted stations: many callers, one engine, and a pipeline that fails now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import psutil
import pytest
from fullpipe.batching import CostCurve, Dynamic
from fullpipe.sequences.stats import RequestStats

from fullpipe.cluster.calibrate import cost_curves
from fullpipe.engine.loop import Engine, Listener
from fullpipe.errors import FullpipeError, Overloaded, PipelineError, PromptError, Unavailable, UsageError
from fullpipe.methods import make_policy
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.sequence import Track
from fullpipe.service import Observer, Service, Started, Ticket, Update, _Running
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token
from fullpipe.stations.spec import StationSpec
from fullpipe.text import Reply

VOCAB, SEED = 50, 3
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}
Start = Callable[[Sequence[Listener]], "Started[Words]"]


class Words:
    """Tokens that read as numbers."""

    eos_ids: frozenset[int] = frozenset()

    def stream(self) -> Words:
        return Words()

    def push(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""


def plain(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(hash_token(tokens, VOCAB, SEED))
    return tokens[len(prompt):]


@dataclass
class Caller:
    """Takes updates and keeps them."""

    updates: list[Update] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, update: Update) -> None:
        assert not self.done.is_set(), "nothing comes behind the last"
        self.updates.append(update)
        if update.token_ids:
            self.begun.set()
        if update.reason:
            self.done.set()

    def result(self) -> tuple[list[int], str, str | None]:
        assert self.done.wait(30)
        return ([token for update in self.updates for token in update.token_ids],
                "".join(update.text for update in self.updates), self.updates[-1].reason)


def inprocess(listeners: Sequence[Listener], share: bool = False) -> Started[Words]:
    stages = [ScriptedStage(k, 3, TRUTH) for k in range(3)]
    pipeline = InProcessPipeline(stages, ScriptedDraft(TRUTH), clock="wall")
    engine = Engine(pipeline, make_policy("fullpipe"), max_num_seqs=4, kv_slots=6000, listeners=listeners,
                    batching=Dynamic(CostCurve({1: 1.0}), num_stages=3), share_prefixes=share)
    return Started(engine, Words(), VOCAB, 4000)


def sharing(listeners: Sequence[Listener]) -> Started[Words]:
    return inprocess(listeners, share=True)


def processes(listeners: Sequence[Listener]) -> Started[Words]:
    specs = [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                         {"index": k, "num_stages": 2, "truth": TRUTH, "delay_s": 0.002}) for k in range(2)]
    draft = StationSpec("fullpipe.stations.drafts.scripted:ScriptedDraft", {"truth": TRUTH})
    engine = Engine(WorkersPipeline(specs, draft, heartbeat_timeout=2.0, timeout=5.0), make_policy("fullpipe"),
                    max_num_seqs=4, kv_slots=6000, share_prefixes=True, listeners=listeners)
    return Started(engine, Words(), VOCAB, 4000)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread of ours, but those that are just ending."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("fullpipe"):
            thread.join(2)
            assert not thread.is_alive(), f"{thread.name} is left"


@pytest.fixture
def service() -> Iterator[Service[Words]]:
    made = Service(inprocess, max_num_seqs=4, max_waiting=8)
    yield made
    made.close()


def test_many_callers_get_what_each_would_get_alone(service: Service[Words]) -> None:
    callers = [Caller() for _ in range(10)]
    for k, caller in enumerate(callers):
        service.submit([k, 3, 4], SamplingParams(max_tokens=20 + k), caller)
    for k, caller in enumerate(callers):
        tokens, text, reason = caller.result()
        assert tokens == plain([k, 3, 4], 20 + k)
        assert text == "".join(f"{token} " for token in tokens)
        assert reason == "length"
    assert service.drain(5)
    assert service.status().running == service.status().waiting == 0


def test_what_cannot_be_is_refused_at_the_door(service: Service[Words]) -> None:
    for prompt, kind in (([], PromptError), (list(range(50)) * 80, PromptError), ([VOCAB], UsageError)):
        with pytest.raises(kind):
            service.submit(prompt, SamplingParams(), Caller())
    long = Service(lambda listeners: Started(inprocess(listeners).engine, Words(), VOCAB, 10**6))
    with closing(long), pytest.raises(PromptError, match="cache slots"):
        long.submit([1], SamplingParams(max_tokens=7000), Caller())


def test_a_full_queue_turns_away_and_a_drained_service_takes_nothing(service: Service[Words]) -> None:
    callers = [Caller() for _ in range(12)]
    tickets = [service.submit([1], SamplingParams(max_tokens=3000), caller) for caller in callers]
    with pytest.raises(Overloaded):
        service.submit([1], SamplingParams(), Caller())
    for ticket in tickets:
        service.cancel(ticket)
    assert {caller.result()[2] for caller in callers} == {"abort"}
    assert service.drain(5)
    with pytest.raises(Unavailable, match="draining"):
        service.submit([1], SamplingParams(), Caller())


def test_closing_ends_those_that_run() -> None:
    service, caller = Service(inprocess), Caller()
    service.submit([1], SamplingParams(max_tokens=3900), caller)
    assert caller.begun.wait(10)
    service.close()
    tokens, _, reason = caller.result()
    assert reason == "abort" and tokens == plain([1], len(tokens))


def test_a_deadline(service: Service[Words]) -> None:
    caller = Caller()
    service.submit([1], SamplingParams(max_tokens=3900), caller, timeout_s=0.2)
    tokens, _, reason = caller.result()
    assert reason == "deadline" and tokens == plain([1], len(tokens))


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1, 2], ids=["stage 0", "stage 1", "draft"])
def test_a_process_that_dies_is_replaced_and_the_text_goes_on(victim: int) -> None:
    service, callers = Service(processes), [Caller() for _ in range(6)]
    try:
        for k, caller in enumerate(callers):
            service.submit([k, 3, 4], SamplingParams(max_tokens=150), caller)
        assert callers[0].begun.wait(20)
        engine = service._engine
        assert engine is not None and isinstance(engine.pipeline, WorkersPipeline)
        psutil.Process(engine.pipeline._fleet.workers[victim].process.pid).kill()
        for k, caller in enumerate(callers):
            tokens, text, reason = caller.result()
            assert (tokens, reason) == (plain([k, 3, 4], 150), "length")
            assert text == "".join(f"{token} " for token in tokens)
        status = service.status()
        assert status.state == "ready" and status.restarts == 1
        assert ["stage 0", "stage 1", "draft"][victim] in status.last_failure
    finally:
        service.close()


@pytest.mark.processes
def test_a_process_that_dies_while_nobody_asks_is_noticed() -> None:
    service, caller = Service(processes), Caller()
    try:
        first = service._engine
        assert first is not None and isinstance(first.pipeline, WorkersPipeline)
        first.pipeline._fleet.workers[1].process.kill()
        while service.status().restarts == 0 or service.status().state != "ready":
            time.sleep(0.02)
        service.submit([1], SamplingParams(max_tokens=5), caller)
        assert caller.result()[0] == plain([1], 5)
    finally:
        service.close()


def test_memory_that_is_kept_to_be_shared_counts_as_free() -> None:
    seen: list[tuple[int, int, int]] = []
    kept = threading.Event()

    class Watch(Observer):
        def on_engine_time(self, seconds: float) -> None:
            ledger = service.built.engine.ledger
            own = sum(one.capacity for one in ledger.kept)
            seen.append((service.status().kv_used, ledger.used, own))
            if own:
                kept.set()

    service = Service(sharing, observers=[Watch()])
    with closing(service):
        caller = Caller()
        service.submit([1], SamplingParams(max_tokens=30), caller)
        assert caller.result()[2] == "length" and kept.wait(10)
    assert seen[-1][0] == 0 < seen[-1][1]
    assert all(told == used - own for told, used, own in seen)


def test_an_update_copies_what_is_new_and_no_more() -> None:
    copied = []

    class Tokens(list[int]):
        def __getitem__(self, at: Any) -> Any:
            found = super().__getitem__(at)
            copied.append(len(found))
            return found

    request = Request(0, (1,), SamplingParams(max_tokens=900))
    track = Track.begin(request, 1000, count(), RequestStats(0.0))
    track.tokens = Tokens(range(800))
    one = _Running(Ticket(0, 1, track.stats), request, Reply(Words()), Caller(), track=track, sent=797)
    assert (one.num_tokens, one.unsent(), copied) == (799, [798, 799], [2])


class Fragile:
    """Starts well once, and then as often as it is told not at all."""

    def __init__(self, failures: int) -> None:
        self.left, self.engines = failures, list[Engine]()
        self.failure = "the machine is on fire"

    def __call__(self, listeners: Sequence[Listener]) -> Started[Words]:
        if self.engines and self.left > 0:
            self.left -= 1
            raise PipelineError(self.failure)
        started = inprocess(listeners)
        self.engines.append(started.engine)
        return started


def broken(engine: Engine) -> None:
    """From the next look on it has nothing but trouble."""

    def events(wait: float | None = None) -> list[object]:
        raise PipelineError("a wire was cut")

    engine.pipeline.events = events  # type: ignore[method-assign, assignment]


def test_who_fails_again_and_again_says_so_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullpipe.service._PAUSES_S", (0.0, 0.0, 0.0, 0.0, 0.3, 0.3))
    start, caller = Fragile(failures=5), Caller()
    service = Service(start)
    try:
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)
        broken(start.engines[0])
        tokens, _, reason = caller.result()
        assert reason == "error" and "on fire" in (caller.updates[-1].error or "")
        assert tokens == plain([1], len(tokens))
        assert service.status().state == "failed" and service.status().retry_after_s >= 1
        with pytest.raises(Unavailable, match="on fire"):
            service.submit([1], SamplingParams(), Caller())
        while service.status().state != "ready":
            time.sleep(0.02)
        again = Caller()
        service.submit([2], SamplingParams(max_tokens=9), again)
        assert again.result()[0] == plain([2], 9)
    finally:
        service.close()


def test_callers_hear_one_line_of_a_failure_and_the_log_all(monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("fullpipe.service._PAUSES_S", (0.0, 0.0, 0.0, 0.0, 30.0))
    start, caller = Fragile(failures=99), Caller()
    start.failure = "stage 1 failed: it died; it printed:\n    File /secret/path"
    with closing(Service(start)) as service, caplog.at_level("ERROR", "fullpipe.service"):
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)
        broken(start.engines[0])
        assert caller.result()[2] == "error"
        assert caller.updates[-1].error == service.status().last_failure == "stage 1 failed: it died"
        with pytest.raises(Unavailable) as refused:
            service.submit([1], SamplingParams(), Caller())
        assert "it died" in str(refused.value) and "secret" not in str(refused.value)
    assert "/secret/path" in caplog.text


def test_closing_does_not_wait_for_a_pipeline_that_is_being_built() -> None:
    go_on, building, caller = threading.Event(), threading.Event(), Caller()
    engines: list[Engine] = []

    def start(listeners: Sequence[Listener]) -> Started[Words]:
        if engines:
            building.set()
            assert go_on.wait(30)
        started = inprocess(listeners)
        engines.append(started.engine)
        return started

    service = Service(start)
    service.submit([1], SamplingParams(max_tokens=3900), caller)
    assert caller.begun.wait(10)
    broken(engines[0])
    assert building.wait(10)
    service.close(timeout=0.01)
    assert service._thread.is_alive() and caller.done.is_set() and caller.result()[2] == "abort"
    go_on.set()
    service._thread.join(10)
    assert not service._thread.is_alive() and service.status().state == "stopped"


def test_who_ended_in_the_step_that_failed_is_told_so() -> None:
    """The engine had ended it, and broke before it said so: the next one has nothing to do for it."""
    start, caller = Fragile(failures=0), Caller()
    with closing(Service(start)) as service:
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)
        [one] = service._running.values()

        def events(wait: float | None = None) -> list[object]:
            assert one.track is not None
            one.track.finished = "stop"
            raise PipelineError("a wire was cut")

        start.engines[0].pipeline.events = events  # type: ignore[method-assign, assignment]
        tokens, _, reason = caller.result()
        assert reason == "stop" and tokens == plain([1], len(tokens))
        assert service.drain(5)


def test_a_start_that_fails_at_once_is_the_callers_to_handle() -> None:
    def start(listeners: Sequence[Listener]) -> Started[Words]:
        raise FullpipeError("no such model")

    with pytest.raises(FullpipeError, match="no such model"):
        Service(start)


def test_rows_are_measured_on_the_stations_that_serve() -> None:
    curve = CostCurve.of(lambda rows: 2 + 0.5 * rows)
    pipeline = InProcessPipeline([ScriptedStage(k, 3, TRUTH) for k in range(3)], ScriptedDraft(TRUTH),
                                 costs=lambda station, rows, measured, context: curve(rows))
    engine = Engine(pipeline, make_policy("fullpipe"))
    stages, draft = cost_curves(engine)
    assert draft is not None
    for rows in (1, 3, 8, 64):
        assert stages(rows) == pytest.approx(curve(rows)) and draft(rows) == pytest.approx(curve(rows))
    assert cost_curves(engine, draft=False)[1] is None
    engine.check()
