"""The service over scripted stations: many callers, one engine, and a pipeline that fails now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from fullpipe.costs import CostCurve, Machine
from fullpipe.engine import Engine
from fullpipe.errors import Overloaded, PipelineError, PromptError, Unavailable, UsageError
from fullpipe.messages import Event
from fullpipe.methods import make_method
from fullpipe.options import EngineOptions
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.service import Asked, Service, Update
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token
from fullpipe.stations.spec import StationSpec
from fullpipe.supervision import Observer

VOCAB, SEED = 50, 3
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}


class Words:
    """Tokens that read as numbers."""

    eos_ids: frozenset[int] = frozenset()
    special: Mapping[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def token_bytes(self, token: int) -> bytes:
        return f"{token} ".encode()

    def stream(self, prompt: Sequence[int], skip_special_tokens: bool) -> Words:
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


class Model:
    """What is served."""

    tokenizer, vocab_size = Words(), VOCAB

    def __init__(self, max_model_len: int = 4000) -> None:
        self.max_model_len = max_model_len


def inprocess() -> Pipeline:
    return InProcessPipeline([ScriptedStage(k, 3, TRUTH) for k in range(3)], ScriptedDraft(TRUTH), clock="wall")


def processes() -> Pipeline:
    specs = [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                         {"index": k, "num_stages": 2, "truth": TRUTH, "delay_s": 0.002}) for k in range(2)]
    draft = StationSpec("fullpipe.stations.drafts.scripted:ScriptedDraft", {"truth": TRUTH})
    return WorkersPipeline(specs, draft, heartbeat_timeout=2.0, timeout=5.0)


def serve(start: Callable[[], Pipeline] = inprocess, *, max_model_len: int = 4000, share: bool = False,
          **more: Any) -> Service[Words]:
    """A service that starts its pipeline like this, and again after a failure."""
    options = EngineOptions(max_num_seqs=4, kv_cache_tokens=6000, enable_prefix_caching=share)
    machine = Machine(3, CostCurve({1: 1.0})) if start is inprocess else None
    return Service(start(), make_method("fullpipe", machine=machine), Model(max_model_len), options=options,
                   rebuild=start, **more)


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
    made = serve(max_waiting=8)
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
    with closing(serve(max_model_len=10**6)) as long:
        assert long.max_model_len == long.engine.memory.longest < 6000
        with pytest.raises(PromptError, match="the context holds"):
            long.submit([1] * 6000, SamplingParams(max_tokens=1), Caller())


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
    service, caller = serve(), Caller()
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
    service, callers = serve(processes), [Caller() for _ in range(6)]
    try:
        for k, caller in enumerate(callers):
            service.submit([k, 3, 4], SamplingParams(max_tokens=150), caller)
        assert callers[0].begun.wait(20)
        pipeline = service.engine.pipeline
        assert isinstance(pipeline, WorkersPipeline)
        psutil.Process(pipeline._fleet.workers[victim].process.pid).kill()
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
    service, caller = serve(processes), Caller()
    try:
        first = service.engine.pipeline
        assert isinstance(first, WorkersPipeline)
        first._fleet.workers[1].process.kill()
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
            memory = service.engine._scheduler.memory
            own, size = memory._paths.num_blocks, memory._pool.size
            seen.append((service.status().kv_used, memory._pool.num_used * size, own * size))
            if own:
                kept.set()

    service = serve(share=True, listeners=[Watch()])
    with closing(service):
        caller = Caller()
        service.submit([1], SamplingParams(max_tokens=30), caller)
        assert caller.result()[2] == "length" and kept.wait(10)
    assert seen[-1][0] == 0 < seen[-1][1]
    assert all(told == used - own for told, used, own in seen)


class Fragile:
    """Starts well once, and then as often as it is told not at all."""

    def __init__(self, failures: int) -> None:
        self.left, self.pipelines = failures, list[Pipeline]()
        self.failure = "the machine is on fire"

    def __call__(self) -> Pipeline:
        if self.pipelines and self.left > 0:
            self.left -= 1
            raise PipelineError(self.failure)
        self.pipelines.append(inprocess())
        return self.pipelines[-1]


def broken(pipeline: Pipeline) -> None:
    """From the next look on it has nothing but trouble."""

    def events(wait: float | None = None) -> list[Event]:
        raise PipelineError("a wire was cut")

    pipeline.events = events  # type: ignore[method-assign]


def test_who_fails_again_and_again_says_so_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullpipe.supervision._PAUSES_S", (0.0, 0.0, 0.0, 0.0, 0.3, 0.3))
    start, caller = Fragile(failures=5), Caller()
    service = serve(start)
    try:
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)
        broken(start.pipelines[0])
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


def test_who_has_patience_does_not_give_up_so_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that are lost may come back: requests wait for them."""
    monkeypatch.setattr("fullpipe.supervision._PAUSES_S", (0.0, 0.01))
    start, caller = Fragile(failures=20), Caller()
    with closing(serve(start, patience_s=60.0)) as service:
        service.submit([1], SamplingParams(max_tokens=1500), caller)
        assert caller.begun.wait(10)
        broken(start.pipelines[0])
        tokens, _, reason = caller.result()
        assert reason == "length" and tokens == plain([1], 1500)
        assert service.status().restarts == 21


def test_callers_hear_one_line_of_a_failure_and_the_log_all(monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("fullpipe.supervision._PAUSES_S", (0.0, 0.0, 0.0, 0.0, 30.0))
    start, caller = Fragile(failures=99), Caller()
    start.failure = "stage 1 failed: it died; it printed:\n    File /secret/path"
    with closing(serve(start)) as service, caplog.at_level("ERROR", "fullpipe.supervision"):
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)
        broken(start.pipelines[0])
        assert caller.result()[2] == "error"
        assert caller.updates[-1].error == service.status().last_failure == "stage 1 failed: it died"
        with pytest.raises(Unavailable) as refused:
            service.submit([1], SamplingParams(), Caller())
        assert "it died" in str(refused.value) and "secret" not in str(refused.value)
    assert "/secret/path" in caplog.text


def test_closing_does_not_wait_for_a_pipeline_that_is_being_built() -> None:
    go_on, building, caller = threading.Event(), threading.Event(), Caller()
    pipelines: list[Pipeline] = []

    def start() -> Pipeline:
        if pipelines:
            building.set()
            assert go_on.wait(30)
        pipelines.append(inprocess())
        return pipelines[-1]

    service = serve(start)
    service.submit([1], SamplingParams(max_tokens=3900), caller)
    assert caller.begun.wait(10)
    broken(pipelines[0])
    assert building.wait(10)
    service.close(timeout=0.01)
    assert service._thread.is_alive() and caller.done.is_set() and caller.result()[2] == "abort"
    go_on.set()
    service._thread.join(10)
    assert not service._thread.is_alive() and service.status().state == "stopped"


def test_who_ended_in_the_step_that_failed_is_told_so() -> None:
    """The engine had ended it, and broke before it said anything else: the next pipeline has nothing to do for it."""
    start, caller = Fragile(failures=0), Caller()
    with closing(serve(start)) as service:
        ticket = service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)

        def events(wait: float | None = None) -> list[Event]:
            service.engine.end(ticket.id, "stop")
            raise PipelineError("a wire was cut")

        start.pipelines[0].events = events  # type: ignore[method-assign]
        tokens, _, reason = caller.result()
        assert reason == "stop" and tokens == plain([1], len(tokens))
        assert service.drain(5)


def test_without_another_pipeline_the_first_failure_is_the_end() -> None:
    pipeline, caller, late = inprocess(), Caller(), Caller()
    service = Service(pipeline, make_method("fullpipe"), Model())
    with closing(service):
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)
        broken(pipeline)
        tokens, _, reason = caller.result()
        assert reason == "error" and caller.updates[-1].error == "a wire was cut" and tokens == plain([1], len(tokens))
        assert isinstance(caller.updates[-1].failure, PipelineError) and service.status().state == "failed"
        with pytest.raises(Unavailable, match=r"the service is failed.*\n.*Make another `LLM`"):
            service.submit([1], SamplingParams(), late)
        with pytest.raises(Unavailable):
            service.call(lambda engine: engine.drain())


def test_a_stop_string_ends_the_text_and_no_token_follows() -> None:
    """The text is made here, not in the engine, which is told so while it tells of the token."""
    whole = plain([7], 40)
    caller = Caller()
    with closing(serve()) as service:
        service.submit([7], SamplingParams(max_tokens=40, stop=(f"{whole[9]} {whole[10]} ",)), caller)
        tokens, text, reason = caller.result()
        assert (tokens, reason) == (whole[:11], "stop")
        assert text == "".join(f"{token} " for token in whole[:9])
        assert service.drain(5)


def test_several_come_in_at_the_same_moment() -> None:
    """In virtual time, which real time has no part in, their figures are the same every time."""

    def figures() -> list[tuple[float, float | None]]:
        pipeline = InProcessPipeline([ScriptedStage(k, 3, TRUTH) for k in range(3)], ScriptedDraft(TRUTH))
        callers = [Caller() for _ in range(6)]
        with closing(Service(pipeline, make_method("fullpipe"), Model(), options=EngineOptions(max_num_seqs=3))) as one:
            tickets = one.submit_all([Asked([k], SamplingParams(max_tokens=20), caller)
                                      for k, caller in enumerate(callers)])
            assert [caller.result()[0] for caller in callers] == [plain([k], 20) for k in range(6)]
        return [(ticket.stats.started, ticket.stats.last_token) for ticket in tickets]

    assert figures() == figures()


def test_an_action_between_two_steps() -> None:
    seen: list[str] = []
    with closing(serve()) as service:
        service.call(lambda engine: engine.use(make_method("pp")))
        service.call(lambda engine: seen.append(engine.method.name))
        with pytest.raises(UsageError, match="too small"):
            service.call(raising(UsageError("too small")))
    assert seen == ["pp"]


def raising(error: Exception) -> Callable[[Engine], None]:
    def act(engine: Engine) -> None:
        raise error

    return act


def test_a_token_that_ends_the_text_is_not_read() -> None:
    whole, caller = plain([7], 10), Caller()
    end = next(token for place, token in enumerate(whole) if place >= 4 and whole.index(token) == place)
    with closing(serve()) as service:
        service.submit([7], SamplingParams(max_tokens=40, stop_token_ids=(end,)), caller)
        tokens, text, reason = caller.result()
    assert (tokens, reason) == (whole[: whole.index(end) + 1], "stop")
    assert text == "".join(f"{token} " for token in tokens[:-1])


# ---- what somebody else does wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("calls", [False, True], ids=["submit", "call"])
def test_who_comes_while_it_closes_is_answered(monkeypatch: pytest.MonkeyPatch, calls: bool) -> None:
    """Closing begins when the caller has been told that the service is open, and has all the time in the world."""
    service, caller = serve(), Caller()
    check, closes = service._recovery.check_open, threading.Thread(target=service.close)

    def slow() -> None:
        check()
        closes.start()
        closes.join(1.0)

    monkeypatch.setattr(service._recovery, "check_open", slow)
    if calls:
        try:
            service.call(lambda engine: None)
        except Unavailable as refused:
            assert "the service is stopped" in str(refused)
    else:
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.result()[2] == "abort"
    closes.join(10)
    monkeypatch.undo()
    with pytest.raises(Unavailable, match="stopped"):
        service.submit([1], SamplingParams(), Caller())


def test_an_action_that_waits_when_the_service_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullpipe.supervision._PAUSES_S", (0.0, 0.0, 0.0, 0.0, 30.0))
    start, refused = Fragile(failures=99), list[str]()
    begun, go_on = threading.Event(), threading.Event()

    def fails(engine: Engine) -> None:
        begun.set()
        assert go_on.wait(10)
        raise PipelineError("a wire was cut")

    with closing(serve(start)) as service:

        def ask(action: Callable[[Engine], None]) -> None:
            with pytest.raises((PipelineError, Unavailable)) as told:
                service.call(action)
            refused.append(str(told.value))

        callers = [threading.Thread(target=ask, args=(action,)) for action in (fails, lambda engine: None)]
        callers[0].start()
        assert begun.wait(10)
        callers[1].start()
        while len(service._calls) < 1:
            time.sleep(0.01)
        go_on.set()
        for one in callers:
            one.join(10)
        assert sorted(refused)[0] == "a wire was cut" and "the service is failed" in sorted(refused)[1]


@pytest.mark.parametrize("error", [PipelineError("it is lost"), UsageError("it is lost"), RuntimeError("it is lost")],
                         ids=lambda error: type(error).__name__)
def test_an_action_after_which_the_engine_is_broken_is_a_failure_of_the_pipeline(error: Exception) -> None:
    def breaks(engine: Engine) -> None:
        real = engine.pipeline.events

        def events(wait: float | None = None) -> list[Event]:
            engine.pipeline.events = real  # type: ignore[method-assign]
            raise error

        engine.pipeline.events = events  # type: ignore[method-assign]
        engine.step(0.0)

    start, caller = Fragile(failures=0), Caller()
    with closing(serve(start)) as service:
        with pytest.raises(PipelineError, match="it is lost") as told:
            service.call(breaks)
        assert told.value is not error and told.value.__cause__ is error
        service.submit([1], SamplingParams(max_tokens=9), caller)
        assert caller.result()[0] == plain([1], 9)
        assert service.status().restarts == 1 and len(start.pipelines) == 2


def test_a_caller_who_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fails(update: Update) -> None:
        raise RuntimeError("my pipe is broken")

    good = [Caller() for _ in range(2)]
    with closing(serve()) as service:
        for deliver in (fails, good[0], fails, good[1]):
            service.submit([1], SamplingParams(max_tokens=30), deliver)
        assert [caller.result()[0] for caller in good] == [plain([1], 30)] * 2
        assert service.drain(5) and service.status().restarts == 0
    assert "my pipe is broken" in caplog.text


class Clumsy(Observer):
    """Fails whenever it is told anything."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def on_finish(self, *news: object) -> None:
        self._fail("finish")

    def on_restart(self, station: str, reason: str) -> None:
        self._fail("restart")

    def on_engine_time(self, seconds: float) -> None:
        self._fail("time")

    def _fail(self, what: str) -> None:
        self.told.add(what)
        raise RuntimeError(what)


def test_an_observer_who_fails_harms_nobody() -> None:
    start, clumsy, caller = Fragile(failures=0), Clumsy(), Caller()
    with closing(serve(start, listeners=[clumsy])) as service:
        service.submit([1], SamplingParams(max_tokens=2000), caller)
        assert caller.begun.wait(10)
        broken(start.pipelines[0])
        assert caller.result()[::2] == (plain([1], 2000), "length")
        assert service.drain(5) and service.status().restarts == 1
    assert clumsy.told == {"finish", "restart", "time"}


class Stumbling(Words):
    """Of its texts the first cannot be made: at its third token, or only at its end."""

    def __init__(self, at_end: bool) -> None:
        self._at_end, self._left = at_end, -1
        self._streams = 0

    def stream(self, prompt: Sequence[int], skip_special_tokens: bool) -> Words:
        self._streams += 1
        if self._streams > 1:
            return Words()
        self._left = 3
        return self

    def push(self, token: int) -> str:
        self._left -= 1
        if self._left == 0 and not self._at_end:
            raise ValueError("no such token")
        return super().push(token)

    def finish(self) -> str:
        raise ValueError("no such token")


@pytest.mark.parametrize("at_end", [False, True])
def test_a_text_that_cannot_be_made_ends_that_request_alone(at_end: bool) -> None:
    class Odd(Model):
        tokenizer = Stumbling(at_end)

    unlucky, lucky = Caller(), Caller()
    with closing(Service(inprocess(), make_method("fullpipe"), Odd())) as service:
        for caller in (unlucky, lucky):
            service.submit([1], SamplingParams(max_tokens=30), caller)
        tokens, _, reason = unlucky.result()
        assert (tokens, reason) == (plain([1], 30 if at_end else 3), "error")
        assert unlucky.updates[-1].error == "ValueError: no such token"
        assert lucky.result()[::2] == (plain([1], 30), "length")
        assert service.drain(5) and service.status().restarts == 0


def test_who_cannot_be_ended_in_the_engine_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    service, caller = serve(), Caller()
    service.submit([1], SamplingParams(max_tokens=3900), caller)
    assert caller.begun.wait(10)

    def end(id: int, reason: str) -> None:
        raise RuntimeError("a table is wrong")

    monkeypatch.setattr(service.engine, "end", end)
    service.close()
    assert caller.result()[2] == "abort"


def test_a_failure_while_draining_is_the_end_where_no_other_pipeline_is() -> None:
    pipeline, caller = inprocess(), Caller()
    with closing(Service(pipeline, make_method("fullpipe"), Model())) as service:
        service.submit([1], SamplingParams(max_tokens=3900), caller)
        assert caller.begun.wait(10)
        assert not service.drain(0.0)
        broken(pipeline)
        assert caller.result()[2] == "error" and service.drain(5)
