"""The application as OpenAI's own client sees it, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai_server import MAX_MODEL_LEN, Serve, Served

from fullpipe.errors import Overloaded, PromptError, Unavailable, UsageError
from fullpipe.options import ServerOptions
from fullpipe.request import SamplingParams

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


def params_of(served: Served, number: int = -1) -> SamplingParams:
    return served.service.submitted[number][1]


def test_a_chat(served: Served, client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HELLO, seed=7)
    prompt, params, priority, timeout_s = served.service.submitted[0]
    assert served.tokenizer.backend.decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert reply.choices[0].message.content == f"You said {len(prompt)} tokens, seed 7. Ünï 🙂!"
    assert reply.choices[0].message.role == "assistant"
    assert (reply.choices[0].finish_reason, reply.choices[0].index, reply.choices[0].logprobs) == ("stop", 0, None)
    assert (reply.object, reply.model, reply.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    assert params == SamplingParams(temperature=1.0, seed=7, max_tokens=MAX_MODEL_LEN - len(prompt))
    assert (priority, timeout_s) == (0, None)


def test_usage_counts_tokens_and_speculation(served: Served, client: openai.OpenAI) -> None:
    served.script("abcde")
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, n=2)
    usage = reply.usage
    assert usage is not None
    assert usage.prompt_tokens == len(served.service.submitted[0][0])
    assert (usage.completion_tokens, usage.total_tokens) == (8, usage.prompt_tokens + 8)
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == 2
    details = usage.completion_tokens_details
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (4, 8)
    told = (usage.model_extra or {})["speculation"]
    assert (told["hits"], told["misses"], told["hit_rate"]) == (4, 2, 4 / 6)
    assert (told["launched_rows"], told["wasted_rows"], told["mean_acceptance_length"]) == (16, 8, 3.0)
    assert (told["ttft_s"], told["tbt_s"]) == (0.0, 1.0)
    assert {"steps", "steps_per_token"} < set(told)


def test_a_chat_streams_role_text_end_and_usage(served: Served, client: openai.OpenAI) -> None:
    served.script("Ünï 🙂")
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True,
                                                 stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Ünï 🙂"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Ünï 🙂".encode())
    assert all(c.usage is None for c in chunks[:-1])
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1


def test_usage_on_every_chunk_if_asked(served: Served, client: openai.OpenAI) -> None:
    served.script("abc")
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(model="tiny", prompt="x", stream=True, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks if c.usage is not None]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 3


def test_streamed_and_whole_texts_are_the_same_for_all_choices(served: Served, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5)
    texts = [""] * 3
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert [params.seed for _, params, _, _ in served.service.submitted] == [5, 6, 7, 5, 6, 7]


def test_seeds(served: Served, client: openai.OpenAI) -> None:
    for _ in range(2):
        client.chat.completions.create(model="tiny", messages=HELLO)
    client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, n=2)
    client.chat.completions.create(model="tiny", messages=HELLO, seed=-1, n=2)
    first, second, *rest = [params.seed for _, params, _, _ in served.service.submitted]
    assert first != second  # equal once in 2**63
    assert rest == [0, 1, 2**64 - 1, 0]


def test_the_models_own_sampling_counts_where_a_request_says_nothing(start: Serve) -> None:
    wants = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 5}
    served = start(sampling=wants)
    served.script("abcdefghijklmnopqrstuvwxyz")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="-") as client:
        client.chat.completions.create(model="tiny", messages=HELLO, seed=3)
        client.completions.create(model="tiny", prompt="x", seed=3, temperature=0.25, max_tokens=2,
                                  extra_body={"top_k": None, "repetition_penalty": 1.0})
        client.completions.create(model="tiny", prompt="x", temperature=0)
    said, other, greedy = (params for _, params, _, _ in served.service.submitted)
    assert said == SamplingParams(seed=3, **wants)
    assert other == SamplingParams(seed=3, temperature=0.25, top_k=20, top_p=0.9, max_tokens=2)
    assert (greedy.max_tokens, greedy.seed) == (5, 0)


def test_a_model_that_wants_to_be_greedy_needs_no_seed(start: Serve) -> None:
    served = start(sampling={"temperature": 0})
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="-") as client:
        client.chat.completions.create(model="tiny", messages=HELLO)
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=0.5)
    greedy, other = (params for _, params, _, _ in served.service.submitted)
    assert (greedy.temperature, greedy.seed) == (0, 0) and other.seed


def test_chat_logprobs_have_bytes_of_cut_characters(served: Served, client: openai.OpenAI) -> None:
    served.script("aé")
    for stream in (False, True):
        told = _chat_logprobs(client, stream)
        assert [one.token for one in told] == ["a", r"bytes:\xc3", r"bytes:\xa9"]
        assert bytes(b for one in told for b in one.bytes or []) == "aé".encode()
        assert [one.logprob for one in told] == [-0.5] * 3
        assert [[top.logprob for top in one.top_logprobs] for one in told] == [[-1.0, -2.0]] * 3
    assert params_of(served).logprobs == 2


def _chat_logprobs(client: openai.OpenAI, stream: bool) -> list[Any]:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    if not stream:
        reply = client.chat.completions.create(**asked)
        return list(reply.choices[0].logprobs.content)
    chunks = client.chat.completions.create(**asked, stream=True)
    return [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]


def test_completion_logprobs_have_offsets(served: Served, client: openai.OpenAI) -> None:
    served.script("aéb")
    told = client.completions.create(model="tiny", prompt="x", logprobs=1).choices[0].logprobs
    assert told is not None
    assert told.tokens == ["a", r"bytes:\xc3", r"bytes:\xa9", "b"]
    assert told.token_logprobs == [-0.5] * 4
    assert told.text_offset == [0, 1, 1, 2]
    assert told.top_logprobs is not None and told.top_logprobs[0] == {"!": -1.0, "a": -0.5}
    chunks = list(client.completions.create(model="tiny", prompt="x", logprobs=1, stream=True))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [o for one in streamed for o in one.text_offset or []] == told.text_offset
    assert [t for one in streamed for t in one.tokens or []] == told.tokens


def test_unlikely_tokens_have_a_finite_logprob(served: Served, client: openai.OpenAI) -> None:
    step = served.service._step
    try:
        def hopeless(job: Any) -> None:
            deliver = job.deliver
            job.deliver = lambda update: (setattr(update, "logprobs", [[(0, float("-inf"))] for _ in update.token_ids]),
                                          deliver(update))
            step(job)
            job.deliver = deliver

        served.service._step = hopeless  # type: ignore[method-assign]
        told = client.completions.create(model="tiny", prompt="x", logprobs=0, max_tokens=1).choices[0].logprobs
    finally:
        served.service._step = step  # type: ignore[method-assign]
    assert told is not None and told.token_logprobs == [-9999.0]


@pytest.mark.parametrize(("prompt", "lengths"), [
    ("abc", [3]), (["abc", "de"], [3, 2]), ([1, 2, 3, 4], [4]), ([[1], [2, 3]], [1, 2]),
])
def test_completions_take_every_kind_of_prompt(served: Served, client: openai.OpenAI, prompt: Any,
                                               lengths: list[int]) -> None:
    served.service.script = lambda tokens, params: tokens
    reply = client.completions.create(model="tiny", prompt=prompt, n=2, seed=3)
    assert [choice.index for choice in reply.choices] == list(range(2 * len(lengths)))
    assert [len(tokens) for tokens, *_ in served.service.submitted] == [n for n in lengths for _ in range(2)]
    assert [params.seed for _, params, *_ in served.service.submitted] == [3, 4] * len(lengths)
    assert reply.usage is not None and reply.usage.prompt_tokens == sum(lengths)
    assert params_of(served).max_tokens == 16
    if isinstance(prompt, str):
        assert [choice.text for choice in reply.choices] == [prompt, prompt]


def test_stop_strings_and_length(served: Served, client: openai.OpenAI) -> None:
    served.script("one two three")
    stopped = client.completions.create(model="tiny", prompt="x", stop=[" three", "zzz"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("one two", "stop")
    short = client.completions.create(model="tiny", prompt="x", max_tokens=3, stop="zzz")
    assert (short.choices[0].text, short.choices[0].finish_reason) == ("one", "length")


def test_all_options_arrive(served: Served, client: openai.OpenAI) -> None:
    more = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [3],
            "priority": -2}
    client.chat.completions.create(
        model="alias/tiny", messages=HELLO, temperature=0.5, top_p=0.9, presence_penalty=0.2, frequency_penalty=-0.3,
        logit_bias={"65": -100, "66": 1}, max_tokens=99, max_completion_tokens=9, stop="END", seed=1, user="me",
        metadata={"a": "b"}, store=True, tool_choice="none", tools=[], response_format={"type": "text"},
        service_tier="auto", modalities=["text"], extra_body=more)
    _, params, priority, _ = served.service.submitted[0]
    assert params == SamplingParams(
        temperature=0.5, top_p=0.9, presence_penalty=0.2, frequency_penalty=-0.3, logit_bias={65: -100.0, 66: 1.0},
        max_tokens=9, stop=("END",), seed=1, top_k=5, min_p=0.1, repetition_penalty=1.1, ignore_eos=True,
        stop_token_ids=(3,))
    assert priority == -2


def test_parts_developer_and_an_answer_sent_back(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message
    turns: Any = [{"role": "developer", "content": "d"},
                  {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                  answer, {"role": "user", "content": "more"}]
    client.chat.completions.create(model="tiny", messages=turns)
    text = served.tokenizer.backend.decode(served.service.submitted[1][0], skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nd<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n")


LONG = "x" * (MAX_MODEL_LEN - 5)  # tokens; as a chat's message, 5 and the template's too many


@pytest.mark.parametrize("more", [{}, {"max_tokens": 5}, {"max_tokens": 1}])
def test_an_answer_may_fill_the_context(served: Served, client: openai.OpenAI, more: Any) -> None:
    """vLLM's and OpenAI's 16 tokens of a completion are a default, which takes what is left."""
    client.completions.create(model="tiny", prompt=LONG, **more)
    assert params_of(served).max_tokens == more.get("max_tokens", 5)


@pytest.mark.parametrize("asked", [6, 16, MAX_MODEL_LEN - 4])
@pytest.mark.parametrize("stream", [False, True])
def test_more_tokens_than_the_context_has_left_are_refused(served: Served, client: openai.OpenAI, asked: int,
                                                           stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=["fits", LONG], max_tokens=asked, stream=stream)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    for told in ("max_tokens", f"context length is {MAX_MODEL_LEN}", f"has {len(LONG)}", str(asked)):
        assert told in caught.value.message
    assert served.service.submitted == []  # the prompt that fits neither


def test_a_chat_has_two_names_for_it_of_which_the_new_one_counts(served: Served, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="tiny", messages=HELLO)
    room = params_of(served).max_tokens
    assert room == MAX_MODEL_LEN - len(served.service.submitted[0][0])
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=room + 1, max_completion_tokens=room)
    assert params_of(served).max_tokens == room
    for more in ({"max_tokens": room + 1}, {"max_completion_tokens": room + 1},
                 {"max_tokens": room, "max_completion_tokens": room + 1}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO, **more)
        assert caught.value.param == max(more, key=more.__getitem__)
        assert f"{room + 1} > {MAX_MODEL_LEN} - {MAX_MODEL_LEN - room}" in caught.value.message
    assert len(served.service.submitted) == 2


def test_models(served: Served, client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["tiny", "alias/tiny"]
    card = client.models.retrieve("alias/tiny")
    assert (card.object, card.created) == ("model", 1700000000)
    assert (card.model_extra or {})["max_model_len"] == MAX_MODEL_LEN
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize(("error", "status", "code", "wait"), [
    (PromptError("larger than the cache", hint="Shorten it."), 400, "context_length_exceeded", None),
    (UsageError("no such token"), 400, None, None),
    (Overloaded("the queue is full", retry_after_s=1.2), 429, "rate_limit_exceeded", "2"),
    (Unavailable("it is down", retry_after_s=0), 503, "service_unavailable", "1"),
])
def test_what_submit_raises(served: Served, client: openai.OpenAI, error: Exception, status: int, code: str | None,
                            wait: str | None) -> None:
    served.service.refuse = error
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.response.headers.get("retry-after") == wait
        assert str(error).split("\n")[0] in caught.value.message


def test_when_a_later_choice_is_refused_the_earlier_are_cancelled(served: Served, client: openai.OpenAI) -> None:
    served.service.hold_at = 0
    taken = served.service.submit

    def once(*args: Any, **more: Any) -> Any:
        if len(served.service.submitted) == 2:
            raise Overloaded("the queue is full", retry_after_s=1)
        return taken(*args, **more)

    served.service.submit = once  # type: ignore[method-assign]
    try:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=HELLO, n=3)
    finally:
        served.service.submit = taken  # type: ignore[method-assign]
    assert served.service.cancelled == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_500(served: Served, client: openai.OpenAI, stream: bool) -> None:
    served.service.fail_after = 0
    with pytest.raises(openai.InternalServerError, match="stage 1 spoke nonsense") as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert caught.value.code == "engine_error"


def test_an_error_in_the_middle_is_an_event(served: Served, client: openai.OpenAI) -> None:
    served.service.hold_at = 1
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    text = next(stream).choices[0].delta.content or ""
    served.service.fail_after = 4
    with served.service.changed:
        served.service.hold_at = 99
        served.service.changed.notify_all()
    with pytest.raises(openai.APIError, match="stage 1 spoke nonsense"):
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "You "


def test_keys(start: Serve) -> None:
    served = start(ServerOptions(api_key=["first", "sécret"]))
    for key in ("wrong", "firs", "first2"):
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client, \
                pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="first", max_retries=0) as client:
        assert client.models.list().data


def test_the_async_client_many_at_once(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model="tiny", messages=HELLO, seed=1)
            return [whole.choices[0].message.content or "",
                    *await asyncio.gather(*(ask(client, seed) for seed in range(1, 9)))]

    whole, *streamed = asyncio.run(all_of_them())
    assert whole == streamed[0]
    assert [f"seed {seed}." in text for seed, text in enumerate(streamed, 1)] == [True] * 8
