"""Every figure is counted once, from the events, and anybody who heard the events could count it again."""

from __future__ import annotations

from collections import Counter

import pytest

from driving import TellingEngine
from fullpipe.engine import Stats, Totals
from fullpipe.events import Asked, Emitted, Finished, Launched, Preempted
from fullpipe.messages import Event
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}


def pipeline(stages: int = 3) -> InProcessPipeline:
    return InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)],
                             ScriptedDraft(TRUTH, accuracy=0.7))


def heard(count: int = 3, **options: object) -> tuple[TellingEngine, list[Event]]:
    events: list[Event] = []
    engine = TellingEngine(pipeline(), make_method("fullpipe"), listeners=[events.append], **options)
    for id in range(count):
        engine.submit(Request(id, tuple(range(id, id + 40)), SamplingParams(max_tokens=700 if options else 30)))
    while engine.busy:
        engine.step()
    return engine, events


@pytest.mark.parametrize("options", [{}, {"kv_cache_tokens": 1300, "spare_slots": 64}])
def test_totals_are_what_the_events_say(options: dict[str, object]) -> None:
    engine, events = heard(**options)
    totals, fates = engine.stats.totals, Counter(one.fate for one in events if isinstance(one, Emitted))
    assert (totals.hits, totals.misses, totals.emitted) == (fates["hit"], fates["miss"], fates.total())
    assert fates["last"] == totals.finished == sum(isinstance(one, Finished) for one in events) == 3
    launched = [one for one in events if isinstance(one, Launched)]
    assert totals.launched_rows == sum(len(one.nodes) for one in launched)
    assert totals.prompt_rows == sum(sum(one.prompt_rows.values()) for one in launched)
    asked = [one for one in events if isinstance(one, Asked)]
    assert totals.draft_rows == sum(sum(one.rows.values()) for one in asked)
    assert totals.preemptions == sum(isinstance(one, Preempted) for one in events)
    assert bool(totals.preemptions) == bool(options)


def test_requests_add_up_to_the_totals() -> None:
    engine, _ = heard()
    for name in ("hits", "misses", "launched_rows", "draft_rows"):
        assert sum(getattr(one, name) for one in engine.figures.values()) == getattr(engine.stats.totals, name)


def test_who_hears_the_same_events_counts_the_same() -> None:
    engine, events = heard()
    again = Stats()
    figures = {}
    for event in events:
        again(event)
        if isinstance(event, Finished):
            again.forget(event.request)
        for id in range(3):
            if id not in figures and id in again._requests:
                figures[id] = again.of(id)
    assert again.totals == engine.stats.totals and figures == engine.figures


def test_what_is_over_is_forgotten() -> None:
    engine, _ = heard()
    with pytest.raises(KeyError):
        engine.stats.of(0)
    engine.drain()
    stats = engine.stats
    assert not (stats._requests or stats._flights or stats._flying or stats._died)


def test_a_token_that_a_listener_ends_the_text_with_keeps_its_fate() -> None:
    """Only a text that the engine itself ends has a last token; who ends one later has speculated beyond it."""
    said: list[Emitted] = []
    engine = TellingEngine(pipeline(), make_method("fullpipe"))

    def third(event: Event) -> None:
        if isinstance(event, Emitted):
            said.append(event)
            if len(said) == 3:
                engine.end(0, "stop")

    engine.listen(third)
    sequence = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=40)))
    while engine.busy:
        engine.step()
    assert sequence.finished == "stop" and len(sequence.output) == len(said) == 3
    assert sequence.output[0] == hash_token([4, 8, 15], 50, 3)
    assert "last" not in {one.fate for one in said}


def test_totals_have_no_rates_before_there_was_a_hit_or_a_miss() -> None:
    assert (Totals(emitted=1).hit_rate, Totals(emitted=1).mean_acceptance_length) == (0.0, 0.0)
    assert (Totals(hits=6, misses=3).hit_rate, Totals(hits=6, misses=3).mean_acceptance_length) == (6 / 9, 3.0)
