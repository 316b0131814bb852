"""lm-eval's way of asking an OpenAI-compatible server how likely continuations are (`local-completions`): the body that
it sends, and how it reads the answer. And the same asked of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Pair = tuple[list[int], list[int]]
"""Context and continuation."""


def body_for(model: str, pairs: Sequence[Pair], **more: Any) -> dict[str, Any]:
    """One request for a batch."""
    return {"model": model, "prompt": [context + continuation for context, continuation in pairs], "temperature": 0,
            "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True} | more


def read(answer: Any, pairs: Sequence[Pair], *, made: int = 1) -> list[tuple[float, bool]]:
    """Of each continuation the sum of its log-probabilities, and whether greedy decoding would have said it. made:
    tokens behind it, which do not count."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    found = []
    for choice, (context, continuation) in zip(choices, pairs, strict=True):
        own = slice(len(context), len(context) + len(continuation))
        told, best = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(told) == len(best) == len(context) + len(continuation) + made
        found.append((sum(told[own]), all(value == max(top.values()) for value, top in zip(told[own], best[own]))))
    return found


def of_model(model: torch.nn.Module, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """What transformers says of the same."""
    found = []
    for context, continuation in pairs:
        with torch.inference_mode():
            logits = model(torch.tensor([context + continuation])).logits[0].float()
        rows = logits[len(context) - 1 : -1]
        own = torch.tensor(continuation)
        found.append((float(rows.log_softmax(-1).gather(1, own[:, None]).sum()), bool((rows.argmax(-1) == own).all())))
    return found


def greedy(model: torch.nn.Module, context: Sequence[int], count: int) -> list[int]:
    """What transformers goes on with."""
    tokens = list(context)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(context) :]
