"""What the native kernels take, beside what the machine could do, and what quantising the rows costs.

    python -m fullpipe_lab.studies.kernels [products] [steps] [quality] [quantising] [--models A,B]
        [--caches float16,int8] [--rows 1,2,4,8,16,32] [--threads 1] [--repeats 12] [--write]

products: one product of each form. Weights take turns, so that no cache holds them. The limit is the longer of two
times: reading the weight at the bandwidth that was measured, and its products at the rate of a loop of nothing else.
steps: all layers and the head of whole models after 128 tokens. quality: the models' logits beside float32 arithmetic
on the same file's weights, over prompts, code and prose, 1,600 tokens: KL per token, and how often the likeliest token
is the same; with each kind of cache. quantising: the same of a bfloat16 model with other blocks (`permuted`), as it is
and quantised while it is read. `--write` keeps the receipt in lab/receipts/kernels.json.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fullpipe
from fullpipe.hub import resolve
from fullpipe.kernels import Form, Kernels, Weight
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.dtypes import STORED, native_kernels
from fullpipe.models.files import ModelFiles
from fullpipe.models.native.slice import NativeSlice
from fullpipe.models.paths import step_of_paths
from fullpipe.models.slice import Slice
from fullpipe.models.step import Step
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from fullpipe.options import QUANTIZATIONS
from fullpipe.prompts import read_prompts
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt
from fullpipe_lab.studies.permuted import write_permuted

PARTS = ("products", "steps", "quality", "quantising")
MODELS = ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m")
SHAPES = ((1536, 8960), (8960, 1536))
CONTEXT = 128
_MANY_BYTES = 160 << 20  # of weights that take turns
_LENGTH = 320  # tokens of each text of which the quality is told


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    native, samples = native_kernels(), list[Any]()
    setting: dict[str, Any] = {"level": native.level, "threads": args.threads, "context": CONTEXT}
    if "products" in args.parts:
        setting["machine"] = limits = measure_limits(native)
        print(f"{native.level}: reads {limits['read_gb_s']:.1f} GB/s, {limits['products_g_s']:.0f} G products/s "
              f"of bytes, {limits['float_products_g_s']:.0f} of floats")
        setting["products"] = [_told(one, samples) for one in products(native, limits, args.rows, args.repeats)]
    if "steps" in args.parts:
        setting["steps"] = [_told(one, samples) for model in args.models
                            for one in steps(native, model, args.rows, args.repeats)]
    if "quality" in args.parts:
        setting["quality"] = [_told(one, samples) for model in args.models
                              for one in quality(native, model, args.caches)]
    if "quantising" in args.parts:
        setting["quantising"] = [_told(one, samples) for model in args.models for one in quantising(native, model)]
    if args.write:
        save_receipt(study_receipt("kernels", setting, samples), STUDIES / "kernels.json")


def _told(found: dict[str, Any], samples: list[Any]) -> dict[str, Any]:
    """Print it, and keep its samples apart."""
    if "samples" in found:
        samples.append({key: value for key, value in found.items() if key not in ("ms", "least_ms", "limit_ms")})
        found = {key: value for key, value in found.items() if key != "samples"}
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in found.items()), flush=True)
    return found


# ---- one product -----------------------------------------------------------------------------------------------


def measure_limits(native: Kernels) -> dict[str, float]:
    """Bandwidth of one core, the best tenth of reading 8 MiB at a time; products of bytes and of floats, the best of
    many."""
    piece, (start, _keep) = 8 << 20, _huge(_MANY_BYTES)
    reads = sorted(_seconds(partial(native.read, at, piece))
                   for _ in range(5) for at in range(start, start + _MANY_BYTES - piece + 1, piece))
    bytes_s, floats_s = (min(_seconds(partial(native.spin, 2000, floats=floats)) for _ in range(100))
                         for floats in (False, True))
    return {"read_gb_s": piece / reads[len(reads) // 10] / 1e9, "products_g_s": native.spin(2000) / bytes_s / 1e9,
            "float_products_g_s": native.spin(2000, floats=True) / floats_s / 1e9}


def products(native: Kernels, limits: dict[str, float], rows: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of each form and shape at each number of rows."""
    for form in Form:
        for outputs, inputs in SHAPES:
            size = sum(native.sizes(form, outputs, inputs))
            weights, keep = _weights(native, form, outputs, inputs, size)
            for count in rows:
                taken = _product(native, weights, count, repeats)
                rate = limits["float_products_g_s" if form.is_float else "products_g_s"]
                limit = max(size / limits["read_gb_s"], count * outputs * inputs / rate) / 1e6
                yield {"form": form.name, "outputs": outputs, "inputs": inputs, "bytes": size, "rows": count,
                       "ms": statistics.median(taken), "least_ms": min(taken), "limit_ms": round(limit, 4),
                       "samples": taken}
            del weights, keep


def _product(native: Kernels, weights: list[Weight], rows: int, repeats: int) -> list[float]:
    x = np.random.default_rng(rows).normal(size=(rows, weights[0].inputs)).astype(np.float32)
    out, threads = np.empty((rows, weights[0].outputs), np.float32), torch.get_num_threads()
    return [_milliseconds(partial(native.product, one, x.ctypes.data, rows, out.ctypes.data, threads))
            for _ in range(repeats) for one in weights]


def _weights(native: Kernels, form: Form, outputs: int, inputs: int, size: int) -> tuple[list[Weight], mmap.mmap]:
    """Weights of ordinary numbers, none of them denormal: those take longer."""
    count = max(2, _MANY_BYTES // size)
    start, keep = _huge(count * size)
    numbers, _ = native.sizes(form, outputs, inputs)
    return [Weight(form, outputs, inputs, start + i * size, start + i * size + numbers, None)
            for i in range(count)], keep


def _huge(size: int) -> tuple[int, mmap.mmap]:
    """An address of so many bytes in huge pages, each 0x33, and what keeps them."""
    page = 2 << 20
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a shared one gets none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, np.uint8)[:] = 0x33
    return -(-ctypes.addressof(ctypes.c_char.from_buffer(memory)) // page) * page, memory


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _milliseconds(work: Callable[[], object]) -> float:
    return round(_seconds(work) * 1e3, 4)


# ---- whole models ----------------------------------------------------------------------------------------------


def steps(native: Kernels, model: str, rows: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step through all layers and the head, its rows guesses for one token each."""
    files = open_model(resolve(model))
    whole = NativeSlice(native, files, 0, files.config.num_layers, has_embedding=True, has_head=True)
    whole.pretend(CONTEXT)
    for count in rows:
        tokens = torch.randint(files.config.vocab_size, (count,), generator=torch.Generator().manual_seed(count))
        guesses = step_of_paths(tokens, [[*range(CONTEXT), CONTEXT + row] for row in range(count)])

        def step(guesses: Step = guesses) -> None:
            whole.logits(whole.forward(guesses))

        step()
        taken = [_milliseconds(step) for _ in range(repeats)]
        yield {"model": model, "rows": count, "ms": statistics.median(taken), "least_ms": min(taken), "samples": taken}


# ---- quality ---------------------------------------------------------------------------------------------------


def quality(native: Kernels, model: str, caches: Sequence[str]) -> Iterator[dict[str, Any]]:
    """How far the logits are from float32 arithmetic on the file's weights, with keys and values in each of these."""
    path = resolve(model)
    files, texts = open_model(path), list(_texts(path))
    exact = _exact(files, texts)
    for cache in caches:
        yield {"model": model, "cache": cache, **_beside(native, files, STORED, texts, exact, cache)}


def quantising(native: Kernels, model: str) -> Iterator[dict[str, Any]]:
    """The same of a model in bfloat16, whose weights are quantised while they are read."""
    path = resolve(model)
    texts = list(_texts(path))
    with TemporaryDirectory() as folder:
        files = open_model(write_permuted(open_model(path), Path(folder)))
        exact = _exact(files, texts)
        for dtype in (STORED, *QUANTIZATIONS):
            yield {"model": f"{model} in bfloat16, other blocks", "dtype": dtype,
                   **_beside(native, files, dtype, texts, exact)}


def _beside(native: Kernels, files: ModelFiles, dtype: str, texts: list[list[int]],
            exact: list[Tensor], cache: str = "float16") -> dict[str, Any]:
    kl, same, started = [], [], time.perf_counter()
    whole = NativeSlice(native, files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=dtype,
                        cache=cache)
    loading = time.perf_counter() - started
    for wanted, text in zip(exact, texts):
        found = whole.logits(_hidden([whole], text))
        truth = wanted.log_softmax(-1)
        kl += F.kl_div(found.log_softmax(-1), truth, reduction="none", log_target=True).sum(-1).tolist()
        same += (found.argmax(-1) == wanted.argmax(-1)).tolist()
    return {"tokens": len(kl), "kl_per_token": statistics.fmean(kl), "same_top": statistics.fmean(map(float, same)),
            "bytes": whole.nbytes, "loading_s": round(loading, 2)}


def _exact(files: ModelFiles, texts: list[list[int]]) -> list[Tensor]:
    """Logits of each text in float32, one layer in memory at a time."""
    def load(first: int, last: int, *, has_embedding: bool = False, has_head: bool = False) -> DecoderSlice:
        return DecoderSlice(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=torch.float32)

    hidden = [_hidden([load(0, 0, has_embedding=True)], text) for text in texts]
    for layer in range(files.config.num_layers):
        one = load(layer, layer + 1)
        hidden = [_hidden([one], text, x) for text, x in zip(texts, hidden)]
    head = load(0, 0, has_head=True)
    return [head.logits(x) for x in hidden]


def _hidden(slices: list[Slice], text: list[int], x: Tensor | None = None) -> Tensor:
    """A text's hidden states behind slices that come one after the other. x: what goes into the first, if no tokens."""
    x, slots = torch.tensor(text) if x is None else x, np.arange(len(text), dtype=np.int32)
    for part in slices:
        x = part.forward(Step.of_text(x, slots))
    return x


def _texts(path: Path) -> Iterator[list[int]]:
    """Prompts, code and prose of this checkout, the first tokens of each."""
    package, tokenizer = Path(fullpipe.__file__).parent, load_tokenizer(path)
    docs = package.parents[1] / "docs"
    prompts = "\n\n".join(prompt.text for prompt in read_prompts(package / "prompts.jsonl"))
    yield list(tokenizer.encode(prompts))[:_LENGTH]
    for file in (package / "engine" / "loop.py", package / "sequences" / "tree.py", docs / "exactness.md",
                 docs / "architecture.md"):
        yield list(tokenizer.encode(file.read_text(encoding="utf-8")[:6000]))[:_LENGTH]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), default=list(PARTS))
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--caches", type=lambda text: text.split(","), default=["float16"])
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="keep the receipt in lab/receipts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
