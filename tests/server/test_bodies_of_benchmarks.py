"""Other programs' benchmarks work against the server, and so does Open WebUI: what they send, as their sources build
it, is answered with what they read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai_server import Served

from fullpipe_lab.sse import check_chunks

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_USAGE = {"include_usage": True}
_ALWAYS = {"include_usage": True, "continuous_usage_stats": True}
_PARTS = [{"type": "text", "text": "Hello there"}]
_TOOL = {"type": "function", "function": {"name": "lookup", "description": "Looks it up.", "parameters": {
    "type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}}}


# vllm/benchmarks/lib/endpoint_request_func.py: openai, openai-chat; and what its options for sampling add.
VLLM = [
    (TEXT, {"model": "tiny", "prompt": "Hello there", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None,
            "stream": True, "stream_options": _USAGE}),
    (TEXT, {"model": "tiny", "prompt": [72, 101, 108], "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": 1,
            "stream": True, "stream_options": _USAGE, "ignore_eos": True, "temperature": 0.0, "top_p": 0.9,
            "top_k": 20, "min_p": 0.1, "frequency_penalty": 0.0, "presence_penalty": 0.0}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": _PARTS}], "max_completion_tokens": 8,
            "stream": True, "stream_options": _USAGE}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": _PARTS}], "max_completion_tokens": 8,
            "stream": True, "stream_options": _USAGE, "ignore_eos": True, "temperature": 0.0}),
]
# guidellm/backends/openai/request_handlers.py: text and chat completions, synthetic data with an output length.
GUIDELLM = [
    (TEXT, {"model": "tiny", "stream": True, "stream_options": _ALWAYS, "max_tokens": 8, "stop": None,
            "ignore_eos": True, "prompt": "Hello there"}),
    (TEXT, {"model": "tiny", "max_tokens": 8, "prompt": "Hello there"}),
    (CHAT, {"model": "tiny", "stream": True, "stream_options": _ALWAYS, "max_completion_tokens": 8, "stop": None,
            "ignore_eos": True, "messages": [{"role": "system", "content": "Be brief."},
                                             {"role": "user", "content": _PARTS}]}),
    (CHAT, {"model": "tiny", "max_completion_tokens": 8, "messages": [
        {"role": "user", "content": _PARTS}, {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": _PARTS}]}),
    (CHAT, {"model": "tiny", "stream": True, "stream_options": _ALWAYS, "tools": [_TOOL],
            "tool_choice": "none", "max_completion_tokens": 8,
            "messages": [{"role": "user", "content": _PARTS}]}),
]
# genai_perf/inputs/converters/openai_*_converter.py, with --extra-inputs for a fixed length; and AIPerf, its successor.
GENAI_PERF = [
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}], "stream": True,
            "max_tokens": 8}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}]}),
    (TEXT, {"model": "tiny", "prompt": ["Hello there"], "stream": True, "max_tokens": 8, "ignore_eos": True}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}],
            "stream": True, "max_tokens": 8, "min_tokens": 8, "ignore_eos": True}),
    (TEXT, {"model": "tiny", "prompt": ["Hello there"], "max_tokens": 8, "min_tokens": 8,
            "ignore_eos": True}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "name": "", "content": "Hello there"}], "stream": True,
            "max_completion_tokens": 8, "stream_options": _USAGE}),
]
# open_webui/utils/payload.py: a chat with all that its controls set, and the question for a title.
OPEN_WEBUI = [
    (CHAT, {"stream": True, "model": "tiny", "messages": [{"role": "system", "content": "Be brief."},
                                                          {"role": "user", "content": "Hello there"}],
            "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "max_tokens": 8, "frequency_penalty": 0.0,
            "presence_penalty": 0.0, "seed": 1, "stop": ["###"], "logit_bias": {"5": 1}, "stream_options": _USAGE}),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "### Task: a title"}], "stream": False,
            "max_tokens": 8}),
]


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    served.script("Ünï🙂 and on and on")
    with served.client() as client:
        yield client


def answered(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, or the one answer."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return check_chunks(response.content) if body.get("stream") else [response.json()]


@pytest.mark.parametrize(("path", "body"), VLLM)
def test_vllm_bench_serve_counts_a_token_for_each_chunk_and_reads_the_usage_at_the_end(
        client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    *chunks, last = answered(client, path, body)
    assert chunks and all(chunk["choices"] for chunk in chunks) and not last["choices"]
    assert last["usage"]["completion_tokens"] == 8 and last["usage"]["prompt_tokens"] > 0
    texts = [chunk["choices"][0].get("text", chunk["choices"][0].get("delta", {}).get("content")) for chunk in chunks]
    assert "".join(text or "" for text in texts).startswith("Ünï")


@pytest.mark.parametrize(("path", "body"), GUIDELLM)
def test_guidellm_reads_the_usage_of_every_chunk(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    told = answered(client, path, body)
    assert all(one["usage"]["completion_tokens"] <= 8 for one in told) and told[-1]["usage"]["completion_tokens"] == 8
    assert all("id" in one for one in told)


@pytest.mark.parametrize(("path", "body"), [*GENAI_PERF, *OPEN_WEBUI])
def test_genai_perf_aiperf_and_open_webui_read_texts(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    told = answered(client, path, body)
    parts = [choice.get("text") or choice.get("delta", choice.get("message", {})).get("content")
             for one in told for choice in one["choices"]]
    assert "".join(part or "" for part in parts).startswith("Ünï")


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_what_they_ask_before_they_begin(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200
