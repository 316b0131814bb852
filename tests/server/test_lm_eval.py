"""lm-eval's loglikelihood tasks get what transformers would tell them, over HTTP, in batches that are larger than what
runs at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_server import byte_tokenizer
from starlette.testclient import TestClient

import tiny
from fullpipe import LLM, SamplingParams
from fullpipe.server.app import ServedModel, create_app
from likelihoods import Pair, body_for, greedy, of_model, read
from simulated import simulated

VOCAB = 258  # real tokens; the head has six more


@dataclass
class Place:
    """A tiny model, by transformers, by us and over HTTP."""

    model: torch.nn.Module
    folder: Path
    llm: LLM
    client: TestClient


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    model = tiny.tiny_model("llama", seed=5, vocab_size=264, eos_token_id=None)
    folder = tiny.save(model, tmp_path_factory.mktemp("likely") / "model")
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    with simulated(folder, draft="ngram", stages=3, dtype="float32", max_num_seqs=4, kv_cache_tokens=8192,
                   enable_prefix_caching=True, prefill_chunk=40) as llm:
        app = create_app(llm._service, ServedModel(("tiny",), llm.tokenizer, llm.max_model_len))
        yield Place(without_padding(model), folder, llm, TestClient(app))


def without_padding(model: Any) -> torch.nn.Module:
    """The model with a head of real tokens alone."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:VOCAB].clone())
    return model  # type: ignore[no-any-return]


def pairs_of(place: Place, count: int) -> list[Pair]:
    """Questions with several answers each, as tasks with choices have them; every third is the model's own."""
    rng, pairs = random.Random(2), list[Pair]()
    while len(pairs) < count:
        context = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))]
        pairs += [(context, [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]) for _ in range(2)]
        pairs.append((context, greedy(place.model, context, rng.randint(1, 5))))
    return pairs[:count]


def ask(place: Place, body: dict[str, Any]) -> Any:
    response = place.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def check(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-3)


@pytest.mark.parametrize("batch", [1, 16, 40])
def test_continuations_are_as_likely_as_transformers_says(place: Place, batch: int) -> None:
    pairs = pairs_of(place, batch)
    ours = read(ask(place, body_for("tiny", pairs)), pairs)
    check(ours, of_model(place.model, pairs))
    assert batch == 1 or {greedy for _, greedy in ours} == {True, False}


def test_so_they_are_without_a_token_behind_them(place: Place) -> None:
    pairs = pairs_of(place, 7)
    answer = ask(place, body_for("tiny", pairs, max_tokens=0))
    assert read(answer, pairs, made=0) == read(ask(place, body_for("tiny", pairs)), pairs)
    assert answer["usage"]["completion_tokens"] == 0


def test_a_batch_says_bit_by_bit_what_one_at_a_time_says(place: Place) -> None:
    pairs = pairs_of(place, 9)
    single = [read(ask(place, body_for("tiny", [pair])), [pair])[0] for pair in pairs]
    assert read(ask(place, body_for("tiny", pairs)), pairs) == single


def test_texts_are_asked_about_in_the_same_way(place: Place) -> None:
    texts = ["Hello there", "Ünï 🙂!"]
    choices = ask(place, body_for("tiny", [], prompt=texts))["choices"]
    for text, choice in zip(texts, choices, strict=True):
        tokens, told = place.llm.tokenizer.encode(text), choice["logprobs"]
        assert choice["text"].startswith(text) and told["token_logprobs"][0] is None
        expected, _ = of_model(place.model, [(tokens[:1], tokens[1:])])[0]
        assert sum(told["token_logprobs"][1 : len(tokens)]) == pytest.approx(expected, abs=2e-3)
        assert [text[:offset] for offset in told["text_offset"][:2]] == ["", text[:1] if text[0].isascii() else ""]


def test_python_is_told_the_same(place: Place) -> None:
    (pair,) = pairs_of(place, 1)
    (one,) = place.llm.generate([pair[0] + pair[1]], SamplingParams(max_tokens=1, prompt_logprobs=1))
    first, *rest = one.prompt_logprobs
    assert first is None and [told[0][0] for told in rest if told] == (pair[0] + pair[1])[1:]
    own = [told[0][1] for told in rest[len(pair[0]) - 1 :] if told]
    assert (sum(own), True) == (read(ask(place, body_for("tiny", [pair])), [pair])[0][0], True)
    (none,) = place.llm.generate([pair[0]], SamplingParams(max_tokens=1))
    assert none.prompt_logprobs == [] and "prompt_logprobs" not in one.to_dict()


@pytest.mark.processes
def test_so_it_is_over_workers(place: Place) -> None:
    prompts = [context + continuation for context, continuation in pairs_of(place, 3)]
    params = SamplingParams(max_tokens=3, prompt_logprobs=2)
    here = place.llm.generate(prompts, params)
    with LLM(str(place.folder), draft="ngram", stages=2, dtype="float32", threads=1) as other:
        there = other.generate(prompts, params)
    assert [one.prompt_logprobs for one in there] == [one.prompt_logprobs for one in here]
    assert [one.token_ids for one in there] == [one.token_ids for one in here]
