"""How much memory a training step of a draft module takes, and what its options save.

    python bench/spd_memory.py [--model smollm2-135m] [--stages 8] [--layers 1,2] [--batch-tokens 4096] [--write]

A fresh process for each set of options takes three steps on random hidden states in the shapes of the model (the third
has all that a run keeps: weights, gradients, moments). It notes its resident memory before the first step, and the
highest that the system saw in the third (`VmHWM`, reset just before). The difference to the memory before is what a
step takes; `saved` is how much less than without options. Seconds are those of the third step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _receipt import finish, receipt

from fullpipe.assembly import stage_ends
from fullpipe.hub import resolve
from fullpipe.models.config import ModelConfig
from fullpipe.models.spd_checkpoint import ModuleConfig, VerifierIdentity
from fullpipe.models.spd_module import PipelineDraftModule
from fullpipe.models.weights import open_model
from fullpipe.training.features import Outer
from fullpipe.training.objective import Fillings, inverse
from fullpipe.training.plan import default_bounds
from fullpipe.training.student import Batch, Student

OPTIONS = {"none": (), "--gradient-checkpointing": ("checkpointing",), "--recompute-logits": ("recompute",),
           "both": ("checkpointing", "recompute")}
# glibc keeps what is freed and grows its threshold for doing so; then a peak says more of it than of the step.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
_NOBODY = VerifierIdentity(name="-", architecture="-", config_hash="-", tokenizer_hash="-")


def main() -> None:
    args = _arguments()
    if args.one:
        print(json.dumps(measure(args, args.layers[0], OPTIONS[args.one])))
        return
    samples = []
    for layers in args.layers:
        plain = None
        for name in OPTIONS:
            sample = {"layers": layers, "options": name, **measured(args, layers, name)}
            plain = plain or sample["step_mb"]
            sample["saved"] = round(1 - sample["step_mb"] / plain, 3)
            print(f"{layers} layers, {name}: a step takes {sample['step_mb']:.0f} MB ({sample['saved']:.0%} saved), "
                  f"{sample['seconds']:.1f} s")
            samples.append(sample)
    settings = {name: getattr(args, name) for name in ("model", "stages", "batch_tokens", "text", "vocab")}
    finish(receipt("spd_memory", {**settings, "steps": samples}, samples), write=args.write)


def measured(args: argparse.Namespace, layers: int, name: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--model", args.model, "--stages", str(args.stages), "--layers", str(layers),
               "--batch-tokens", str(args.batch_tokens), "--text", str(args.text), "--vocab", str(args.vocab),
               f"--one={name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **_GIVE_BACK})
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(args: argparse.Namespace, layers: int, options: tuple[str, ...]) -> dict[str, float]:
    """Three steps here, now, all tokens labels, the pipeline full."""
    files = open_model(Path(args.model) if Path(args.model).exists() else resolve(args.model))
    shape, ends = files.config, stage_ends(files.config, args.stages)
    bounds, ids = default_bounds("spd", [ends]), torch.arange(args.vocab)
    config = _module(shape, layers, bounds, ends, args.vocab)
    torch.manual_seed(0)
    module, outer = PipelineDraftModule(config, shape), Outer(files, ids, torch.bfloat16)
    module.adopt(outer.final_norm, outer.head_rows)
    module.checkpointing = "checkpointing" in options
    student = Student(module, outer, inverse(ids, shape.vocab_size), loss="forward-kl",
                      recompute_logits="recompute" in options)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    batch, filling = _batch(args, shape, len(bounds)), Fillings(bounds, (ends,)).of(ends, args.stages)
    before = _resident("VmRSS")
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = student(batch, filling)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
    return {"step_mb": (_resident("VmHWM") - before) / 1e6, "seconds": round(seconds, 2),
            "weights_mb": sum(parameter.numel() for parameter in module.parameters()) * 4 / 1e6}


def _module(shape: ModelConfig, layers: int, bounds: tuple[int, ...], ends: tuple[int, ...],
            vocab: int) -> ModuleConfig:
    return ModuleConfig(
        kind="spd", hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate=shape.intermediate, rms_eps=shape.rms_eps, num_layers=layers, bounds=bounds,
        verifier_layers=shape.num_layers, vocab_size=shape.vocab_size, draft_vocab_size=vocab, stages=(ends,),
        train_span=512, verifier=_NOBODY, qk_norm=shape.qk_norm, attention_bias=shape.qkv_bias, shared_head=True)


def _batch(args: argparse.Namespace, shape: ModelConfig, bounds: int) -> Batch:
    texts, size = max(1, args.batch_tokens // args.text), args.text
    hidden = torch.randn(texts, size, bounds, shape.hidden).bfloat16()
    return Batch(hidden, hidden[:, :, -1], torch.randint(args.vocab, (texts, size)), torch.ones(texts, size).bool())


def _resident(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory of a training step of a draft module (Linux).")
    parser.add_argument("--model", default="smollm2-135m", help="catalogue name or path")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--text", type=int, default=256, help="tokens of a text of the batch")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens of the draft vocabulary")
    parser.add_argument("--write", action="store_true", help="write bench/receipts/spd_memory.json")
    parser.add_argument("--one", choices=OPTIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
