"""The thoughts of a model come apart from its answer: in messages, in streams, in the count of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from asked import USER, Asked

from tool_templates import QWEN_TOOLS, WEATHER, tool

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>\n"
OPENS = PLAIN + "<think>\n"
CLOSES = PLAIN + "<think>\n\n</think>\n\n"
Asking = Callable[..., Asked]
MARKS = ["<think>", "</think>"]


def thinking(asking: Asking, template: str = PLAIN, parser: str = "qwen3", **more: Any) -> Asked:
    return asking(template, reasoning_parser=parser, **more)


@pytest.mark.parametrize(("template", "parser", "text", "thoughts", "content"), [
    (PLAIN, "qwen3", "<think>\nHm.\n</think>\n\nNoon.", "\nHm.\n", "\n\nNoon."),
    (PLAIN, "qwen3", "Noon.", None, "Noon."), (PLAIN, "deepseek_r1", "Hm.</think>Noon.", "Hm.", "Noon."),
    (OPENS, "qwen3", "Hm.</think>Noon.", "Hm.", "Noon."), (OPENS, "deepseek_r1", "Hm.", "Hm.", None),
    (CLOSES, "deepseek_r1", "Noon.", None, "Noon."), (CLOSES, "qwen3", "Noon.", None, "Noon."),
    (PLAIN, "none", "<think>Hm.</think>", None, "<think>Hm.</think>"),
])
def test_thoughts_come_apart(asking: Asking, template: str, parser: str, text: str, thoughts: str | None,
                             content: str | None) -> None:
    asked = thinking(asking, template, parser)
    asked.say(text)
    message = asked.message()
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == (thoughts, thoughts, content)
    deltas = streamed(asked)
    assert joined(deltas, "content") == (content or "")
    assert joined(deltas, "reasoning_content") == joined(deltas, "reasoning") == (thoughts or "")


def streamed(asked: Asked, **more: Any) -> list[dict[str, Any]]:
    """The deltas of a stream."""
    body = {"model": "m", "messages": [USER], "stream": True, **more}
    lines = asked.http.post("/v1/chat/completions", json=body).text.splitlines()
    return [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]


def joined(deltas: list[dict[str, Any]], field: str) -> str:
    return "".join(delta.get(field) or "" for delta in deltas)


def test_thoughts_are_left_out_if_asked(asking: Asking) -> None:
    asked = thinking(asking)
    asked.say("<think>Hm.</think>Noon.")
    message = asked.message(include_reasoning=False)
    assert (message["reasoning_content"], message["content"]) == (None, "Noon.")
    assert asked.message(include_reasoning=True)["reasoning_content"] == "Hm."
    assert not any("reasoning" in delta for delta in streamed(asked, include_reasoning=False))


@pytest.mark.parametrize("special", [MARKS, []])
def test_their_tokens_are_counted(asking: Asking, special: list[str]) -> None:
    asked = thinking(asking, special=special)
    asked.say("\n<think>Hm.</think>Noon.")
    usage = asked.chat()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 3
    assert usage["completion_tokens"] == (1 + 3 + 2 + 5 if special else 24)


@pytest.mark.parametrize("special", [MARKS, []])
def test_an_answer_that_is_all_thoughts_is_counted_as_a_whole(asking: Asking, special: list[str]) -> None:
    asked = thinking(asking, parser="deepseek_r1", special=special)
    asked.say("Hm, hm.")
    usage = asked.chat()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] == 7


def test_marks_that_are_special_tokens_are_seen_and_other_special_tokens_are_not(asking: Asking) -> None:
    asked = thinking(asking, special=[*MARKS, "<|pad|>"])
    asked.say("<think>Hm<|pad|>.</think>No<|pad|>on.")
    message = asked.message()
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Noon.")


def test_calls_are_made_behind_thoughts_and_not_in_them(asking: Asking) -> None:
    asked = thinking(asking, QWEN_TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    asked.say(f"<think>\nShall I {call}?\n</think>\n\n{call}")
    answer = asked.chat(tools=[WEATHER])["choices"][0]
    assert answer["message"]["reasoning_content"] == f"\nShall I {call}?\n"
    assert answer["message"]["content"] is None and len(answer["message"]["tool_calls"]) == 1
    assert answer["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("template", "parser", "start"), [
    (OPENS, "qwen3", "thoughts breaks answer"), (PLAIN, "deepseek_r1", "thoughts breaks answer"),
    (PLAIN, "qwen3", '("\\u003cthink>" thoughts breaks)? answer'),
])
def test_a_form_is_that_of_the_answer(asking: Asking, template: str, parser: str, start: str) -> None:
    asked = thinking(asking, template, parser)
    asked.say('Hm.</think>\n\n{"a": 1}' if start.startswith("thoughts") else '<think>Hm.</think>\n\n{"a": 1}')
    message = asked.message(response_format={"type": "json_object"})
    assert (message["reasoning_content"], json.loads(message["content"])) == ("Hm.", {"a": 1})
    assert asked.structured.kind == "grammar" and f"start: {start}\n" in asked.structured.text


def test_a_form_is_that_of_all_the_text_where_there_are_no_thoughts(asking: Asking) -> None:
    asked = thinking(asking, CLOSES)
    asked.say('{"a": 1}')
    assert asked.message(response_format={"type": "json_object"})["content"] == '{"a": 1}'
    assert asked.structured.kind == "json_object"


def test_a_grammar_of_the_callers_own_is_that_of_all_the_text(asking: Asking) -> None:
    asked = thinking(asking, OPENS)
    asked.say("abc")
    message = asked.message(guided_grammar='start: "abc"')
    assert (message["reasoning_content"], message["content"]) == (None, "abc")
    assert asked.structured.text == 'start: "abc"'


def test_a_call_is_demanded_behind_thoughts(asking: Asking) -> None:
    asked = thinking(asking, QWEN_TOOLS, "deepseek_r1")
    asked.say('Hm.</think>{"city": "Bern"}')
    message = asked.message(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
    assert message["reasoning_content"] == "Hm." and message["content"] is None
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'
    asked.say('Hm.</think>\n\n[{"name": "weather", "parameters": {"city": "Bern"}}]')
    message = asked.message(tools=[WEATHER], tool_choice="required")
    assert message["content"] is None and message["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'


def test_strict_functions_leave_thoughts_and_words_free(asking: Asking) -> None:
    """The grammar of a text in which calls are held to their schema takes any words, and so any thoughts."""
    asked = thinking(asking, QWEN_TOOLS, "deepseek_r1")
    asked.say('Hm.</think><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    message = asked.message(tools=[tool("f", strict=True)])
    assert message["reasoning_content"] == "Hm." and message["tool_calls"]
