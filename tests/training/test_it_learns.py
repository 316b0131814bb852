"""A minute of training on a real model: the module guesses better than n-gram in texts that it has not seen.

`answers.jsonl.gz` is what SmolLM2-135M says, greedily, when it is asked to play an expert of something:

    fullpipe train distill --model smollm2-135m --data prompts.jsonl --out answers.jsonl --max-tokens 40
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fullpipe import SamplingParams
from fullpipe.hub import resolve
from fullpipe.training.plan import Plan
from fullpipe.training.run import gather, train
from simulated import simulated

ANSWERS = Path(__file__).with_name("answers.jsonl.gz")
STAGES, HELD_OUT = 4, 25  # every 25th prompt is for the engine


@pytest.mark.weights
@pytest.mark.timeout(900)
def test_a_minute_of_training_beats_ngram_on_prompts_that_were_held_out(tmp_path: Path) -> None:
    lines = gzip.decompress(ANSWERS.read_bytes()).decode().splitlines()
    asked = [json.loads(line)["messages"][:1] for line in lines[::HELD_OUT]]
    data = tmp_path / "answers.jsonl"
    data.write_text("\n".join(line for place, line in enumerate(lines) if place % HELD_OUT))

    plan = Plan(stages=(STAGES,), bounds=(0, 8, 30), steps=220, warmup=10, batch_tokens=256, max_length=160,
                validation=0.02, refreshed=0.05, ahead=0.0)
    material = gather(plan, resolve("smollm2-135m"), "smollm2-135m", [data], vocab=None, vocab_size=2048,
                      say=lambda line: None)
    summary = train(plan, material, tmp_path / "module", lambda *_: None)
    assert summary["seconds"] < 600
    learnt, matched = (hit_rate(draft, asked) for draft in (f"spd:{tmp_path / 'module'}", "ngram"))
    assert learnt > matched + 0.1, f"{learnt:.1%} of the tokens were guessed, by n-gram {matched:.1%}"


def hit_rate(draft: str, asked: list[list[dict[str, str]]]) -> float:
    """Share of the emitted tokens that were in flight, by the same method."""
    with simulated("smollm2-135m", draft=draft, stages=STAGES, method="spd", dtype="bfloat16", threads=2) as llm:
        said = [llm.chat(prompt, SamplingParams(max_tokens=32)).speculation for prompt in asked]
    hits, misses = (sum(one[name] for one in said) for name in ("hits", "misses"))
    return hits / (hits + misses)
