"""What a request may want beside its answer's text, whole and streamed: the prompt before it, log-probabilities of the
prompt, ids of tokens, the best of several texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai_server import MAX_MODEL_LEN, Served

from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.request import SamplingParams
from fullpipe.server.besides import spelled_prompt

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    served.script("né!")
    with served.client() as client:
        yield client


def answer(client: httpx.Client, prompt: Any = "aé", path: str = TEXT, **fields: Any) -> Any:
    body = HELLO if path == CHAT else {"model": "tiny", "prompt": prompt}
    response = client.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client: httpx.Client, prompt: Any = "aé", path: str = TEXT, **fields: Any) -> list[Any]:
    body = HELLO if path == CHAT else {"model": "tiny", "prompt": prompt}
    response = client.post(path, json=body | fields | {"stream": True})
    assert response.status_code == 200, response.text
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event) for event in events[:-2]]


def refused(client: httpx.Client, path: str = TEXT, **fields: Any) -> tuple[str, str]:
    body = HELLO if path == CHAT else {"model": "tiny", "prompt": "aé"}
    response = client.post(path, json=body | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


def params_of(served: Served, number: int = -1) -> SamplingParams:
    return served.service.submitted[number][1]


# ---- the prompt before the answer ------------------------------------------------------------------------------------


def test_an_echo_is_the_prompt_and_then_the_answer(served: Served, client: httpx.Client) -> None:
    (choice,) = answer(client, echo=True)["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("aéné!", None, "stop")
    assert params_of(served).prompt_logprobs is None


def test_its_log_probabilities_are_those_of_the_prompt_and_then_the_answers(served: Served,
                                                                            client: httpx.Client) -> None:
    (choice,) = answer(client, echo=True, logprobs=1)["choices"]
    told = choice["logprobs"]
    assert told["tokens"] == ["a", r"bytes:\xc3", r"bytes:\xa9", "n", r"bytes:\xc3", r"bytes:\xa9", "!"]
    assert told["token_logprobs"] == [None, -0.25, -0.25, -0.5, -0.5, -0.5, -0.5]
    assert told["top_logprobs"][:2] == [None, {"!": -0.1, r"bytes:\xc3": -0.25}]
    assert told["top_logprobs"][3] == {"!": -1.0, "n": -0.5}
    assert told["text_offset"] == [0, 1, 1, 2, 3, 3, 4]
    assert (params_of(served).prompt_logprobs, params_of(served).logprobs) == (1, 1)


def test_streamed_it_is_the_same(client: httpx.Client) -> None:
    (whole,) = answer(client, echo=True, logprobs=2)["choices"]
    came = [chunk["choices"][0] for chunk in chunks(client, echo=True, logprobs=2)]
    assert "".join(one["text"] for one in came) == whole["text"] and came[0]["text"].startswith("aé")
    for name, values in whole["logprobs"].items():
        assert [value for one in came if one["logprobs"] for value in one["logprobs"][name]] == values


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_alone_is_an_answer_too(served: Served, client: httpx.Client, stream: bool) -> None:
    asked: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 0}
    if stream:
        *came, last = chunks(client, **asked, stream_options={"include_usage": True})
        (choice,), usage = [one["choices"][0] for one in came], last["usage"]
    else:
        whole = answer(client, **asked)
        (choice,), usage = whole["choices"], whole["usage"]
    assert (choice["text"], choice["finish_reason"]) == ("aé", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 0, 3)
    assert params_of(served).max_tokens == 1


def test_a_text_that_would_have_ended_at_once_ends_by_its_length(served: Served, client: httpx.Client) -> None:
    served.script("")
    (choice,) = answer(client, echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("aé", "length")


@pytest.mark.parametrize(("prompt", "text"), [
    ([97, 98], None), ("a<|im_start|>b", "a<|im_start|>b"), ([256, 65], None), (["x", "y"], None)])
def test_every_kind_of_prompt_is_echoed(served: Served, client: httpx.Client, prompt: Any, text: str | None) -> None:
    choices = answer(client, prompt, echo=True, max_tokens=0)["choices"]
    submitted = [tokens for tokens, *_ in served.service.submitted]
    assert [choice["text"] for choice in choices] == [
        text or served.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in submitted]


def test_a_character_that_the_answer_completes_comes_with_the_answer(served: Served, client: httpx.Client) -> None:
    first, second = served.tokenizer.encode("é")
    served.service.script = lambda prompt, params: [second]
    (choice,) = answer(client, [65, first], echo=True, logprobs=0)["choices"]
    assert choice["text"].endswith("é") and choice["logprobs"]["text_offset"] == [0, 1, 1]
    (alone,) = answer(client, [65, first], echo=True, max_tokens=0)["choices"]
    assert alone["text"].endswith("�")


def test_choices_of_several_prompts_have_each_its_own(client: httpx.Client) -> None:
    choices = answer(client, ["ab", "c"], echo=True, logprobs=0, n=2)["choices"]
    assert [choice["text"] for choice in choices] == ["abné!", "abné!", "cné!", "cné!"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["logprobs"]["token_logprobs"][:2] for choice in choices] == [[None, -0.25]] * 2 + [[None, -0.5]] * 2


def test_who_runs_out_of_time_has_the_prompt(served: Served, client: httpx.Client) -> None:
    served.service.fail_after, served.service.fail_with = 0, "deadline"
    (choice,) = answer(client, echo=True, logprobs=1)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("aé", "length")
    assert choice["logprobs"]["token_logprobs"] == [None] * 3


@pytest.mark.parametrize(("messages", "fields", "text"), [
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}],
     {"continue_final_message": True}, "Well, né!"),
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}], {}, "Well, né!"),
    ([{"role": "user", "content": "Hi"}], {}, "né!"),
    ([{"role": "user", "content": "Hi"}], {"add_generation_prompt": False}, "Hiné!"),
])
def test_a_chat_echoes_the_message_that_it_goes_on_with(client: httpx.Client, messages: Any, fields: dict[str, Any],
                                                        text: str) -> None:
    asked = {"messages": messages, "echo": True, **fields}
    assert answer(client, path=CHAT, **asked)["choices"][0]["message"]["content"] == text
    came = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(client, path=CHAT, **asked)]
    assert "".join(came) == text


# ---- log-probabilities of the prompt ---------------------------------------------------------------------------------


def test_prompt_logprobs_are_as_vllm_has_them(served: Served, client: httpx.Client) -> None:
    (choice,) = answer(client, "ab", prompt_logprobs=2)["choices"]
    (b,) = served.tokenizer.encode("b")
    assert choice["prompt_logprobs"] == [None, {
        str(b): {"logprob": -0.25, "rank": 2, "decoded_token": "b"},
        "0": {"logprob": -0.1, "rank": 1, "decoded_token": "!"},
        "1": {"logprob": -1.1, "rank": 2, "decoded_token": '"'}}]
    assert choice["text"] == "né!" and choice["logprobs"] is None and "token_ids" not in choice


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(2, 0), (0, 2)])
def test_who_asks_for_both_is_told_of_each_as_many_as_it_asks_for(served: Served, client: httpx.Client, logprobs: int,
                                                                  prompt_logprobs: int) -> None:
    (both,) = answer(client, "ab", echo=True, logprobs=logprobs, prompt_logprobs=prompt_logprobs)["choices"]
    assert params_of(served).prompt_logprobs == 2
    (echoed,) = answer(client, "ab", echo=True, logprobs=logprobs)["choices"]
    (scored,) = answer(client, "ab", prompt_logprobs=prompt_logprobs)["choices"]
    assert both["logprobs"] == echoed["logprobs"] and both["prompt_logprobs"] == scored["prompt_logprobs"]


def test_a_chat_has_them_beside_its_choices(served: Served, client: httpx.Client) -> None:
    whole = answer(client, path=CHAT, prompt_logprobs=0, n=2)
    prompt = served.service.submitted[0][0]
    assert [None if one is None else list(one) for one in whole["prompt_logprobs"]] == [
        None, *([str(token)] for token in prompt[1:])]
    assert "prompt_logprobs" not in whole["choices"][0]


def test_who_does_not_ask_is_told_nothing(client: httpx.Client) -> None:
    assert set(answer(client)["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
    whole = answer(client, path=CHAT)
    assert not {"prompt_logprobs", "prompt_token_ids"} & set(whole) and "token_ids" not in whole["choices"][0]


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_ids_of_tokens(served: Served, client: httpx.Client, path: str) -> None:
    whole = answer(client, path=path, return_token_ids=True)
    prompt, said = served.service.submitted[0][0], served.tokenizer.encode("né!")
    holder = whole if path == CHAT else whole["choices"][0]
    assert (holder["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (prompt, said)
    came = chunks(client, path=path, return_token_ids=True)
    holders = came if path == CHAT else [chunk["choices"][0] for chunk in came]
    assert [one["prompt_token_ids"] for one in holders if "prompt_token_ids" in one] == [prompt]
    assert "prompt_token_ids" in holders[0]
    assert [id for chunk in came for id in chunk["choices"][0].get("token_ids", [])] == said


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_tokens_may_be_called_by_their_ids(served: Served, client: httpx.Client, path: str) -> None:
    more: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    told = answer(client, path=path, return_tokens_as_token_ids=True, **more)["choices"][0]["logprobs"]
    names = [one["token"] for one in told["content"]] if path == CHAT else told["tokens"]
    assert names == [f"token_id:{token}" for token in served.tokenizer.encode("né!")]
    best = told["content"][0]["top_logprobs"][0]["token"] if path == CHAT else next(iter(told["top_logprobs"][0]))
    assert best == "token_id:0"


@pytest.mark.parametrize(("keep", "left"), [(2, 2), (7, 7), (300, 300), (-1, MAX_MODEL_LEN - 5), (400, None)])
def test_the_end_of_a_prompt_may_be_enough(served: Served, client: httpx.Client, keep: int, left: int | None) -> None:
    body = {"model": "tiny", "prompt": "x" * 500 + "yz", "truncate_prompt_tokens": keep, "max_tokens": 5, "echo": True}
    response = client.post(TEXT, json=body)
    if left is None:
        assert response.json()["error"]["code"] == "context_length_exceeded"
        return
    assert served.service.submitted[0][0] == served.tokenizer.encode("x" * (left - 2) + "yz")
    assert response.json()["choices"][0]["text"].startswith("x" * (left - 2) + "yzn")


def test_a_prompt_that_is_short_enough_stays(served: Served, client: httpx.Client) -> None:
    answer(client, "abc", truncate_prompt_tokens=5)
    assert served.service.submitted[0][0] == served.tokenizer.encode("abc")


def test_a_chat_is_cut_too(served: Served, client: httpx.Client) -> None:
    answer(client, path=CHAT, truncate_prompt_tokens=3)
    assert served.tokenizer.decode(served.service.submitted[0][0], skip_special_tokens=False) == "nt\n"


def test_all_of_it_arrives(served: Served, client: httpx.Client) -> None:
    for path in (CHAT, TEXT):
        answer(client, path=path, min_tokens=2, bad_words=["no", "nay"], allowed_token_ids=[3, 1],
               include_stop_str_in_output=True, stop="!", max_tokens=9)
        params = params_of(served)
        assert (params.min_tokens, params.bad_words, params.allowed_token_ids) == (2, ("no", "nay"), (3, 1))
        assert (params.include_stop_str_in_output, params.stop, params.max_tokens) == (True, ("!",), 9)


def test_a_stop_string_may_be_part_of_the_text(client: httpx.Client) -> None:
    assert answer(client, stop="é")["choices"][0]["text"] == "n"
    (kept,) = answer(client, stop="é", include_stop_str_in_output=True)["choices"]
    assert (kept["text"], kept["finish_reason"]) == ("né", "stop")
    came = chunks(client, stop="é", include_stop_str_in_output=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in came) == "né"


# ---- the best of several ---------------------------------------------------------------------------------------------


def test_the_best_are_those_whose_tokens_are_the_likeliest_in_the_mean(served: Served, client: httpx.Client,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of seed k has the log-probability -k in each token, and is the longer the better."""
    served.service.script = lambda prompt, params: served.tokenizer.encode(str(params.seed) * (1 + params.seed % 3))
    step = served.service._step

    def by_seed(job: Any) -> None:
        deliver = job.deliver
        job.deliver = lambda update: (setattr(update, "logprobs", [[(token, -float(job.params.seed))]
                                                                    for token in update.token_ids]), deliver(update))
        step(job)
        job.deliver = deliver

    monkeypatch.setattr(served.service, "_step", by_seed)
    whole = answer(client, ["a", "b"], n=2, best_of=4, seed=4, temperature=1)
    assert [choice["text"] for choice in whole["choices"]] == ["44", "555", "44", "555"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in whole["choices"])
    assert whole["usage"]["completion_tokens"] == 2 * (2 + 3 + 1 + 2), "all that was made is counted"
    (best,) = answer(client, best_of=3, seed=4, logprobs=0, temperature=1)["choices"]
    assert best["logprobs"]["token_logprobs"] == [-4.0, -4.0]


def test_as_many_as_are_wanted_may_be_streamed(client: httpx.Client) -> None:
    assert {chunk["choices"][0]["index"] for chunk in chunks(client, n=2, best_of=2)} == {0, 1}


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "fields", "param"), [
    (TEXT, {"max_tokens": 0}, "max_tokens"), (TEXT, {"n": 2, "best_of": 1}, "best_of"),
    (TEXT, {"best_of": 2, "stream": True}, "best_of"),
    (TEXT, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 3, "stream": True}, "prompt_logprobs"), (CHAT, {"max_tokens": 0}, "max_tokens"),
    (TEXT, {"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens"),
    (TEXT, {"min_tokens": 17}, "min_tokens"), (TEXT, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (TEXT, {"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens"),
    (TEXT, {"allowed_token_ids": [258]}, "allowed_token_ids"), (TEXT, {"bad_words": [""]}, "bad_words[0]"),
    (TEXT, {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    (CHAT, {"return_tokens_as_token_ids": True, "logprobs": False}, "return_tokens_as_token_ids"),
    (TEXT, {"detokenize": False}, "detokenize"), (TEXT, {"logprobs": 21}, "logprobs"),
    (TEXT, {"prompt_logprobs": -1}, "prompt_logprobs"),
])
def test_it_is_said_which_field_is_at_fault(served: Served, client: httpx.Client, path: str, fields: dict[str, Any],
                                            param: str) -> None:
    named, message = refused(client, path, **fields)
    assert named == param and param.partition("[")[0] in message
    assert served.service.submitted == []


# ---- spelling --------------------------------------------------------------------------------------------------------


def test_offsets_of_a_prompt_grow_to_its_length(tokenizer: Tokenizer) -> None:
    for text in ("", "abc", "Ünï 🙂!", "a<|im_end|>b"):
        said, offsets = spelled_prompt(tokenizer.encode(text), text, tokenizer)
        assert said == text and offsets == sorted(offsets) and max(offsets, default=0) <= len(text)


def test_what_was_put_around_a_text_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    said, offsets = spelled_prompt([256, *tokenizer.encode("ab")], "ab", tokenizer)
    assert (said, offsets) == ("ab", [0, 0, 1])


def test_a_text_that_the_tokenizer_writes_another_way_stays_what_it_was(tokenizer: Tokenizer) -> None:
    said, offsets = spelled_prompt(tokenizer.encode("abcdef"), "xy", tokenizer)
    assert (said, offsets) == ("xy", [0, 1, 2, 2, 2, 2])
