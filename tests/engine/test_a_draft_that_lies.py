"""The engine learns how far a draft can be believed; the text never depends on it."""

from __future__ import annotations

import math
from itertools import count

import pytest

from fullpipe.engine import Engine
from fullpipe.messages import Expansion, Flight
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.calibration import Calibration
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token

TRUTH = {"kind": "hash", "vocab": 500, "seed": 3}
IDS = count()


class Liar(ScriptedDraft):
    """Its first guess is true in 9 of 10 cases, and it claims another probability."""

    def __init__(self, claim: float) -> None:
        super().__init__(TRUTH, accuracy=0.9, coverage=0.95, vocab=500)
        self._claims = [math.log(claim), math.log((1 - claim) / 20)]

    def run(self, job: Flight) -> list[Expansion]:
        said = super().run(job)
        for one in said:
            one.logprobs = [self._claims[at > 0] for at in range(len(one.tokens))]
        return said


def answer(claim: float, calibration: Calibration | None, tokens: int = 60) -> tuple[list[int], float, Calibration]:
    """The text, the share of hits, and what was learned."""
    pipeline = InProcessPipeline([ScriptedStage(k, 3, TRUTH) for k in range(3)], Liar(claim), clock="virtual")
    engine = Engine(pipeline, make_method("fullpipe", width=2, floor=0.3), calibration=calibration)
    sequence = engine.submit(Request(next(IDS), (1, 2, 3), SamplingParams(max_tokens=tokens)))
    stats = engine.stats.of(sequence.request.id)
    while engine.busy:
        engine.step()
        engine.check()
    return sequence.tokens, stats.hits / tokens, engine.calibration


def truth(tokens: int) -> list[int]:
    text = [1, 2, 3]
    for _ in range(tokens):
        text.append(hash_token(text, 500, 3))
    return text


@pytest.mark.parametrize("claim", [0.2, 0.9])
def test_what_is_learned_is_the_rate_whatever_was_claimed(claim: float) -> None:
    text, _, learned = answer(claim, None, 400)
    assert text == truth(400)
    assert math.exp(learned.map(0, math.log(claim))) == pytest.approx(0.9, abs=0.08)


def test_too_modest_a_draft_is_followed_once_it_is_known_and_at_once_by_the_next_engine() -> None:
    """Its claims lie below the floor: at its word nothing would ever be launched."""
    text, hits, learned = answer(0.2, None)
    again, more, _ = answer(0.2, learned)
    assert text == again == truth(60)
    assert 0 < hits < more
    assert more > 0.7


def test_too_bold_a_draft_is_doubted() -> None:
    class Wrong(Liar):
        def run(self, job: Flight) -> list[Expansion]:
            said = super().run(job)
            for one in said:
                one.tokens.reverse()
            return said

    pipeline = InProcessPipeline([ScriptedStage(k, 3, TRUTH) for k in range(3)], Wrong(0.9), clock="virtual")
    engine = Engine(pipeline, make_method("fullpipe", width=2, floor=0.3))
    sequence = engine.submit(Request(0, (1, 2, 3), SamplingParams(max_tokens=80)))
    launched = []
    while engine.busy:
        before = len(sequence.tokens), engine.stats.of(0).launched_rows
        engine.step()
        launched.append((before[0], before[1]))
    rows = dict(launched)
    assert sequence.tokens == truth(80)
    assert rows[82] - rows[62] == 20, "in the end only roots"
    assert rows[12] - rows[4] > 8, "at first it was believed"


def test_the_same_again_is_the_same() -> None:
    one, two = answer(0.2, None), answer(0.2, None)
    assert one[:2] == two[:2] and one[2].counts() == two[2].counts()


def test_requests_learn_together_and_another_pipeline_changes_nothing() -> None:
    pipelines = [InProcessPipeline([ScriptedStage(k, 2, TRUTH) for k in range(2)], Liar(0.2), clock="virtual")
                 for _ in range(2)]
    engine = Engine(pipelines[0], make_method("fullpipe", width=2))
    for id in range(3):
        engine.submit(Request(id, (1, 2, id), SamplingParams(max_tokens=30)))
    while engine.calibration.noted < 200:
        engine.step()
    before = engine.calibration.counts()
    engine.attach(pipelines[1])
    assert engine.calibration.counts() == before
    while engine.busy:
        engine.step()
    rows = engine.calibration.counts()[0]
    assert sum(row[2] for row in rows) == pytest.approx(90 * 0.95, abs=8), "one fate a token, but for the uncovered"
