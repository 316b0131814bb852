"""What clients ask of a text's form comes to the service as a structure, and what cannot be made is blamed on the field
that asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from asked import Asked
from openai_server import CHATML

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.request import Structured
from fullpipe.server.grammars import behind_thoughts, free_calls

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer", "default": None}}, "required": ["größe"]}
Asking = Callable[..., Asked]


@pytest.fixture
def asked(asking: Asking) -> Asked:
    return asking(CHATML)


def schema_format(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA, **more}}


ASKED: list[tuple[dict[str, Any], Structured]] = [
    ({"response_format": {"type": "json_object"}}, Structured("json_object")),
    *(({"response_format": schema_format(**more)}, Structured("json", json.dumps(SCHEMA, ensure_ascii=False)))
      for more in ({}, {"strict": True}, {"strict": False, "description": "How tall."})),
    *(({name: schema}, Structured("json", json.dumps(SCHEMA, ensure_ascii=False)))
      for name in ("guided_json",) for schema in (SCHEMA, json.dumps(SCHEMA))),
    ({"guided_regex": "[a-c]+"}, Structured("regex", "[a-c]+")),
    ({"guided_choice": ["ja", "nein"]}, Structured("choice", '["ja", "nein"]')),
    ({"guided_grammar": 'start: "a"'}, Structured("grammar", 'start: "a"')),
    *(({"structured_outputs": {"json": schema}}, Structured("json", json.dumps(SCHEMA, ensure_ascii=False)))
      for schema in (SCHEMA, json.dumps(SCHEMA))),
    ({"structured_outputs": {"regex": "a", "json": None, "json_object": False}}, Structured("regex", "a")),
    ({"structured_outputs": {"choice": ["a"]}}, Structured("choice", '["a"]')),
    ({"structured_outputs": {"grammar": "x"}}, Structured("grammar", "x")),
    ({"structured_outputs": {"json_object": True}}, Structured("json_object")),
    ({"guided_json": {}}, Structured("json", "{}")),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("fields", "structured"), ASKED, ids=lambda value: str(value)[:60])
def test_a_form_is_asked_for(asked: Asked, path: str, fields: dict[str, Any], structured: Structured) -> None:
    said: dict[str, Any] = {"prompt": "hi"} if path == TEXT else {"messages": [{"role": "user", "content": "hi"}]}
    response = asked.http.post(path, json={"model": "m", **said, **fields})
    assert response.status_code == 200, response.text
    assert asked.structured == structured


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": None, "guided_json": None},
])
def test_none_is_asked_for(asked: Asked, fields: dict[str, Any]) -> None:
    asked.message(**fields)
    assert asked.params.structured is None


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("fields", "param", "why"), [
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "response_format"),
    ({"guided_json": {}, "guided_choice": ["a"]}, "guided_choice", "guided_json"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "structured_outputs.regex"),
    ({"structured_outputs": {"json_object": True}, "guided_regex": "a"}, "structured_outputs.json_object",
     "guided_regex"),
    ({"structured_outputs": {}}, "structured_outputs", "says nothing"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "says nothing"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported: use"),
    ({"structured_outputs": {"json": {}, "disable_fallback": True}}, "structured_outputs.disable_fallback",
     "'structured_outputs.disable_fallback' is not supported: there is one backend"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported: between the parts"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "not supported: there is one"),
    ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format",
     "'response_format.structural_tag' is not supported: use"),
    ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format", "belongs under \"json_schema\""),
    ({"response_format": {"type": "json_schema", "json_schema": {"type": "object"}}}, "response_format.json_schema",
     "belongs under \"schema\""),
    ({"response_format": {**schema_format(), "junk": 1}}, "response_format.junk", "unknown field"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "junk": 1}}},
     "response_format.json_schema.junk", "unknown field"),
    ({"guided_json": "no schema"}, "guided_json", "is not JSON"), ({"guided_json": "[1]"}, "guided_json", "an object"),
    ({"guided_json": 5}, "guided_json", "must be a string or an object"),
    ({"structured_outputs": {"json": "x"}}, "structured_outputs.json", "is not JSON"),
    ({"guided_choice": []}, "guided_choice", "must not be empty"),
    ({"guided_choice": "a"}, "guided_choice", "must be a list"),
    ({"guided_regex": ""}, "guided_regex", "must not be empty"),
    ({"guided_grammar": {}}, "guided_grammar", "must be a string"),
    ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
    ({"response_format": {}}, "response_format", "type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema",
     "missing"),
    ({"response_format": schema_format(schema_=1)}, "response_format.json_schema.schema_", "unknown field"),
    ({"response_format": schema_format(strict="yes")}, "response_format.json_schema.strict", "must be true or false"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": [], "x": 1}}},
     "response_format.json_schema", ""),
])
def test_a_form_that_cannot_be_asked_for(asked: Asked, path: str, fields: dict[str, Any], param: str, why: str) -> None:
    error = asked.refusal(path, **fields)
    assert str(error["param"]).startswith(param) and why in error["message"]


@pytest.mark.parametrize("off", [None, False])
def test_what_others_say_of_a_structure_may_ask_for_nothing(asked: Asked, off: bool | None) -> None:
    nothing = dict.fromkeys(("disable_any_whitespace", "whitespace_pattern", "structural_tag", "disable_fallback",
                             "disable_additional_properties"), off)
    asked.message(structured_outputs={"regex": "a", **nothing}, guided_decoding_backend=None)
    assert asked.params.structured is not None


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("raised", "said"), [
    (UsageError("the JSON schema cannot be followed: no such type", param="structured", hint="Mend it."),
     "the JSON schema cannot be followed: no such type. Mend it."),
    (MissingExtra("structured texts need llguidance", hint="pip install 'fullpipe[structured]'"),
     "structured texts need llguidance"),
])
def test_what_the_service_cannot_make_is_blamed_on_the_field(asked: Asked, path: str, raised: Exception,
                                                             said: str) -> None:
    asked.service.refuse = raised
    for fields, param in (({"response_format": schema_format()}, "response_format"),
                          ({"guided_json": {}}, "guided_json"),
                          ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex")):
        error = asked.refusal(path, **fields)
        assert error["param"] == param and error["message"].startswith(f"{param}: {said}")


def test_other_faults_are_blamed_on_what_they_are_of(asked: Asked) -> None:
    asked.service.refuse = UsageError("seed must be a number", param="seed")
    assert asked.refusal(guided_regex="a")["param"] == "seed"


# ---- a part of a text ------------------------------------------------------------------------------------------------


def test_an_answer_has_a_form_and_the_thoughts_before_it_have_none() -> None:
    found = behind_thoughts(Structured("json", '{"const": "<a>"}'), (), optional=False)
    assert found is not None and found.kind == "grammar"
    assert found.text.splitlines() == [
        "%llguidance {}", "start: thoughts breaks answer", r'thoughts[suffix="\u003c/think>"]: /(.|\n)*/',
        r'breaks: "\n"? "\n"?', r'answer: %json {"const": "\u003ca>"}']


@pytest.mark.parametrize(("structured", "answer"), [
    (Structured("json_object"), '%json {"type": "object"}'), (Structured("choice", '["a", "\\"b"]'), r'"a" | "\"b"'),
    (Structured("regex", r"a/b\/c\\/" + "\n"), r"/a\/b\/c\\\/\n/"),
])
def test_any_form_but_a_grammar_may_stand_behind_thoughts(structured: Structured, answer: str) -> None:
    found = behind_thoughts(structured, ["</think>", "<think>"], optional=True)
    assert found is not None
    assert found.text.splitlines()[1:] == [
        "start: (<think> thoughts breaks)? answer", r"thoughts: /(.|\n)*/ </think>", r'breaks: "\n"? "\n"?',
        f"answer: {answer}"]
    assert behind_thoughts(Structured("grammar", "x"), [], optional=False) is None


SCHEMAS: list[Structured] = [
    Structured("json", json.dumps(SCHEMA)), Structured("json_object"), Structured("choice", '["<a>", "b"]'),
    Structured("regex", r"\d+/\d+")]


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("structured", SCHEMAS, ids=lambda one: one.kind)
def test_llguidance_follows_thoughts_and_the_answer_behind(structured: Structured, optional: bool) -> None:
    found = behind_thoughts(structured, (), optional=optional)
    assert found is not None
    answer = {"json": '{"größe": 5}', "json_object": '{"a": 1}', "choice": "<a>", "regex": "1/2"}[structured.kind]
    begin = "<think>" if optional else ""
    for text in (f"{begin}Hm, {{</think>\n\n{answer}", f"{begin}</think>{answer}", *([answer] if optional else [])):
        assert follows(found.text, text)
    for text in (f"{begin}Hm.</think>\n\nNo.", *([] if optional else [answer, f"{begin}Hm.{answer}"])):
        assert not follows(found.text, text)


def test_llguidance_follows_calls_among_words() -> None:
    schema = {"anyOf": [{"type": "object", "properties": {"name": {"enum": ["f"]}, "arguments": SCHEMA},
                         "required": ["name", "arguments"], "additionalProperties": False}]}
    grammar = free_calls(schema, {"f": SCHEMA}, "<tool_call>", "</tool_call>", (), one=False).text
    call = '<tool_call>\n{"name": "f", "arguments": {"größe": 1}}\n</tool_call>'
    whole = '{\n  "name": "f",\n  "arguments": {"größe": 1}\n}'
    for text in ("", "Hello.", "a < b", call, f"I look.\n{call}\n{call}", f"{call} So.", whole, '{"name": "g", 5',
                 f"```json\n{whole}\n```", f" {whole} ".replace("arguments", "parameters"), "```python\n1\n```",
                 f"See: {whole.replace('1', 'x')}"):
        assert follows(grammar, text), text
    for text in ("<tool_call>no", call.replace("1", '"x"'), call.replace('"f"', '"g"'), whole.replace("1", '"x"'),
                 whole.replace("größe", "grösse"), f"```json\n{whole.replace('1', 'true')}\n```", f"{whole} So."):
        assert not follows(grammar, text), text


def follows(grammar: str, text: str) -> bool:
    """Whether a text, byte by byte, is one of the grammar."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("grammar", grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())
