"""How much memory loading a stage takes, against the weights it keeps, and how long.

    python bench/load_memory.py [--models smollm2-135m,qwen2.5-coder-0.5b] [--stages 1,4,8] [--dtype bfloat16] [--write]

A fresh process per stage: it imports and warms up everything first, notes its resident memory, loads the
stage, and notes the highest resident memory the system saw (`VmHWM`, reset just before loading). The ratio is the
rise of the peak over the bytes of the stage's weights; the promise is 1.3. Pages of a mapped file would count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _receipt import finish, receipt

from fullpipe.hub import resolve
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.files import ModelFiles
from fullpipe.models.linear import can_pack
from fullpipe.models.weights import open_model

LIMIT = 1.3


def main() -> None:
    args = _arguments()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), int(args.one[1]), int(args.one[2]), args.dtype)))
        return
    samples = [sample for name in args.models for stages in args.stages
               for sample in measure_cut(_path(name), stages, args.dtype)]
    for sample in samples:
        print(f"{sample['model']} {sample['stages']} stages, layers {sample['layers']}: {sample['weight_mb']:.0f} MB "
              f"of weights, peak {sample['peak_mb']:.0f} MB ({sample['ratio']:.2f}), {sample['seconds']:.1f} s")
    worst = max(sample["ratio"] for sample in samples)
    finish(receipt("load_memory", {"dtype": args.dtype, "worst_ratio": worst, "limit": LIMIT,
                                   "within_limit": worst <= LIMIT, "stages": samples}, samples), write=args.write)
    sys.exit(worst > LIMIT)


def measure_cut(path: Path, stages: int, dtype: str) -> list[dict[str, Any]]:
    """First, second and last of `stages` equal shares of the layers, one process each."""
    layers = open_model(path).config.num_layers
    bounds = [round(i * layers / stages) for i in range(stages + 1)]
    return [{"model": path.name, "stages": stages, **measured(path, bounds[i], bounds[i + 1], dtype)}
            for i in sorted({0, min(1, stages - 1), stages - 1})]


def measured(path: Path, first: int, last: int, dtype: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--dtype", dtype, "--one", str(path), str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(path: Path, first: int, last: int, dtype: str) -> dict[str, Any]:
    """Load layers first..last (and what belongs to a first or last stage) here, now."""
    files, kind = open_model(path), getattr(torch, dtype)
    warm_up(files, kind)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _resident("VmRSS"), time.perf_counter()
    stage = DecoderSlice(files, first, last, has_embedding=first == 0, has_head=last == files.config.num_layers,
                         dtype=kind)
    seconds, peak, after = time.perf_counter() - start, _resident("VmHWM"), _resident("VmRSS")
    weights = stage_bytes(files, first, last, kind, packed=stage.packed)
    return {"layers": f"{first}-{last}", "weight_mb": weights / 1e6, "peak_mb": (peak - before) / 1e6,
            "kept_mb": (after - before) / 1e6, "ratio": round((peak - before) / weights, 3), "seconds": seconds}


def warm_up(files: ModelFiles, dtype: torch.dtype) -> None:
    """Touch what every process touches once: code of kernels and libraries is no weight, but counts as resident."""
    can_pack(dtype)
    for name, shape in files.config.layer_shapes(0).items():
        files.read_into(name, torch.empty(min(shape[0], files.config.head_dim), *shape[1:], dtype=dtype))


def stage_bytes(files: ModelFiles, first: int, last: int, dtype: torch.dtype, *, packed: bool) -> int:
    """Bytes of the weights that a stage keeps; a tied head is a second copy where it is packed."""
    size = files.sizes(dtype)
    shares_head = files.config.tied and not packed and first == 0
    ends = (size.embedding_bytes if first == 0 else 0) + (
        size.head_bytes if last == files.config.num_layers and not shares_head else 0)
    return ends + (last - first) * size.layer_bytes


def _resident(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _path(name: str) -> Path:
    return Path(name) if Path(name).exists() else resolve(name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory and time of loading a stage (Linux).")
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=split, default=["smollm2-135m"], help="catalogue names or paths")
    parser.add_argument("--stages", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 8])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--write", action="store_true", help="write bench/receipts/load_memory.json")
    parser.add_argument("--one", nargs=3, metavar=("PATH", "FIRST", "LAST"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
