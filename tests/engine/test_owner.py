"""Who owns an engine hears everything last, and is not dropped; a step that it breaks is broken."""

from __future__ import annotations

import time

import pytest

from fullpipe.engine import Engine
from fullpipe.errors import PipelineError
from fullpipe.events import Admitted, Emitted, Finished, Launched
from fullpipe.messages import Event
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.scripted import ScriptedStage

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}


def pipeline(clock: str = "virtual") -> InProcessPipeline:
    return InProcessPipeline([ScriptedStage(0, 1, TRUTH)], clock=clock)  # type: ignore[arg-type]


def run(engine: Engine, id: int = 0) -> None:
    engine.submit(Request(id, (4, 8, 15), SamplingParams(max_tokens=5)))
    while engine.busy:
        engine.step()


def test_the_owner_ends_a_text_and_those_who_watch_hear_it_in_order() -> None:
    heard: list[Event] = []
    engine: Engine

    def own(event: Event) -> None:
        if isinstance(event, Emitted) and event.position == 4:
            engine.end(event.request, "stop")

    engine = Engine(pipeline(), make_method("pp"), listeners=[heard.append], owner=own)
    run(engine)
    told = [event for event in heard if isinstance(event, (Emitted, Finished))]
    assert [type(event) for event in told] == [Emitted, Emitted, Finished]


def test_what_the_owner_raises_breaks_the_step() -> None:
    def own(event: Event) -> None:
        if isinstance(event, Emitted):
            raise RuntimeError("cannot read this token")

    engine = Engine(pipeline(), make_method("pp"), owner=own)
    with pytest.raises(RuntimeError, match="cannot read"):
        run(engine)
    with pytest.raises(PipelineError, match="cannot go on"):
        engine.step()
    assert engine.stats.totals.emitted == 1, "it was counted before"


def test_time_goes_on_while_nothing_happens() -> None:
    """A request that comes after an idle while is not told to have been launched before it came."""
    told: list[Event] = []
    engine = Engine(pipeline("wall"), make_method("pp"), listeners=[told.append])
    run(engine)
    time.sleep(0.05)
    told.clear()
    began = engine.now()
    run(engine, 1)
    for event in told:
        if isinstance(event, (Admitted, Launched)):
            assert event.time >= began
