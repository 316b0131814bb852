"""A real model says how likely continuations are as transformers does: what lm-eval's loglikelihood tasks stand on."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient
from test_smollm2 import transformers_model

from fullpipe.hub import resolve
from fullpipe.server.app import ServedModel, create_app
from likelihoods import Pair, body_for, of_model, read
from simulated import simulated

# As a task with choices asks: one context, several continuations.
QUESTIONS = [("The capital of France is", [" Paris", " London", " a banana"]),
             ("def add(a, b):\n    return a", [" + b", " - b", "\n\nimport os"])]


@pytest.mark.weights
def test_smollm2_over_http() -> None:
    model = transformers_model(resolve("smollm2-135m"))
    with simulated("smollm2-135m", draft="ngram", stages=2, dtype="float32", kv_cache_tokens=8192,
                   enable_prefix_caching=True) as llm:
        pairs: list[Pair] = [(llm.tokenizer.encode(context), llm.tokenizer.encode(continuation))
                             for context, continuations in QUESTIONS for continuation in continuations]
        app = create_app(llm._service, ServedModel(("smol",), llm.tokenizer, llm.max_model_len))
        response = TestClient(app).post("/v1/completions", json=body_for("smol", pairs))
    assert response.status_code == 200, response.text
    ours, theirs = read(response.json(), pairs), of_model(model, pairs)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-3)
    assert max(range(3), key=lambda k: ours[k][0]) == 0, "it knows that much"
