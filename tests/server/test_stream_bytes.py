"""Every endpoint that streams keeps the rules of server-sent events to the byte, whatever the text is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import Served

from fullpipe.engine import Stats
from fullpipe.server.live import Live
from fullpipe.supervision import Status
from fullpipe_lab.sse import DONE, BadStream, Event, check_bytes, check_chunks, check_named

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]}, TEXT: {"prompt": "Hello"},
    RESPONSES: {"input": "Hello"},
}
MORE: dict[str, list[dict[str, Any]]] = {
    CHAT: [{}, {"logprobs": True, "top_logprobs": 2}, {"stream_options": {"include_usage": True}}, {"n": 3},
           {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2}],
    TEXT: [{}, {"logprobs": 2}, {"stream_options": {"include_usage": True}}, {"prompt": ["a", "b"], "n": 2}],
    RESPONSES: [{}],
}
# What would break a stream whose writer does not escape it, and what readers of text take for the end of a line.
TEXTS = ["plain", "", "\n\n", "a\r\nb\rc\n", "data: [DONE]\n\n", "[DONE]", ": comment\n", "event: x\ndata: y\n\n",
         "\u2028\u2029\x85\x0b\x0c\x1c\x1e", "\x00\x01\x7f", "Ünï🙂", "\ufeff", '"\\/{}', "event:\nid: 1\nretry: 0\n\n"]


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> bytes:
    response = client.post(path, json={"model": "tiny", "stream": True, **ASK[path], **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert "content-length" not in response.headers
    return response.content


def text_of(path: str, chunks: list[dict[str, Any]]) -> str:
    """Of the first choice."""
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ()) if choice["index"] == 0]
    return "".join((one["delta"].get("content") if path == CHAT else one["text"]) or "" for one in choices)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_whatever_the_text_is_the_bytes_keep_the_rules(served: Served, client: httpx.Client, path: str,
                                                       text: str) -> None:
    served.script(text)
    for more in MORE[path]:
        chunks = check_chunks(streamed(client, path, {**more, "max_tokens": 200}))
        assert text_of(path, chunks) == text, more
        assert all(("usage" in chunk) for chunk in chunks[-1:]) or "stream_options" not in more


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_so_do_those_of_a_response(served: Served, client: httpx.Client, text: str) -> None:
    served.script(text)
    raw = streamed(client, RESPONSES, {"max_output_tokens": 200})
    told = check_named(raw.removesuffix(f"data: {DONE}\n\n".encode()))
    assert told[0]["type"] == "response.created" and told[-1]["type"] in ("response.completed", "response.incomplete")
    assert "".join(one["delta"] for one in told if one["type"] == "response.output_text.delta") == text


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("how", ["error", "abort"])
def test_so_does_one_that_breaks_off(served: Served, client: httpx.Client, path: str, how: str) -> None:
    served.script("abcdef")
    served.service.fail_after, served.service.fail_with, served.service.hold_at = 3, how, 2
    with client.stream("POST", path, json={"model": "tiny", "stream": True, **ASK[path]}) as response:
        pieces = response.iter_raw()
        raw = next(pieces)
        served.service.go_on()
        raw += b"".join(pieces)
    assert "error" in check_chunks(raw)[-1]


def test_so_does_the_pages_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullpipe.server.live.TICK", 0.001)
    monkeypatch.setattr("fullpipe.server.live.BEAT", 0.01)
    status = [Status("ready", 0, 0, 0, 0, 0)]
    live = Live(lambda: 2, lambda: status[0], lambda token: f"<{token}>\n\n", model_name="m\n\n")
    live.on_start(Stats())

    async def some() -> bytes:
        feed = live.feed()
        raw = await anext(feed) + await anext(feed)
        status[0] = Status("stopped", 0, 0, 0, 0, 0, "stage 1:\n\ndata: x")
        live.close()
        return raw + b"".join([piece async for piece in feed])

    raw = asyncio.run(some())
    assert b": " in raw and all(isinstance(json.loads(event.data), dict) for event in check_bytes(raw))


# ---- the checker itself ----------------------------------------------------------------------------------------------

_END = b"data: [DONE]\n\n"


@pytest.mark.parametrize("raw", [
    b'data: {}\n\ndata: {}\n\n', b"", b'data: {}\n\ndata: [DONE]\n', b'data: {}\n\ndata: [DONE]',
    _END + b"data: {}\n\n",
    b'data: {}\ndata: [DONE]\n\n', b'data: {\ndata: }\n\n' + _END, b"data: []\n\n" + _END, b"data: {\n\n" + _END,
    b'data: {"a": NaN}\n\n' + _END, b"data:{}\n\n" + _END, b"data:  {}\n\n" + _END, b"Data: {}\n\n" + _END,
    b"data\n\n" + _END, b"{}\n\n" + _END, b"\n\ndata: {}\n\n" + _END, b"data: {}\n\n\n" + _END,
    b"data: {}\r\n\r\n" + _END,
    b"\xef\xbb\xbfdata: {}\n\n" + _END, b'data: {"a": "\xff"}\n\n' + _END, b'data: {"a": "\0"}\n\n' + _END,
    b"event: x\ndata: {}\n\n" + _END, b"event: x\n\n" + _END, b"retry: soon\n\n" + _END,
    b"event: \ndata: {}\n\n" + _END,
    b'data: {"a": "x\r"}\n\n' + _END,
], ids=repr)
def test_what_breaks_a_rule_is_found(raw: bytes) -> None:
    with pytest.raises(BadStream):
        check_chunks(raw)


@pytest.mark.parametrize("raw", [
    b'event: a\ndata: {"type": "b", "sequence_number": 0}\n\n', b'data: {"type": "a", "sequence_number": 0}\n\n',
    b'event: a\ndata: {"type": "a", "sequence_number": 1}\n\n', b'event: a\ndata: {"type": "a"}\n\n',
    b'event: a\nevent: a\ndata: {"type": "a", "sequence_number": 0}\n\n',
])
def test_events_have_their_names_and_numbers(raw: bytes) -> None:
    with pytest.raises(BadStream):
        check_named(raw)


def test_what_is_right_is_read() -> None:
    assert check_bytes(b": hi\n\nevent: a\ndata: 1\ndata: 2\nid: 7\nretry: 10\n\n") == [Event("1\n2", "a")]
    assert check_chunks(b'data: {"a": 1}\n\n: still here\n\n' + _END) == [{"a": 1}]
    assert check_named(b'event: a\ndata: {"type": "a", "sequence_number": 0}\n\n') == [
        {"type": "a", "sequence_number": 0}]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none(), max_size=3), max_size=4))
def test_whatever_json_is_sent_comes_back(said: list[dict[str, Any]]) -> None:
    raw = "".join(f"data: {json.dumps(one)}\n\n" for one in said).encode() + _END
    assert check_chunks(raw) == said
