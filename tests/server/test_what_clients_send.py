"""Fields that clients send besides: which are taken, which are ignored and told of once, which are refused by name; and
conversations as they replay them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from one_word import OneWord, application
from openai_server import Served, byte_tokenizer
from pydantic import BaseModel
from starlette.testclient import TestClient

from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.server.app import ServedModel, create_app
from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest, Message, Part, StreamOptions, ToolCall
from fullpipe.server.protocol.tables import IGNORED, REFUSED

USER: dict[str, Any] = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
THINKS = ("{% for m in messages %}{{ '<' + m.role + '>' + (m.reasoning_content or '') + m.content }}"
          "{% for call in m.tool_calls %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
          "{% endfor %}{% if add_generation_prompt %}<assistant>"
          "{% if enable_thinking is defined and not enable_thinking %}<quick>{% endif %}{% endif %}")


def with_template(service: Any, source: str | None) -> FastAPI:
    """The application over a model "m" with this chat template."""
    template = None if source is None else ChatTemplate(source)
    return create_app(service, ServedModel(("m",), Tokenizer(byte_tokenizer().backend, template=template), 400))


@pytest.fixture
def client() -> TestClient:
    return TestClient(application(OneWord()))


@pytest.fixture
def thinking(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a server whose model has another template."""
    with openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0,
                       http_client=TestClient(with_template(served.service, THINKS))) as client:
        yield client


def prompt_of(served: Served) -> str:
    return str(served.tokenizer.backend.decode(served.service.submitted[-1][0], skip_special_tokens=False))


# ---- the table -------------------------------------------------------------------------------------------------------

# Everything that stands for what the tables call by a path.
PLACES: dict[str, type[BaseModel]] = {
    "": ChatRequest, "stream_options.": StreamOptions, "messages.": Message, "messages.content.": Part,
    "messages.tool_calls.": ToolCall,
}
SAMPLES: list[Any] = ["x", "", 5, 0.5, True, [], ["x"], {}, {"a": {"b": [1, None]}}, {str(k): "" for k in range(2000)}]


def body_with(path: str, value: Any) -> dict[str, Any]:
    *parents, field = path.split(".")
    calls = {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f"}, "index": value}]}
    return {
        "": CHAT | {field: value}, "stream_options": CHAT | {"stream": True, "stream_options": {field: value}},
        "messages": CHAT | {"messages": [USER | {field: value}]},
        "messages.content": CHAT | {"messages": [USER | {"content": [{"type": "text", "text": "hi", field: value}]}]},
        "messages.tool_calls": CHAT | {"messages": [USER, calls]},
    }[".".join(parents)]


@pytest.mark.parametrize("path", IGNORED)
def test_what_changes_no_text_is_taken_and_told_once(path: str, caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(with_template(OneWord(), THINKS))
    with caplog.at_level(logging.WARNING, "fullpipe.server"):
        for value in [None, *SAMPLES]:
            response = client.post("/v1/chat/completions", json=body_with(path, value))
            assert response.status_code == 200, response.text
    told = [record.getMessage() for record in caplog.records if repr(path) in record.getMessage()]
    assert len(told) == 1 and IGNORED[path] in told[0]


@pytest.mark.parametrize("prefix", PLACES)
def test_the_table_is_what_the_schema_says(prefix: str) -> None:
    fields = PLACES[prefix].model_fields
    declared = {prefix + name for name, field in fields.items() if "ignored" in (field.description or "")}
    assert declared == {path for path in IGNORED if path.startswith(prefix) and "." not in path.removeprefix(prefix)}


def test_a_field_is_ignored_or_refused_never_both() -> None:
    assert not IGNORED.keys() & REFUSED.keys()


@pytest.mark.parametrize(("create", "request_"), [
    (openai.resources.chat.completions.Completions.create, ChatRequest),
    (openai.resources.completions.Completions.create, CompletionRequest),
])
def test_every_field_that_openais_client_knows_has_been_decided_on(create: Any, request_: type[BaseModel]) -> None:
    transport = {"self", "extra_headers", "extra_query", "extra_body"}
    assert set(inspect.signature(create).parameters) - transport <= set(request_.model_fields)


def test_what_is_ignored_changes_no_prompt(served: Served) -> None:
    with served.client() as client:
        for body in (CHAT, *(body_with(path, "x") for path in IGNORED if "tool_calls" not in path)):
            assert client.post("/v1/chat/completions", json=body | {"model": "tiny"}).status_code == 200
    assert len({tuple(tokens) for tokens, *_ in served.service.submitted}) == 1


@pytest.mark.parametrize(("field", "value", "way_out"), [
    ("enable_thinking", False, "chat_template_kwargs"), ("chat_template", "{{ x }}", "whoever starts the server"),
    ("documents", [{"text": "x"}], "messages"), ("reasoning_effort", "low", "chat_template_kwargs"),
    ("thinking", {"type": "disabled"}, "chat_template_kwargs"), ("moderation", {"model": "x"}, "moderated"),
])
def test_what_would_change_the_text_is_refused_with_the_way_out(client: TestClient, field: str, value: Any,
                                                                way_out: str) -> None:
    error = client.post("/v1/chat/completions", json=CHAT | {field: value}).json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert way_out in error["message"]


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_with_tools_is_replayed(served: Served, thinking: openai.OpenAI) -> None:
    turns: Any = [
        USER, {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
               "function_call": None, "reasoning_content": "(hm)", "tool_calls": [
                   {"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"ä": 1}'}}]},
        {"role": "tool", "tool_call_id": "c1",
         "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "", "type": "message", "id": "msg_1", "status": "completed"},
        {"role": "user", "content": "on", "cache_control": {"type": "ephemeral"}},
    ]
    thinking.chat.completions.create(model="m", messages=turns)
    assert prompt_of(served) == '<user>hi<assistant>(hm)f{"ä": 1}<tool>1\n2<assistant><user>on<assistant>'


@pytest.mark.parametrize(("extra", "prompt"), [
    ({}, "<user>hi<assistant>He<assistant>"),
    ({"add_generation_prompt": False}, "<user>hi<assistant>He"),
    ({"continue_final_message": True}, "<user>hi<assistant>He"),
    ({"continue_final_message": True, "add_generation_prompt": False}, "<user>hi<assistant>He"),
    ({"continue_final_message": False, "add_generation_prompt": True}, "<user>hi<assistant>He<assistant>"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "<user>hi<assistant>He<assistant><quick>"),
    ({"chat_template_kwargs": {"enable_thinking": True, "other": [1]}}, "<user>hi<assistant>He<assistant>"),
    ({"chat_template_kwargs": {}}, "<user>hi<assistant>He<assistant>"),
])
def test_how_a_prompt_ends_is_asked_for_as_of_vllm(served: Served, thinking: openai.OpenAI, extra: dict[str, Any],
                                                   prompt: str) -> None:
    turns: Any = [USER, {"role": "assistant", "content": "He"}]
    thinking.chat.completions.create(model="m", messages=turns, extra_body=extra)
    assert prompt_of(served) == prompt


@pytest.mark.parametrize(("extra", "param"), [
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    ({"messages": [USER, {"role": "assistant", "content": ""}], "continue_final_message": True},
     "continue_final_message"),
    ({"messages": [USER, {"role": "user", "content": None}]}, "messages[1].content"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[1].content[0].type"),
])
def test_what_cannot_be_asked_of_a_template(served: Served, thinking: openai.OpenAI, extra: dict[str, Any],
                                            param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        thinking.chat.completions.create(model="m", messages=[USER], extra_body=extra)  # type: ignore[list-item]
    assert caught.value.param == param and param in caught.value.message
    assert served.service.submitted == []


def test_a_variable_that_the_template_does_not_read_is_told_once(client: TestClient,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fullpipe.server"):
        for _ in range(2):
            body = CHAT | {"chat_template_kwargs": {"enable_thinking": False}}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "chat_template_kwargs.enable_thinking" in told[0] and "does not read" in told[0]


@pytest.mark.parametrize(("source", "why"), [
    ("{{ raise_exception('Conversation roles must alternate') }}", "refuses these messages: Conversation roles must"),
    ("{{ messages[0].content + 1 }}", "TypeError"), ("{{ messages[0].content + x.y }}", "'x' is undefined"),
    ("{% for %}", "cannot be read"), (None, "has no chat template"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_template_raises_is_the_requests_error(source: str | None, why: str, stream: bool) -> None:
    client = TestClient(with_template(OneWord(), source))
    response: httpx.Response = client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages" and why in error["message"] and "chat_template" not in error["message"]
    assert client.post("/v1/completions", json={"model": "m", "prompt": "hi"}).status_code == 200
