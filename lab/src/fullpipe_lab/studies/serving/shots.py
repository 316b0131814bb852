"""Requests that nobody would send, and some that somebody would: drawn from a seed and from the server's own document.

    shots = [*own(document, 3000, seed), *by_schemathesis(document, 2000, seed)]

Fields are those that the document names, so that new ones are tried as soon as they are there.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fullpipe_lab.studies.serving.servers import MODEL_NAME

_MOST_TOKENS = 8  # of an answer: the server is to be asked much, not to say much
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Shot:
    """Is a request. family: how it was made."""

    family: str
    method: str
    path: str
    content: bytes
    kind: str = _JSON


# ---- what there is to ask --------------------------------------------------------------------------------------------


def kinds_of(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Fields of the body of each path of /v1 that takes one."""
    found = {}
    for path, methods in document["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        reference = body["content"][_JSON]["schema"].get("$ref") if body and path.startswith("/v1/") else None
        if reference:
            found[path] = list(document["components"]["schemas"][reference.rpartition("/")[2]]["properties"])
    return found


_KEYED = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
_TOOL = {"type": "function", "function": {"name": "lookup", "parameters": _KEYED}}
_FLAT = {"type": "function", "name": "lookup", "parameters": _KEYED}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
# What somebody may mean by a field.
_SENSE: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 1, 2], "top_p": [0.1, 0.9, 1], "top_k": [-1, 0, 1, 40], "min_p": [0, 0.1], "n": [1, 2],
    "presence_penalty": [-2, 0.5], "frequency_penalty": [2, 0], "repetition_penalty": [1, 1.3], "seed": [0, -1, 7],
    "stop": ["\n", ["a", "b"], "<|im_end|>"], "stop_token_ids": [[1], [0, 2]], "logit_bias": [{"5": 3}, {"1": -100}],
    "stream": [True, True, False], "stream_options": [{"include_usage": True}], "priority": [-1, 0, 9],
    "ignore_eos": [True], "skip_special_tokens": [False], "logprobs": [True, 0, 3], "top_logprobs": [0, 5],
    "best_of": [1, 2], "echo": [True], "prompt_logprobs": [0, 2], "min_tokens": [0, 2, 5], "bad_words": [["the"]],
    "allowed_token_ids": [[1, 2, 3]], "truncate_prompt_tokens": [-1, 4], "add_special_tokens": [True, False],
    "return_token_ids": [True], "return_tokens_as_token_ids": [True], "include_stop_str_in_output": [True],
    "tools": [[_TOOL], [_FLAT]], "tool_choice": ["auto", "none", "required", {"type": "function", "function": {
        "name": "lookup"}}, {"type": "function", "name": "lookup"}],
    "response_format": [{"type": "json_object"}, {"type": "text"}, {"type": "json_schema", "json_schema": {
        "name": "x", "schema": _SCHEMA}}],
    "structured_outputs": [{"regex": "[a-z]{1,4}"}, {"choice": ["yes", "no"]}, {"json": _SCHEMA}, {"regex": "("}],
    "guided_regex": ["[0-9]+", "("], "guided_choice": [["a", "b"], []], "guided_json": [_SCHEMA, "{"],
    "guided_grammar": ['start: "a" | "b"', "start:"], "add_generation_prompt": [False, True],
    "continue_final_message": [True], "chat_template_kwargs": [{"x": 1}], "reasoning_effort": ["low"],
    "include_reasoning": [False], "instructions": ["Be brief."], "text": [{"format": {"type": "json_object"}}],
    "truncation": ["disabled"], "include": [["message.output_text.logprobs"]], "store": [False],
    "user": ["me"], "metadata": [{"a": "b"}], "parallel_tool_calls": [False],
    "return_token_strs": [True],
}
_PROMPTS: list[Any] = ["Hi", "Once upon a time", [1, 2, 3], ["a", "b"], [[5], [6, 7]], "ü🙂 " * 20]
_TURNS: list[Any] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}],
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "lookup", "arguments": '{"key": "a"}'}}]},
     {"role": "tool", "tool_call_id": "c", "content": "1"}],
]
_SAID = {"messages": _TURNS, "prompt": _PROMPTS, "input": [*_PROMPTS[:2], *_TURNS[:4]], "tokens": [[1, 2], []]}
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, "", "x", "0",
    "null", "\u0000", "\u2028", "🙂" * 40, "x" * 5000, "../..", "%s%n", [], {}, [[]], [None], [{}], [""], ["x"] * 300,
    list(range(300)), {"a": None}, {"": ""}, {"type": "text"}, {"type": "object"}, {"type": ["x"]}, {"$ref": "#"},
    {str(k): k for k in range(300)}, [[[[[[[[]]]]]]]], {"a": {"a": {"a": {"a": {}}}}}, {"$ref": "#/a"}, "(a+)+$",
]
_PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/models/x", "/v1/embeddings",
          "/v1", "/", "/tokenize", "/detokenize", "/metrics", "/health", "/ready", "/v1/chat", "/v1/models/%00",
          "/v1/responses/x", "/live/x", "/..%2f..%2fetc/passwd", "/chat/completions", "/v1//completions", "/docs"]
_METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"]
_TYPES = [_JSON, "application/json; charset=utf-16", "text/plain", "", "multipart/form-data; boundary=x", "*/*",
          "application/x-www-form-urlencoded", "application/xml", "a" * 2000]


# ---- our own ---------------------------------------------------------------------------------------------------------


def own(document: Mapping[str, Any], number: int, seed: int) -> Iterator[Shot]:
    """So many requests: sensible ones, ones with wrong values, with broken bytes, and to strange places."""
    draw, kinds = random.Random(seed), kinds_of(document)
    for _ in range(number):
        path = draw.choice(list(kinds))
        family = draw.choices(("sensible", "twisted", "broken", "strange"), (40, 35, 15, 10))[0]
        body = sensible(draw, kinds[path])
        if family == "twisted":
            body = _twisted(draw, body, kinds[path])
        content = json.dumps(body).encode()
        if family == "broken":
            content = _broken(draw, content)
        if family == "strange":
            yield Shot(family, draw.choice(_METHODS), draw.choice(_PATHS), content, draw.choice(_TYPES))
        else:
            yield Shot(family, "POST", path, content)


def sensible(draw: random.Random, fields: list[str]) -> dict[str, Any]:
    """A body that may well be answered, soon."""
    body: dict[str, Any] = {"model": MODEL_NAME}
    body |= {field: draw.choice(values) for field, values in _SAID.items() if field in fields}
    if limits := [field for field in _LIMITS if field in fields]:
        body[draw.choice(limits)] = draw.randint(1, _MOST_TOKENS)
    known = [field for field in fields if field in _SENSE]
    for field in draw.sample(known, min(len(known), draw.choice((0, 0, 1, 1, 2, 4)))):
        body[field] = draw.choice(_SENSE[field])
    if "stream" in fields and (draw.random() < 0.5 or "stream_options" in body):
        body["stream"] = True
    return body


def _twisted(draw: random.Random, body: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """The same with odd values: of fields, inside of values, or of fields that there are none of."""
    for _ in range(draw.randint(1, 3)):
        field = draw.choice([*body, draw.choice(fields), draw.choice(("x", "", "__class__", "Model", "\u0000"))])
        if isinstance(body.get(field), list | dict) and draw.random() < 0.5:
            body[field] = _twisted_inside(draw, json.loads(json.dumps(body[field])))
        else:
            body[field] = draw.choice(_ODD)
    return body


def _twisted_inside(draw: random.Random, value: Any) -> Any:
    """The value with one of its inner parts exchanged, removed or added."""
    if not isinstance(value, list | dict) or not value or draw.random() < 0.3:
        return draw.choice(_ODD)
    key: Any = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.2:
        del value[key]
    else:
        value[key] = _twisted_inside(draw, value[key])
    return value


def _broken(draw: random.Random, content: bytes) -> bytes:
    """The bytes with a few cut out, put in, doubled or exchanged."""
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 7, 30))
        piece = content[at : at + size]
        put = draw.choice((b"", piece * 2, bytes(draw.randrange(256) for _ in range(min(size, 3))), b'"', b"{", b"}",
                           b",", b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"[" * 200))
        content = content[:at] + put + content[at + size :]
    return content


# ---- schemathesis' ---------------------------------------------------------------------------------------------------


def by_schemathesis(document: Mapping[str, Any], number: int, seed: int) -> list[Shot]:
    """So many bodies that fit the document, and that do not, as schemathesis derives them; none where it is not
    installed."""
    if importlib.util.find_spec("schemathesis") is None:
        return []
    import schemathesis
    from schemathesis import GenerationMode

    schema: Any = schemathesis.openapi.from_dict(dict(document))
    every = [found.ok() for found in schema.get_all_operations()]
    operations = [one for one in every if one.method.lower() == "post" and one.body]
    each = -(-number // (2 * len(operations)))
    return [shot for operation in operations for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            for shot in _drawn(operation.as_strategy(generation_mode=mode), mode.value, each, seed)][:number]


def _drawn(cases: Any, mode: str, number: int, seed: int) -> list[Shot]:
    """So many shots of a strategy's cases at most."""
    import hypothesis

    shots: list[Shot] = []

    def take(case: Any) -> None:
        if len(shots) < number and (shot := _of_case(case, mode)) is not None:
            shots.append(shot)

    settings = hypothesis.settings(max_examples=number, database=None, deadline=None,
                                   phases=[hypothesis.Phase.generate],
                                   suppress_health_check=list(hypothesis.HealthCheck))
    hypothesis.seed(seed)(settings(hypothesis.given(case=cases)(take)))()
    return shots


def _of_case(case: Any, mode: str) -> Shot | None:
    """None of a body that is no JSON."""
    try:
        body = _bounded(case.body, case.path) if isinstance(case.body, dict) else case.body
        content = json.dumps(body).encode()
    except (TypeError, ValueError):
        return None
    return Shot(f"schemathesis, {mode}", "POST", case.formatted_path, content)


def _bounded(body: dict[str, Any], path: str) -> dict[str, Any]:
    """The same, made for the model that is served, and so that not much is said; wrong values stay."""
    body = dict(body)
    if isinstance(body.get("model"), str):
        body["model"] = MODEL_NAME
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 2)
    limits = [field for field in _LIMITS if isinstance(body.get(field), int)]
    for field in limits or ["max_output_tokens" if path.endswith("/responses") else "max_tokens"]:
        body[field] = min(body.get(field, _MOST_TOKENS), _MOST_TOKENS)
    if body.get("stream_options") is not None and not body.get("stream"):
        body["stream"] = True
    return body
