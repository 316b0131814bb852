"""What stages on a GPU say, and what they take, in one go: run this where a GPU is.

    python -m fullpipe_lab.studies.gpu_stage --model smollm2-135m.gguf [--parts a,b,c,d,e,f,g,h] [--out DIR]

a: the machine, and the bandwidth of its memory. b: what a GPU says beside the processor, and the texts of methods.
c: whether a row has the same bits in any company. d: what a step takes, against reading its weights once; models of the
shape of Qwen2.5 1.5B and 7B with random weights. e: pipelines of stage processes on the one GPU. f: a profile file. g:
products alone. h: whole steps with other constants of our kernels.

A part that fails is told and does not stop the others; the command ends with 1 then. DIR/gpu_stage.json is written anew
after each. `--small` tries the parts on small sizes, so that `--device cpu` can see them run.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fullpipe.assembly import prepare
from fullpipe.models import rope
from fullpipe.models.config import ModelConfig
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.gpu.decoder import ROWS, DeviceSlice, Weights
from fullpipe.models.linear import Linear
from fullpipe.models.loading import Layer
from fullpipe.models.paths import step_of_paths
from fullpipe.models.slice import Slice
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from fullpipe.options import Options
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.prompts import choose
from fullpipe.request import SamplingParams
from fullpipe_lab.asking import Asker, Real
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt

PRODUCTS = ("library", "ours", "early")
"""Whose products a slice has: the library's, or ours; the last with kernels that begin early, as Fullpipe has them."""

METHODS = ("pp", "pipedec", "fullpipe")
STEP_ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 2048)

Row = dict[str, Any]


@dataclass
class Study:
    """What is asked for, and what has been found: a list of rows under each name."""

    device: torch.device
    model: Path
    out: Path
    small: bool
    products: Sequence[str] = PRODUCTS
    found: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def note(self, table: str, **row: Any) -> None:
        self.found.setdefault(table, []).append(row)
        print(f"[{table}] " + "  ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)

    def read_gbps(self) -> float:
        """The measured bandwidth of reading, or what a datasheet would say where it was not measured."""
        rows = [row["gbps"] for row in self.found.get("bandwidth", [])]
        return float(max(rows, default=3000.0))

    def save(self) -> None:
        receipt = study_receipt("gpu_stage", self.found, [])
        save_receipt(receipt, self.out / "gpu_stage.json")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- time ------------------------------------------------------------------------------------------------


def device_ms(study: Study, run: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds on the device. Calls follow each other without a gap."""
    for _ in range(3):
        run()
    if not study.on_gpu:
        return wall_ms(study, run, 3)
    torch.cuda.synchronize()
    event: Callable[[], torch.cuda.Event] = partial(torch.cuda.Event, enable_timing=True)
    marks = [(event(), event()) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in marks)


def wall_ms(study: Study, run: Callable[[], object], repeats: int = 15) -> float:
    """Median milliseconds on the wall clock of a call that waits for its result."""
    samples = []
    for _ in range(repeats + 3):
        begun = time.perf_counter()
        run()
        if study.on_gpu:
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(samples[3:])


def freed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- a: the machine --------------------------------------------------------------------------------------


def part_a(study: Study) -> None:
    about: Row = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "cores": os.cpu_count()}
    if study.on_gpu:
        import triton

        card = torch.cuda.get_device_properties(study.device)
        about |= {"card": card.name, "memory_mib": card.total_memory >> 20, "sms": card.multi_processor_count,
                  "l2_mib": card.L2_cache_size >> 20, "triton": triton.__version__, "driver": _driver()}
    study.note("machine", **about)
    size = 1 << (20 if study.small else 32)
    one = torch.randn(size // 4, device=study.device)
    other = torch.empty_like(one)
    copying = device_ms(study, lambda: other.copy_(one), 10)
    study.note("bandwidth", what="copy, bytes read and written", gbps=2 * size / copying / 1e6, ms=copying)
    reading = device_ms(study, lambda: torch.sum(one), 10)
    study.note("bandwidth", what="sum of float32, bytes read", gbps=size / reading / 1e6, ms=reading)
    for name, host in (("pinned", torch.empty(1 << 22, pin_memory=study.on_gpu)), ("pageable", torch.empty(1 << 22))):
        taken = wall_ms(study, lambda: host.copy_(one[: 1 << 22]) if size >= 1 << 24 else None, 5)  # noqa: B023
        study.note("to_host", memory=name, mib=16, ms=taken)


def _driver() -> str:
    import subprocess

    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


# ---- b: the same as the processor ------------------------------------------------------------------------


def part_b(study: Study) -> None:
    tokens = _text(study, 40 if study.small else 200)
    truth = _logits_of(_whole(study, "cpu", torch.float32), tokens)
    for where, dtype in (("gpu", torch.float32), *((products, torch.bfloat16) for products in study.products),
                         ("cpu", torch.bfloat16)):
        logits = _logits_of(_whole(study, where, dtype), tokens)
        error = ((logits - truth).norm() / truth.norm()).item()
        kl = torch.nn.functional.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), log_target=True,
                                        reduction="none").sum(-1).mean().item()
        same = (logits.argmax(-1) == truth.argmax(-1)).float().mean().item()
        study.note("parity", where=where, dtype=str(dtype).removeprefix("torch."), positions=len(tokens),
                   relative_error=error, kl=kl, same_top_token=same)
    freed()
    for name in ("bfloat16", "float32"):
        _texts_in_process(study, name)


def _whole(study: Study, where: str, dtype: torch.dtype) -> Slice:
    files = open_model(study.model)
    last = files.config.num_layers
    if where == "cpu":
        return DecoderSlice(files, 0, last, has_embedding=True, has_head=True, dtype=dtype)
    return DeviceSlice(Weights.read(files, 0, last, has_embedding=True, has_head=True, dtype=dtype,
                                    device=study.device), dtype, study.device,
                       **use(study, where if where in PRODUCTS else study.products[-1]))


def _text(study: Study, count: int) -> list[int]:
    """The first tokens of all prompts that come with Fullpipe, one after the other."""
    from fullpipe.models.tokens.loading import load_tokenizer

    tokenizer = load_tokenizer(study.model)
    return tokenizer.encode("\n\n".join(prompt.text for prompt in choose(None, 3)))[:count]


def _logits_of(slice: Slice, tokens: Sequence[int]) -> Tensor:
    """Of every position, float32 [tokens, vocab]."""
    return slice.logits(slice.forward(Step.of_text(torch.tensor(tokens), np.arange(len(tokens), dtype=np.int32))))


def _prompts(on: Asker, count: int) -> list[list[int]]:
    return [on.encode([{"role": "user", "content": prompt.text}]) for prompt in choose(None, 1)[:count]]


def _texts_in_process(study: Study, dtype: str) -> None:
    """Two stages on the device, in this process: the methods' texts, which must be one."""
    use(study, study.products[-1])
    prepared = prepare(Options.of(model=str(study.model), stages=2, draft="ngram", dtype=dtype, method="fullpipe",
                                  **_device_of(study)))
    with Asker(prepared, InProcessPipeline(*prepared.build(), clock="wall")) as on:
        prompts = _prompts(on, 1 if study.small else 3)
        said: dict[str, list[list[int]]] = {}
        for method in METHODS:
            on.use(method)
            begun = time.perf_counter()
            answers = [on.ask([prompt], SamplingParams(max_tokens=16 if study.small else 64))[0] for prompt in prompts]
            said[method] = [answer.tokens for answer in answers]
            tokens = sum(map(len, said[method]))
            study.note("texts in process", dtype=dtype, method=method, prompts=len(prompts), tokens=tokens,
                       hits=sum(answer.stats.hits for answer in answers),
                       tokens_per_s=tokens / (time.perf_counter() - begun), same_as_pp=said[method] == said["pp"])
    freed()


def _device_of(study: Study) -> Row:
    return {"device": "cuda" if study.on_gpu else "cpu"}


# ---- c: the same bits in any company ---------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Guesses behind a prompt. parents: index of a row, or -1 for the prompt's end. slots: of prompt and rows."""

    prompt: list[int]
    tokens: list[int]
    parents: list[int]
    slots: list[int]

    def path(self, row: int) -> list[int]:
        return [] if row < 0 else [*self.path(self.parents[row]), row]

    def position(self, row: int) -> int:
        return len(self.prompt) + len(self.path(row)) - 1

    def read(self, row: int) -> list[int]:
        """Slots that a row reads, in order of position."""
        size = len(self.prompt)
        return [*self.slots[:size], *(self.slots[size + at] for at in self.path(row))]


def part_c(study: Study) -> None:
    files = open_model(study.model)
    real = Weights.read(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=torch.bfloat16,
                        device=study.device)
    models = [("SmolLM2-135M, whole", real)]
    if not study.small:
        models.append(("1.5B shape, 7 layers and head, random", random_weights(study, QWEN_1_5B, 7)))
        models.append(("7B shape, 2 layers and head, random", random_weights(study, QWEN_7B, 2)))
    for name, weights in models:
        _rows_of(study, name, weights)
    freed()


def _rows_of(study: Study, name: str, weights: Weights) -> None:
    """Every set of buckets by itself: the rows of a tree, all together, are what they are in random company, batches
    and slots, behind a prompt that came in random chunks."""
    rng = random.Random(1)
    vocab, size = weights.config.vocab_size, 60 if study.small else 300
    tree = Tree([rng.randrange(vocab) for _ in range(size)], [rng.randrange(vocab) for _ in range(48)],
                [rng.randrange(-1, row) for row in range(48)], list(range(size + 48)))
    seen: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for products, rows in product(study.products, (*((bucket,) for bucket in ROWS), ROWS)):
        slice = _sliced(study, weights, products, rows=rows)
        truth = seen[products, rows] = _run_tree(slice, tree, random.Random(0), whole=True)
        compared = differing = bits = 0
        for trial in range(2 if study.small else 6):
            rng = random.Random(trial)
            moved = replace(tree, slots=rng.sample(range(1500), size + 48))
            found = _run_tree(slice, moved, rng, whole=False)
            unlike = found.view(torch.int32) ^ truth.view(torch.int32)
            compared += len(found)
            differing += int(unlike.ne(0).any(1).sum())
            bits += sum(int(((unlike >> bit) & 1).sum()) for bit in range(32)) if unlike.any() else 0
        study.note("row identity", model=name, products=products, tried=str(rows), used=str(slice.rows),
                   exact=slice.exact, rows_compared=compared, rows_differing=differing, bits_differing=bits)
        del slice
        freed()
    for (products, rows), logits in seen.items():
        study.note("buckets against the set", model=name, products=products, bucket=str(rows),
                   same_bits=torch.equal(logits, seen[products, ROWS]), same_as_last=torch.equal(
                       logits, seen[study.products[-1], ROWS]),
                   largest_difference=(logits - seen[products, ROWS]).abs().max().item())


def _run_tree(slice: DeviceSlice, tree: Tree, rng: random.Random, *, whole: bool) -> Tensor:
    """Logits of the tree's rows, in order. whole: prompt and rows in one step each, alone; else as it comes."""
    size, start, crowd = len(tree.prompt), 0, 1536  # slots from `crowd` on are others'
    slice.pretend(crowd + 1024)
    line = np.array(tree.slots[:size], np.int32)
    while start < size:
        end = size if whole else min(size, start + rng.choice((1, 3, 16, 40, 64, 130)))
        slice.forward(Step.of_text(torch.tensor(tree.prompt[start:end]), line[:end], start))
        start = end
    out, rows = torch.empty(len(tree.tokens), slice.config.vocab_size), list(range(len(tree.tokens)))
    while rows:
        count = len(rows) if whole else rng.choice((1, 1, 2, 3, 5, 8, 13, 20))
        batch, rows = rows[:count], rows[count:]
        others, length = 0 if whole else rng.choice((0, 1, 7, 30)), rng.randrange(1, 990)
        x = torch.tensor([tree.tokens[row] for row in batch] + [rng.randrange(100) for _ in range(others)])
        before = list(range(crowd, crowd + length))
        paths = [tree.read(row) for row in batch] + [[*before, crowd + length + own] for own in range(others)]
        out[batch] = slice.logits(slice.forward(step_of_paths(x, paths)))[: len(batch)]
    return out


# ---- d: the time of a step -------------------------------------------------------------------------------


def _qwen(hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool) -> ModelConfig:
    return ModelConfig(family="qwen2", num_layers=28, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=128,
                       intermediate=intermediate, vocab_size=vocab, rms_eps=1e-6,
                       rope=rope.Rope(inv_freq=rope.plain(1e6, 128)), qkv_bias=True, o_bias=False, qk_norm=False,
                       tied=tied, max_positions=32768)


QWEN_1_5B = _qwen(1536, 12, 2, 8960, 151936, True)
QWEN_7B = _qwen(3584, 28, 4, 18944, 152064, False)


def random_weights(study: Study, config: ModelConfig, layers: int, *, ends: bool = True) -> Weights:
    """Weights of this shape, made on the device: what a step takes does not depend on them."""
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.bfloat16, device=study.device).mul_(0.02)

    def norm() -> Tensor:
        return torch.rand(config.hidden, device=study.device) + 0.5

    def layer() -> Layer:
        width = config.q_size + 2 * config.kv_size
        bias = matrix(1, width)[0] if config.qkv_bias else None
        return Layer(norm(), Linear(matrix(width, config.hidden), bias, packed=False), None,
                     Linear(matrix(config.hidden, config.q_size), None, packed=False), norm(),
                     Linear(matrix(2 * config.intermediate, config.hidden), None, packed=False),
                     Linear(matrix(config.hidden, config.intermediate), None, packed=False))

    table = matrix(config.vocab_size, config.hidden) if ends else None
    head = None if table is None else Linear(table, None, packed=False)
    return Weights(config, 0, [layer() for _ in range(layers)], table, head, norm() if ends else None)


def part_d(study: Study) -> None:
    shapes = {"1.5B shape": QWEN_1_5B, "7B shape": QWEN_7B}
    if study.small:
        shapes = {"tiny": replace(QWEN_1_5B, num_layers=2, hidden=256, heads=2, kv_heads=1, intermediate=512,
                                  vocab_size=1024)}
    for name, config in shapes.items():
        for part, layers, ends in (("7 layers", 7, False), ("whole", config.num_layers, True)):
            weights = random_weights(study, config, min(layers, config.num_layers), ends=ends)
            for products in study.products:
                with trying(study, f"d: {name}, {part}, {products}"):
                    _steps_of(study, name, part, weights, products)
                freed()
            if ends:
                for what in (_buckets_of, _eager_of, _kernels_of):
                    with trying(study, f"d: {what.__name__} {name}"):
                        what(study, name, weights)
            del weights
            freed()


def use(study: Study, products: str) -> Row:
    """The option of a slice with these products; and kernels that begin early or do not, from now on."""
    if study.on_gpu:
        from fullpipe.models.gpu import kernels

        kernels.EARLY = products == "early"
    return {"library": products == "library"}


def _pool(study: Study, weights: Weights) -> int:
    return 8192 * len(weights.layers) * weights.config.sizes(2).kv_bytes


def _sliced(study: Study, weights: Weights, products: str, **options: Any) -> DeviceSlice:
    return DeviceSlice(weights, torch.bfloat16, study.device, pool_bytes=_pool(study, weights), **use(study, products),
                       **options)


@torch.inference_mode()
def _steps_of(study: Study, name: str, part: str, weights: Weights, products: str) -> None:
    slice, config = _sliced(study, weights, products), weights.config
    for context in (64,) if study.small else CONTEXTS:
        for rows in (1, 16) if study.small else STEP_ROWS:
            work = _chain(slice, rows, context)
            step, bucket, width = _filled(slice, work)
            limit = (_weight_bytes(weights) + context * len(weights.layers) * config.sizes(2).kv_bytes) \
                / study.read_gbps() / 1e6
            taken = device_ms(study, step.replay)
            if weights.head is not None:
                taken += device_ms(study, slice.head(bucket).replay)
            study.note("steps", model=name, part=part, products=products, context=context, rows=rows, bucket=bucket,
                       width=width, device_ms=taken, limit_ms=limit, over_limit=taken / limit,
                       wall_ms=wall_ms(study, _whole_call(slice, work)))


def _chain(slice: DeviceSlice, rows: int, context: int) -> Step:
    """Rows that follow a context, one after the other."""
    slice.pretend(context + rows)
    x = torch.arange(rows) if slice.has_embedding else torch.randn(rows, slice.config.hidden).to(slice.dtype)
    return Step.of_text(x, np.arange(context + rows, dtype=np.int32), context)


def _filled(slice: DeviceSlice, work: Step) -> tuple[Any, int, int]:
    """The step that such a call runs, with its inputs in place; its bucket and width."""
    from fullpipe.models.gpu.rows import Rows

    slice.forward(work)
    rows = Rows.of(work)
    bucket, width = next(bucket for bucket in slice.rows if bucket >= len(work)), rows.context.shape[1]
    with torch.inference_mode():
        step = slice.step(bucket, width)
        step.inputs.fill(work.x, rows)
    return step, bucket, width


def _whole_call(slice: DeviceSlice, work: Step) -> Callable[[], object]:
    if not slice.has_head:
        return lambda: slice.forward(work)
    return lambda: slice.logits(slice.forward(work))


def _weight_bytes(weights: Weights) -> int:
    sizes = weights.config.sizes(2)
    return len(weights.layers) * sizes.layer_bytes + sizes.head_bytes * (weights.head is not None)


@torch.inference_mode()
def _buckets_of(study: Study, name: str, weights: Weights) -> None:
    """Each bucket by itself, whether or not it agrees with others."""
    for products, bucket in product(study.products, ROWS):
        slice = _sliced(study, weights, products, rows=(bucket,))
        work = _chain(slice, 8, 128)
        step, _, _ = _filled(slice, work)
        study.note("buckets", model=name, products=products, bucket=bucket, layers_ms=device_ms(study, step.replay),
                   head_ms=device_ms(study, slice.head(bucket).replay),
                   limit_ms=_weight_bytes(weights) / study.read_gbps() / 1e6)
        del slice, step
        freed()
    for products in study.products:
        slice = _sliced(study, weights, products)
        study.note("buckets that agree", model=name, products=products, rows=str(slice.rows), exact=slice.exact)
        del slice


@torch.inference_mode()
def _eager_of(study: Study, name: str, weights: Weights) -> None:
    slice = _sliced(study, weights, study.products[0], graphs=False)
    for rows in (1, 8, 64):
        work = _chain(slice, rows, 128)
        step, bucket, _ = _filled(slice, work)
        with torch.inference_mode():
            study.note("without graphs", model=name, rows=rows, bucket=bucket,
                       layers_ms=device_ms(study, step.replay, 10),
                       wall_ms=wall_ms(study, _whole_call(slice, work), 10))


def _kernels_of(study: Study, name: str, weights: Weights) -> None:
    """Which kernels run in a step of 8 rows, and what each takes of it."""
    for products in study.products:
        _profiled(study, name, _sliced(study, weights, products, graphs=False), products)


@torch.inference_mode()
def _profiled(study: Study, name: str, slice: DeviceSlice, products: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    work = _chain(slice, 8, 128 if not study.small else 64)
    step, bucket, _ = _filled(slice, work)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if study.on_gpu else [])]
    with torch.inference_mode(), profile(activities=kinds) as told:
        step.replay()
        slice.head(bucket).replay()
        if study.on_gpu:
            torch.cuda.synchronize()
    taken = {one.key: (one.count, getattr(one, "self_device_time_total", 0.0)) for one in told.key_averages()
             if getattr(one, "self_device_time_total", 0.0) > 0 and one.device_type.name == "CUDA"}
    for key, (count, us) in sorted(taken.items(), key=lambda item: -item[1][1])[:16]:
        study.note("kernels", model=name, products=products, bucket=bucket, count=count, us_each=us / count, us=us,
                   kernel=key[:80])


# ---- e: pipelines of processes ---------------------------------------------------------------------------


def part_e(study: Study) -> None:
    for stages in (2,) if study.small else (4, 8):
        with trying(study, f"e: {stages} stages"):
            _pipeline(study, stages)


def _pipeline(study: Study, stages: int) -> None:
    begun = time.perf_counter()
    options = Options.of(model=str(study.model), stages=stages, draft="ngram", method="fullpipe", dtype="bfloat16",
                         start_timeout=120.0, **_device_of(study))
    with Real(options, progress=lambda line: print(f"  {line}", flush=True)) as on:
        study.note("pipelines started", stages=stages, s=time.perf_counter() - begun)
        prompts = _prompts(on, 3)
        params = SamplingParams(max_tokens=12 if study.small else 96)
        said: dict[str, list[list[int]]] = {}
        for method in METHODS:
            on.use(method)
            on.ask([prompts[0]], replace(params, max_tokens=8))  # graphs are captured
            answers = [on.ask([prompt], params)[0] for prompt in prompts]
            said[method] = [answer.tokens for answer in answers]
            tbt = statistics.fmean(answer.stats.tbt_s for answer in answers)
            study.note("pipelines", stages=stages, method=method, tokens=sum(map(len, said[method])),
                       tokens_per_s=1 / tbt, hits=sum(answer.stats.hits for answer in answers),
                       misses=sum(answer.stats.misses for answer in answers), same_as_pp=said[method] == said["pp"])


# ---- f: a profile ----------------------------------------------------------------------------------------


def part_f(study: Study) -> None:
    from fullpipe.cluster.measure import measure

    sizes: Row = {"rows": (1, 4), "contexts": (32,)} if study.small else \
        {"rows": (1, 2, 4, 8, 16, 32, 64), "contexts": (128, 512, 2048)}
    profile = measure(str(study.model), repeats=3, **sizes, **_device_of(study))
    path = study.out / "gpu.profile.json"
    profile.save(path)
    study.note("profile", file=path.name, layer_us_1_row=1e6 * profile.layers.at(1, 128),
               layer_us_16_rows=1e6 * profile.layers.at(16, 128), flight_us=1e6 * profile.flights.at(1, 128),
               head_us=1e6 * profile.heads.at(1))


# ---- g: products -----------------------------------------------------------------------------------------


def part_g(study: Study) -> None:
    from fullpipe_lab.studies.gpu_products import compare

    for name, config in (("1.5B", QWEN_1_5B), ("7B", QWEN_7B)):
        weights = random_weights(study, config, 28)
        layers, sizes = weights.layers, [("qkv", "qkv"), ("out", "out"), ("gate_up", "gate_up"), ("down", "down")]
        for what, attribute in sizes:
            with trying(study, f"g: {name} {what}"):
                compare([getattr(layer, attribute).weight for layer in layers], study.read_gbps(), study.note,
                        f"{name} {what}")
        assert weights.head is not None
        with trying(study, f"g: {name} head"):
            compare([weights.head.weight], study.read_gbps(), study.note, f"{name} head")
        del weights, layers
        freed()


# ---- h: constants of our kernels ---------------------------------------------------------------------------

BASE = {"TILE": 64, "DEPTH": 128, "WARPS": 4, "STAGES": 4, "AHEAD": 512, "ENOUGH": 128, "LEAST_TILES": 3,
        "PER_WARP": 512}
TRIED: tuple[Row, ...] = (
    {}, {"STAGES": 3}, {"DEPTH": 64, "STAGES": 6}, {"DEPTH": 64, "STAGES": 4}, {"TILE": 128, "DEPTH": 64},
    {"TILE": 128, "WARPS": 8, "STAGES": 3}, {"STAGES": 3, "ENOUGH": 256, "LEAST_TILES": 2},
    {"STAGES": 3, "ENOUGH": 512}, {"STAGES": 3, "ENOUGH": 64}, {"STAGES": 3, "AHEAD": 128},
    {"STAGES": 3, "AHEAD": 1536}, {"STAGES": 3, "PER_WARP": 256}, {"STAGES": 3, "PER_WARP": 128})


def part_h(study: Study) -> None:
    """Whole steps with other constants, which change no more than the order of sums."""
    from fullpipe.models.gpu import kernels

    for name, config in (("1.5B shape", QWEN_1_5B), ("7B shape", QWEN_7B)):
        weights = random_weights(study, config, config.num_layers)
        for changes in TRIED:
            with trying(study, f"h: {name} {changes}"):
                for constant, value in (BASE | changes).items():
                    assert hasattr(kernels, constant)
                    setattr(kernels, constant, value)
                _tried(study, name, weights, changes)
            freed()
        del weights
        freed()
    for constant, value in BASE.items():
        setattr(kernels, constant, value)


@torch.inference_mode()
def _tried(study: Study, name: str, weights: Weights, changes: Row) -> None:
    slice, taken = _sliced(study, weights, "early"), {}
    for rows in (8, 32, 64):
        step, bucket, _ = _filled(slice, _chain(slice, rows, 128))
        taken[f"ms_{rows}_rows"] = device_ms(study, step.replay) + device_ms(study, slice.head(bucket).replay)
    study.note("constants", model=name, changes=str(changes), agree=str(slice.rows), **taken)


# ---- all of it -------------------------------------------------------------------------------------------

PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e, "f": part_f, "g": part_g, "h": part_h}


@contextmanager
def trying(study: Study, what: str) -> Iterator[None]:
    """What fails is told, and the rest goes on."""
    begun = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        study.note("failed", what=what, error=f"{type(error).__name__}: {error}"[:300])
    study.note("time", what=what, s=time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file of SmolLM2-135M")
    parser.add_argument("--parts", default="a,b,c,d,e,f")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or STUDIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--products", default=",".join(PRODUCTS), help="whose products: some of the default, in order")
    parser.add_argument("--small", action="store_true", help="small sizes, to see the parts run")
    asked = parser.parse_args()
    study = Study(torch.device(asked.device), asked.model, asked.out, asked.small, asked.products.split(","))
    gc.freeze()  # torch collects before each capture
    for part in asked.parts.split(","):
        with trying(study, part):
            PARTS[part](study)
        freed()
        with trying(study, f"the receipt after {part}"):
            study.save()
    _summary(study)
    sys.exit(1 if "failed" in study.found else 0)


def _summary(study: Study) -> None:
    """What matters, last."""
    print("\n==== summary ====")
    for table in ("machine", "bandwidth", "parity", "texts in process", "row identity", "buckets against the set",
                  "buckets", "buckets that agree", "without graphs", "products", "our product", "constants",
                  "pipelines", "profile", "failed"):
        for row in study.found.get(table, []):
            print(f"{table}: " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    print("steps: model, part, context, rows: device ms (over limit) wall ms")
    for row in study.found.get("steps", []):
        print(f"  {row['model']:10} {row['part']:8} {row['products']:7} {row['context']:5} {row['rows']:3}: "
              f"{row['device_ms']:.3f} ({row['over_limit']:.2f}) {row['wall_ms']:.3f}")


if __name__ == "__main__":
    main()
