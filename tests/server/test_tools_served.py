"""Chats with tools, as OpenAI's own client sees them: whole, and streamed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from asked import USER, Asked
from openai_server import CHATML

from tool_templates import CLOCK, LLAMA_TOOLS, MISTRAL_TOOLS, QWEN_TOOLS, WEATHER, tool

Asking = Callable[..., Asked]
TOOLS: Any = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🙂"}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
ARGUMENTS = '{"city": "Zürich 🙂"}'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def asked(asking: Asking) -> Asked:
    return asking(QWEN_TOOLS)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_the_model_is_told_of_the_tools_as_its_template_tells_it(asked: Asked) -> None:
    asked.message(tools=TOOLS)
    told = [json.loads(line) for line in asked.prompt.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()]
    assert told == TOOLS
    assert list(told[0]["function"]) == ["name", "description", "parameters"]


def test_a_call(asked: Asked) -> None:
    asked.say(f"I look.\n{CALL}")
    reply = asked.openai.chat.completions.create(model="m", messages=[USER], tools=TOOLS)  # type: ignore[list-item]
    (choice,) = reply.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
    assert asked.params.structured is None and asked.params.skip_special_tokens


def test_an_answer_of_calls_alone_has_no_content(asked: Asked) -> None:
    asked.say(f"\n{CALL}\n{CLOCK_CALL}\n")
    message = asked.message(tools=TOOLS)
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": ARGUMENTS}, {"name": "clock", "arguments": "{}"}]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_an_answer_without_calls_is_as_ever(asked: Asked) -> None:
    asked.say("Hello. \n")
    answer = asked.chat(tools=TOOLS)["choices"][0]
    assert answer["message"] == {"role": "assistant", "content": "Hello. \n", "refusal": None, "reasoning": None,
                                 "reasoning_content": None, "tool_calls": None}
    assert answer["finish_reason"] == "stop"


def test_a_stream_tells_of_a_call_first_and_then_its_arguments_piece_by_piece(asked: Asked) -> None:
    asked.say(f"I look.\n{CALL}")
    chunks = list(asked.openai.chat.completions.create(model="m", messages=[USER], tools=TOOLS,  # type: ignore
                                                       stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    first, *pieces = [call for delta in deltas for call in delta.tool_calls or ()]
    assert first.id is not None and first.id.startswith("call_")
    assert (first.index, first.type) == (0, "function")
    assert first.function is not None and (first.function.name, first.function.arguments) == ("weather", "")
    assert all((one.index, one.id, one.type) == (0, None, None) for one in pieces)
    assert "".join(one.function.arguments or "" for one in pieces if one.function) == ARGUMENTS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


def test_a_call_that_was_held_back_is_streamed_in_one_piece(asked: Asked) -> None:
    asked.say('{"name": "weather", "arguments": {"city": "Bern"}}')
    chunks = asked.openai.chat.completions.create(model="m", messages=[USER], tools=TOOLS,  # type: ignore
                                                  stream=True)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.arguments for call in calls if call.function] == ["", '{"city": "Bern"}']


@pytest.mark.parametrize("text", [
    f"I look.\n{CALL}{CLOCK_CALL}", CALL, "No call.", "<tool_call>{no", f"{CLOCK_CALL} And so on.", "",
    '```json\n{"name": "weather", "arguments": {"city": "Zürich 🙂"}}\n```',
])
@pytest.mark.parametrize("n", [1, 2])
def test_openais_client_joins_a_stream_to_the_whole_message(asked: Asked, text: str, n: int) -> None:
    asked.say(text)
    whole = asked.openai.chat.completions.create(model="m", messages=[USER], tools=TOOLS, n=n)  # type: ignore
    with asked.openai.chat.completions.stream(model="m", messages=[USER], tools=TOOLS, n=n) as stream:  # type: ignore
        joined = stream.get_final_completion()
    for one, other in zip(whole.choices, joined.choices, strict=True):
        assert (one.message.content or "") == (other.message.content or "")
        assert [(call.function.name, call.function.arguments) for call in one.message.tool_calls or ()] \
            == [(call.function.name, call.function.arguments) for call in other.message.tool_calls or ()]
        assert one.finish_reason == other.finish_reason


def test_an_answer_that_is_cut_off_in_a_call_says_so(asked: Asked) -> None:
    asked.say(CALL)
    answer = asked.chat(tools=TOOLS, max_tokens=CALL.index(ARGUMENTS) + 10)["choices"][0]
    assert answer["finish_reason"] == "length"
    assert answer["message"]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS[:10]


def test_one_call_at_a_time_if_asked(asked: Asked) -> None:
    asked.say(CALL + CLOCK_CALL)
    assert len(asked.message(tools=TOOLS, parallel_tool_calls=False)["tool_calls"]) == 1
    assert len(asked.message(tools=TOOLS, parallel_tool_calls=True)["tool_calls"]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_of_every_token(asked: Asked, stream: bool) -> None:
    asked.say(f"I look.\n{CALL}")
    body = {"model": "m", "messages": [USER], "tools": TOOLS, "logprobs": True, "stream": stream}
    response = asked.http.post("/v1/chat/completions", json=body)
    parts = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")] if stream \
        else [response.json()]
    told = [one for part in parts for one in (part["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for one in told for byte in one["bytes"]).decode() == f"I look.\n{CALL}"


def test_an_answer_can_be_sent_back(asked: Asked) -> None:
    asked.say(CALL)
    reply = asked.openai.chat.completions.create(model="m", messages=[USER], tools=TOOLS)  # type: ignore[list-item]
    message = reply.choices[0].message
    assert message.tool_calls
    turns: Any = [USER, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}]
    asked.say("It rains.")
    again = asked.openai.chat.completions.create(model="m", messages=turns, tools=TOOLS)
    assert again.choices[0].message.content == "It rains."
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in asked.prompt and "Rain." in asked.prompt


# ---- who decides -----------------------------------------------------------------------------------------------------


def test_where_no_call_is_wanted_the_model_is_not_told_of_tools(asked: Asked) -> None:
    asked.say(CALL)
    for more in ({"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {"tools": None}):
        answer = asked.chat(**more)["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (CALL, "stop")
        assert "<tools>" not in asked.prompt


@pytest.mark.parametrize("parallel", [None, True, False])
def test_calls_are_required(asked: Asked, parallel: bool | None) -> None:
    asked.say('[{"name": "clock", "parameters": {}}]')
    answer = asked.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel)["choices"][0]
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
    assert asked.structured.kind == "json" and "<tools>" in asked.prompt
    schema = json.loads(asked.structured.text)
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    assert schema.get("maxItems") == (1 if parallel is False else None)
    weather, clock = schema["items"]["anyOf"]
    assert weather["properties"] == {"name": {"type": "string", "enum": ["weather"]},
                                     "parameters": WEATHER["function"]["parameters"]}
    assert clock["properties"]["parameters"] == {"type": "object", "properties": {}, "additionalProperties": False}


def test_a_function_is_named(asked: Asked) -> None:
    asked.say('{"city": "Bern"}')
    answer = asked.chat(tools=TOOLS, tool_choice=NAMED)["choices"][0]
    assert answer["finish_reason"] == "stop" and answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert json.loads(asked.structured.text) == WEATHER["function"]["parameters"]


def test_demanded_calls_are_streamed_too(asked: Asked) -> None:
    for choice, text in ((NAMED, ARGUMENTS), ("required", f'[{{"name": "weather", "parameters": {ARGUMENTS}}}]')):
        asked.say(text)
        with asked.openai.chat.completions.stream(model="m", messages=[USER], tools=TOOLS,  # type: ignore
                                                  tool_choice=choice) as stream:  # type: ignore[arg-type]
            (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)


def test_schemas_that_refer_to_themselves_still_do_in_the_schema_of_all_calls(asked: Asked) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "up": {"$ref": "#"}}}
    tree = {"$defs": {"node": node}, "type": "object",
            "properties": {"root": {"$ref": "#/$defs/node"}, "x": {"default": ["$ref"]}}}
    asked.say("[]")
    asked.chat(tools=[tool("a/b", tree), CLOCK], tool_choice="required")
    schema = json.loads(asked.structured.text)
    assert schema["items"]["anyOf"][0]["properties"]["parameters"] == {"$ref": "#/$defs/a~1b"}
    moved = schema["$defs"]["a/b"]
    assert moved["properties"]["root"] == {"$ref": "#/$defs/a~1b/$defs/node"}
    assert moved["$defs"]["node"]["properties"] == {"next": {"$ref": "#/$defs/a~1b/$defs/node"},
                                                    "up": {"$ref": "#/$defs/a~1b"}}


def test_strict_functions_are_held_to_their_schema_where_the_model_calls_by_itself(asked: Asked) -> None:
    asked.say(CALL)
    strict = tool("weather", WEATHER["function"]["parameters"], strict=True)
    assert asked.message(tools=[strict, CLOCK])["tool_calls"]
    assert asked.structured.kind == "grammar"
    assert '"enum": ["weather"]' in asked.structured.text and '"required": ["city"]' in asked.structured.text
    assert "strict" not in asked.prompt


def test_where_strict_has_no_effect_the_log_says_so_once(asking: Asking, caplog: pytest.LogCaptureFixture) -> None:
    asked = asking(LLAMA_TOOLS)
    with caplog.at_level(logging.WARNING, "fullpipe.server"):
        for _ in range(2):
            asked.message(tools=[tool("f", strict=True)])
    assert len([one for one in caplog.records if "tools.function.strict" in one.getMessage()]) == 1


# ---- other families --------------------------------------------------------------------------------------------------


def test_llama(asking: Asking) -> None:
    asked = asking(LLAMA_TOOLS, special=["<|python_tag|>", "<|eom|>"])
    asked.say('<|python_tag|>{"name": "clock", "parameters": {}}<|eom|>')
    message = asked.message(tools=TOOLS)
    assert (message["content"], message["tool_calls"][0]["function"]["name"]) == (None, "clock")
    assert not asked.params.skip_special_tokens, "the parser must see the mark"
    asked.say("So <|eom|><|python_tag|>it is.")
    assert asked.message(tools=TOOLS)["content"] == "So it is."
    assert asked.message(tools=TOOLS, skip_special_tokens=False)["content"] == "So <|eom|>it is."
    assert asked.message()["content"] == "So it is." and asked.params.skip_special_tokens


def test_mistral(asking: Asking) -> None:
    asked = asking(MISTRAL_TOOLS, special=["[TOOL_CALLS]"])
    asked.say('[TOOL_CALLS] [{"name": "clock", "arguments": {}}]')
    reply = asked.openai.chat.completions.create(model="m", messages=[USER], tools=TOOLS)  # type: ignore[list-item]
    message = reply.choices[0].message
    assert message.tool_calls and len(message.tool_calls[0].id) == 9
    turns: Any = [USER, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12"}]
    asked.openai.chat.completions.create(model="m", messages=turns, tools=TOOLS)
    assert "[TOOL_RESULTS] 12" in asked.prompt


def test_a_parser_can_be_named(asking: Asking) -> None:
    asked = asking(LLAMA_TOOLS, tool_call_parser="hermes")
    asked.say(CLOCK_CALL)
    assert asked.message(tools=TOOLS)["tool_calls"][0]["function"]["name"] == "clock"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "param", "why"), [
    ({"tool_choice": "auto"}, "tool_choice", "there are no tools"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "there are no tools"),
    ({"tool_choice": NAMED}, "tool_choice", "there are no tools"),
    ({"tool_choice": NAMED, "tools": [CLOCK]}, "tool_choice.function.name", "there are clock"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name", "another tool"),
    ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice", "'none', 'auto' or 'required'"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ({"tools": [tool("a b")]}, "tools[0].function.name", "must be of letters"),
    ({"tools": [tool("f", verbose=True)]}, "tools[0].function.verbose", "unknown field"),
    ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format", "no other form"),
    ({"tools": [CLOCK], "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "no other form"),
    ({"functions": [{"name": "f"}]}, "functions", "tools"), ({"function_call": "auto"}, "function_call", "tool_choice"),
])
def test_what_cannot_be_asked(asked: Asked, fields: dict[str, Any], param: str, why: str) -> None:
    error = asked.refusal(**fields)
    assert error["param"] == param and why in error["message"]


def test_a_template_without_words_for_tools_is_told_of_none(asking: Asking) -> None:
    asked = asking(CHATML)
    for choice in ("auto", "required", NAMED):
        error = asked.refusal(tools=TOOLS, tool_choice=choice)
        assert error["param"] == "tools" and "the model's chat template has no words for them" in error["message"]
    assert asked.message(tools=TOOLS, tool_choice="none")["content"]


@pytest.mark.parametrize(("template", "options"), [
    (LLAMA_TOOLS, {"tool_call_parser": "none"}), ("{{ tools }}{{ messages[0].content }}", {}),
])
def test_where_no_call_would_be_understood_it_must_be_demanded(asking: Asking, template: str,
                                                               options: dict[str, Any]) -> None:
    asked = asking(template, **options)
    error = asked.refusal(tools=TOOLS)
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter") and "tool_choice" in error["message"]
    asked.say("{}")
    assert asked.message(tools=TOOLS, tool_choice=NAMED)["tool_calls"]
