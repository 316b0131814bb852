"""The application by its bytes: probes, errors, limits, connections that close, readers that do not read."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from openai_server import Serve, Served, fresh
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.flow_control import FlowControl

from fullpipe import __version__
from fullpipe.errors import UsageError
from fullpipe.options import ServerOptions
from fullpipe.request import SamplingParams
from fullpipe.server import guard
from fullpipe.server.answer import Answer, Mailbox
from fullpipe.server.guard import EventStream, Guard
from fullpipe.server.protocol.tables import REFUSED
from fullpipe.supervision import Status

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hello"}


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, after a look at its shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == ("server_error" if status >= 500 else error["type"])
    return error


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_probes(served: Served, client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/version").json() == {"version": __version__}
    metrics = client.get("/metrics")
    assert metrics.text == "fullpipe_up 1\n"
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    served.service.now = Status("ready", 3, 2, 10, 100, 1, "stage 1: killed")
    ready = client.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {"state": "ready", "running": 3, "waiting": 2, "restarts": 1,
                            "last_failure": "stage 1: killed"}


@pytest.mark.parametrize("state", ["starting", "rebuilding", "failed", "draining", "stopped"])
def test_not_ready(served: Served, client: httpx.Client, state: Any) -> None:
    served.service.now = Status(state, 0, 0, 0, 0, 4, "stage 1: killed", retry_after_s=2.5)
    response = client.get("/ready")
    error = refusal(response, 503)
    assert error["code"] == state and "stage 1: killed" in error["message"]
    assert response.headers["retry-after"] == "3"
    assert response.json()["state"] == state and response.json()["last_failure"] == "stage 1: killed"
    assert client.get("/health").status_code == 200


# ---- errors and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/health", 405),
    ("POST", "/v1/models", 405), ("GET", "/v1/models/", 404), ("GET", "/v1/models/%ff%00", 404), ("GET", "/docs", 404),
])  # fmt: skip
def test_paths_and_methods(client: httpx.Client, method: str, path: str, status: int) -> None:
    refusal(client.request(method, path), status)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
def test_other_content_types(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    refusal(client.post("/v1/completions", content=json.dumps(TEXT), headers=headers), 415)


def test_a_charset_is_allowed(client: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/completions", content=json.dumps(TEXT), headers=headers).status_code == 200


@pytest.fixture(scope="module")
def narrow(start: Serve) -> Served:
    """A server with tight limits."""
    return start(ServerOptions(max_body_bytes=1000, max_connections=2, max_choices=4, request_timeout=9.0,
                               allowed_origins=["https://page.example"]))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_while_it_comes(narrow: Served, chunked: bool) -> None:
    fresh(narrow)

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    with narrow.client() as client:
        content: Any = pieces() if chunked else b" " * 2000
        refusal(client.post("/v1/completions", content=content, headers=headers), 413)
    assert narrow.service.submitted == []


def test_an_endless_body_is_cut_off(narrow: Served) -> None:
    with narrow.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b" " * 1000 + b"\r\n")
        connection.sendall(b"1\r\n \r\n")  # and no end
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_too_many_at_once(narrow: Served) -> None:
    fresh(narrow)
    narrow.service.hold_at = 1
    with narrow.client() as client, client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as first, \
            client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as second:
        assert (first.status_code, second.status_code) == (200, 200)
        third = client.post("/v1/completions", json=TEXT)
        assert refusal(third, 429)["code"] == "rate_limit_exceeded"
        assert third.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200


def test_too_many_choices(narrow: Served) -> None:
    with narrow.client() as client:
        assert refusal(client.post("/v1/completions", json=TEXT | {"n": 5}), 400)["param"] == "n"
        assert refusal(client.post("/v1/completions", json=TEXT | {"n": 2, "prompt": ["a"] * 3}), 400)["param"] == "n"


def test_more_choices_than_there_will_ever_be_room_for(served: Served, client: httpx.Client) -> None:
    served.service.capacity = 2
    assert client.post("/v1/completions", json=TEXT | {"n": 2}).status_code == 200
    error = refusal(client.post("/v1/completions", json=TEXT | {"n": 3}), 400)
    assert error["param"] == "n" and "may ask for 2" in error["message"]


@pytest.mark.parametrize("keys", [[""], ["good", ""], ["a b"], ["key\n"], ["\tkey"]])
def test_a_key_that_is_not_one_word_is_no_key(keys: list[str]) -> None:
    with pytest.raises(UsageError, match="API key") as caught:
        ServerOptions(api_key=keys)
    assert "FULLPIPE_API_KEY" in (caught.value.hint or "")


def test_who_is_refused_takes_no_room_from_others() -> None:
    """Many send bodies that are too large and never end. A few are read on; none counts as being served."""
    statuses: dict[int, int] = {}

    async def silence() -> Any:
        return await asyncio.Event().wait()

    async def send(number: int, message: Any) -> None:
        statuses.setdefault(number, message.get("status", 0))

    async def scenario() -> None:
        door = Guard(PlainTextResponse("welcome"), ServerOptions(max_connections=2, max_body_bytes=10))
        large = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"11")]}
        small = large | {"headers": []}
        crowd = [asyncio.create_task(door(dict(large), silence, partial(send, number))) for number in range(100)]
        await asyncio.wait(crowd[guard._DRAINS:], timeout=10)
        assert statuses == dict.fromkeys(range(guard._DRAINS, 100), 413)
        await door(small, silence, partial(send, 100))
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        assert (statuses[100], door._draining) == (200, 0)

    asyncio.run(scenario())


def test_a_time_limit_is_handed_on(narrow: Served) -> None:
    fresh(narrow)
    with narrow.client() as client:
        assert client.post("/v1/completions", json=TEXT).status_code == 200
    assert narrow.service.submitted[0][3] == 9.0


def test_a_prompt_longer_than_the_context(client: httpx.Client) -> None:
    long = client.post("/v1/completions", json=TEXT | {"prompt": "x" * 400})
    assert refusal(long, 400) | {"message": ""} == {"message": "", "type": "invalid_request_error", "param": "prompt",
                                                    "code": "context_length_exceeded"}
    many = [{"role": "user", "content": "x" * 500}]
    error = refusal(client.post("/v1/chat/completions", json=CHAT | {"messages": many}), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_pages_elsewhere_are_let_in_only_if_named(narrow: Served, client: httpx.Client) -> None:
    asking = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with narrow.client() as named:
        allowed = named.options("/v1/chat/completions", headers=asking)
        other = named.options("/v1/chat/completions", headers=asking | {"origin": "https://evil.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in other.headers
    assert client.options("/v1/chat/completions", headers=asking).status_code == 405


# ---- refused fields --------------------------------------------------------------------------------------------------

_WRONG: dict[str, Any] = {
    "functions": [{}], "function_call": "auto", "modalities": ["text", "audio"],
    "suffix": "end", "use_beam_search": True, "detokenize": False,
}
_TEXT_ONLY = {"suffix"}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_refused_by_name(served: Served, client: httpx.Client, field: str) -> None:
    text = field in _TEXT_ONLY
    body = (TEXT if text else CHAT) | {field: _WRONG.get(field, {"any": "thing"})}
    error = refusal(client.post("/v1/completions" if text else "/v1/chat/completions", json=body), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert field in error["message"] and "not supported" in error["message"]
    assert served.service.submitted == []


@pytest.mark.parametrize(("changes", "param"), [
    ({"colour": 1}, "colour"), ({"top_logprobs": 2}, "top_logprobs"), ({"temperature": "hot"}, "temperature"),
    ({"n": True}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"), ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"stop": ["a"] * 17}, "stop"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type"),
])  # fmt: skip
def test_param_is_the_path_of_the_fault(client: httpx.Client, changes: dict[str, Any], param: str) -> None:
    assert refusal(client.post("/v1/chat/completions", json=CHAT | changes), 400)["param"] == param


def test_tokens_that_the_model_does_not_have(client: httpx.Client) -> None:
    error = refusal(client.post("/v1/completions", json=TEXT | {"prompt": [1, 300]}), 400)
    assert error["param"] == "prompt" and "300" in error["message"]


# ---- ids and logs ----------------------------------------------------------------------------------------------------


def test_every_answer_has_an_id_and_every_log_line_too(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fullpipe.server"):
        own = client.post("/v1/completions", json=TEXT, headers={"x-request-id": "mine-1"})
        given = client.get("/no%0Athing", headers={"x-request-id": "not mine"})
    assert own.headers["x-request-id"] == "mine-1" and own.json()["id"] == "cmpl-mine-1"
    lines = [record.getMessage() for record in caplog.records if record.name == "fullpipe.server"]
    assert all(line.split()[0] in ("mine-1", given.headers["x-request-id"]) for line in lines)
    assert [line.split()[1:4] for line in lines if "/" in line] == [["POST", "/v1/completions", "200"],
                                                                     ["GET", "/no%0Athing", "404"]]
    assert len(given.headers["x-request-id"]) == 32


def test_what_nobody_foresaw_is_a_500_of_the_same_shape(served: Served, client: httpx.Client,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    served.service.refuse = KeyError("inside")
    error = refusal(client.post("/v1/completions", json=TEXT), 500)
    assert "inside" not in error["message"]
    assert any(record.exc_info for record in caplog.records)


# ---- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_at", [0, 2])
def test_closing_the_connection_cancels_every_choice(served: Served, stream: bool, hold_at: int) -> None:
    service = served.service
    service.hold_at = hold_at
    body = json.dumps(CHAT | {"stream": stream, "n": 2}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" \
           f"Content-Length: {len(body)}\r\n\r\n"
    with served.connect() as connection:
        connection.sendall(head.encode() + body)
        if stream and hold_at:
            assert connection.recv(12) == b"HTTP/1.1 200"
        else:
            service.wait_for(lambda: len(service.submitted) == 2)
    service.wait_for(lambda: sorted(service.cancelled) == [0, 1])


def test_what_has_ended_is_not_cancelled(served: Served, client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", json=CHAT | {"n": 2}).status_code == 200
    assert client.get("/health").status_code == 200
    assert served.service.cancelled == []


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set while an answer waits for its reader."""
    event = threading.Event()
    pause, resume = FlowControl.pause_writing, FlowControl.resume_writing
    monkeypatch.setattr(FlowControl, "pause_writing", lambda flow: (pause(flow), event.set()))
    monkeypatch.setattr(FlowControl, "resume_writing", lambda flow: (resume(flow), event.clear()))
    return event


def test_who_does_not_read_holds_up_nobody(start: Serve, paused: threading.Event) -> None:
    served = start(send_buffer=2**16)
    served.script("x" * 300)
    asked = CHAT | {"stream": True, "max_tokens": 300, "logprobs": True, "top_logprobs": 20, "n": 4}
    body = json.dumps(asked).encode()
    with served.connect() as deaf, served.client() as client:
        deaf.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert paused.wait(10)
        assert client.post("/v1/completions", json=TEXT).json()["choices"][0]["text"] == "x" * 16
        assert paused.is_set()
        got = b"".join(iter(lambda: deaf.recv(2**16), b""))  # it may still have all of it
    assert len(got) > 2**20 and got.count(b'"finish_reason":"length"') == 4 and b"data: [DONE]" in got


@pytest.mark.parametrize("at_its_end", [False, True])
def test_who_takes_nothing_for_long_is_given_up(served: Served, at_its_end: bool) -> None:
    served.service.hold_at = 0

    async def never(message: Any) -> None:
        if message["type"] == "http.response.body" and message["more_body"] is not at_its_end:
            await asyncio.Event().wait()

    async def silence() -> Any:
        return await asyncio.Event().wait()

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"

    async def scenario() -> None:
        answer = Answer(served.service, silence)  # type: ignore[arg-type]
        answer.submit(0, [1], SamplingParams(), priority=0, timeout_s=None)
        stream = EventStream(events(), 0.01, answer.close)
        async with asyncio.timeout(10):
            await stream({"type": "http", "fullpipe.request_id": "x"}, silence, never)

    asyncio.run(scenario())
    assert served.service.cancelled == [0]


def test_a_mailbox_loses_nothing_between_threads() -> None:
    async def scenario() -> list[int]:
        mailbox: Mailbox[int] = Mailbox()
        threads = [threading.Thread(target=lambda k=k: [mailbox.put(k * 1000 + i) for i in range(1000)])
                   for k in range(4)]
        for thread in threads:
            thread.start()
        got: list[int] = []
        while len(got) < 4000:
            got += await asyncio.wait_for(mailbox.take(), 10)
        return got

    got = asyncio.run(scenario())
    assert sorted(got) == list(range(4000))
    assert all([i for i in got if i // 1000 == k] == list(range(k * 1000, k * 1000 + 1000)) for k in range(4))


def test_news_after_the_loop_has_ended_hurt_nobody() -> None:
    async def make() -> Mailbox[int]:
        return Mailbox()

    asyncio.run(make()).put(1)


# ---- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(served: Served) -> None:
    served.script("Hi")
    command = ["curl", "-sN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json",
               "-d", json.dumps(CHAT | {"stream": True, "temperature": 0})]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hi"
    assert abs(chunks[0]["created"] - time.time()) < 600
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_document(start: Serve, client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/models/{name}",
                          "/health", "/ready", "/version", "/metrics", "/tokenize", "/detokenize"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        responses = paths[path]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        for status in ("400", "401", "404", "413", "415", "429", "500", "503"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
        assert "422" not in responses
