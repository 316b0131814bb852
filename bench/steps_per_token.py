"""Steps per token of the methods on real prompts: Qwen2.5-Coder 1.5B with its 0.5B draft, bf16, 8 stages.

Virtual time, every stage step and every draft call costing one step, the 8 steps of each first token
included. The text does not depend on the method, and rows off the true path decide nothing. So the target
runs once per prompt (`pp`, all stages real), and every method is then run with the real draft against the
target's own tokens. `--real N` also runs the first N prompts of each file with all stages real, and fails
unless steps, hits and misses agree with the replay.

Run: python bench/steps_per_token.py --prompts ../shared/data/prompts/{humaneval,gsm8k,mt_bench}.jsonl [--write]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from _receipt import finish, receipt

from fullpipe.hub import resolve
from fullpipe.prompts import read_prompts
from fullpipe.request import Request, SamplingParams
from fullpipe.threads import share_the_machine

METHODS = (("pipedec", 4), ("pipedec", 8), ("fullpipe", 4), ("fullpipe", 8))
# An independent offline model of the two policies counted these on the same prompts.
_COUNTS = {"humaneval": (1.13, 1.10, 1.10, 1.08), "gsm8k": (1.42, 1.27, 1.30, 1.21),
           "mt_bench": (2.34, 2.16, 2.14, 1.92)}
EXPECTED = {(name, *method): count for name, counts in _COUNTS.items() for method, count in zip(METHODS, counts)}
DRAFTS = {"model": "qwen2.5-coder-0.5b", "mix": "qwen2.5-coder-0.5b,ngram"}
STAGES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=5, help="prompts per file")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--real", type=int, default=0, help="prompts per file to run with all stages real, too")
    parser.add_argument("--draft", choices=("model", "mix"), default="model", help="mix: the model and n-gram")
    parser.add_argument("--methods", nargs="+", default=[f"{method}:{width}" for method, width in METHODS],
                        help="METHOD:WIDTH ...")
    parser.add_argument("--recorded", type=Path, help="keep the target's tokens here, and take them from here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="steps_per_token", help="name of the receipt")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    share_the_machine()
    import torch

    torch.set_num_threads(arguments.threads)
    params = SamplingParams(max_tokens=arguments.tokens, temperature=arguments.temperature, seed=arguments.seed)
    methods = [(method, int(width)) for method, _, width in (one.partition(":") for one in arguments.methods)]
    if arguments.recorded and arguments.recorded.exists():
        recorded = json.loads(arguments.recorded.read_text())
    else:
        recorded = record(arguments.prompts, arguments.limit, params, arguments.threads)
    if arguments.recorded:
        arguments.recorded.write_text(json.dumps(recorded))
    samples = replay_all(recorded, params, methods, arguments.draft)
    checked = check_real(recorded, samples, params, methods, arguments)
    results = summary(samples)
    print_table(results)
    finish(receipt(arguments.name, {"table": results, "checked_with_real_stages": checked}, samples),
           write=arguments.write)


def record(files: list[Path], limit: int, params: SamplingParams, threads: int) -> list[dict[str, Any]]:
    """The target's own tokens on every prompt, by `pp` over real stages."""
    from fullpipe.llm import LLM

    rows = []
    with LLM("qwen2.5-coder-1.5b", draft="none", stages=STAGES, method="pp", dtype="bfloat16", costs="unit",
             threads=threads) as llm:
        for file in files:
            for prompt in read_prompts(file, limit):
                tokens = llm.encode([{"role": "user", "content": prompt.text}])
                (said,) = llm.generate([tokens], params)
                rows.append({"set": file.stem, "id": prompt.id, "prompt": tokens, "tokens": said.token_ids})
                say(f"recorded {file.stem} {prompt.id}: {len(said.token_ids)} tokens, "
                    f"{said.speculation['steps_per_token']:.2f} steps per token")
    return rows


def replay_all(recorded: list[dict[str, Any]], params: SamplingParams, methods: list[tuple[str, int]],
               kind: str) -> list[dict[str, Any]]:
    from fullpipe.assembly import draft_names, draft_spec
    from fullpipe.model.tokenizer import Tokenizer

    target = Tokenizer.load(resolve("qwen2.5-coder-1.5b"))
    spec = draft_spec(draft_names("", DRAFTS[kind]), target, "bfloat16", target.vocab_size)
    assert spec is not None
    draft = spec.build()
    samples = []
    for row in recorded:
        for method, width in methods:
            begun = time.monotonic()
            stats = replay(row, draft, method, width, params)
            samples.append({key: row[key] for key in ("set", "id")} | stats)
            say(f"{row['set']} {row['id']} {method} {width}: {stats['steps']:.0f} steps for {stats['tokens']} tokens, "
                f"{time.monotonic() - begun:.0f} s")
    return samples


_requests = iter(range(1 << 30))


def replay(row: dict[str, Any], draft: Any, method: str, width: int, params: SamplingParams) -> dict[str, Any]:
    """One method with the real draft against the recorded tokens."""
    from dataclasses import replace

    from fullpipe.engine import Engine
    from fullpipe.messages import Emitted
    from fullpipe.pipeline.inprocess import InProcessPipeline
    from fullpipe.pipeline.scripted import ScriptedStage
    from fullpipe.policies import make_policy

    truth = {"kind": "text", "tokens": row["tokens"]}
    pipeline = InProcessPipeline([ScriptedStage(k, STAGES, truth) for k in range(STAGES)], draft)
    engine = Engine(pipeline, make_policy(method, width=width))
    params = replace(params, max_tokens=len(row["tokens"]))
    track = engine.submit(Request(next(_requests), tuple(row["prompt"]), params))
    said = []
    while engine.busy:
        said += [event.token for event in engine.step() if isinstance(event, Emitted)]
    engine.drain()
    assert said == row["tokens"]
    stats = track.stats
    return {"method": method, "width": width, "tokens": stats.num_emitted, "steps": stats.steps, "hits": stats.hits,
            "misses": stats.misses, "launched_rows": stats.launched_rows, "draft_calls": stats.draft_calls,
            "draft_rows": stats.draft_rows}


def check_real(recorded: list[dict[str, Any]], samples: list[dict[str, Any]], params: SamplingParams,
               methods: list[tuple[str, int]], arguments: argparse.Namespace) -> list[str]:
    """Run some prompts with all stages real: same text, steps, hits and misses as in the replay."""
    from fullpipe.llm import LLM

    if not arguments.real:
        return []
    checked = []
    with LLM("qwen2.5-coder-1.5b", draft=DRAFTS[arguments.draft], stages=STAGES, dtype="bfloat16", costs="unit",
             threads=arguments.threads) as llm:
        for method, width in methods:
            llm.use(method, width=width)
            for name in dict.fromkeys(row["set"] for row in recorded):
                for row in [row for row in recorded if row["set"] == name][: arguments.real]:
                    (real,) = llm.generate([row["prompt"]], params)
                    (want,) = (one for one in samples if (one["set"], one["id"], one["method"], one["width"])
                               == (name, row["id"], method, width))
                    label = f"{name} {row['id']} {method} {width}"
                    if real.token_ids != row["tokens"]:
                        # A last token by its stop rule makes the two runs' ends differ, a near-tie their texts.
                        sys.exit(f"{label}: the text differs from pp's")
                    told = real.speculation
                    if (told["steps"], told["misses"]) != (want["steps"], want["misses"]):
                        sys.exit(f"{label}: real {told}, replay {want}")
                    say(f"agrees with real stages: {label}")
                    checked.append(label)
    return checked


def summary(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per set and method: all steps over all tokens, as the expectation counts them."""
    rows = []
    for name in dict.fromkeys(one["set"] for one in samples):
        for method, width in dict.fromkeys((one["method"], one["width"]) for one in samples):
            mine = [one for one in samples if (one["set"], one["method"], one["width"]) == (name, method, width)]
            steps, tokens = sum(one["steps"] for one in mine), sum(one["tokens"] for one in mine)
            hits, misses = sum(one["hits"] for one in mine), sum(one["misses"] for one in mine)
            rows.append({"set": name, "method": method, "width": width, "steps_per_token": round(steps / tokens, 3),
                         "expected": EXPECTED.get((name, method, width)),
                         "hit_rate": round(hits / (hits + misses), 4)})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['set']:<10} {row['method']:<9} w = {row['width']:<2}  {row['steps_per_token']:.3f} steps per "
              f"token (offline model: {row['expected']}), hit rate {row['hit_rate']:.1%}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
