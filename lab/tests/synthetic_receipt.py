"""Synthetic receipts: numbers of a plausible shape, made by formula and not measured. For tests alone."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from fullpipe_lab.receipts import Candidate, ClusterInfo, ModelInfo, Receipt, Sample, Tuning

METHODS = {"pp": (0.0, 1), "chain": (0.62, 5), "static-tree": (0.72, 16), "pipedec": (0.86, 8), "fullpipe": (0.9, 8)}
"""Hit probability and rows of a flight."""

TASKS = ("humaneval", "gsm8k", "mt_bench")
_EASE = {"humaneval": 1.04, "gsm8k": 1.0, "mt_bench": 0.88}
_STAGE_S, _LINK_S, _DRAFT_S = 0.012, 0.0005, 0.009


def sample(**changes: Any) -> Sample:
    """Ten tokens of `pp` on two stages of a second each, without links."""
    values: dict[str, Any] = {
        "cluster": "two", "stages": 2, "temperature": 0.0, "method": "pp", "width": None, "depth": None,
        "draft": "", "floor": None, "prompt": "set/0#0", "task": "set", "repeat": 0, "phase": "main",
        "tokens": 10, "finish": "length", "same_text": True, "near_ties": 0, "ttft_s": 2.0, "tbt_s": 2.0,
        "decode_s": 20.0, "steps": 20.0, "steps_per_token": 2.0, "hits": 0, "misses": 9, "restarts": 9,
        "launched_rows": 10, "wasted_rows": 0, "draft_calls": 0, "draft_rows": 0, "fill": 0.5, "bubbles": [0.5, 0.5],
        "draft_busy": 0.0, "link_bytes": [1000.0], "hits_by_depth": [0], "asked_by_depth": [9], "engine_s": 0.001,
        "wall_s": 1.0,
    }
    return Sample(**values | changes)


def cluster(name: str = "two", stages: int = 2, **changes: Any) -> ClusterInfo:
    values: dict[str, Any] = {"name": name, "label": "modelled", "note": "Weights over bandwidth.", "stages": stages,
                              "text": f'name = "{name}"\n'}
    return ClusterInfo(**values | changes)


def receipt(samples: Sequence[Sample], **changes: Any) -> Receipt:
    """A receipt of these samples, with the clusters that they name."""
    values: dict[str, Any] = {
        "command": "fullpipe bench --synthetic", "commit": "0123456789abcdef", "dirty": False,
        "date": "2026-01-02T03:04:05Z", "versions": {"python": "3.11"}, "machine": {"cores": 2}, "clock": "virtual",
        "model": ModelInfo(target="qwen2.5-1.5b", draft="auto", dtype="bfloat16"),
        "settings": {"max_new_tokens": 128, "seed": 0},
        "clusters": [cluster(name, stages) for name, stages in
                     dict.fromkeys((one.cluster, one.stages) for one in samples)],
        "samples": list(samples),
    }
    return Receipt(**values | changes)


def whole_receipt(stages: Sequence[int] = (8, 14), temperatures: Sequence[float] = (0.0, 1.0),
                  prompts: int = 4, tokens: int = 128) -> Receipt:
    """All methods on clusters of so many stages, with tuning, agreement and peers."""
    random = Random(5)
    samples = [_drawn(random, f"gpus-{n}", n, temperature, method, f"{task}/{index}#0", task, tokens)
               for n in stages for temperature in temperatures for method in METHODS for task in TASKS
               for index in range(prompts)]
    tuning = [_tuned(f"gpus-{n}", n, temperature, method) for n in stages for temperature in temperatures
              for method in METHODS if method != "pp"]
    return receipt(
        samples, tuning=tuning, clusters=[cluster(f"gpus-{n}", n) for n in stages],
        notes=["Synthetic: made by formula for a test."],
        agreement=[{"run": "2 stages", "virtual_tbt_s": 0.0512, "wall_tbt_s": 0.0548, "ratio": 0.934, "within": True}],
        peers=[{"program": "transformers", "status": "ok", "tbt_ms": 61.2, "text": "equal"},
               {"program": "vllm", "status": "missing", "reason": "no environment"}],
        checks=[{"cluster": f"gpus-{n}", "temperature": 0.0, "method": method, "prompt": f"{TASKS[0]}/0#0",
                 "tokens": tokens, "text equal": True, "steps equal": True, "near-ties": 0}
                for n in stages for method in METHODS],
    )


def _drawn(random: Random, name: str, stages: int, temperature: float, method: str, prompt: str, task: str,
           tokens: int) -> Sample:
    p, rows = METHODS[method]
    p = min(p * _EASE[task] * (1 - 0.02 * temperature), 0.97)
    chain = [random.random() < p for _ in range(tokens - 1)]
    misses = chain.count(False)
    stage_s = _STAGE_S * (1 + 0.01 * rows)
    traversal = stages * stage_s + (stages + 1) * _LINK_S
    serial = method in ("chain", "static-tree")
    drafting = (1 + misses) * rows * _DRAFT_S / 4 if serial else 0.0
    pace = 0.0 if serial else stage_s * random.uniform(1.0, 1.3)
    decode = (1 + misses) * traversal + (tokens - 1 - misses) * pace + drafting
    flights = (1 + misses) if serial or method == "pp" else decode / stage_s * 0.9
    idle = max(1 - flights * stage_s / decode, 0.0)
    hits, asked = _by_depth(chain)
    return sample(
        cluster=name, stages=stages, temperature=temperature, method=method, prompt=prompt, task=task,
        width=None if method in ("pp", "chain") else rows, depth=rows if method == "chain" else None,
        draft="" if method == "pp" else "qwen2.5-0.5b", floor=1e-3 if method == "fullpipe" else None,
        tokens=tokens, ttft_s=traversal * 2, tbt_s=(decode - traversal) / (tokens - 1), decode_s=decode,
        steps=decode / stage_s, steps_per_token=decode / stage_s / tokens, hits=tokens - 1 - misses, misses=misses,
        restarts=misses // 2, launched_rows=int(flights * rows), wasted_rows=max(int(flights * rows) - tokens, 0),
        fill=min(0.9 * (1 - idle), 1.0), bubbles=[idle] * stages,
        draft_busy=min(drafting / decode if serial else 0.0 if method == "pp" else 0.75, 1.0),
        link_bytes=[3072.0 * flights * rows] * (stages - 1), hits_by_depth=hits, asked_by_depth=asked,
        draft_calls=0 if method == "pp" else int(flights), draft_rows=int(flights * rows), engine_s=0.02,
        wall_s=decode / 3,
    )


def _by_depth(chain: Sequence[bool]) -> tuple[list[int], list[int]]:
    hits, asked, depth = [0] * len(chain), [0] * len(chain), 0
    for hit in chain:
        asked[depth] += 1
        hits[depth] += hit
        depth = depth + 1 if hit else 0
    deepest = max(i for i, count in enumerate(asked) if count) + 1
    return hits[:deepest], asked[:deepest]


def _tuned(name: str, stages: int, temperature: float, method: str) -> Tuning:
    chain = method == "chain"
    candidates = [Candidate(width=None if chain else width, depth=depth if chain or method == "static-tree" else None,
                            draft="qwen2.5-0.5b", floor=None,
                            tbt_s=0.004 * stages * (1 + abs(width - 8) / 20 + abs(depth - 4) / 10 + temperature / 20))
                  for width in ((1,) if chain else (4, 8, 16, 32))
                  for depth in ((2, 3, 4, 6, 8) if chain or method == "static-tree" else (4,))]
    best = min(range(len(candidates)), key=lambda index: candidates[index].tbt_s)
    return Tuning(cluster=name, temperature=temperature, method=method, candidates=candidates, best=best, prompts=6)
