"""Who is blamed when a pipeline fails again and again, and what counts as again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import count

import pytest

from fullpipe.errors import PipelineError
from fullpipe.messages import Event
from fullpipe.methods import make_method
from fullpipe.options import EngineOptions
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import SamplingParams
from fullpipe.service import Service, Update
from fullpipe.stations.scripted import ScriptedStage
from fullpipe.text import Detokenizer

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}


class Silent:
    """Words without text."""

    eos_ids: frozenset[int] = frozenset()
    special: Mapping[str, int] = {}

    def stream(self, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class Told:
    """A caller who waits for the end."""

    def __init__(self) -> None:
        self.end: Update | None = None
        self._done = threading.Event()

    def __call__(self, update: Update) -> None:
        if update.reason is not None:
            self.end = update
            self._done.set()

    def reason(self) -> str | None:
        assert self._done.wait(20)
        return self.end.reason if self.end else None


class Model:
    """What is served."""

    tokenizer, vocab_size, max_model_len = Silent(), 50, 4000


class Failing:
    """Starts pipelines with room for one request. While `left` lasts, one fails when it has looked for events more than
    so many times with a request running: at once is before it is launched, once before its first token. cause: the id
    of the request that must run for that; None: any."""

    def __init__(self, left: int, looks: int, cause: int | None = None) -> None:
        self.left, self._looks, self._cause = left, looks, cause
        self.service: Service[Silent] | None = None

    def __call__(self) -> Pipeline:
        pipeline = InProcessPipeline([ScriptedStage(k, 2, TRUTH) for k in range(2)], None, clock="wall")
        events, looks = pipeline.events, count()

        def failing(wait: float | None = None) -> list[Event]:
            happened = events(wait)
            running = self.service.engine._scheduler.running if self.service else {}
            guilty = bool(running) if self._cause is None else self._cause in running
            if guilty and self.left > 0 and next(looks) >= self._looks:
                self.left -= 1
                raise PipelineError("a wire was cut")
            return happened

        pipeline.events = failing  # type: ignore[method-assign]
        return pipeline


@contextmanager
def serving(start: Failing, monkeypatch: pytest.MonkeyPatch, seqs: int = 1) -> Iterator[Service[Silent]]:
    monkeypatch.setattr("fullpipe.supervision._PAUSES_S", (0.0,))
    options = EngineOptions(max_num_seqs=seqs, kv_cache_tokens=6000)
    with closing(Service(start(), make_method("pp"), Model(), options=options, rebuild=start)) as start.service:
        yield start.service


def test_who_only_waits_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that runs gets on between failures; the one behind it never gets its turn and is not ended for that."""
    with serving(Failing(left=6, looks=12), monkeypatch) as service:
        first, second = Told(), Told()
        service.submit([1], SamplingParams(max_tokens=400), first)
        service.submit([2], SamplingParams(max_tokens=20), second)
        assert (first.reason(), second.reason()) == ("length", "length")
        assert service.status().restarts == 6


def test_who_is_the_cause_is_ended_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs beside it fails as often and gets on as little. Those who come while it is on trial wait."""
    with serving(Failing(left=99, looks=1, cause=1), monkeypatch, seqs=3) as service:
        told = [Told() for _ in range(3)]
        for id, one in enumerate(told):
            service.submit([1 + id], SamplingParams(max_tokens=20), one)
        assert [one.reason() for one in told] == ["length", "error", "length"]
        assert "at last alone" in ((told[1].end and told[1].end.error) or "")
        late = Told()
        service.submit([9], SamplingParams(max_tokens=5), late)
        assert late.reason() == "length" and service.status().state == "ready"


def test_a_cause_that_runs_by_itself_is_found_before_the_service_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Failing(left=99, looks=1, cause=0), monkeypatch) as service:
        first, second = Told(), Told()
        service.submit([1], SamplingParams(max_tokens=9), first)
        service.submit([2], SamplingParams(max_tokens=9), second)
        assert (first.reason(), second.reason()) == ("error", "length")
        assert service.status().restarts == 5


def test_who_is_struck_by_chance_goes_on_alone_and_then_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four failures in a row before anybody has a token: a rule that counts to three would have ended them all."""
    with serving(Failing(left=4, looks=1), monkeypatch, seqs=3) as service:
        told = [Told() for _ in range(3)]
        for id, one in enumerate(told):
            service.submit([1 + id], SamplingParams(max_tokens=20), one)
        assert [one.reason() for one in told] == ["length"] * 3


def test_who_is_held_back_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for another's trial is not admitted; leaving ends it all the same."""
    start = Failing(left=4, looks=1)
    with serving(start, monkeypatch, seqs=2) as service:
        first, second = Told(), Told()
        monkeypatch.setattr(service._recovery.supervision, "got_on", lambda id: None)  # the trial does not end
        monkeypatch.setattr(service._recovery.supervision, "forget", lambda id: None)
        service.submit([1], SamplingParams(max_tokens=5), first)
        ticket = service.submit([2], SamplingParams(max_tokens=5), second)
        assert first.reason() == "length"
        service.cancel(ticket)
        assert second.reason() == "abort"


@pytest.mark.parametrize(("steady_s", "state_reached"), [(0.0, False), (1e9, True)], ids=["steady", "shaky"])
def test_failures_of_a_pipeline_that_stood_long_are_not_in_a_row(
        monkeypatch: pytest.MonkeyPatch, steady_s: float, state_reached: bool) -> None:
    monkeypatch.setattr("fullpipe.supervision._STEADY_S", steady_s)
    with serving(Failing(left=7, looks=0), monkeypatch) as service:
        told = Told()
        service.submit([1], SamplingParams(max_tokens=10), told)
        assert (told.reason() == "error") is state_reached
