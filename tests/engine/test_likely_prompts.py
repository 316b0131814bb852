"""Who asks how likely its prompt was is told so before its first token, token by token, whatever happens meanwhile.

The slow, obvious version is `expected`: ask the truth for what follows every beginning of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving import TellingEngine
from fullpipe.engine.scores import gathered
from fullpipe.errors import PipelineError
from fullpipe.events import Admitted, Emitted, PromptScored
from fullpipe.messages import ArenaId, Event, Landed, Scored
from fullpipe.methods import make_method, options_of
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.sequence import Sequence as Running
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token, scripted_score

VOCAB, SEED = 50, 3
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}
Told = list[tuple[int, int, list[tuple[int, float]]]]


def pipeline(stages: int) -> InProcessPipeline:
    return InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)], ScriptedDraft(TRUTH))


def request(id: int, prompt: Sequence[int], tokens: int, count: int | None) -> Request:
    return Request(id, tuple(prompt), SamplingParams(max_tokens=tokens, prompt_logprobs=count))


def expected(prompt: Sequence[int], count: int) -> Told:
    scores = [scripted_score(ArenaId(0), position, prompt[position], hash_token(list(prompt[:position]), VOCAB, SEED),
                             count) for position in range(1, len(prompt))]
    return [(one.position, one.rank, one.told) for one in scores]


class Heard:
    """What an engine told of prompts, and of the rest its kind and whose it was."""

    def __init__(self) -> None:
        self.scores: dict[int, Told] = {}
        self.order: list[tuple[type[Event], int]] = []
        self.cached: dict[int, int] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, PromptScored):
            self.scores[event.request] = [(one.position, one.rank, one.told) for one in event.scores]
        if isinstance(event, Admitted):
            self.cached[event.request] = event.cached_tokens
        if isinstance(event, (PromptScored, Emitted)):
            self.order.append((type(event), event.request))

    def check(self, requests: Sequence[Request]) -> None:
        for one in requests:
            count = one.params.prompt_logprobs
            whose = [kind for kind, request in self.order if request == one.id]
            if count is None or len(one.prompt) == 1:
                assert one.id not in self.scores
            else:
                assert self.scores[one.id] == expected(one.prompt, count)
                assert whose[0] is PromptScored and PromptScored not in whose[whose.index(Emitted) :]
            assert Emitted in whose


def finish(engine: TellingEngine) -> None:
    while engine.busy:
        engine.step()
        engine.check()


@given(method=st.sampled_from(["pp", "chain", "pipedec", "fullpipe"]), stages=st.integers(1, 4),
       chunk=st.integers(1, 9), beginning=st.integers(0, 40), seats=st.sampled_from([None, 2]),
       prompts=st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=30),
                                  st.sampled_from([None, 0, 1, 3])), min_size=1, max_size=5),
       slots=st.sampled_from([600, 900, 4000]), share=st.booleans())
def test_every_prompt_is_told_as_it_is(method: str, stages: int, chunk: int, beginning: int, seats: int | None,
                                       prompts: list[tuple[list[int], int | None]], slots: int, share: bool) -> None:
    heard = Heard()
    engine = TellingEngine(pipeline(stages), make_method(method, **options_of(method, width=3)), prefill_chunk=chunk,
                           max_num_seqs=seats, spare_slots=40, kv_cache_tokens=slots, block_size=16,
                           enable_prefix_caching=share, listeners=[heard])
    requests = [request(id, (*range(beginning), *prompt), 30, count) for id, (prompt, count) in enumerate(prompts)]
    for one in requests:
        engine.submit(one)
    finish(engine)
    heard.check(requests)


def test_what_others_have_computed_is_computed_again_for_it_and_shared_by_it() -> None:
    heard, prompt = Heard(), list(range(45))
    engine = TellingEngine(pipeline(2), make_method("pp"), kv_cache_tokens=4000, enable_prefix_caching=True,
                           listeners=[heard])
    requests = [request(id, prompt, 4, count) for id, count in enumerate((None, 2, None))]
    for one in requests:
        engine.submit(one)
        finish(engine)
    heard.check(requests)
    assert heard.cached == {0: 0, 1: 0, 2: 44}


@pytest.mark.parametrize("steps", [1, 4, 9, 14])
def test_another_pipeline_says_the_same(steps: int) -> None:
    """The first one ends while the prompt is on its way, or behind it."""
    heard, asked = Heard(), request(0, range(40), 8, 2)
    engine = TellingEngine(pipeline(3), make_method("pp"), prefill_chunk=6, listeners=[heard])
    engine.submit(asked)
    for _ in range(steps):
        engine.step()
    engine.attach(pipeline(2))
    finish(engine)
    heard.check([asked])


def landed_for(score: Scored) -> tuple[Landed, Running]:
    running = Running(request(0, (4, 8, 15), 5, 1), 0.0)
    running.arena = ArenaId(7)
    return Landed(0.0, 0, prompts=[score]), running


@pytest.mark.parametrize("score", [
    Scored(ArenaId(7), 0, 1, [(4, -1.0)]), Scored(ArenaId(7), 3, 1, [(15, -1.0)]), Scored(ArenaId(7), 1, 1, []),
    Scored(ArenaId(7), 1, 1, [(15, -1.0), (8, -2.0)]),
])
def test_what_cannot_be_said_of_a_prompt_is_a_failure(score: Scored) -> None:
    landed, running = landed_for(score)
    with pytest.raises(PipelineError, match=f"position {score.position} of a prompt"):
        gathered(landed, [running])


def test_what_is_said_of_those_who_are_gone_is_left() -> None:
    landed, running = landed_for(Scored(ArenaId(6), 9, 1, [(1, -1.0)]))
    assert gathered(landed, [running]) == [] == gathered(landed, []) and running.scores == {}
