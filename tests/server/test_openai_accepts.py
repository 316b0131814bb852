"""Whatever leaves the server is what OpenAI's own package says an answer is, by its own types, strictly: of every path,
whole and in chunks, and also where a request ends by a time-out, a failure or the server's end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, CompletionChoice, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from openai_server import Served

from fullpipe.errors import Overloaded, StructureError, Unavailable, UsageError
from fullpipe.server.metrics import REASONS
from fullpipe.server.problems import failure
from fullpipe.server.replies import ChatReplies, finish_reason

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]},
    TEXT: {"model": "tiny", "prompt": "Hi"},
}
LOGPROBS: dict[str, list[dict[str, Any]]] = {
    CHAT: [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}], TEXT: [{}, {"logprobs": 0}, {"logprobs": 2}],
}


class UnfinishedChoice(CompletionChoice):
    """Of chunks before the last, in which OpenAI sends null though its package says never."""

    finish_reason: None = None  # type: ignore[assignment]


class UnfinishedCompletion(Completion):
    choices: list[UnfinishedChoice]  # type: ignore[assignment]


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def check_error(body: Any) -> ErrorObject:
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = ErrorObject.model_validate(body["error"] | {"code": body["error"]["code"] or ""}, strict=True)
    assert error.message
    return error


def check_whole(path: str, response: httpx.Response) -> list[str]:
    """The reasons of the choices, [] of an error."""
    if response.status_code != 200:
        check_error(response.json())
        return []
    kind: Any = ChatCompletion if path == CHAT else Completion
    return [choice.finish_reason for choice in kind.model_validate(response.json(), strict=True).choices]


def check_stream(path: str, response: httpx.Response) -> list[str]:
    """The same of a stream, all of whose chunks belong together."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    bodies = [json.loads(event) for event in events[:-2]]
    *chunks, last = bodies
    if "error" in last:
        check_error(last)
    else:
        chunks.append(last)
    for chunk in chunks:
        check_chunk(path, chunk)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) <= 1
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    return reasons if "error" not in last else []


def check_chunk(path: str, chunk: Any) -> None:
    unfinished = all(choice["finish_reason"] is None for choice in chunk["choices"])
    kind: Any = ChatCompletionChunk if path == CHAT else UnfinishedCompletion if unfinished else Completion
    kind.model_validate(chunk, strict=True)


def asked(path: str) -> Iterator[dict[str, Any]]:
    for logprobs, stream, n in itertools.product(LOGPROBS[path], (False, True), (1, 2)):
        yield BODIES[path] | logprobs | {"n": n, "max_tokens": 4, "stream": stream}
    for usage in ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}, {}):
        yield BODIES[path] | {"stream": True, "max_tokens": 4, "stream_options": usage}


# What the fake service does: the text that it has, how many tokens until it ends, and why.
ENDINGS: dict[str, tuple[str, int | None, str, str | None]] = {
    "by itself": ("ab", None, "", "stop"), "at the limit": ("Ünï🙂 and on", None, "", "length"),
    "at once": ("", None, "", "stop"), "in time": ("Ünï", 3, "deadline", "length"),
    "before a token": ("Ünï", 0, "deadline", "length"), "by a failure": ("Ünï", 3, "error", None),
    "by a failure at once": ("Ünï", 0, "error", None), "by the server's end": ("Ünï", 3, "abort", None),
    "by the server's end at once": ("Ünï", 0, "abort", None),
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_answer_is_one_that_openai_knows(served: Served, client: httpx.Client, path: str, ending: str) -> None:
    text, served.service.fail_after, served.service.fail_with, reason = ENDINGS[ending]
    served.script(text)
    for body in asked(path):
        response = client.post(path, json=body)
        streamed = body["stream"] and response.status_code == 200
        reasons = check_stream(path, response) if streamed else check_whole(path, response)
        assert reasons == ([] if reason is None else [reason] * body.get("n", 1)), body


@pytest.mark.parametrize(("ending", "status", "code"), [
    ("error", 500, "engine_error"), ("abort", 503, "service_unavailable"),
])
def test_a_client_is_told_what_cut_its_answer_off(served: Served, ending: str, status: int, code: str) -> None:
    """No answer, whole or streamed, looks as if it had come to its end."""
    served.script("abcdef")
    served.service.fail_after, served.service.fail_with = 3, ending
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as whole:
            client.chat.completions.create(**BODIES[CHAT])
        assert (whole.value.status_code, whole.value.code) == (status, code)
        text, served.service.hold_at = "", 2
        with pytest.raises(openai.APIError) as streamed:
            for chunk in client.chat.completions.create(**BODIES[CHAT], stream=True):
                text += chunk.choices[0].delta.content or ""
                assert chunk.choices[0].finish_reason is None
                served.service.go_on()
        assert (text, streamed.value.code) == ("abc", code)


def test_an_end_of_the_server_is_worth_another_try(served: Served, client: httpx.Client) -> None:
    served.service.fail_after, served.service.fail_with = 1, "abort"
    assert client.post(TEXT, json=BODIES[TEXT]).headers["retry-after"] == "1"


@pytest.mark.parametrize("reason", REASONS)
def test_every_end_that_the_engine_knows_is_told_as_an_answer_or_an_error(reason: str) -> None:
    choice: Any = SimpleNamespace(reason=reason)
    assert (finish_reason(choice) is None) == (failure(reason, "") is not None)


def test_a_structure_that_cannot_be_followed_is_the_callers_to_change() -> None:
    problem = failure("error", "x", StructureError("too complex to follow", hint="Ask for a simpler one."))
    assert problem is not None
    assert (problem.status_code, problem.error.code) == (400, "structure_error")
    assert problem.error.message == "too complex to follow. Ask for a simpler one."


def test_what_runs_has_neither() -> None:
    running: Any = SimpleNamespace(reason=None)
    assert finish_reason(running) is None and failure(None, "") is None


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("error", [
    Overloaded("full", retry_after_s=1), Unavailable("down", retry_after_s=1), UsageError("no"), KeyError("inside"),
])
def test_refusals_are_errors_that_openai_knows(served: Served, client: httpx.Client, path: str,
                                               error: Exception) -> None:
    served.service.refuse = error
    for stream in (False, True):
        response = client.post(path, json=BODIES[path] | {"stream": stream})
        assert response.status_code >= 400
        check_error(response.json())


def test_a_mistake_of_ours_in_mid_stream_is_an_error_event(served: Served, client: httpx.Client,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    served.script("abc")
    chunks = ChatReplies.chunks

    def break_off(replies: ChatReplies, news: Any, usage: Any) -> Iterator[Any]:
        if news.choice.reason is not None:
            raise KeyError("inside")
        return chunks(replies, news, usage)

    monkeypatch.setattr(ChatReplies, "chunks", break_off)
    response = client.post(CHAT, json=BODIES[CHAT] | {"stream": True})
    assert check_stream(CHAT, response) == []
    assert "internal_error" in response.text and "inside" not in response.text


def test_models_are_what_openai_calls_one(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and len(listed["data"]) == 2
    for card in (*listed["data"], client.get("/v1/models/alias/tiny").json()):
        Model.model_validate(card, strict=True)
    check_error(client.get("/v1/models/other").json())
