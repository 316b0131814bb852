"""One contract for every method, whatever stations cost: the engine never stands still, for where a root waits a flight
is under way or a draft job is, and each text is the model's."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driving import TellingEngine
from fullpipe.costs import CostCurve, Machine
from fullpipe.messages import Expansion, Flight
from fullpipe.methods import METHODS, WITH_DEPTH, make_method, options_of
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.tree import State
from fullpipe.stations.base import DraftLike
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.ngram import NgramDraft
from fullpipe.stations.drafts.scripted import ScriptedDraft, TapChecker
from fullpipe.stations.scripted import ScriptedStage, hash_token

VOCAB = 12  # few, so that text repeats itself
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": 3}
KNOTS = (1, 2, 4, 8, 16, 32)


class Empty(ScriptedDraft):
    """Answers every question, and knows nothing."""

    def run(self, job: Flight) -> list[Expansion]:
        return [Expansion(one.node, [], [], []) for one in super().run(job)]


class Mute(ScriptedDraft):
    """Answers some of the questions, and the others never, as a draft that reads hidden states may for long."""

    def run(self, job: Flight) -> list[Expansion]:
        return [one for one in super().run(job) if hash_token([one.node], 3, 5)]


DRAFTS = {"good": lambda: ScriptedDraft(TRUTH, accuracy=0.9, vocab=VOCAB),
          "sure and wrong": lambda: ScriptedDraft({**TRUTH, "seed": 4}, accuracy=1.0, vocab=VOCAB),
          "modest": lambda: ScriptedDraft(TRUTH, accuracy=0.05, coverage=0.3, vocab=VOCAB),
          "empty": lambda: Empty(TRUTH), "mute": lambda: Mute(TRUTH, vocab=VOCAB), "ngram": NgramDraft,
          "mix": lambda: Mix([ScriptedDraft(TRUTH, vocab=VOCAB), NgramDraft()])}


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    """Free rows, dear rows, and rows that get dear at once."""
    steps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.5, 4.0]), min_size=len(KNOTS), max_size=len(KNOTS)))
    first = draw(st.sampled_from([1e-6, 0.01, 1.0, 5.0]))
    return CostCurve({rows: first + sum(steps[: at + 1]) for at, rows in enumerate(KNOTS)})


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Stations as they are; links there and back in equal shares."""
    stages = [draw(curves()) for _ in range(draw(st.integers(1, 4)))]
    seconds = st.sampled_from([0.0, 0.01, 1.0, 30.0])
    return Machine(len(stages), draft=draw(curves()), link_s=len(stages) * draw(seconds), shared=draw(st.booleans()),
                   draft_link_s=draw(seconds), stages=stages)


def pipeline_of(machine: Machine, draft: DraftLike, *, taps: bool = False) -> InProcessPipeline:
    link, count = Link(machine.link_s / machine.num_stages), machine.num_stages

    def costs(station: str, rows: int, measured: float, context: int) -> float:
        curve = machine.draft if station == "draft" else machine.stages[int(station.split()[1])]
        return curve(rows) if curve else 0.0

    stages = [ScriptedStage(k, count, TRUTH, taps=[k + 1] if taps else ()) for k in range(count)]
    return InProcessPipeline(stages, draft, costs=costs,
                             links=Links([link] * (count - 1), landing=link, draft=Link(machine.draft_link_s / 2)),
                             device_of=lambda station: "stage 0" if machine.shared and station == "draft" else station)


def plain(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(hash_token(tokens, VOCAB, 3))
    return tokens[len(prompt):]


@pytest.mark.parametrize("method", METHODS)
@given(machine=machines(), told=st.sampled_from(["right", "nothing", "wrong"]), other=curves(),
       draft=st.sampled_from(sorted(DRAFTS)), width=st.sampled_from([None, None, 1, 3]),
       spare=st.sampled_from([None, 0, 1, 9]), tokens=st.lists(st.integers(1, 40), min_size=1, max_size=2),
       chunk=st.sampled_from([1, 3, 64]), prompt=st.integers(1, 9))
def test_no_machine_and_no_draft_makes_it_stand_still(method: str, machine: Machine, told: str, other: CostCurve,
                                                      draft: str, width: int | None, spare: int | None,
                                                      tokens: list[int], chunk: int, prompt: int) -> None:
    if method in WITH_DEPTH and draft == "mute":
        draft = "empty"  # those wait for every answer
    known = {"right": machine, "nothing": None,
             "wrong": Machine(machine.num_stages, other, machine.stage, shared=machine.shared)}[told]
    made = make_method(method, **options_of(method, width=width), machine=known)
    engine = TellingEngine(pipeline_of(machine, DRAFTS[draft]()), made, prefill_chunk=chunk,
                           spare_slots=None if spare is None else made.least_slots + spare)
    sequences = [engine.submit(Request(id, (id, *range(1, prompt)), SamplingParams(max_tokens=count)))
                 for id, count in enumerate(tokens)]
    for _ in range(2000):
        if not engine.busy:
            break
        engine.step()
        engine.check()
        waits = any(one.tree.root.state is State.PROPOSED and one.stages.rows >= one.tree.root.position
                    for one in engine._scheduler.running.values())
        if waits and engine._stage_ready:
            assert engine._flights.under_way or not engine._draft_ready, "a root waits for nothing"
    assert [one.output for one in sequences] == [plain(one.request.prompt, count)
                                                 for one, count in zip(sequences, tokens)]


@settings(max_examples=50)
@given(machine=machines(), draft=st.sampled_from(sorted(DRAFTS)), luck=st.integers(0, 99))
def test_nor_does_a_request_more_or_less(machine: Machine, draft: str, luck: int) -> None:
    """Whoever has decided for one sequence alone goes over to many, and comes back."""
    rng = random.Random(luck)
    engine = TellingEngine(pipeline_of(machine, DRAFTS[draft]()), make_method("fullpipe", machine=machine))
    sequences = [engine.submit(Request(0, (1, 2), SamplingParams(max_tokens=40)))]
    for _ in range(3000):
        if not engine.busy:
            break
        if len(sequences) < 4 and rng.random() < 0.05:
            sequences.append(engine.submit(Request(len(sequences), (len(sequences), 2),
                                                   SamplingParams(max_tokens=rng.randint(1, 30)))))
        engine.step()
        engine.check()
    assert all(one.output == plain(one.request.prompt, one.request.params.max_tokens) for one in sequences)


@settings(max_examples=50)
@given(machine=machines(), told=st.booleans(), good=st.booleans())
def test_a_root_is_not_held_for_an_answer_that_waits_for_its_launch(machine: Machine, told: bool, good: bool) -> None:
    """An early exit reads hidden states, and nothing can be said of a node before it has been at stage 0."""
    draft = TapChecker(TRUTH, vocab=VOCAB, accuracy=0.9 if good else 0.3)
    engine = TellingEngine(pipeline_of(machine, draft, taps=True),
                           make_method("fullpipe", machine=machine if told else None))
    sequence = engine.submit(Request(0, (1, 2, 3), SamplingParams(max_tokens=40)))
    for _ in range(2000):
        if engine.busy:
            engine.step()  # an imagined pipeline raises where all wait for one another
    assert sequence.output == plain(sequence.request.prompt, 40)
