"""A model of random weights calls what is demanded, in the form that its text is made to have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from asked import USER
from starlette.testclient import TestClient

import structured
from fullpipe import LLM
from fullpipe.options import ServerOptions
from fullpipe.server.app import ServedModel, create_app
from tool_templates import tool

pytest.importorskip("llguidance")

SWITCH = {"$defs": {"state": {"enum": ["on", "off"]}}, "type": "object", "additionalProperties": False,
          "properties": {"state": {"$ref": "#/$defs/state"}, "now": {"type": "boolean"}}, "required": ["state", "now"]}
SHORT = "{% if tools %}{{ tools | length }} tools. {% endif %}{{ messages[0].content }}:"  # its context is 512 tokens
TOOLS: Any = [tool("switch", SWITCH), tool("clock")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = structured.save(tmp_path_factory.mktemp("model"))
    with LLM(model, draft="ngram", dtype="float32", threads=1, chat_template=SHORT) as llm:
        served = ServedModel(("m",), llm.tokenizer, llm.max_model_len)
        with openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0, http_client=TestClient(
                create_app(llm._service, served, ServerOptions()))) as client:
            yield client


def check(call: Any) -> None:
    """It is one of those that were offered, with arguments of its schema."""
    told = json.loads(call.function.arguments)
    if call.function.name == "clock":
        assert told == {}
    else:
        assert call.function.name == "switch" and set(told) == {"state", "now"}
        assert told["state"] in ("on", "off") and isinstance(told["now"], bool)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_call_is_required(client: openai.OpenAI, seed: int) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": [USER], "tools": TOOLS, "tool_choice": "required", "seed": seed,
                             "parallel_tool_calls": False, "max_tokens": 400}
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or ()
    check(call)
    with client.chat.completions.stream(**asked) as stream:
        (same,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)  # type: ignore


@pytest.mark.parametrize("seed", [1, 2])
def test_a_call_is_named(client: openai.OpenAI, seed: int) -> None:
    (choice,) = client.chat.completions.create(
        model="m", messages=[USER], tools=TOOLS, seed=seed, max_tokens=400,  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "switch"}}).choices
    assert choice.finish_reason == "stop"
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "switch"
    check(call)


def test_a_structure_is_one_of_the_text(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "switch", "schema": SWITCH, "strict": True}}
    (choice,) = client.chat.completions.create(model="m", messages=[USER], response_format=form,  # type: ignore
                                               seed=1, max_tokens=400).choices
    assert choice.finish_reason == "stop" and set(json.loads(choice.message.content or "")) == {"state", "now"}


@pytest.mark.parametrize(("fields", "param"), [
    ({"guided_json": {"type": "nonsense"}}, "guided_json"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"tools": [tool("f", {"type": "nonsense"})], "tool_choice": "required"}, "tools"),
])
def test_a_structure_that_cannot_be_followed_is_blamed_on_its_field(client: openai.OpenAI, fields: dict[str, Any],
                                                                    param: str) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be followed") as caught:
        client.chat.completions.create(model="m", messages=[USER], extra_body=fields)  # type: ignore[list-item]
    assert caught.value.param == param
