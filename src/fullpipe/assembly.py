"""From names to a pipeline: resolve, check, cut, describe every station, start them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fullpipe.errors import UsageError
from fullpipe.hub import CATALOGUE, resolve
from fullpipe.model.config import ModelConfig
from fullpipe.model.tokenizer import Tokenizer, check_same_vocabulary
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.pipeline.spec import StationSpec
from fullpipe.planning.cluster import Cluster, DraftCosts
from fullpipe.planning.partition import cut

Say = Callable[[str], None]
_NGRAM = "fullpipe.sources.ngram:build_ngram"
# Beside a model, a match of a single token only displaces better guesses (docs/log.md).
MIXED_MIN_N = 2

_HEARTBEAT_TIMEOUT_S = 10.0
_LONGEST_S = 86_400.0  # the system's own waits overflow at 24 days


@dataclass(frozen=True, slots=True)
class Assembly:
    """A running pipeline and what its users must know. clock: "wall" or "virtual"."""

    pipeline: Pipeline
    tokenizer: Tokenizer
    clock: str
    max_model_len: int
    vocab_size: int


def assemble(model: str, *, draft: str, stages: int, method: str, needs_draft: bool, dtype: str,
             pipeline: Literal["inprocess", "distributed"], clock: Literal["virtual", "wall"],
             costs: Literal["measured", "unit"], link_ms: float, link_mbit: float | None,
             pace: Mapping[str, Mapping[Any, float]] | None, threads: int | None, max_model_len: int | None,
             margins: bool, timeout: float, start_timeout: float, progress: Say,
             cluster: Cluster | None = None) -> Assembly:
    """Everything that `LLM` needs, checked before the first weight is read."""
    for name, value, known in (("pipeline", pipeline, ("inprocess", "distributed")),
                               ("clock", clock, ("virtual", "wall")), ("costs", costs, ("measured", "unit")),
                               ("dtype", dtype, ("auto", "float32", "bfloat16"))):
        if value not in known:
            raise UsageError(f"unknown {name} {value!r}", hint=f"Known are: {', '.join(known)}.")
    for ok, what in (
        (link_ms >= 0, f"the link latency must be 0 or more (got {link_ms} ms)"),
        (timeout > 0, f"the time-out must be above 0 (got {timeout:g} s)"),
        (0 < start_timeout <= _LONGEST_S,
         f"the time to start must be above 0 and at most a day (got {start_timeout:g} s)"),
        (threads is None or threads >= 1, f"threads must be 1 or more (got {threads})"),
        (max_model_len is None or max_model_len >= 1, f"max_model_len must be 1 or more (got {max_model_len})"),
        (link_mbit is None or link_mbit > 0, f"the links' bandwidth must be above 0 (got {link_mbit} Mbit/s)"),
        ((not link_ms and link_mbit is None) or (pipeline, clock) != ("inprocess", "wall"),
         "links can be given in virtual time and for stage processes; in one process on the wall clock there are none"),
        (cluster is None or (clock, costs) == ("virtual", "measured"),
         "a cluster has its own costs: leave out the clock and the costs"),
        (cluster is None or not (link_ms or link_mbit or pace),
         "a cluster has its own links and paces: leave them out"),
        (pace is None or pipeline == "distributed", "devices can be paced only where they are processes (distributed)"),
    ):
        if not ok:
            raise UsageError(what)
    links = cluster.links if cluster is not None else Links.even(stages, Link.of(link_ms, link_mbit))
    from fullpipe.model.weights import open_model

    path = resolve(model)
    files = open_model(path)
    tokenizer = Tokenizer.load(path)
    vocab = min(max(tokenizer.tokens) + 1, files.config.vocab_size)  # rows beyond it are padding
    dtype = pick_dtype(dtype)
    specs = stage_specs(path, files.config, stages, dtype, vocab, margins)
    wanted = needs_draft or draft != "auto"
    names = draft_names(model, draft) if wanted else []
    if cluster is not None and any(name != "ngram" for name in names):
        cluster.check_draft()
    source = draft_spec(names, tokenizer, dtype, vocab)
    if needs_draft and source is None:
        raise UsageError(f"the method {method} needs a draft",
                         hint="Name one (a model, or ngram), or use the method pp.")
    length = min(max_model_len or files.config.max_positions, files.config.max_positions)
    if cluster is not None and pipeline == "distributed":
        pace = cluster.pace(names)
    progress(f"loading {path.name} as {stages} stages in {dtype}")
    if pipeline == "distributed":
        from fullpipe.pipeline.distributed import DistributedPipeline

        processes = DistributedPipeline(specs, source, links=links, pace=pace, threads=threads or 1, timeout=timeout,
                                        heartbeat_timeout=min(_HEARTBEAT_TIMEOUT_S, timeout),
                                        start_timeout=start_timeout)
        return Assembly(processes, tokenizer, "wall", length, vocab)
    stations = _inprocess(specs, source, clock, costs, links, cluster, names, threads)
    return Assembly(stations, tokenizer, clock, length, vocab)


def _inprocess(specs: list[StationSpec], source: StationSpec | None, clock: Literal["virtual", "wall"], costs: str,
               links: Links, cluster: Cluster | None, names: list[str], threads: int | None) -> Pipeline:
    import torch

    from fullpipe.pipeline.inprocess import InProcessPipeline, measured_costs, unit_costs

    if threads is not None:
        torch.set_num_threads(threads)
    stages, draft = [spec.build() for spec in specs], source.build() if source else None
    if cluster is not None:
        return InProcessPipeline(stages, draft, costs=DraftCosts(cluster, names), links=cluster.links,  # type: ignore
                                 message_bytes=cluster.message_bytes, device_of=cluster.device_of)
    return InProcessPipeline(stages, draft, clock=clock, links=links,  # type: ignore[arg-type]
                             costs=unit_costs if costs == "unit" else measured_costs)


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


def draft_names(model: str, draft: str) -> list[str]:
    """The sources that `draft` stands for, in order; empty for "none"."""
    names = [name.strip() for name in default_draft(model, draft).split(",")]
    if names == ["none"]:
        return []
    if not all(names) or "none" in names:
        raise UsageError(f"{draft!r} names no draft", hint="Use none, ngram, a model, or several with commas between.")
    return names


def default_draft(model: str, draft: str) -> str:
    """What "auto" means: n-gram, together with the model's partner where the catalogue has one."""
    if draft != "auto":
        return draft
    partner = CATALOGUE[model].draft if model in CATALOGUE else "ngram"
    return partner if partner == "ngram" else f"{partner},ngram"


def draft_spec(names: list[str], target: Tokenizer, dtype: str, vocab: int) -> StationSpec | None:
    """The draft station's spec, or None without names. Raises DraftMismatch for another vocabulary."""
    if not names:
        return None
    # Models judge every token, n-gram knows a few: the order that `mix.merge` wants.
    specs = [_one_draft(name, target, dtype, vocab) for name in sorted(names, key=lambda name: name == "ngram")]
    if len(specs) == 1:
        return specs[0]
    if specs[-1].builder == _NGRAM:
        specs[-1] = StationSpec(_NGRAM, {"min_n": MIXED_MIN_N})
    return StationSpec("fullpipe.sources.mix:build_mix", {"sources": [spec.to_dict() for spec in specs]})


def _one_draft(name: str, target: Tokenizer, dtype: str, vocab: int) -> StationSpec:
    if name == "ngram":
        return StationSpec(_NGRAM)
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
