"""Well over a thousand bodies that the server must refuse, derived from what its two kinds of request take.

What a field takes is written down here once more, by hand: bodies made out of the server's own schema would be wrong
only where the schema says so.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from one_word import MAX_BODY, MAX_LEN

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BOTH = (CHAT, TEXT)


@dataclass(frozen=True)
class Bad:
    """blamed: fields of which the refusal names one, unless it is the JSON that is at fault; none where no field is.
    kind: the content type."""

    path: str
    body: bytes
    blamed: tuple[str, ...] = ()
    status: int = 400
    kind: str = "application/json"


def right(path: str, **fields: Any) -> dict[str, Any]:
    """A body that is answered, but for these fields."""
    said = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": "m", **said, **fields}


def with_fields(path: str, blamed: str, **fields: Any) -> Bad:
    return Bad(path, json.dumps(right(path, **fields)).encode(), (blamed,))


def spliced(path: str, field: str, raw: bytes) -> bytes:
    """A body in which the field's value is written so."""
    mark = json.dumps("?")
    return json.dumps(right(path, **{field: "?"})).encode().replace(mark.encode(), raw)


# ---- what fields take ------------------------------------------------------------------------------------------------

_SAMPLES: dict[str, list[Any]] = {
    "null": [None], "boolean": [True, False], "integer": [0, 1], "fraction": [0.5], "string": ["", "x", "1"],
    "list": [[], ["x"]], "object": [{}, {"x": 1}],
}
_INTEGERS = ("n", "max_tokens", "top_k", "seed", "priority", "min_tokens", "prompt_logprobs", "truncate_prompt_tokens")
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_NOTHING = ("timeout", "guided_whitespace_pattern", "guided_decoding_backend")
_SHARED: dict[str, str] = {
    **dict.fromkeys(_INTEGERS, "null integer"), **dict.fromkeys(_NUMBERS, "null integer fraction"),
    **dict.fromkeys(_NOTHING, "null"),
    **dict.fromkeys(("ignore_eos", "stream", "echo", "use_beam_search", "skip_special_tokens",
                     "include_stop_str_in_output", "add_special_tokens", "return_token_ids",
                     "return_tokens_as_token_ids", "detokenize"), "null boolean"),
    **dict.fromkeys(("bad_words", "allowed_token_ids"), "null list"),
    **dict.fromkeys(("logit_bias", "stream_options", "response_format", "structured_outputs"), "null object"),
    **dict.fromkeys(("guided_regex", "guided_grammar"), "null string"), "guided_json": "null string object",
    "guided_choice": "null list",
    **dict.fromkeys(("user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key",
                     "prompt_cache_options", "prompt_cache_retention"), " ".join(_SAMPLES)),
    "model": "null string", "stop": "null string list", "stop_token_ids": "null list",
}
TAKES: dict[str, dict[str, str]] = {
    CHAT: {**_SHARED, "messages": "list", "max_completion_tokens": "null integer", "logprobs": "null boolean",
           "top_logprobs": "null integer", "tools": "null list", "functions": "null list", "modalities": "null list",
           "tool_choice": "null string object", "function_call": "null string", "documents": "null list",
           "chat_template_kwargs": "null object",
           **dict.fromkeys(("add_generation_prompt", "continue_final_message", "parallel_tool_calls",
                            "include_reasoning"), "null boolean"),
           **dict.fromkeys(("audio", "prediction", "moderation", "reasoning_effort", "verbosity", "web_search_options",
                            "chat_template", "enable_thinking", "thinking"), "null")},
    TEXT: {**_SHARED, "prompt": "string list", "logprobs": "null integer", "best_of": "null integer",
           "suffix": "null string"},
}

# Of vLLM's that ask for what is not here.
_OTHERS = {
    **dict.fromkeys(("length_penalty", "routed_experts_prompt_start"), "null integer fraction"),
    "spaces_between_special_tokens": "null boolean",
    **dict.fromkeys(("lora_name", "watermarking", "truncation_side", "logprob_token_ids", "media_io_kwargs",
                     "mm_processor_kwargs", "prompt_embeds", "request_id", "return_prompt_text", "cache_salt",
                     "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "repetition_detection",
                     "thinking_token_budget"), "null"),
    **dict.fromkeys(("session_id", "stream_interval", "return_token_offsets", "return_mm_kwargs"), " ".join(_SAMPLES)),
}
for _fields in TAKES.values():
    _fields.update(_OTHERS)

_LONG = "x" * MAX_LEN  # tokens: a prompt that leaves no room
_TOKENS = [[-1], [2**31], ["a"], [1.5], [None], [True], [[1]], [{}], [0, -1], [0, "0"]]
_BEYOND: dict[str, list[Any]] = {
    "n": [0, -1, 129, 10**9, 10**30],
    "max_tokens": [0, -1, MAX_LEN - 1, MAX_LEN, 2**31 - 1, 2**31, 10**30],
    "temperature": [-1e-9, -1, -5e-324], "top_p": [0, -0.1, 1.0000001, 2, -1], "min_p": [-0.001, 1.001, 2],
    "top_k": [-2, 2**31, -(10**30)], "presence_penalty": [-2.001, 2.001, 3], "frequency_penalty": [-2.001, 2.001, 3],
    "repetition_penalty": [0, 0.0099, 100.01, -1], "seed": [2**63, -(2**63) - 1, 10**30],
    "priority": [11, -11, 2**31, -(2**31) - 1, 10**30], "min_tokens": [-1, MAX_LEN, 10**30],
    "prompt_logprobs": [-1, 21, 10**30], "truncate_prompt_tokens": [0, -2, MAX_LEN + 1, 10**30],
    "bad_words": [[""], ["a", ""], [None], [1], ["x"] * 129, ["x" * 1025]], "allowed_token_ids": [[], [999], *_TOKENS],
    "stop": ["", [""], ["a", ""], ["x"] * 17, "x" * 1025, ["x" * 1025], [None], [1], [[]], [{}], [["a"]], ["a", None]],
    "stop_token_ids": [*_TOKENS, [0] * 129],
    "logit_bias": [{"a": 1}, {"": 1}, {"-1": 1}, {"1.5": 1}, {" 1": 1}, {"1 ": 1}, {"1e1": 1}, {"٣": 1},
                   {"1234567890": 1}, {"9999": 1}, {"1": 100.5}, {"1": -100.5}, {"1": None}, {"1": "1"}, {"1": True},
                   {"1": []}, {"1": {}}, {"1": 0, "x": 0}, {str(k): 1 for k in range(1025)}],
    "stream_options": [{}, {"include_usage": True}],  # without stream
    "response_format": [{}, {"type": None}, {"type": "json_object", "x": 1}, {"type": "json_schema"}, {"type": 1},
                        {"type": "text", "x": 1}, {"type": "json_schema", "json_schema": {"name": "x"}},
                        {"type": "json_schema", "json_schema": {"name": 1, "schema": {}}},
                        {"type": "json_schema", "json_schema": {"schema": "{}"}}, {"type": "structural_tag"}],
    "structured_outputs": [{}, {"x": 1}, {"json": "no"}, {"json": {}, "regex": "a"}, {"choice": []}, {"regex": ""},
                           {"json_object": 1}, {"grammar": {}}],
    "guided_json": ["", "x", "[]", "5", {str(k): 1 for k in range(1025)}], "guided_regex": [""], "guided_grammar": [""],
    "guided_choice": [[], [""], [1], ["a", None], ["a"] * 1025],
    "use_beam_search": [True], "detokenize": [False], "return_tokens_as_token_ids": [True],  # without logprobs
    "model": ["M", "m ", "gpt-4", "../m"],
}
_BEYOND_OF: dict[str, dict[str, list[Any]]] = {
    CHAT: {
        "max_completion_tokens": [0, -1, MAX_LEN - 1, MAX_LEN, 2**31, 10**30], "top_logprobs": [-1, 21, 3],
        "tools": [[{}], [None], [{"type": "function", "function": {"name": "f"}}], ["f"], [{"type": "function"}],
                  [{"type": "retrieval", "function": {"name": "f"}}], [{"type": "function", "function": {"name": ""}}],
                  [{"type": "function", "function": {"name": "f", "parameters": "{}"}}],
                  [{"type": "function", "function": {"name": "f"}}] * 2,
                  [{"type": "function", "function": {"name": f"f{k}"}} for k in range(129)]],
        "functions": [[{}], [{"name": "f"}]],
        "tool_choice": ["auto", "required", "", "None", {}, {"type": "function"}, {"type": "allowed_tools"},
                        {"type": "function", "function": {"name": "f"}}], "function_call": ["auto", "", "f"],
        "continue_final_message": [1, "yes"], "add_generation_prompt": [0, "no"], "documents": [[{"text": "x"}]],
        "chat_template": ["{{ messages }}", ""], "enable_thinking": [True, False],
        "thinking": [{"type": "enabled"}], "reasoning_effort": ["low"], "moderation": [{"model": "x"}],
        "chat_template_kwargs": [{"messages": []}, {"tools": []}, {"add_generation_prompt": False},
                                 {"continue_final_message": True}, {"chat_template": "x"}, {"a": 1, "tools": None},
                                 {str(k): "" for k in range(1025)}],
        "modalities": [["audio"], ["text", "audio"], [""], [None], [1], [[]]],
        "messages": [[None], ["hi"], [1], [True], [[]], [{}], [{"role": "user"}], [{"content": "x"}],
                     [{"role": "user", "content": _LONG}], [{"role": "user", "content": "x"}] * 40],
    },
    TEXT: {
        "logprobs": [-1, 21, 10**30], "best_of": [0, 129, -1], "suffix": ["x", " "],
        "prompt": ["", [""], ["a", ""], [[]], [[1], []], [-1], [2**31], [1.5], [True], [None], [{}], [1, "a"],
                   [1, None], [1, True], [1, 1.5], ["a", 1], ["a", None], ["a", ["b"]], [[1], ["a"]], [[1], [-1]],
                   [[1], 1], [[1], None], [["a"]], [[[1]]], [[1.5]], [999], [[1], [999]], _LONG, ["a", _LONG],
                   [1] * MAX_LEN, [[1], [1] * MAX_LEN], ["a"] * 257],
    },
}

_PARTS = [[None], [""], [1], [[]], [{}], [{"type": "text"}], [{"text": "x"}], [{"type": None, "text": "x"}],
          [{"type": "Text", "text": "x"}], [{"type": "text", "text": None}], [{"type": "text", "text": 1}],
          [{"type": "text", "text": ["x"]}], [{"type": "text", "text": "x", "more": 1}],
          [{"type": "text", "refusal": "x"}], [{"type": "refusal", "text": "x"}], [{"type": "refusal"}],
          [{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "input_audio", "input_audio": {}}],
          [{"type": "file", "file": {}}], [{"type": "video_url", "video_url": {"url": "x"}}],
          [{"type": "text", "text": "x"}, {"type": "image_url"}], [[{"type": "text", "text": "x"}]]]
_IN_A_MESSAGE: dict[str, list[Any]] = {
    "role": [None, "", "wizard", "User", "SYSTEM", " user", "Tool", 1, True, [], {}, ["user"]],
    "content": [None, 1, 1.5, True, {}, {"type": "text", "text": "x"}, [], *_PARTS],
    "name": [1, True, [], {}, ["x"]], "refusal": [1, {}, []],
    "audio": [{}, {"id": "x"}, "x", []], "function_call": [{}, {"arguments": "{}"}, "auto", [], {"name": 1}],
    "tool_calls": [[{}], [{"id": "x"}], [None], {}, "x", [{"function": {}}], [{"function": {"name": None}}],
                   [{"function": {"name": "f", "arguments": "{"}}], [{"function": {"name": "f", "arguments": 1}}],
                   [{"type": "custom", "custom": {"name": "f", "input": "x"}}], [{"function": {"name": "f"}, "x": 1}],
                   [{"function": {"name": "f"}}]],  # of the last the template knows nothing
    "reasoning": [1, [], {}], "reasoning_content": [1, [], {}], "tool_call_id": [1, [], {}],
    "Role": ["user"], "text": ["x"], "prefix": [True], "reasoning_details": [[]],
}
_STREAM_OPTIONS: list[Any] = [{"x": 1}, {"include_usag": True}, {"include_usage": "yes"}, {"include_usage": 1},
                              {"include_usage": []}, {"continuous_usage_stats": 0}, {"continuous_usage_stats": {}},
                              {"include_usage": True, "more": None}]


# ---- families --------------------------------------------------------------------------------------------------------


def wrong_types() -> Iterator[Bad]:
    for path in BOTH:
        for field, takes in TAKES[path].items():
            for kind, samples in _SAMPLES.items():
                if kind not in takes.split():
                    for sample in samples:
                        yield with_fields(path, field, **{field: sample})


def beyond(path: str) -> Iterator[tuple[str, Any]]:
    for field, values in {**_BEYOND, **_BEYOND_OF[path]}.items():
        for value in values:
            yield field, value


def out_of_range() -> Iterator[Bad]:
    for path in BOTH:
        for field, value in beyond(path):
            bad = with_fields(path, field, **{field: value})
            yield Bad(path, bad.body, ("n", "prompt") if field == "prompt" else bad.blamed,
                      404 if field == "model" else 400)
        for options in _STREAM_OPTIONS:
            yield with_fields(path, "stream_options", stream=True, stream_options=options)
    for value in (-1, 21):
        yield with_fields(CHAT, "top_logprobs", logprobs=True, top_logprobs=value)
    for n, best_of in ((2, 1), (3, 2), (128, 127)):
        yield with_fields(TEXT, "best_of", n=n, best_of=best_of)
    yield with_fields(TEXT, "best_of", best_of=2, stream=True)
    yield with_fields(TEXT, "best_of", best_of=128, prompt=["a", "b", "c"])
    for path in BOTH:
        yield with_fields(path, "prompt_logprobs", prompt_logprobs=0, stream=True)
        yield with_fields(path, "min_tokens", min_tokens=4, max_tokens=3)
    yield with_fields(TEXT, "n", n=128, prompt=["a", "b", "c"])


def messages() -> Iterator[Bad]:
    """Every fault of a message, in the first and in the third."""
    before = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    for turns in ([], before):
        for field, values in _IN_A_MESSAGE.items():
            for value in values:
                message = {"role": "user", "content": "hi", field: value}
                yield with_fields(CHAT, f"messages[{len(turns)}].{field}", messages=[*turns, message])
        for missing in ("role", "content"):
            message = {"role": "user", "content": "hi"}
            del message[missing]
            yield with_fields(CHAT, f"messages[{len(turns)}].{missing}", messages=[*turns, message])


def missing_and_unknown() -> Iterator[Bad]:
    for path in BOTH:
        said = "messages" if path == CHAT else "prompt"
        body = right(path, n=1)
        del body[said]
        yield Bad(path, json.dumps(body).encode(), (said,))
        for name in ("temprature", "Model", "max_token", "stop_strings", "engine", "n ", " n", "__class__", "0",
                     "a.b", "a[0]", "\x00", "ü🙂", "x" * 300, "model_config", "inputs", "input"):
            yield with_fields(path, name[:100], **{name: 1})
        for other, value in {"messages": right(CHAT)["messages"], "prompt": "hi"}.items():
            if other != said:
                yield with_fields(path, other, **{other: value})
    for only in TAKES[TEXT].keys() - TAKES[CHAT].keys():
        yield with_fields(CHAT, only, **{only: "x"})
    for only in TAKES[CHAT].keys() - TAKES[TEXT].keys():
        yield with_fields(TEXT, only, **{only: "x"})


_NO_NUMBERS = [b"NaN", b"Infinity", b"-Infinity", b"nan", b"1e999", b"-1e999", b"0x10", b"01", b"1.", b".5", b"+1",
               b"1e", b"--1", b"1_000", b"1,5", b"'1'", b"9" * 400, b"-" + b"9" * 4400, b"1" + b"0" * 310 + b".5"]


def numbers() -> Iterator[Bad]:
    """What is no number, or one that no field can hold."""
    for path in BOTH:
        for field in (*_INTEGERS, *_NUMBERS):
            for raw in _NO_NUMBERS:
                yield Bad(path, spliced(path, field, raw), (field,))


def nesting() -> Iterator[Bad]:
    for path in BOTH:
        for field in ("stop", "model", "stream_options", "logit_bias", "response_format"):
            for depth in (60, 150, 3000):
                yield Bad(path, spliced(path, field, b"[" * depth + b"]" * depth), (field,))
                yield Bad(path, spliced(path, field, b'{"0":' * depth + b"1" + b"}" * depth), (field,))
        yield Bad(path, b"[" * 9000)
        yield Bad(path, b'{"a":' * 3000)


def written(path: str) -> bytes:
    """A right body with one of everything that JSON has, but for numbers in a row, which stay right without a comma."""
    more = {"temperature": 0.5, "stop": ["Ende", "fín"], "user": "ü🙂", "stream": False, "metadata": {"a": "b"}, "n": 1}
    return json.dumps(right(path, **more), ensure_ascii=False, separators=(",", ":")).encode()


def cut() -> Iterator[Bad]:
    for path in BOTH:
        body = written(path)
        for at in range(len(body)):
            yield Bad(path, body[:at])


_INSTEAD = {b"{": b"([", b"}": b")]", b"[": b"({", b"]": b")}", b":": b"=;,", b",": b";:", b'"': b"'`"}


def structure() -> Iterator[Bad]:
    """One structural character is missing, doubled, or another one."""
    for path in BOTH:
        body = written(path)
        for at in range(len(body)):
            if (one := body[at:at + 1]) in _INSTEAD:
                yield Bad(path, body[:at] + body[at + 1:])
                yield Bad(path, body[:at] + one + body[at:])
                for other in _INSTEAD[one]:
                    yield Bad(path, body[:at] + bytes([other]) + body[at + 1:])


_JUNK = [b"\xff", b"\x80", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82",
         rb"\ud800", rb"\udc00", rb"\udfff\ud800", rb"\ud83dx", rb"\x41", rb"\u12", rb"\u12g4", rb"\'", rb"\0",
         rb"\U0041", *(bytes([code]) for code in range(32))]


def strings() -> Iterator[Bad]:
    """Bytes that no JSON string has: in a text, in a name, in a value that is not looked at."""
    for path in BOTH:
        said = b"hi"
        whole = json.dumps(right(path, user="u")).encode()
        for junk in _JUNK:
            yield Bad(path, whole.replace(said, b"h" + junk + b"i"))
            yield Bad(path, whole.replace(b'"user"', b'"us' + junk + b'er"'))
            yield Bad(path, whole.replace(b'"u"', b'"' + junk + b'"'))
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp037"):
            yield Bad(path, whole.decode().encode(encoding))
        yield Bad(path, whole.replace(said, "grüße".encode("latin-1")))


def roots() -> Iterator[Bad]:
    """Something other than one object."""
    for path in BOTH:
        whole = json.dumps(right(path)).encode()
        for raw in (b"", b" ", b"\n\n", b"null", b"true", b"false", b"0", b"1.5", b'"x"', b'""', b"[]", b"[[]]",
                    b"[{}]", b"undefined",
                    b"hello", b"<xml/>", b"model=m&prompt=hi", b"\x00", b"//", b"{}{}", b"---\nmodel: m",
                    b"[" + whole + b"]", whole + whole, whole + b",", whole + b"x", b"x" + whole, whole + b"\x00",
                    json.dumps(whole.decode()).encode(), b"/**/" + whole, b"data: " + whole, whole.replace(b'"', b"'"),
                    whole[:-1] + b",}"):
            yield Bad(path, raw)
        yield Bad(path, b"{}", ("messages" if path == CHAT else "prompt",))


def repeated() -> Iterator[Bad]:
    """A field twice, of which the last is wrong: it is the one that counts."""
    for path in BOTH:
        for field, first, last in (("n", 1, 0), ("temperature", 1, -1), ("model", "m", 5), ("stream", False, "no"),
                                   ("echo", False, 1), ("stop", "a", ""), ("top_p", 1, 0), ("seed", 1, 1.5)):
            whole = json.dumps(right(path, **{field: first}))
            yield Bad(path, f"{whole[:-1]}, {json.dumps(field)}: {json.dumps(last)}}}".encode(), (field,))


def combined() -> Iterator[Bad]:
    """Several wrong fields at once, of which one is named."""
    draw = random.Random(7)
    for path in BOTH:
        faults = [fault for fault in beyond(path) if fault[0] != "model"]
        for _ in range(60):
            chosen = dict(draw.sample(faults, draw.randint(2, 5)))
            yield Bad(path, json.dumps(right(path, **chosen)).encode(), (*chosen, "n"))


def too_large() -> Iterator[Bad]:
    for path in BOTH:
        for body in (json.dumps(right(path, user="x" * MAX_BODY)).encode(), b" " * (MAX_BODY + 1),
                     b"\xff" * MAX_BODY * 2,
                     json.dumps(right(path)).encode() + b" " * MAX_BODY, b"[" * (MAX_BODY + 1)):
            yield Bad(path, body, status=413)


def other_content_types() -> Iterator[Bad]:
    for path in BOTH:
        for kind in ("", "text/plain", "text/json", "application/x-www-form-urlencoded",
                     "multipart/form-data; boundary=x",
                     "application/jsonx", "application/json-patch+json", "application/octet-stream", "json", ";", "*/*",
                     "application/json, text/plain", "application/x-ndjson"):
            yield Bad(path, json.dumps(right(path, user=kind)).encode(), status=415, kind=kind)


_MAKERS: tuple[Callable[[], Iterator[Bad]], ...] = (
    wrong_types, out_of_range, messages, missing_and_unknown, numbers, nesting, cut, structure, strings, roots,
    repeated,
    combined, too_large, other_content_types)
NOT_JSON = frozenset({"numbers", "nesting", "cut", "structure", "strings", "roots"})  # some of their bodies
FAMILIES: dict[str, list[Bad]] = {make.__name__: list(make()) for make in _MAKERS}
