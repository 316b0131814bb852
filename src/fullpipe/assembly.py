"""From names to a pipeline: resolve, check, cut, describe every station, start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fullpipe.errors import UsageError
from fullpipe.hub import CATALOGUE, resolve
from fullpipe.model.config import ModelConfig
from fullpipe.model.tokenizer import Tokenizer, check_same_vocabulary
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.spec import StationSpec
from fullpipe.planning.partition import cut

Say = Callable[[str], None]

_HEARTBEAT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Assembly:
    """A running pipeline and what its users must know. clock: "wall" or "virtual"."""

    pipeline: Pipeline
    tokenizer: Tokenizer
    clock: str
    max_model_len: int
    vocab_size: int


def assemble(model: str, *, draft: str, stages: int, needs_draft: bool, dtype: str,
             pipeline: Literal["inprocess", "distributed"], clock: Literal["virtual", "wall"],
             costs: Literal["measured", "unit"], link_ms: float, threads: int | None, max_model_len: int | None,
             margins: bool, timeout: float, progress: Say) -> Assembly:
    """Everything that `LLM` needs, checked before the first weight is read."""
    for name, value, known in (("pipeline", pipeline, ("inprocess", "distributed")),
                               ("clock", clock, ("virtual", "wall")), ("costs", costs, ("measured", "unit")),
                               ("dtype", dtype, ("auto", "float32", "bfloat16"))):
        if value not in known:
            raise UsageError(f"unknown {name} {value!r}", hint=f"Known are: {', '.join(known)}.")
    if link_ms < 0:
        raise UsageError(f"the link latency must be 0 or more (got {link_ms} ms)")
    if not timeout > 0:
        raise UsageError(f"the time-out must be above 0 (got {timeout:g} s)")
    from fullpipe.model.weights import open_model

    path = resolve(model)
    files = open_model(path)
    tokenizer = Tokenizer.load(path)
    vocab = min(tokenizer.vocab_size, files.config.vocab_size)
    dtype = pick_dtype(dtype)
    specs = stage_specs(path, files.config, stages, dtype, vocab, margins)
    wanted = needs_draft or draft != "auto"
    source = draft_spec(default_draft(model, draft), tokenizer, dtype, vocab) if wanted else None
    length = min(max_model_len or files.config.max_positions, files.config.max_positions)
    progress(f"loading {path.name} as {stages} stages in {dtype}")
    if pipeline == "distributed":
        from fullpipe.pipeline.distributed import DistributedPipeline

        stations = DistributedPipeline(specs, source, threads=threads or 1, timeout=timeout,
                                       heartbeat_timeout=min(_HEARTBEAT_TIMEOUT_S, timeout))
        return Assembly(stations, tokenizer, "wall", length, vocab)
    return Assembly(_inprocess(specs, source, clock, costs, link_ms, threads), tokenizer, clock, length, vocab)


def _inprocess(specs: list[StationSpec], source: StationSpec | None, clock: Literal["virtual", "wall"], costs: str,
               link_ms: float, threads: int | None) -> Pipeline:
    import torch

    from fullpipe.pipeline.inprocess import InProcessPipeline, measured_costs, unit_costs

    torch.set_num_threads(threads or os.cpu_count() or 1)
    return InProcessPipeline([spec.build() for spec in specs], source.build() if source else None,  # type: ignore
                             clock=clock, costs=unit_costs if costs == "unit" else measured_costs,
                             link_s=link_ms / 1e3)


def stage_specs(path: Path, config: ModelConfig, stages: int, dtype: str, vocab: int,
                margins: bool) -> list[StationSpec]:
    """One spec per stage; cut so that the slowest stage reads as few bytes as possible."""
    sizes = config.sizes(2 if dtype == "bfloat16" else 4)
    # A lookup reads a few rows of the embedding, whatever its size: it costs memory, no time.
    ranges = cut([sizes.layer_bytes] * config.num_layers, sizes.head_bytes, 0.0, stages)
    return [StationSpec("fullpipe.model.stage:build_stage",
                        {"model": str(path), "first": part.start, "last": part.stop, "is_first": k == 0,
                         "is_last": k == stages - 1, "dtype": dtype, "vocab": vocab, "margins": margins})
            for k, part in enumerate(ranges)]


def default_draft(model: str, draft: str) -> str:
    """What "auto" means: the catalogue's partner of the model, else n-gram."""
    if draft != "auto":
        return draft
    return CATALOGUE[model].draft if model in CATALOGUE else "ngram"


def draft_spec(draft: str, target: Tokenizer, dtype: str, vocab: int) -> StationSpec | None:
    """The draft station's spec, or None for "none". Raises DraftMismatch for another vocabulary."""
    names = [name.strip() for name in draft.split(",")]
    if names == ["none"]:
        return None
    if not all(names) or "none" in names:
        raise UsageError(f"{draft!r} names no draft", hint="Use none, ngram, a model, or several with commas between.")
    specs = [_one_draft(name, target, dtype, vocab) for name in names]
    if len(specs) == 1:
        return specs[0]
    return StationSpec("fullpipe.sources.mix:build_mix", {"sources": [spec.to_dict() for spec in specs]})


def _one_draft(name: str, target: Tokenizer, dtype: str, vocab: int) -> StationSpec:
    if name == "ngram":
        return StationSpec("fullpipe.sources.ngram:build_ngram")
    path = resolve(name)
    check_same_vocabulary(target, Tokenizer.load(path))
    return StationSpec("fullpipe.sources.draft_model:build_draft_model",
                       {"model": str(path), "dtype": dtype, "vocab": vocab})


def pick_dtype(dtype: str) -> str:
    """"auto" is bfloat16 where the processor has instructions for it, else float32."""
    if dtype != "auto":
        return dtype
    import torch

    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32"
