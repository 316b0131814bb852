"""Asking the draft again about what is in flight: the text stays, and late siblings save misses.

`Changeable` answers a node better each time it is asked, as a source does that reads hidden states; and it may keep
answers back for a later reply.
"""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving import TellingEngine
from fullpipe.engine import RequestStats
from fullpipe.events import Emitted
from fullpipe.messages import Expansion, Flight
from fullpipe.methods import WITH_REFRESH, make_method, options_of
from fullpipe.pipeline.durations import unit_costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token

VOCAB, SEED = 50, 3
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}
PROMPT = (4, 8, 15)
FIRST = (0.5, 0.3, 0.1)
AGAIN = (0.9, 0.05, 0.03)


class Changeable(ScriptedDraft):
    """The truth comes second when a node is first asked about, in `wrong` of 10 cases, and first from then on.

    keep: of every so many answers one waits for the reply to the next job (0: none), in reverse order.
    """

    def __init__(self, wrong: int, keep: int = 0) -> None:
        super().__init__(TRUTH, accuracy=1.0)
        self.wrong, self.keep = wrong, keep
        self.times: dict[int, int] = {}
        self.kept: list[Expansion] = []
        self.jobs: list[list[int]] = []

    def run(self, job: Flight) -> list[Expansion]:
        fresh = [self.changed(expansion) for expansion in super().run(job)]
        self.jobs.append([expansion.node for expansion in fresh])
        late = [one for one in fresh if self.keep and hash_token([one.node, job.id], self.keep, 1) == 0]
        said = [*self.kept[::-1], *(one for one in fresh if one not in late)]
        self.kept = late
        return said

    def changed(self, expansion: Expansion) -> Expansion:
        node, (truth, other, third, *_) = expansion.node, expansion.tokens
        time = self.times[node] = self.times.get(node, -1) + 1
        if time == 0 and hash_token([node], 10, 7) < self.wrong:
            return Expansion(node, [other, truth, third], [math.log(p) for p in FIRST], [-1] * 3)
        return Expansion(node, [truth, other, third], [math.log(p) for p in (AGAIN if time else FIRST)], [-1] * 3)


def plain(count: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(hash_token(tokens, VOCAB, SEED))
    return tokens[len(PROMPT):]


def run(source: Changeable, method: str, *, stages: int = 6, tokens: int = 60, width: int | None = None,
        refresh: bool = True, spare: int | None = None, costs=unit_costs, link_s: float = 0.0) -> RequestStats:
    pipeline = InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)], source, costs=costs,
                                 links=Links.even(stages, Link(link_s)))
    can = refresh and method in WITH_REFRESH
    made = make_method(method, **options_of(method, width=width, refresh=can))
    engine = TellingEngine(pipeline, made, prefill_chunk=2, spare_slots=spare)
    engine.submit(Request(0, PROMPT, SamplingParams(max_tokens=tokens)))
    said = []
    while engine.busy:
        said += [event.token for event in engine.step() if isinstance(event, Emitted)]
        engine.check()
    assert said == plain(tokens)
    assert not engine._jobs.asked and not engine._flights.launched, "nothing is remembered of a request that is over"
    return engine.figures[0]


@given(method=st.sampled_from(["pipedec", "spd", "ppsd", "fullpipe"]), stages=st.integers(1, 8),
       width=st.integers(1, 5), wrong=st.integers(0, 10), keep=st.sampled_from([0, 1, 2, 3]),
       durations=st.lists(st.integers(1, 20), min_size=1, max_size=7), link=st.sampled_from([0.0, 0.3, 5.0]),
       spare=st.sampled_from([2, 5, 200]))
def test_the_text_is_the_same_however_answers_change_and_when_they_come(
        method: str, stages: int, width: int, wrong: int, keep: int, durations: list[int], link: float,
        spare: int) -> None:
    cycle = itertools.cycle(durations)
    run(Changeable(wrong, keep), method, stages=stages, width=width, tokens=25, spare=spare, link_s=link,
        costs=lambda station, rows, measured, context: next(cycle) / 4 if rows else 0.0)


@pytest.mark.parametrize(("method", "width"), [("spd", 1), ("spd", 2), ("fullpipe", 1)])
def test_a_better_second_answer_saves_steps(method: str, width: int) -> None:
    steps = {refresh: run(Changeable(5), method, width=width, refresh=refresh).steps_per_token
             for refresh in (False, True)}
    assert steps[True] < 0.95 * steps[False]


def test_a_late_sibling_costs_only_the_step_by_which_it_is_late() -> None:
    """Every first answer is wrong, every second right: each token is in flight one step late, and never a whole
    traversal."""
    stats = run(Changeable(10), "spd", stages=8, tokens=50)
    assert stats.hit_rate == 1
    assert stats.steps == 8 + 2 * 49


def test_without_refresh_every_wrong_first_answer_is_a_miss() -> None:
    stats = run(Changeable(10), "spd", stages=8, tokens=20, refresh=False)
    assert (stats.hits, stats.misses, stats.steps) == (0, 19, 8 * 20)


@pytest.mark.parametrize("method", WITH_REFRESH)
def test_a_refresh_rides_along_behind_new_nodes(method: str) -> None:
    source = Changeable(3)
    run(source, method, width=1)
    seen: set[int] = set()
    again = 0
    for nodes in source.jobs:
        new = [node for node in nodes if node not in seen]
        assert nodes[: len(new)] == new, "new ones come first"
        assert new or not nodes, "a job for old ones alone delays the next new one"
        again += len(nodes) - len(new)
        seen |= set(nodes)
    assert again > 20


def test_without_refresh_nobody_is_asked_twice() -> None:
    source = Changeable(3)
    run(source, "fullpipe", refresh=False)
    assert set(source.times.values()) == {0}


def test_what_the_draft_may_be_waiting_for_is_cancelled() -> None:
    """When nodes die about which the draft owes an answer, it is told, whether they were launched or not."""

    class Telling(InProcessPipeline):
        cancelled: tuple[int, ...] = ()

        def cancel(self, nodes: list[int]) -> None:
            self.cancelled += tuple(nodes)
            super().cancel(nodes)

    pipeline = Telling([ScriptedStage(k, 3, TRUTH) for k in range(3)], ScriptedDraft(TRUTH, accuracy=0.5))
    engine = TellingEngine(pipeline, make_method("fullpipe", width=1))
    engine.submit(Request(0, PROMPT, SamplingParams(max_tokens=20)))
    while not set(engine._jobs.asked) - set(engine._flights.launched):
        engine.step()
    owed, before = set(engine._jobs.asked), set(pipeline.cancelled)
    engine.end(0)
    assert owed <= set(pipeline.cancelled) - before
    assert not engine._jobs.asked
    engine.drain()
