"""Text to tokens and back over HTTP, as vLLM has it; and what this server does not do is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from one_word import OneWord, application
from openai_server import MAX_MODEL_LEN, Served
from starlette.testclient import TestClient

from fullpipe.options import ServerOptions

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_a_text_becomes_tokens(served: Served, client: httpx.Client) -> None:
    told = client.post("/tokenize", json={"model": "tiny", "prompt": "né"}).json()
    assert told == {"count": 3, "max_model_len": MAX_MODEL_LEN, "tokens": served.tokenizer.encode("né"),
                    "token_strs": None}
    asked = {"prompt": "né", "return_token_strs": True, "add_special_tokens": False}
    told = client.post("/tokenize", json=asked).json()
    assert told["token_strs"] == ["n", "Ã", "©"]
    assert client.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    assert served.service.submitted == []


def test_so_does_a_conversation(served: Served, client: httpx.Client) -> None:
    for fields in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"x": 1}}):
        told = client.post("/tokenize", json={"model": "alias/tiny", "messages": HELLO, **fields}).json()
        kwargs: Any = fields
        assert told["tokens"] == served.tokenizer.chat(HELLO, **kwargs) and told["count"] == len(told["tokens"])


def test_tokens_become_the_text_again(served: Served, client: httpx.Client) -> None:
    for text in ("", "Ünï 🙂", "<|im_start|>user"):
        tokens = served.tokenizer.encode(text)
        assert client.post("/detokenize", json={"model": "tiny", "tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
    ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
    ("/tokenize", {"prompt": "x", "chat_template_kwargs": {}}, "chat_template_kwargs"),
    ("/tokenize", {"prompt": ["x"]}, "prompt"), ("/tokenize", {"content": "x"}, "content"),
    ("/tokenize", {"messages": []}, "messages"), ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/tokenize", {"messages": HELLO, "chat_template": "{{ x }}"}, "chat_template"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": [999]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]"), ("/detokenize", {"tokens": "x"}, "tokens"),
])
def test_what_is_wrong_is_named(client: httpx.Client, path: str, body: Any, param: str) -> None:
    error = refusal(client.post(path, json=body))
    assert error["param"] == param and param.partition("[")[0] in error["message"]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
def test_models_types_and_keys_are_looked_at_as_elsewhere(client: httpx.Client, path: str,
                                                          body: dict[str, Any]) -> None:
    assert refusal(client.post(path, json=body | {"model": "gpt-4"}), 404)["code"] == "model_not_found"
    refusal(client.post(path, content=b"{}", headers={"content-type": "text/plain"}), 415)
    locked = TestClient(application(OneWord(), ServerOptions(api_key=["k"])))
    assert refusal(locked.post(path, json=body), 401)["code"] == "invalid_api_key"
    assert locked.post(path, json=body, headers={"authorization": "Bearer k"}).status_code == 200


@pytest.mark.parametrize(("path", "what"), [
    ("/v1/embeddings", "embeddings"), ("/embeddings", "embeddings"), ("/v1/rerank", "ranking"),
    ("/rerank", "ranking"), ("/v1/score", "scores"), ("/score", "scores"), ("/pooling", "pooling"),
    ("/v1/audio/transcriptions", "speech"), ("/v1/audio/speech", "speech"), ("/v1/images/generations", "images"),
    ("/v1/moderations", "moderation"), ("/v1/batches", "files"), ("/v1/fine_tuning/jobs", "training"),
])
def test_what_is_not_done_here_is_said(client: httpx.Client, path: str, what: str) -> None:
    error = refusal(client.post(path, json={"model": "tiny", "input": "x"}), 404)
    assert error["code"] == "unsupported_endpoint" and "generates text only" in error["message"]
    assert what in error["message"] and path in error["message"]


def test_it_is_said_to_those_who_may_come_in_alone() -> None:
    client = TestClient(application(OneWord(), ServerOptions(api_key=["k"])))
    assert client.post("/v1/embeddings", json={}).status_code == 401
    assert client.post("/v1/embeddings", json={}, headers={"authorization": "Bearer k"}).status_code == 404
