"""A real model in float32: transformers' greedy text, whatever the method, the stages and the pipeline."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fullpipe import LLM, SamplingParams
from fullpipe.hub import resolve
from fullpipe.kernels import load
from fullpipe.methods import options_of
from simulated import simulated

PROMPTS = ["Write a Python function that reverses a string.", "What is the capital of France?",
           "Count from one to ten.", "Rewrite this: the cat sat on the mat, the cat sat on the hat."]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with simulated("smollm2-135m", draft="ngram", stages=6, dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def asked(llm: LLM) -> list[list[int]]:
    return [llm.encode([{"role": "user", "content": prompt}]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def plain(llm: LLM, asked: list[list[int]]) -> list[list[int]]:
    llm.use("pp")
    return [one.token_ids for one in llm.generate(asked, SamplingParams(max_tokens=64, ignore_eos=True))]


@pytest.mark.weights
def test_greedy_text_is_what_transformers_generate_says(asked: list[list[int]], plain: list[list[int]]) -> None:
    model = transformers_model(resolve("smollm2-135m"))
    for prompt, said in zip(asked, plain):
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                                 max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out[0, len(prompt):].tolist() == said


@pytest.mark.weights
@pytest.mark.parametrize("method", ["chain", "static-tree", "pipedec", "fullpipe"])
def test_every_method_says_the_same(llm: LLM, asked: list[list[int]], plain: list[list[int]], method: str) -> None:
    llm.use(method, **options_of(method, width=4))
    (one,) = llm.generate(asked[3:], SamplingParams(max_tokens=64, ignore_eos=True))
    assert one.token_ids == plain[3]
    assert one.speculation["hits"] > 0


@pytest.mark.weights
@pytest.mark.processes
def test_so_do_processes_and_samples(llm: LLM, asked: list[list[int]], plain: list[list[int]]) -> None:
    sampled = SamplingParams(max_tokens=16, temperature=1.0, seed=7)
    llm.use("pp")
    (reference,) = llm.generate(asked[:1], sampled)
    with LLM("smollm2-135m", draft="ngram", stages=2, dtype="float32") as other:
        (greedy,) = other.generate(asked[3:], SamplingParams(max_tokens=24, ignore_eos=True))
        (sample,) = other.generate(asked[:1], sampled)
    assert greedy.token_ids == plain[3][:24]
    assert sample.token_ids == reference.token_ids
    assert greedy.timing["clock"] == "wall"


@pytest.mark.weights
@pytest.mark.processes
@pytest.mark.skipif(load() is None, reason="the native kernels were not built")
def test_weights_as_they_are_stored_say_the_same_by_every_method_on_any_stages(asked: list[list[int]]) -> None:
    plain = SamplingParams(max_tokens=48, ignore_eos=True)
    sampled = SamplingParams(max_tokens=24, temperature=1.0, seed=7)
    texts: dict[str, list[list[int]]] = {}
    with simulated("smollm2-135m", draft="ngram", stages=6, dtype="stored") as llm:
        assert llm.dtype == "stored"
        for method in ("pp", "pipedec", "fullpipe"):
            llm.use(method, **options_of(method, width=4))
            texts[method] = [one.token_ids for params in (plain, sampled) for one in llm.generate(asked[2:], params)]
    with LLM("smollm2-135m", draft="ngram", stages=2, dtype="stored") as other:
        texts["2 processes"] = [one.token_ids for params in (plain, sampled)
                                for one in other.generate(asked[2:], params)]
    assert all(said == texts["pp"] for said in texts.values()), texts


def transformers_model(path: Path) -> torch.nn.Module:
    """transformers' Llama filled with the file's weights by our loader (whose parity has a test of its own)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fullpipe.models.weights import open_model

    files = open_model(path)
    config = files.config
    base = 1 / config.rope.inv_freq[1] ** (config.head_dim / 2)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=config.num_layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.rms_eps, rope_theta=base, max_position_embeddings=config.max_positions,
        tie_word_embeddings=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(files.tensor(name, torch.float32))
    return model.eval()
