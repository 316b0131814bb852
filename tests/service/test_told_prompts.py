"""A caller who asks how likely its prompt was is told with the first token, in this process and over workers, and after
a failure too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest
from test_service import SEED, VOCAB, Caller, Fragile, broken, inprocess, plain, processes, serve

from fullpipe.messages import ArenaId, Landed
from fullpipe.pipeline.base import Pipeline
from fullpipe.request import SamplingParams
from fullpipe.service import Update
from fullpipe.stations.scripted import ScriptedStage, hash_token, scripted_score

PROMPT = [k * 7 % VOCAB for k in range(40)]


def told(caller: Caller) -> list[tuple[int, int, list[tuple[int, float]]] | None]:
    """What came, all of it in one update, which has the first token or is the last."""
    (update,) = [update for update in caller.updates if update.prompt_logprobs]
    before = caller.updates[: caller.updates.index(update)]
    assert not any(one.token_ids for one in before) and (update.token_ids or update.reason)
    return [one and (one.position, one.rank, one.told) for one in update.prompt_logprobs]


def expected(prompt: list[int], count: int) -> list[tuple[int, int, list[tuple[int, float]]] | None]:
    scores = [scripted_score(ArenaId(0), at, prompt[at], hash_token(prompt[:at], VOCAB, SEED), count)
              for at in range(1, len(prompt))]
    return [None, *((one.position, one.rank, one.told) for one in scores)]


@pytest.mark.parametrize("start", [inprocess, pytest.param(processes, marks=pytest.mark.processes)])
def test_prompts_are_told_in_front_of_texts_that_stay_the_same(start: Callable[[], Pipeline]) -> None:
    with closing(serve(start)) as service:
        asked, other, short = Caller(), Caller(), Caller()
        service.submit(PROMPT, SamplingParams(max_tokens=9, prompt_logprobs=2), asked)
        service.submit(PROMPT, SamplingParams(max_tokens=9), other)
        service.submit([5], SamplingParams(max_tokens=1, prompt_logprobs=2), short)
        assert asked.result()[0] == other.result()[0] == plain(PROMPT, 9)
        assert short.result()[0] == plain([5], 1)
    assert told(asked) == expected(PROMPT, 2)
    assert told(short) == [None]
    assert not any(update.prompt_logprobs for update in other.updates)


def test_a_failure_on_the_way_changes_nothing() -> None:
    start, caller = Fragile(0), Caller()
    with closing(serve(start)) as service:
        broken(start.pipelines[0])
        service.submit(PROMPT, SamplingParams(max_tokens=9, prompt_logprobs=0), caller)
        assert caller.result()[0] == plain(PROMPT, 9)
    assert len(start.pipelines) == 2 and told(caller) == expected(PROMPT, 0)


def test_stages_that_say_nothing_of_a_prompt_end_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    land = ScriptedStage._land

    def silent(stage: ScriptedStage, flight: object) -> Landed:
        landed = land(stage, flight)  # type: ignore[arg-type]
        landed.prompts = []
        return landed

    monkeypatch.setattr(ScriptedStage, "_land", silent)
    caller, other = Caller(), Caller()
    with closing(serve()) as service:
        service.submit(PROMPT, SamplingParams(max_tokens=9, prompt_logprobs=0), caller)
        service.submit(PROMPT, SamplingParams(max_tokens=9), other)
        assert caller.result()[2] == "error" and other.result()[0] == plain(PROMPT, 9)
    last: Update = caller.updates[-1]
    assert last.error == "the stages did not say how likely the prompt is"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_part_of_the_text_where_that_is_asked_for(include: bool) -> None:
    said = "".join(f"{token} " for token in plain(PROMPT, 30))
    stop = said[10:14]
    caller = Caller()
    with closing(serve()) as service:
        service.submit(PROMPT, SamplingParams(max_tokens=30, stop=(stop,), include_stop_str_in_output=include), caller)
        _, came, reason = caller.result()
    before = said[: said.index(stop)]
    assert (came, reason) == (before + (stop if include else ""), "stop")


@pytest.mark.parametrize("include", [False, True])
def test_so_is_a_token_that_ends_it(include: bool) -> None:
    tokens, caller = plain(PROMPT, 30), Caller()
    params = SamplingParams(max_tokens=30, stop_token_ids=(tokens[7],), include_stop_str_in_output=include)
    with closing(serve()) as service:
        service.submit(PROMPT, params, caller)
        _, came, reason = caller.result()
    count = tokens.index(tokens[7]) + include
    assert (came, reason) == ("".join(f"{token} " for token in tokens[:count]), "stop")
