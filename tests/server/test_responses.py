"""/v1/responses as OpenAI's own package sees it, by its types, strictly; and by its bytes."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from asked import Asked
from fastapi import FastAPI
from one_word import OneWord
from openai.types.responses import Response, ResponseStreamEvent
from openai_server import Served, byte_tokenizer
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.server.app import ServedModel, create_app
from fullpipe.server.protocol.answers import CallDelta, ChatChunkChoice, ChosenLogprob, Delta, FunctionDelta
from fullpipe.server.replies import ChatReplies
from fullpipe.server.responses.asking import Turns, _tools, as_chat
from fullpipe.server.responses.output import Output
from fullpipe.server.responses.protocol import ResponsesRequest
from fullpipe.server.responses.replies import _said
from fullpipe.server.responses.tables import IGNORED, REFUSED
from tool_templates import QWEN_TOOLS

Asking = Callable[..., Asked]
PATH = "/v1/responses"
ASKED: dict[str, Any] = {"model": "tiny", "input": "Hello"}
USER: dict[str, Any] = {"role": "user", "content": "hi"}
TOOL: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
LOOSE = TOOL | {"strict": False}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "Zürich 🙂"}}\n</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TEXT_EVENTS = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
               "response.output_text.delta", "response.output_text.done", "response.content_part.done",
               "response.output_item.done", "response.completed"]


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture
def openai_client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


def whole(client: httpx.Client, **fields: Any) -> Any:
    response = client.post(PATH, json=ASKED | fields)
    assert response.status_code == 200, response.text
    Response.model_validate(response.json(), strict=True)
    return response.json()


def events_of(content: bytes) -> list[Any]:
    """The events of a stream, whose bytes keep the rules: UTF-8, a line with the type and one with the data, then an
    empty one. Each is what OpenAI's package knows, and they are numbered."""
    *blocks, rest = content.decode().split("\n\n")
    assert rest == "" and "\r" not in content.decode()
    events = []
    for number, block in enumerate(blocks):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}" and event["sequence_number"] == number
        EVENT.validate_python(event, strict=True)
        events.append(event)
    return events


def streamed(client: httpx.Client, **fields: Any) -> list[Any]:
    response = client.post(PATH, json=ASKED | fields | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    return events_of(response.content)


def streamed_slowly(served: Served, client: httpx.Client) -> list[Any]:
    """The same, of which the first two tokens come by themselves."""
    served.service.hold_at, pieces = 2, []
    with client.stream("POST", PATH, json=ASKED | {"stream": True}) as response:
        for piece in response.iter_raw():
            pieces.append(piece)
            served.service.go_on()
    return events_of(b"".join(pieces))


def refused(client: httpx.Client | TestClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json=ASKED | fields)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def kinds(events: list[Any]) -> list[str]:
    """Types of events, several of a kind in a row as one."""
    types = [event["type"] for event in events]
    return [kind for number, kind in enumerate(types) if number == 0 or types[number - 1] != kind]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer(served: Served, openai_client: openai.OpenAI) -> None:
    served.script("Ünï 🙂!")
    answer = openai_client.responses.create(
        model="tiny", input="Hello", instructions="Be brief.", max_output_tokens=20, temperature=0, metadata={"a": "b"})
    assert answer.output_text == "Ünï 🙂!" and answer.status == "completed" and answer.error is None
    assert answer.id.startswith("resp_") and [item.type for item in answer.output] == ["message"]
    assert (answer.instructions, answer.max_output_tokens, answer.metadata) == ("Be brief.", 20, {"a": "b"})
    assert (answer.temperature, answer.top_p, answer.tool_choice, answer.tools) == (0, 1, "auto", [])
    assert answer.usage is not None and answer.usage.output_tokens == len("Ünï 🙂!".encode())
    assert answer.usage.input_tokens_details.cached_tokens == 2
    tokens, params, *_ = served.service.submitted[0]
    assert served.tokenizer.backend.decode(tokens, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert (params.max_tokens, params.temperature, params.logprobs) == (20, 0, None)


@pytest.mark.parametrize("text", ["", "x", "Ünï 🙂 and on"])
@pytest.mark.parametrize("fields", [{}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
                                    {"max_output_tokens": 4}])
def test_a_stream_comes_to_the_same_as_an_answer(served: Served, client: httpx.Client, text: str,
                                                 fields: dict[str, Any]) -> None:
    served.script(text)
    answer, events = whole(client, **fields), streamed(client, **fields)
    last = events[-1]["response"]
    for one in (answer, last):
        one["output"][0]["id"], one["id"], one["created_at"], one["completed_at"] = "", "", 0, 0
        one["usage"].pop("speculation")
    assert last == answer
    (message,) = answer["output"]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == message["content"][0]["text"]
    assert [one for event in deltas for one in event["logprobs"]] == message["content"][0]["logprobs"]
    cut = len(text.encode()) >= 4 and "max_output_tokens" in fields
    expected = [*TEXT_EVENTS[:-1], "response.incomplete" if cut else "response.completed"]
    assert kinds(events) == (expected if deltas else [kind for kind in expected if "delta" not in kind])
    assert (answer["status"], message["status"]) == (("incomplete",) * 2 if cut else ("completed",) * 2)
    assert answer["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)


def test_log_probabilities(served: Served, client: httpx.Client) -> None:
    served.script("ab")
    for asked, others in (({"include": ["message.output_text.logprobs"]}, 0), ({"top_logprobs": 2}, 2)):
        (message,) = whole(client, **asked)["output"]
        assert [(one["token"], len(one["top_logprobs"])) for one in message["content"][0]["logprobs"]] == [
            ("a", others), ("b", others)]
    assert whole(client, top_logprobs=0)["output"][0]["content"][0]["logprobs"] == []


def test_the_clients_own_stream(served: Served, openai_client: openai.OpenAI) -> None:
    served.script("Hi you")
    with openai_client.responses.stream(model="tiny", input="Hello") as stream:
        assert stream.get_final_response().output_text == "Hi you"


def test_a_conversation_goes_on(served: Served, openai_client: openai.OpenAI) -> None:
    served.script("Hi")
    first = openai_client.responses.create(model="tiny", input=[{"role": "user", "content": "Hello"}])
    openai_client.responses.create(model="tiny", input=[
        {"role": "user", "content": "Hello"}, *first.output,  # type: ignore[list-item]
        {"role": "user", "content": [{"type": "input_text", "text": "on"}]}])
    assert served.tokenizer.backend.decode(served.service.submitted[-1][0]).split() == [
        "user", "Hello", "assistant", "Hi", "user", "on", "assistant"]


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
def test_what_fails_at_once_has_a_status(served: Served, client: httpx.Client, reason: str, status: int) -> None:
    served.service.fail_after, served.service.fail_with = 0, reason
    refused(client, status)
    refused(client, status, stream=True)


def test_what_fails_later_is_told_as_failed(served: Served, client: httpx.Client) -> None:
    served.script("abcdef")
    served.service.fail_after = 3
    refused(client, 500)
    last = streamed_slowly(served, client)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert "stage 1 spoke nonsense" in last["response"]["error"]["message"]
    assert last["response"]["output"][0]["status"] == "in_progress"


def test_a_mistake_of_ours_is_told_as_failed(served: Served, client: httpx.Client,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    served.script("abc")
    chunks = ChatReplies.chunks

    def break_off(replies: ChatReplies, news: Any, usage: Any) -> Iterator[Any]:
        if news.choice.reason is not None:
            raise KeyError("inside")
        return chunks(replies, news, usage)

    monkeypatch.setattr(ChatReplies, "chunks", break_off)
    last = streamed_slowly(served, client)[-1]
    assert last["type"] == "response.failed" and "inside" not in json.dumps(last)


def test_nothing_is_stored(served: Served, client: httpx.Client, openai_client: openai.OpenAI) -> None:
    asks: list[Any] = [openai_client.responses.retrieve, openai_client.responses.delete,
                       openai_client.responses.cancel, openai_client.responses.input_items.list]
    for ask in asks:
        with pytest.raises(openai.NotFoundError, match="this server stores none"):
            ask("resp_1")
    assert whole(client, store=True)["store"] is False


# ---- what is asked ---------------------------------------------------------------------------------------------------


def request_of(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate(ASKED | fields)


def test_every_field_that_openais_client_knows_has_been_decided_on() -> None:
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    known = set(inspect.signature(openai.resources.responses.Responses.create).parameters)
    assert known - transport <= set(ResponsesRequest.model_fields)


def test_items_that_are_one_turn_of_the_model_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1", "status": "x"}
    turns = Turns.of(request_of(instructions="Be brief.", input=[
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": None,
         "content": [{"type": "output_text", "text": "well", "annotations": [], "logprobs": []}]},
        call, call | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, call,
        {"type": "message", "role": "developer", "content": "on"},
    ]))
    function = {"name": "f", "arguments": "{}"}
    assert turns.messages == [
        {"role": "system", "content": "Be brief."}, USER,
        {"role": "assistant", "reasoning_content": "hm", "content": [{"type": "output_text", "text": "well"}],
         "tool_calls": [{"id": "c1", "type": "function", "function": function},
                        {"id": "c2", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "developer", "content": "on"},
    ]
    assert turns.places == ["instructions", "input[0]", "input[2]", "input[5].output", "input[6].output", "input[8]",
                            "input[9]", "input[11]"]
    assert turns.calls == {(2, 0): "input[3]", (2, 1): "input[4]", (6, 0): "input[10]"}


@pytest.mark.parametrize(("fields", "tools", "choice"), [
    ({}, None, None), ({"tool_choice": "auto"}, None, None), ({"tool_choice": "required"}, None, "required"),
    ({"tools": [TOOL]}, ["f"], None), ({"tools": [TOOL], "tool_choice": "none"}, ["f"], "none"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, ["f"],
     {"type": "function", "function": {"name": "f"}}),
    ({"tools": [TOOL, TOOL | {"name": "g"}],
      "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}},
     ["g"], "required"),
])
def test_tools_are_offered_as_in_a_chat(fields: dict[str, Any], tools: Any, choice: Any) -> None:
    said = dict(_tools(request_of(**fields)))
    assert said.get("tool_choice") == choice
    offered = said.get("tools")
    assert (offered and [tool["function"]["name"] for tool in offered]) == tools
    assert not offered or offered[0]["function"]["strict"] is True


def test_an_answer_that_is_not_complete_is_gone_on_with(served: Served, client: httpx.Client) -> None:
    begun = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "He"}]}
    for status, end in (("incomplete", "He"), ("completed", "<|im_start|>assistant\n")):
        whole(client, input=[USER, begun | {"status": status}])
        assert served.tokenizer.backend.decode(served.service.submitted[-1][0], skip_special_tokens=False).endswith(end)


def test_what_vllm_has_besides_is_taken(served: Served, client: httpx.Client) -> None:
    whole(client, top_k=3, min_p=0.1, repetition_penalty=1.1, seed=5, stop=["x"], ignore_eos=True, priority=-1,
          logit_bias={"1": 2}, presence_penalty=0.5, frequency_penalty=0.5, stop_token_ids=[3], top_p=0.5)
    _, params, priority, _ = served.service.submitted[0]
    assert (params.top_k, params.min_p, params.seed, params.stop, priority) == (3, 0.1, 5, ("x",), -1)
    assert (params.logit_bias, params.stop_token_ids, params.top_p) == ({1: 2.0}, (3,), 0.5)


# ---- what is not taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field for field in REFUSED if "." not in field])
def test_what_is_not_supported_is_refused_by_name(served: Served, client: httpx.Client, field: str) -> None:
    wrong: dict[str, Any] = {"background": True, "truncation": "auto"}
    error = refused(client, 400, **{field: wrong.get(field, [{"any": "thing"}])})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert REFUSED[field] in error["message"] and served.service.submitted == []


@pytest.mark.parametrize(("fields", "param", "why"), [
    ({"colour": 1}, "colour", "unknown field"),
    ({"max_tokens": 1}, "max_tokens", "it is called max_output_tokens here"),
    ({"messages": [USER]}, "messages", "it is called input here"), ({"temprature": 1}, "temprature", "'temperature'?"),
    ({"response_format": {"type": "text"}}, "response_format", "say it in text.format"),
    ({"guided_json": {}}, "guided_json", "say it in structured_outputs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0]", "stands beside \"type\" here"),
    ({"text": {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}}, "text.format", "beside type here"),
    ({"structured_outputs": {"json": {}, "disable_fallback": True}}, "structured_outputs.disable_fallback",
     "there is one backend"), ({"input": None}, "input", "string or a list"),
    ({"input": []}, "input", ""), ({"input": [5]}, "input[0]", "role or a type"),
    ({"input": [USER, {"role": "tool", "content": "x"}]}, "input[1].role", ""),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]", "'web_search_call' are not supported"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "not supported"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input[0].content[0].type", "only text is"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "must be a text"),
    ({"instructions": "x", "input": [{"role": "user", "content": []}]}, "input[0].content", "must be a text"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "text"}]}]}, "input[0].output",
     "must be a text"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content", ""),
    ({"input": "x" * 500}, "input", "maximum context length"), ({"model": "other"}, "model", "no model"),
    ({"max_output_tokens": 0}, "max_output_tokens", ""), ({"max_output_tokens": 399}, "max_output_tokens", "too large"),
    ({"temperature": -1}, "temperature", ""), ({"temperature": "hot"}, "temperature", ""), ({"top_p": 0}, "top_p", ""),
    ({"top_logprobs": 21}, "top_logprobs", ""), ({"top_logprobs": -1}, "top_logprobs", ""),
    ({"logit_bias": {"x": 1}}, "logit_bias", ""), ({"logit_bias": {"9999": 1}}, "logit_bias", "no token"),
    ({"stop": [""]}, "stop[0]", ""), ({"include": ["everything"]}, "include[0]", ""),
    ({"metadata": {"a": 1}}, "metadata.a", ""), ({"metadata": {str(k): "" for k in range(17)}}, "metadata", ""),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "does not read it"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort", ""), ({"text": {"verbosity": "low"}}, "text.verbosity", ""),
    ({"text": {"format": {"type": "wav"}}}, "text.format", ""),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "only functions are"), ({"tools": [{}]}, "tools[0].type", ""),
    ({"tool_choice": "f"}, "tool_choice", ""), ({"tool_choice": {"type": "mcp"}}, "tool_choice", "must be none"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
        {"type": "function", "name": "g"}]}}, "tool_choice.tools", "no tool 'g'"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "cannot set"),
    ({"stream": "yes"}, "stream", ""),
])
def test_param_is_the_path_of_the_fault(served: Served, client: httpx.Client, fields: dict[str, Any], param: str,
                                        why: str) -> None:
    error = refused(client, 404 if param == "model" else 400, **fields)
    assert error["param"].startswith(param) and why in error["message"]
    assert served.service.submitted == []


def test_a_body_without_input(client: httpx.Client) -> None:
    response = client.post(PATH, json={"model": "tiny"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "input"


def with_template(source: str) -> FastAPI:
    tokenizer = Tokenizer(byte_tokenizer().backend, template=ChatTemplate(source))
    return create_app(OneWord(), ServedModel(("tiny",), tokenizer, 400))  # type: ignore[arg-type]


def test_effort_is_for_templates_that_read_it() -> None:
    chat = as_chat(request_of(reasoning={"effort": "low"}), Turns.of(request_of()), lambda name: True)
    assert chat.chat_template_kwargs == {"reasoning_effort": "low"}
    app = with_template("{{ reasoning_effort }}{{ messages[0].content }}")
    answer = TestClient(app).post(PATH, json=ASKED | {"reasoning": {"effort": "low"}})
    assert answer.status_code == 200 and answer.json()["reasoning"]["effort"] == "low"


def test_what_a_template_raises_is_the_inputs_error() -> None:
    error = refused(TestClient(with_template("{{ raise_exception('messages must alternate') }}")))
    assert error["param"] == "input" and "messages must alternate" in error["message"]


def sent(path: str) -> dict[str, Any]:
    """A body with something at this path of the table."""
    *parents, field = path.split(".")
    value: Any = {"store": True, "include": ["reasoning.encrypted_content"]}.get(path, "x")
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    part = {"type": "input_text", "text": "x", field: value}
    item = call if field in ("status", "caller", "parsed_arguments") else USER
    return {"": {field: value}, "stream_options": {"stream": True, "stream_options": {field: value}},
            "reasoning": {"reasoning": {field: value}}, "tools": {"tools": [TOOL | {field: value}]},
            "input": {"input": [item | {field: value}]}, "input.content": {"input": [USER | {"content": [part]}]},
            "input.output": {"input": [{"type": "function_call_output", "call_id": "c", "output": [part]}]},
            }[".".join(parents)]


@pytest.mark.parametrize("path", IGNORED)
def test_what_has_no_effect_is_taken_and_said(path: str) -> None:
    assert list(request_of(**sent(path)).ignored()) == [path]


def test_what_has_no_effect_is_told_once(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fullpipe.server"):
        for _ in range(2):
            whole(client, client_metadata={"a": "b"}, include=["reasoning.encrypted_content"])
    told = [record.getMessage() for record in caplog.records]
    assert sum("'client_metadata'" in line for line in told) == sum("'include'" in line for line in told) == 1


def test_what_asks_for_nothing_is_not_told() -> None:
    asked = request_of(store=False, include=["message.output_text.logprobs"], user=None, background=False,
                       truncation="disabled", parallel_tool_calls=True, text={"format": {"type": "text"}})
    assert list(asked.ignored()) == []


# ---- reasoning and calls ---------------------------------------------------------------------------------------------


def piece(**delta: Any) -> ChatChunkChoice:
    """What a chat's chunk tells."""
    return ChatChunkChoice(index=0, delta=Delta(**delta))


def call(number: int, arguments: str = "", id: str | None = None, name: str | None = None) -> CallDelta:
    return CallDelta(index=number, id=id, function=FunctionDelta(name=name, arguments=arguments))


def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    output = Output("1")
    pieces = [piece(reasoning_content="hm"), piece(reasoning_content=" hm"), piece(content="we"), piece(content="ll"),
              piece(tool_calls=[call(0, id="c1", name="f")]), piece(tool_calls=[call(0, '{"a"')]),
              piece(tool_calls=[call(0, ": 1}"), call(1, "{}", id="c2", name="g")])]
    events = [event for one in pieces for event in _said(output, one)] + list(output.finish("completed"))
    assert [item.model_dump(exclude={"id"}) for item in output.items] == [
        {"type": "reasoning", "status": "completed", "summary": [],
         "content": [{"type": "reasoning_text", "text": "hm hm"}]},
        {"type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "well", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "status": "completed", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "status": "completed", "call_id": "c2", "name": "g", "arguments": "{}"},
    ]
    assert kinds([event.model_dump() for event in events]) == [
        "response.output_item.added", "response.content_part.added", "response.reasoning_text.delta",
        "response.reasoning_text.done", "response.content_part.done", "response.output_item.done",
        *TEXT_EVENTS[2:-1],
        *["response.output_item.added", "response.function_call_arguments.delta",
          "response.function_call_arguments.done", "response.output_item.done"] * 2]
    for event in events:
        EVENT.validate_python(event.model_dump(), strict=True)


def test_an_item_that_is_cut_is_not_complete() -> None:
    output = Output("1")
    list(_said(output, piece(content="a")))
    list(_said(output, piece(tool_calls=[call(0, "{", id="c1", name="f")])))
    list(output.finish("incomplete"))
    assert [item.status for item in output.items] == ["completed", "incomplete"]


def test_log_probabilities_wait_for_the_text_that_they_belong_to() -> None:
    output, told = Output("1"), [ChosenLogprob(token="x", logprob=-1, bytes=[1], top_logprobs=[])]
    assert list(output.say("", told)) == []
    assert [getattr(event, "logprobs", None) for event in output.say("a", told)][-1] == told * 2
    list(output.say("", told))
    list(output.call(0, "c", "f", "{}"))  # they were of the call's tokens
    list(output.say("b"))
    list(output.finish("completed"))
    message = output.items[-1]
    assert message.type == "message" and message.content[0].logprobs == []


def test_a_call_and_its_result(asking: Asking) -> None:
    asked = asking(QWEN_TOOLS)
    asked.say(f"I look.\n{CALL}")
    first = asked.openai.responses.create(model="m", input="hi", tools=[LOOSE])  # type: ignore[list-item]
    message, called = first.output
    assert message.type == "message" and first.output_text == "I look." and first.status == "completed"
    assert called.type == "function_call" and called.call_id.startswith("call_")
    assert (called.name, called.arguments) == ("f", '{"a": "Zürich 🙂"}')
    assert '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}' in asked.prompt
    asked.say("It rains.")
    again = asked.openai.responses.create(model="m", tools=[LOOSE], input=[  # type: ignore[list-item]
        {"role": "user", "content": "hi"}, *first.output,  # type: ignore[list-item]
        {"type": "function_call_output", "call_id": called.call_id, "output": "rain"}])
    assert again.output_text == "It rains."
    assert asked.prompt.endswith(
        '<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "f", "arguments": {"a": "Zürich 🙂"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_a_call_is_streamed(asking: Asking) -> None:
    asked = asking(QWEN_TOOLS)
    asked.say(f"I look.\n{CALL}\n{CALL}")
    with asked.openai.responses.stream(model="m", input="hi", tools=[LOOSE]) as stream:  # type: ignore[list-item]
        events = list(stream)
        whole = stream.get_final_response()
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    pieces = ["".join(event.delta for event in events if event.type == "response.function_call_arguments.delta"
                      and event.output_index == index) for index in (1, 2)]
    assert pieces == ['{"a": "Zürich 🙂"}'] * 2


def test_a_call_may_be_demanded(asking: Asking) -> None:
    asked = asking(QWEN_TOOLS)
    asked.say('{"a": 1}')
    response = asked.http.post(PATH, json={"input": "hi", "tools": [TOOL], "tool_choice": {
        "type": "function", "name": "f"}}).json()
    Response.model_validate(response, strict=True)
    assert [(item["type"], item["arguments"]) for item in response["output"]] == [("function_call", '{"a": 1}')]
    assert asked.structured.kind == "json" and response["tool_choice"] == {"type": "function", "name": "f"}


def test_the_form_of_the_text_is_a_chats(asking: Asking) -> None:
    asked = asking(QWEN_TOOLS)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    forms: list[tuple[dict[str, Any], str]] = [
        ({"type": "json_schema", "name": "x", "schema": schema, "strict": True}, "json"),
        ({"type": "json_object"}, "json_object")]
    for form, kind in forms:
        response = asked.http.post(PATH, json={"input": "hi", "text": {"format": form}}).json()
        Response.model_validate(response, strict=True)
        assert asked.structured.kind == kind and response["text"]["format"] == form
    assert asked.http.post(PATH, json={"input": "hi", "text": {"format": {"type": "text"}}}).status_code == 200
    assert asked.params.structured is None


@pytest.mark.parametrize(("fields", "param"), [
    ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, ""),
    ({"text": {"format": {"type": "json_object", "more": 1}}}, "text.format.more"),
])
def test_what_chats_refuse_is_blamed_on_the_requests_fields(asking: Asking, fields: dict[str, Any], param: str) -> None:
    response = asking(QWEN_TOOLS).http.post(PATH, json={"input": "hi", **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].startswith(param)
    assert "function." not in error["message"] and "response_format" not in error["param"]


def test_thoughts_are_an_item_of_their_own(asking: Asking) -> None:
    asked = asking(QWEN_TOOLS, special=("<think>", "</think>"), reasoning_parser="qwen3")
    asked.say("<think>hm, hm</think>Hello.")
    answer = asked.openai.responses.create(model="m", input="hi")
    thought, message = answer.output
    assert thought.type == "reasoning" and thought.content and thought.content[0].text == "hm, hm"
    assert message.type == "message" and answer.output_text == "Hello."
    assert answer.usage and answer.usage.output_tokens_details.reasoning_tokens > 0
