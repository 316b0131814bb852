"""Lossy acceptance over scripted stations: what may stand where the target would have said something else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving import TellingEngine
from fullpipe.engine import RequestStats
from fullpipe.events import Emitted
from fullpipe.messages import Flight, Landed
from fullpipe.methods import METHODS, make_method, options_of
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token

VOCAB, SEED, STAGES = 12, 3, 5
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}
PROMPT = (4, 8, 11)


class Lenient(ScriptedStage):
    """A last stage that lets the `count` tokens after its pick pass too, at positions of which `every` is a divisor."""

    def __init__(self, count: int, every: int = 1) -> None:
        super().__init__(STAGES - 1, STAGES, TRUTH)
        self.count, self.every = count, every

    def run(self, flight: Flight, hidden: Any) -> Any:
        landed = super().run(flight, hidden)
        assert isinstance(landed, Landed)
        positions = [part.positions[row] for part in flight.parts for row in range(len(part)) if part.wants[row]]
        landed.others = [passing(token, self.count) if position % self.every == 0 else []
                         for token, position in zip(landed.tokens, positions)]
        return landed


def passing(token: int, count: int) -> list[int]:
    return [(token + 1 + i) % VOCAB for i in range(count)]


def run(method: str, last: ScriptedStage, *, accuracy: float, tokens: int = 30,
        width: int | None = None, prompt: tuple[int, ...] = PROMPT) -> tuple[list[Emitted], RequestStats]:
    stages = [*(ScriptedStage(k, STAGES, TRUTH) for k in range(STAGES - 1)), last]
    draft = ScriptedDraft(TRUTH, accuracy=accuracy, coverage=accuracy, vocab=VOCAB)
    engine = TellingEngine(InProcessPipeline(stages, draft), make_method(method, **options_of(method, width=width)),
                           fanout=4)
    engine.submit(Request(0, prompt, SamplingParams(max_tokens=tokens, accept_typical=0.3)))
    said = []
    while engine.busy:
        said += [event for event in engine.step() if isinstance(event, Emitted)]
        engine.check()
    return said, engine.figures[0]


def truths(said: list[Emitted]) -> list[int]:
    """What the target says at each place of that very text."""
    path = [*PROMPT, *(event.token for event in said)]
    return [hash_token(path[:end], VOCAB, SEED) for end in range(len(PROMPT), len(path))]


@given(method=st.sampled_from(sorted(METHODS)), accuracy=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
       count=st.integers(0, 8), every=st.integers(1, 7), width=st.integers(1, 6))
def test_what_was_altered_is_counted_and_everything_else_is_the_targets(
        method: str, accuracy: float, count: int, every: int, width: int) -> None:
    said, stats = run(method, Lenient(count, every), accuracy=accuracy, width=width)
    truth = truths(said)
    for event, token in zip(said, truth, strict=True):
        assert event.altered == (event.token != token)
        if event.altered:
            assert event.hit and event.token in passing(token, count) and (event.position - 1) % every == 0
    assert stats.altered == sum(event.altered for event in said)
    if stats.altered == 0:
        assert [event.token for event in said] == truths(said)
    if count == 0 or method == "pp":
        assert stats.altered == 0


def test_the_targets_own_token_goes_before_all_others() -> None:
    """The draft always guesses right and three wrong ones beside it, all of which would pass."""
    said, stats = run("fullpipe", Lenient(VOCAB - 1), accuracy=1.0, width=8)
    assert stats.altered == 0 and stats.hit_rate == 1
    assert [event.token for event in said] == truths(said)


def test_a_draft_that_is_always_wrong_is_taken_at_its_word_where_everything_passes() -> None:
    _, stats = run("spd", Lenient(VOCAB - 1), accuracy=0.0)
    assert stats.hit_rate == 1
    assert stats.altered == 29, "all but the last, which nobody guesses"
    assert stats.steps == STAGES + 29


@pytest.mark.parametrize("prompt", [(1,), (2,), (4,), (5,), (9,)])
def test_of_several_that_pass_the_best_in_flight_is_taken(prompt: tuple[int, ...]) -> None:
    """In flight behind the prompt are the tokens from 0 on without the truth; what follows the truth passes."""
    (first, *_), _ = run("spd", Lenient(VOCAB - 1), accuracy=0.0, width=4, prompt=prompt)
    truth = hash_token(list(prompt), VOCAB, SEED)
    flying = [guess for guess in range(5) if guess != truth][:4]
    assert first.token == next(other for other in passing(truth, VOCAB - 1) if other in flying)


@pytest.mark.parametrize("accuracy", [0.0, 0.6])
def test_an_exact_request_is_as_ever(accuracy: float) -> None:
    said, stats = run("fullpipe", ScriptedStage(STAGES - 1, STAGES, TRUTH), accuracy=accuracy)
    assert stats.altered == 0 and [event.token for event in said] == truths(said)
