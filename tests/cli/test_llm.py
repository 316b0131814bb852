"""The front door in Python: what it remembers, what it takes, and what it refuses before a station sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Models

from fullpipe.cluster.alone import Choice
from fullpipe.engine import Engine
from fullpipe.errors import PipelineError, PromptError, StationFailed, Unavailable, UsageError
from fullpipe.llm import LLM, _Answer
from fullpipe.messages import Event
from fullpipe.methods import WITH_DEPTH
from fullpipe.request import SamplingParams
from fullpipe.service import Service, Update
from simulated import simulated

PARAMS = SamplingParams(max_tokens=12)
VOCAB = 96


@pytest.fixture(scope="module")
def llm(models: Models) -> Iterator[LLM]:
    with simulated(models.target, draft=str(models.draft), stages=3, method="static-tree", width=3, depth=2, floor=0.01,
                   dtype="float32", max_num_seqs=2) as llm:
        yield llm


def test_what_was_learned_of_a_draft_is_there_for_the_next(models: Models, monkeypatch: pytest.MonkeyPatch,
                                                           tmp_path: Path) -> None:
    monkeypatch.setenv("FULLPIPE_HOME", str(tmp_path))
    options: dict[str, Any] = {"draft": str(models.draft), "method": "chain", "dtype": "float32"}
    with LLM(models.target, **options):
        pass
    assert not list(tmp_path.glob("profiles/*.fates.json")), "who has learned nothing keeps nothing"
    with LLM(models.target, **options) as first:
        text = first.generate("hello there", PARAMS)[0].token_ids
    with LLM(models.target, **options) as second:
        assert second._service.engine.calibration.counts() == first._service.engine.calibration.counts() != {}
        assert second.generate("hello there", PARAMS)[0].token_ids == text
    with LLM(models.target, **options | {"draft": "ngram"}) as other:
        assert other._service.engine.calibration.counts() == {}


# ---- changing the method ---------------------------------------------------------------------------------


def shape(llm: LLM) -> tuple[int, int | None, float]:
    method = llm._service.engine.method
    return method.width, getattr(method, "depth", None), round(math.exp(method.floor), 9)


def test_use_keeps_what_the_constructor_was_given(llm: LLM) -> None:
    llm.use("fullpipe")
    assert shape(llm) == (3, None, 0.01), "fullpipe has no depth"
    llm.use("pipedec", width=5, floor=0.5)
    assert shape(llm) == (5, None, 0.5)
    llm.use("static-tree")
    assert shape(llm) == (3, 2, 0.01), "the constructor's values, not those of the last use"
    llm.use("chain", depth=6)
    assert shape(llm) == (1, 6, 0.01), "a chain is one node wide"
    llm.use("pp")


def test_what_nobody_gave_is_the_methods_own(models: Models) -> None:
    with simulated(models.target, draft="ngram", stages=2, dtype="float32") as llm:
        llm.use("chain")
        assert shape(llm) == (1, 4, 0.0)
        llm.use("static-tree")
        assert shape(llm) == (8, 4, 1e-4)


def test_a_refresh_counts_for_the_methods_that_have_one(models: Models) -> None:
    with simulated(models.target, draft="ngram", stages=2, dtype="float32", refresh=True) as llm:
        assert llm._service.engine.method.refresh
        llm.use("pipedec")
        assert not llm._service.engine.method.refresh
        llm.use("spd")
        assert (llm._service.engine.method.refresh, llm._service.engine.method.width) == (True, 1)
        llm.use("spd", refresh=False)
        assert not llm._service.engine.method.refresh
        with pytest.raises(UsageError, match="the method pp has no refresh"):
            llm.use("pp", refresh=True)


def test_exact_and_lossy_requests_share_a_batch(models: Models) -> None:
    """Each keeps its own rule; the exact one's text is what it is alone."""
    lossy = SamplingParams(max_tokens=30, accept_typical=0.001)
    exact = SamplingParams(max_tokens=30)
    with simulated(models.target, draft=str(models.draft), stages=3, method="spd", dtype="float32",
                   max_num_seqs=2) as llm:
        free, strict = llm.generate(["hello", "hello"], [lossy, exact])
        llm.use("pp")
        (plain,) = llm.generate("hello", exact)
    assert free.speculation["altered_tokens"] > 0 == strict.speculation["altered_tokens"]
    assert strict.token_ids == plain.token_ids != free.token_ids


def test_a_method_that_is_refused_leaves_the_old_one(llm: LLM) -> None:
    llm.use("pipedec")
    for method in ("spqr", "fullpipe"):
        with pytest.raises(UsageError, match=r"unknown method|the method fullpipe has no depth \(got 3\)"):
            llm.use(method, depth=3)
    assert llm._service.engine.method.name == "pipedec"


def test_the_constructor_refuses_a_depth_too(models: Models) -> None:
    with pytest.raises(UsageError, match=f"Leave it out, or use one of: {', '.join(WITH_DEPTH)}"):
        LLM(str(models.target), draft="ngram", method="fullpipe", depth=3)


# ---- prompts ---------------------------------------------------------------------------------------------


def test_prompts_as_vllm_wraps_them(llm: LLM) -> None:
    tokens = llm.encode("hello")
    plain = llm.generate("hello", PARAMS)[0].token_ids
    wrapped = llm.generate([{"prompt": "hello"}, {"prompt_token_ids": tokens}], PARAMS)
    assert [one.token_ids for one in wrapped] == [plain, plain]
    assert llm.generate({"prompt_token_ids": tokens}, PARAMS)[0].token_ids == plain


@pytest.mark.parametrize("prompt", [{}, {"prompt": "a", "prompt_token_ids": [1]}, {"role": "user", "content": "a"},
                                    {"prompt": "a", "multi_modal_data": {}}])
def test_mappings_that_are_no_prompt(llm: LLM, prompt: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a prompt cannot be made of"):
        llm.generate(prompt, PARAMS)


def test_a_message_with_a_misspelt_key_is_no_empty_prompt(llm: LLM) -> None:
    with pytest.raises(UsageError) as caught:
        llm.chat([{"role": "user", "contents": "a"}], PARAMS)
    assert not isinstance(caught.value, PromptError)


# ---- sampling parameters ---------------------------------------------------------------------------------


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    several = [PARAMS, SamplingParams(max_tokens=5, temperature=1.0, seed=3), SamplingParams(max_tokens=7)]
    prompts = ["hello", "hello", "another"]
    together = llm.generate(prompts, several)
    assert [len(one.token_ids) for one in together] == [12, 5, 7]
    alone = [llm.generate(prompt, own)[0] for prompt, own in zip(prompts, several)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert llm.generate("hello", [PARAMS])[0].token_ids == together[0].token_ids
    assert llm.generate([], []) == []


@pytest.mark.parametrize("number", [0, 1, 3])
def test_another_number_of_parameters_is_refused(llm: LLM, number: int) -> None:
    with pytest.raises(UsageError, match=f"there are 2 prompts and {number} sampling parameters\nGive one"):
        llm.generate(["one", "two"], [PARAMS] * number)


# ---- a bias that leaves nothing to pick ------------------------------------------------------------------


@pytest.mark.parametrize("least", [-math.inf, -1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidding_every_token_is_refused_and_the_next_request_runs(llm: LLM, least: float,
                                                                     temperature: float) -> None:
    forbidden = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(VOCAB), least))
    with pytest.raises(UsageError, match=r"forbids every one of the 96 tokens.*\nLeave at least one"):
        llm.generate("hello", forbidden)
    assert len(llm.generate("hello", PARAMS)[0].token_ids) == PARAMS.max_tokens


def test_all_tokens_but_one_may_be_forbidden(llm: LLM) -> None:
    (one,) = llm.generate("hello", SamplingParams(max_tokens=3, logit_bias=dict.fromkeys(range(1, VOCAB), -math.inf)))
    assert one.token_ids == [0, 0, 0]


def test_a_bias_beyond_the_logits_is_refused(llm: LLM) -> None:
    with pytest.raises(UsageError, match="the logit_bias of token 7 is too large"):
        llm.generate("hello", SamplingParams(logit_bias={7: 1e39}))
    (one,) = llm.generate("hello", SamplingParams(max_tokens=2, logit_bias={7: 3.4e38}))
    assert one.token_ids == [7, 7]


# ---- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"widht": 4}, "there is no option 'widht'\nDid you mean width?"),
    ({"pipeline_parallel_size": 2}, "there is no option 'pipeline_parallel_size'\nDid you mean stages?"),
    ({"pipeline": "inprocess"}, "there is no option 'pipeline'\nKnown are: "),
    ({"stages": "two"}, "stages: expected `int | null`, got `str`"),
    ({"method": "spqr"}, "unknown method 'spqr'"),
    ({"dtype": "int3"}, "unknown dtype 'int3'"),
    ({"max_num_seqs": 0}, "max_num_seqs must be 1 or more (got 0)"),
    ({"threads": 0}, "threads must be 1 or more (got 0)"),
    ({"link_ms": 5}, "link_ms is for stage processes, and there are none\nSay how many there shall be: `stages=2`."),
    ({"max_model_len": 0}, "max_model_len must be 1 or more (got 0)"),
    ({"max_model_len": 100_000}, "max_model_len is 100000, and the model takes 16384 tokens\nAsk for no more"),
    ({"max_model_len": 9000, "kv_cache_tokens": 500}, "256 cache slots hold "),
    ({"kv_cache_tokens": 3}, "3 cache slots are less than a block of 256"),
    ({"generation_config": "nowhere"}, "there is no generation_config.json in nowhere"),
    ({"prefill_chunk": 0}, "prefill_chunk must be 1 or more (got 0)"),
    ({"spare_slots": -1}, "spare_slots must be 0 or more (got -1)"),
])
def test_options_that_cannot_be(models: Models, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        LLM(str(models.target), **{"draft": "ngram", **options})
    assert message in str(refused.value)


def test_a_cache_that_is_shorter_than_the_model_is_told(models: Models) -> None:
    told: list[str] = []
    with LLM(models.target, draft="none", kv_cache_tokens=500, progress=told.append) as llm:
        assert f"the cache holds {llm.max_model_len} tokens of a text, the model 16384" in told[-1]


def test_a_draft_that_nobody_asks_is_told(models: Models) -> None:
    told: list[str] = []
    with LLM(models.target, draft="ngram", method="pp", progress=told.append):
        assert told[0] == "warning: the method pp asks no draft, so ngram changes nothing"


def test_a_depth_that_was_asked_for_is_not_dropped_where_guessing_would_not_pay(
        models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def choose(machine: object, drafts: tuple[str, ...], *, may_do_without: bool) -> Choice:
        asked.append(may_do_without)
        return Choice(drafts, 2, "so it is")

    monkeypatch.setattr("fullpipe.assembly.made.choose", choose)
    for shape in ({}, {"depth": 3}, {"floor": 0.1}):
        with LLM(models.target, **shape) as llm:
            assert llm.method == "chain"
    assert asked == [True, False, False]


def test_log_probabilities_that_were_asked_for(llm: LLM) -> None:
    (bare,), (told,) = (llm.generate("hello", SamplingParams(max_tokens=3, logprobs=k)) for k in (None, 2))
    assert bare.logprobs == [] and [len(one) for one in told.logprobs] == [3, 3, 3]
    assert [one[0][0] for one in told.logprobs] == told.token_ids == bare.token_ids
    assert all(one[0] == one[1] for one in told.logprobs), "what greedy picks is the likeliest"


# ---- starting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_time_to_start_that_is_none(models: Models, seconds: float) -> None:
    with pytest.raises(UsageError, match="the time to start must be above 0 and at most a day"):
        LLM(str(models.target), draft="none", method="pp", stages=2, start_timeout=seconds)


@pytest.mark.processes
def test_processes_that_start_too_slowly(models: Models) -> None:
    """No interpreter starts within a millisecond."""
    with pytest.raises(StationFailed, match=r"not ready after 0.001 s\nLoading may just be slow here"):
        LLM(str(models.target), draft="none", method="pp", stages=2, dtype="float32", start_timeout=0.001)


# ---- what fails, and when --------------------------------------------------------------------------------


def test_a_request_that_fails_says_why_and_the_next_is_refused(models: Models) -> None:
    gone = StationFailed("stage 1", "it fell over; it printed:\nmuch", hint="What was emitted is kept.")

    def events(wait: float | None = None) -> list[Event]:
        raise gone

    with simulated(models.target, draft="ngram", stages=2, dtype="float32") as llm:
        llm._service.engine.pipeline.events = events  # type: ignore[method-assign]
        try:
            llm.generate("hello", PARAMS)
        except StationFailed as error:
            assert error is not gone and error.__cause__ is gone
            assert str(error) == "stage 1 failed: it fell over\nWhat was emitted is kept."
        except Unavailable as error:  # it was noticed before the request came
            assert "it fell over" in str(error)
        with pytest.raises(Unavailable, match=r"the service is failed .*it fell over\)\n.*another `LLM`"):
            llm.generate("hello", PARAMS)


def test_every_request_raises_its_own_exception() -> None:
    failure = StationFailed("draft", "it fell over", hint="Start again.")
    told = []
    for error in ("draft failed: it fell over", "draft failed: it fell over", "it failed 5 times: draft"):
        one = _Answer(PARAMS)
        one.deliver(Update(reason="error", error=error, failure=failure))
        one.rest()
        with pytest.raises(PipelineError) as raised:
            one.check()
        assert (raised.value.message, raised.value.hint, raised.value.exit_code) == (error, "Start again.", 7)
        assert raised.value.__cause__ is failure
        told.append(raised.value)
    assert [type(one) for one in told] == [StationFailed, StationFailed, PipelineError]
    assert len({id(one) for one in [*told, failure]}) == 4


def test_whose_request_comes_between_is_no_error(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service was idle when it was looked at, and is not when the engine is asked to wait for its stations."""
    real = Service.call

    def call(service: Service[Any], action: Any) -> None:
        def first(engine: Engine) -> None:
            monkeypatch.setattr(Engine, "busy", property(lambda self: True))
            try:
                action(engine)
            finally:
                monkeypatch.undo()

        real(service, first)

    with simulated(models.target, draft="ngram", stages=2, dtype="float32") as llm:
        (before,) = llm.generate("hello", PARAMS)
        monkeypatch.setattr(Service, "call", call)
        (after,) = llm.generate("hello", PARAMS)
    assert before.token_ids == after.token_ids


def test_the_time_ends_with_the_answer_and_not_with_its_reader(llm: LLM) -> None:
    stream = llm.stream("hello", PARAMS)
    next(stream)
    time.sleep(1.0)
    *_, last = stream
    assert last.completion and 0 < last.completion.timing["wall_s"] < 1.0
