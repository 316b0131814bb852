"""Bad input over a real socket: each is a 4xx of OpenAI's shape with a reason that names the field, and nothing reaches
the service."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from malformed import CHAT, FAMILIES, NOT_JSON, TAKES, TEXT, Bad, right, written
from one_word import MAX_BODY, MAX_LEN, OneWord, application

from fullpipe.options import ServerOptions
from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest


@pytest.fixture(scope="module")
def service() -> OneWord:
    return OneWord()


@pytest.fixture(scope="module")
def port(service: OneWord) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(application(service), log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=10, trust_env=False) as client:
        yield client


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error of a 4xx, which has exactly OpenAI's fields."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert response.headers["x-request-id"]
    return dict(error)


SAYS = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}

BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"temperature": -1}, "temperature"),
    ("chat", {"temperature": "hot"}, "temperature"),
    ("chat", {"temperature": True}, "temperature"),
    ("chat", {"top_p": 0}, "top_p"),
    ("chat", {"top_p": 1.5}, "top_p"),
    ("chat", {"top_k": -2}, "top_k"),
    ("chat", {"top_k": 1.5}, "top_k"),
    ("chat", {"min_p": 2}, "min_p"),
    ("chat", {"presence_penalty": 3}, "presence_penalty"),
    ("chat", {"frequency_penalty": -3}, "frequency_penalty"),
    ("chat", {"repetition_penalty": 0}, "repetition_penalty"),
    ("chat", {"n": 0}, "n"),
    ("chat", {"n": 10**9}, "n"),
    ("chat", {"n": "1"}, "n"),
    ("chat", {"max_tokens": 0}, "max_tokens"),
    ("chat", {"max_tokens": 10**30}, "max_tokens"),
    ("chat", {"max_tokens": 1.5}, "max_tokens"),
    ("chat", {"max_completion_tokens": -1}, "max_completion_tokens"),
    ("chat", {"seed": 2**64}, "seed"),
    ("chat", {"seed": 0.5}, "seed"),
    ("chat", {"stop": ""}, "stop"),
    ("chat", {"stop": ["a", ""]}, "stop[1]"),
    ("chat", {"stop": ["x"] * 17}, "stop"),
    ("chat", {"stop": {}}, "stop"),
    ("chat", {"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ("chat", {"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ("chat", {"logit_bias": {"a": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("chat", {"logit_bias": {"1": None}}, "logit_bias"),
    ("chat", {"logit_bias": []}, "logit_bias"),
    ("chat", {"logprobs": 1}, "logprobs"),
    ("chat", {"top_logprobs": 3}, "top_logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {"stream": "yes"}, "stream"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("chat", {"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
    ("chat", {"ignore_eos": 1}, "ignore_eos"),
    ("chat", {"priority": "high"}, "priority"),
    ("chat", {"messages": None}, "messages"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": ["hi"]}, "messages[0]"),
    ("chat", {"messages": [{}]}, "messages[0]"),
    ("chat", {"messages": [*SAYS, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
    ("chat", {"messages": [{"role": "Tool", "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0]"),
    ("chat", {"messages": [{"role": "user", "content": "x" * MAX_LEN}]}, "messages"),
    ("chat", {"model": "other"}, "model"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[]]}, "prompt"),
    ("completions", {"prompt": ["a", 1]}, "prompt"),
    ("completions", {"prompt": [1, "a"]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"prompt": [1.5]}, "prompt"),
    ("completions", {"prompt": {"text": "a"}}, "prompt"),
    ("completions", {"prompt": "x" * MAX_LEN}, "prompt"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"logprobs": True}, "logprobs"),
    ("completions", {"n": 3, "best_of": 2}, "best_of"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
]  # fmt: skip

SAID: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"stop": ["x"] * 17}, "stop: must have at most 16 entries"),
    ("chat", {"stop": 5}, "stop: must be a string or a list"),
    ("chat", {"stop": [5]}, "stop[0]: must be a string"),
    ("chat", {"stop": ""}, "stop: must not be empty"),
    ("chat", {"priority": 11}, "priority: must be from -10, served first, to 10"),
    ("chat", {"messages": []}, "messages: must not be empty"),
    ("chat", {"messages": ["hi"]}, "messages[0]: must be an object"),
    ("chat", {"stream": "yes"}, "stream: must be true or false"),
    ("chat", {"temperature": -1}, "temperature: must be greater than or equal to 0"),
    ("chat", {"logit_bias": {"a": 1}}, "logit_bias.a: is no id of a token; names here are whole numbers, as in "
                                       '{"50256": -100}'),
    ("chat", {"tools": [{"type": "function", "function": {"name": "a b"}}]},
     "tools[0].function.name: must be of letters, digits and _ . : / -, 256 at most"),
    ("chat", {"response_format": {"type": "xml"}},
     "response_format: there is no type 'xml' here; it must be one of 'text', 'json_object', 'json_schema'"),
    ("chat", {"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
    ("chat", {"prompt": "x"}, "unknown field 'prompt'; a chat's prompt stands in messages; a text is asked at "
                              "/v1/completions"),
    ("chat", {"colour": 1}, "unknown field 'colour'"),
    ("chat", {"tools": [{"type": "function", "name": "f"}]},
     "tools[0]: its name and parameters belong under \"function\", as in "
     '{"type": "function", "function": {"name": "f", "parameters": {...}}}'),
    ("chat", {"guided_json": '{"enum": ["\\ud800"]}'},
     "guided_json: a structure must be text that UTF-8 can spell"),
    ("completions", {"messages": SAYS}, "unknown field 'messages'; a chat is asked at /v1/chat/completions"),
    ("completions", {"max_completion_tokens": 5},
     "unknown field 'max_completion_tokens'; it is called max_tokens here"),
    ("completions", {"bad_words": ["a"] * 129}, "bad_words: must have at most 128 entries"),
]

UNSUPPORTED: list[tuple[str, str, Any]] = [
    ("chat", "tools", [{"type": "function", "function": {"name": "f"}}]),
    ("chat", "tool_choice", "auto"),
    ("chat", "functions", [{"name": "f"}]),
    ("chat", "function_call", "auto"),
    ("chat", "modalities", ["text", "audio"]),
    ("chat", "audio", {"voice": "x", "format": "wav"}),
    ("chat", "prediction", {"type": "content", "content": "x"}),
    ("chat", "structured_outputs", {"structural_tag": "x"}),
    ("chat", "timeout", 5),
    ("chat", "temprature", 1),
    ("completions", "messages", SAYS),
    ("completions", "detokenize", False),
    ("completions", "suffix", "x"),
]


def body_of(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", **({"messages": SAYS} if kind == "chat" else {"prompt": "hi"}), **fields}


def post(client: httpx.Client, kind: str, fields: dict[str, Any]) -> httpx.Response:
    return client.post("/chat/completions" if kind == "chat" else "/completions", json=body_of(kind, fields))


@pytest.mark.parametrize(("kind", "fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named(client: httpx.Client, service: OneWord, kind: str, fields: dict[str, Any],
                              param: str) -> None:
    before = len(service.asked)
    response = post(client, kind, fields)
    error = refusal(response)
    assert error["param"] is not None
    assert error["param"].startswith(param)
    assert response.status_code == (404 if fields.get("model") else 400)
    assert len(service.asked) == before


@pytest.mark.parametrize(("kind", "fields", "said"), SAID, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_in_words(client: httpx.Client, kind: str, fields: dict[str, Any], said: str) -> None:
    assert refusal(post(client, kind, fields))["message"] == said


@pytest.mark.parametrize(("kind", "field", "value"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_by_name(client: httpx.Client, kind: str, field: str, value: Any) -> None:
    response = post(client, kind, {field: value})
    error = refusal(response)
    assert response.status_code == 400
    assert error["param"].split(".")[0].split("[")[0] == field
    assert field in error["message"]


BAD_BODIES = {
    "empty": b"",
    "blank": b"  ",
    "cut short": b'{"model": "m"',
    "two values": b"{}{}",
    "no object": b"[]",
    "null": b"null",
    "text": b'"hi"',
    "number": b"1",
    "single quotes": b"{'model': 'm'}",
    "trailing comma": b'{"model": "m",}',
    "NaN": b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
    "Infinity": b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
    "infinite by size": b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
    "lone surrogate": b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "lone surrogate in a name": b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "\\udfff": 1}',
    "lone surrogate in metadata": b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], '
                                  b'"metadata": {"\\ud800": "x"}}',
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "m"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"model": "m"}',
    "deep lists": b'{"model": "m", "messages": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "a number of 5000 digits": b'{"model": "m", "n": ' + b"9" * 5000 + b"}",
    "a float of 4000 digits": b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": '
                              + b"9" * 4000 + b"}",
    "many unknown fields": json.dumps({f"x{i}": i for i in range(1000)}).encode(),
    "a control character": b'{"model": "m\x01"}',
}  # fmt: skip


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_body_that_is_not_json_of_ours(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code == 400, response.text
    assert len(refusal(response)["message"]) < 1000


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ";"])
def test_another_content_type(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = client.post("/chat/completions", content=json.dumps(body_of("chat", {})), headers=headers)
    assert response.status_code == 415
    assert "`Content-Type: application/json`" in refusal(response)["message"]


@pytest.mark.parametrize(("root_path", "path"),
                         [("", "/v1/models"), ("/api", "/api/v1/models"), ("/api", "/v1/models")])
def test_the_key_is_needed_under_a_root_path_too(root_path: str, path: str) -> None:
    """Servers put their root path before the path (ASGI 3)."""
    app = application(OneWord(), ServerOptions(api_key=["k"]))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.get(path)

    response = asyncio.run(ask())
    assert response.status_code == 401
    assert refusal(response)["code"] == "invalid_api_key"


def test_a_body_above_the_limit(client: httpx.Client) -> None:
    response = post(client, "chat", {"user": "x" * MAX_BODY})
    assert response.status_code == 413
    refusal(response)


def test_a_chunked_body_above_the_limit_is_refused_before_its_end(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    b"transfer-encoding: chunked\r\n\r\n")
        raw.sendall(b"%x\r\n%s\r\n" % (MAX_BODY + 1, b" " * (MAX_BODY + 1)))  # and no last chunk
        assert raw.recv(64).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    b"content-length: 10\r\n\r\n{")
        assert raw.recv(64).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nothing", 404), ("POST", "/models", 405), ("GET", "/chat/completions", 405),
    ("DELETE", "/completions", 405),
    ("GET", "/models/other", 404), ("GET", "/models/%ED%A0%80", 404), ("GET", "/models/%0d%0aset-cookie:x", 404),
    ("OPTIONS", "/models", 405),
])  # fmt: skip
def test_unknown_paths_and_methods(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    refusal(response)


@pytest.mark.parametrize(("method", "path", "says"), [
    ("GET", "/v1/nothing", "This server has "), ("POST", "/v1/v1/chat/completions", "/v1 stands twice"),
    ("POST", "/v1/chat/completions/", "leave out the slash at the end, as in /v1/chat/completions"),
    ("GET", "/v1/models/", "leave out the slash at the end, as in /v1/models"),
    ("POST", "/v1/messages", "ask /v1/chat/completions"), ("POST", "/v1/load_lora_adapter", "when the server starts"),
    ("POST", "/v1/chat/completion", "did you mean /v1/chat/completions?"),
    ("GET", "/v1/model", "did you mean /v1/models?"),
])
def test_a_path_that_is_not_here_leads_to_what_is(port: int, method: str, path: str, says: str) -> None:
    response = httpx.request(method, f"http://127.0.0.1:{port}{path}", trust_env=False)
    error = refusal(response)
    assert response.status_code == 404 and says in error["message"] and "/v1/chat/completions" in error["message"]


def test_a_method_that_is_not_taken_leads_to_those_that_are(client: httpx.Client) -> None:
    response = client.get("/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert refusal(response)["message"] == "/v1/chat/completions takes POST, and no GET"
    assert client.patch("/responses/x").headers["allow"] == "DELETE, GET"


@pytest.mark.parametrize("fields", [
    {"tools": [], "tool_choice": "auto", "model": ""}, {"tools": [], "tool_choice": "none"},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "service_tier": "auto"},
    {"functions": None, "audio": None, "logit_bias": {}, "stop": [], "parallel_tool_calls": None},
    {"user": "u", "metadata": {"a": "b"}, "store": True, "stop": None, "seed": -1, "temperature": 1, "top_k": -1},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                  {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []}]},
])  # fmt: skip
def test_what_asks_for_nothing_is_taken(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = post(client, "chat", fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "yes"


# ---- a thousand and more, in process ---------------------------------------------------------------------------------


def test_there_are_more_than_a_thousand_malformed_bodies() -> None:
    distinct = {(bad.path, bad.body) for family in FAMILIES.values() for bad in family}
    assert len(distinct) >= 1000
    assert len({body for _, body in distinct}) >= 1000  # and not by being sent to two places
    assert all(len({(bad.path, bad.body, bad.kind) for bad in family}) == len(family) for family in FAMILIES.values())
    for path, request in ((CHAT, ChatRequest), (TEXT, CompletionRequest)):
        assert set(TAKES[path]) == set(request.model_fields)


def exchange(app: FastAPI, bodies: list[Bad]) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return [await client.post(bad.path, content=bad.body, headers={"content-type": bad.kind}) for bad in bodies]

    return asyncio.run(ask())


def send(bodies: list[Bad]) -> list[httpx.Response]:
    """All of them, one after another; none may come as far as the service."""
    service = OneWord()
    answers = exchange(application(service), bodies)
    assert not [bad.body for bad, answer in zip(bodies, answers) if answer.status_code == 200]
    assert service.asked == []
    return answers


def names(error: dict[str, Any], blamed: tuple[str, ...]) -> bool:
    """Whether param is one of the fields, or inside one, and the message says so."""
    param = str(error["param"])
    return param.startswith(blamed) and repr(param)[1:-1] in error["message"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_malformed_body_is_refused_with_a_reason(family: str) -> None:
    bodies = FAMILIES[family]
    for bad, answer in zip(bodies, send(bodies)):
        error = refusal(answer)
        assert answer.status_code == bad.status, (bad.body[:300], answer.text)
        assert 10 <= len(error["message"]) < 1000, (bad.body[:300], answer.text)
        assert error["type"] == "invalid_request_error"
        if error["code"] == "invalid_json":
            assert family in NOT_JSON, (bad.body[:300], answer.text)
        elif bad.blamed:
            assert names(error, bad.blamed), (bad.body[:300], answer.text)


def test_a_field_without_a_name(client: httpx.Client) -> None:
    error = refusal(post(client, "chat", {"": 1}))
    assert error["param"] == "" and error["message"] == "unknown field ''"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_key_is_asked_for_before_anything_else(path: str) -> None:
    app = application(OneWord(), ServerOptions(api_key=["k"], max_body_bytes=1000))
    answers = exchange(app, [Bad(path, written(path)), Bad(path, b"{"), Bad(path, b"", kind="text/plain")])
    assert {refusal(answer)["code"] for answer in answers} == {"invalid_api_key"}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_the_malformed_bodies_are_made_of_is_right(path: str) -> None:
    service = OneWord()
    answers = exchange(application(service), [Bad(path, json.dumps(right(path)).encode()), Bad(path, written(path))])
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(service.asked) == 2
