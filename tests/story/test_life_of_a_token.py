"""The tour of docs/life-of-a-token.md, walked: one request, a tiny random model on three stages, one guessed token.

Every stage step and every draft call takes one second of the virtual clock. The stops carry the tour's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch

from fullpipe import LLM, Chunk, SamplingParams
from fullpipe.messages import Died, Drafted, Emitted, Event, Finished, Landed, Launched, Leg

PROMPT = "w1 w17 w9 w33 w17 w9"
STAGES = ("stage 0", "stage 1", "stage 2")
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


def write_models(root: Path) -> tuple[str, str]:
    """A target, and a draft that is mostly but not always right: the target with its weights disturbed."""
    model = tiny.tiny_model("qwen2", seed=1)
    target = tiny.save(model, root / "target")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    draft = tiny.save(model, root / "draft")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for folder in (target, draft):
        words.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return str(target), str(draft)


if __name__ == "__main__":
    import tempfile
    t, d = write_models(Path(tempfile.mkdtemp()))
    ev = []
    with LLM(t, draft=d, stages=3, width=4, dtype="float32", costs="unit", threads=1, listeners=[ev.append]) as llm:
        ch = list(llm.stream(PROMPT, PARAMS))
        for e in ev: print(str(e)[:400])
        print(ch)
