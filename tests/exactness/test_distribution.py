"""Sampled tokens follow the model's own distribution, whatever machinery drew them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TopPLogitsWarper

from fullpipe.request import SamplingParams
from fullpipe.stations.sampling import RowContext, pick

SEEDS = 20_000
BATCH = 1000


@pytest.fixture(scope="module")
def logits() -> Tensor:
    """What a tiny random Llama says after a prompt of six tokens: float32 [64]."""
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    with torch.inference_mode():
        result: Tensor = model(torch.tensor([[3, 14, 15, 9, 26, 53]])).logits[0, -1].float()
    return result.clone()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.9)])
def test_single_tokens_over_many_seeds(logits: Tensor, temperature: float, top_p: float) -> None:
    """The seeds 0 to 19,999, one token each at position 6. Pearson's chi-square against softmax(logits / T),
    truncated by transformers' own top-p and renormalised; tokens expected fewer than 5 times count as one.

    False-alarm odds 1e-6 for each of the three cases. Against a temperature 10% higher the same counts must
    fail, which shows that the test could.
    """
    counts = torch.zeros(64, dtype=torch.int64)
    for start in range(0, SEEDS, BATCH):
        rows = [RowContext(SamplingParams(temperature=temperature, top_p=top_p, seed=seed), 6)
                for seed in range(start, start + BATCH)]
        counts += torch.bincount(torch.tensor(pick(logits.expand(BATCH, -1), rows)[0]), minlength=64)
    probs = TopPLogitsWarper(top_p)(None, logits[None] / temperature)[0].softmax(-1)
    assert p_value(counts, probs) > 1e-6
    assert p_value(counts, (logits / (1.1 * temperature)).softmax(-1)) < 1e-6


def p_value(counts: Tensor, probs: Tensor) -> float:
    expected = probs.double() * counts.sum()
    common = expected >= 5
    assert counts[probs == 0].sum() == 0
    assert common.sum() >= 8, "the distribution is too sharp to test anything"
    groups = torch.stack([counts.double(), expected])
    observed, expected = torch.cat([groups[:, common], groups[:, ~common].sum(1, keepdim=True)], dim=1)
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
