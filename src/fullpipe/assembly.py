"""From names to a pipeline: resolve, check, cut, describe every station, start them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec import to_builtins

from fullpipe.cluster.partition import cut
from fullpipe.errors import DraftMismatch, UsageError
from fullpipe.hub import CATALOGUE, resolve
from fullpipe.models.config import ModelConfig
from fullpipe.models.tokenizer import Tokenizer, check_same_vocabulary
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.planning.cluster import Cluster, DraftCosts
from fullpipe.stations.drafts.names import module_folder
from fullpipe.stations.spec import StationSpec

Say = Callable[[str], None]
_NGRAM = "fullpipe.stations.drafts.ngram:build_ngram"
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
    from fullpipe.models.weights import open_model

    path = resolve(model)
    files = open_model(path)
    tokenizer = Tokenizer.load(path)
    vocab = min(max(tokenizer.tokens) + 1, files.config.vocab_size)  # rows beyond it are padding
    dtype = pick_dtype(dtype)
    wanted = needs_draft or draft != "auto"
    names = draft_names(model, draft) if wanted else []
    ends = stage_ends(files.config, stages)
    target = Target(path, files.config, tokenizer, dtype, vocab, ends)
    source = draft_spec(names, target, progress)
    if cluster is not None:
        DraftCosts(cluster, names).check()
    specs = stage_specs(target, margins=margins, taps=taps_of(names))
    if needs_draft and source is None:
        raise UsageError(f"the method {method} needs a draft",
                         hint="Name one (a model, or ngram), or use the method pp.")
    length = min(max_model_len or files.config.max_positions, files.config.max_positions)
    if cluster is not None and pipeline == "distributed":
        pace = cluster.pace(names)
    progress(f"loading {path.name} as {stages} stages in {dtype}")
    if pipeline == "distributed":
        from fullpipe.pipeline.workers import WorkersPipeline

        processes = WorkersPipeline(specs, source, links=links, pace=pace, threads=threads or 1, timeout=timeout,
                                        heartbeat_timeout=min(_HEARTBEAT_TIMEOUT_S, timeout),
                                        start_timeout=start_timeout)
        return Assembly(processes, tokenizer, "wall", length, vocab)
    row_bytes = files.config.sizes(2 if dtype == "bfloat16" else 4).row_bytes
    stations = _inprocess(specs, source, clock, costs, links, cluster, names, threads, row_bytes)
    return Assembly(stations, tokenizer, clock, length, vocab)


def _inprocess(specs: list[StationSpec], source: StationSpec | None, clock: Literal["virtual", "wall"], costs: str,
               links: Links, cluster: Cluster | None, names: list[str], threads: int | None,
               row_bytes: int) -> Pipeline:
    import torch

    from fullpipe.pipeline.inprocess import InProcessPipeline, measured_costs, unit_costs

    if threads is not None:
        torch.set_num_threads(threads)
    stages, draft = [spec.build() for spec in specs], source.build() if source else None
    if cluster is not None:
        return InProcessPipeline(stages, draft, costs=DraftCosts(cluster, names), links=cluster.links,  # type: ignore
                                 message_bytes=cluster.message_bytes, device_of=cluster.device_of)
    return InProcessPipeline(stages, draft, clock=clock, links=links,  # type: ignore[arg-type]
                             costs=unit_costs if costs == "unit" else measured_costs,
                             message_bytes=lambda rows: rows * row_bytes)


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is to be served. ends: layers finished after each stage. vocab: number of real tokens."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: str
    vocab: int
    ends: tuple[int, ...]


def stage_ends(config: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers finished after each stage; cut so that the slowest stage reads as few bytes as possible."""
    sizes = config.sizes(2)  # of any dtype: only their proportions matter
    # A lookup reads a few rows of the embedding, whatever its size: it costs memory, no time.
    return tuple(part.stop for part in cut([sizes.layer_bytes] * config.num_layers, sizes.head_bytes, 0.0, stages))


def stage_specs(target: Target, *, margins: bool, taps: Sequence[int] = ()) -> list[StationSpec]:
    """One spec per stage. taps: numbers of finished layers after which hidden states go to the draft station."""
    specs, first = [], 0
    for k, last in enumerate(target.ends):
        args = {"model": str(target.path), "first": first, "last": last, "is_first": k == 0,
                "is_last": k == len(target.ends) - 1, "dtype": target.dtype, "vocab": target.vocab, "margins": margins}
        if mine := [tap for tap in taps if first < tap <= last]:
            args["taps"] = mine
        specs.append(StationSpec("fullpipe.stations.target:build_stage", args))
        first = last
    return specs


def draft_names(model: str, draft: str) -> list[str]:
    """The sources that `draft` stands for, in order; empty for "none"."""
    names = [name.strip() for name in default_draft(model, draft).split(",")]
    if names == ["none"]:
        return []
    if not all(names) or "none" in names:
        raise UsageError(f"{draft!r} names no draft",
                         hint="Use none, ngram, a model, spd:DIR, exit:DIR, or several with commas between.")
    return names


def deepens(draft: str) -> bool:
    """Whether a source of this draft answers better when it is asked again about a node in flight."""
    return any(name.strip().startswith("spd:") for name in draft.split(","))


def default_draft(model: str, draft: str) -> str:
    """What "auto" means: n-gram, together with the model's partner where the catalogue has one."""
    if draft != "auto":
        return draft
    partner = CATALOGUE[model].draft if model in CATALOGUE else "ngram"
    return partner if partner == "ngram" else f"{partner},ngram"


def draft_spec(names: list[str], target: Target, say: Say) -> StationSpec | None:
    """The draft station's spec, or None without names. Raises DraftMismatch for what does not fit the target."""
    if not names:
        return None
    # Models judge every token, n-gram knows a few: the order that `mix.merge` wants.
    specs = [_one_draft(name, target, say) for name in sorted(names, key=lambda name: name == "ngram")]
    if len(specs) == 1:
        return specs[0]
    if specs[-1].builder == _NGRAM:
        specs[-1] = StationSpec(_NGRAM, {"min_n": MIXED_MIN_N})
    return StationSpec("fullpipe.stations.drafts.mix:build_mix", {"drafts": to_builtins(specs)})


def _one_draft(name: str, target: Target, say: Say) -> StationSpec:
    if name == "ngram":
        return StationSpec(_NGRAM)
    if folder := module_folder(name):
        return _module_spec(name, folder, target, say)
    path = resolve(name)
    check_same_vocabulary(target.tokenizer, Tokenizer.load(path))
    return StationSpec("fullpipe.stations.drafts.model:build_draft_model",
                       {"model": str(path), "dtype": target.dtype, "vocab": target.vocab})


def _module_spec(name: str, folder: Path, target: Target, say: Say) -> StationSpec:
    """Of a draft module that reads hidden states. What may cost acceptance is said; what cannot work raises
    DraftMismatch or UnsupportedModel."""
    from fullpipe.models.spd_checkpoint import check_fits, identity_of, load_config

    config, kind = load_config(folder), name.partition(":")[0]
    if config.kind != kind:
        raise DraftMismatch(f"{folder} holds a module of kind {config.kind}, not {kind}",
                            hint=f"Write {config.kind}:{folder}.")
    identity = identity_of(target.path, dtype=target.dtype, tokenizer=target.tokenizer)
    for warning in check_fits(config, target.config, identity, target.ends, target.dtype):
        say(f"warning: {warning}")
    same = config.verifier.quantisation == identity.quantisation
    return StationSpec("fullpipe.stations.drafts.module:build_spd", {
        "module": str(folder), "model": str(target.path), "dtype": target.dtype, "vocab": target.vocab, "parity": same})


def taps_of(names: list[str]) -> list[int]:
    """After how many layers the stages are tapped for these sources, rising."""
    from fullpipe.models.spd_checkpoint import load_config

    folders = [folder for name in names if (folder := module_folder(name))]
    return sorted({bound for folder in folders for bound in load_config(folder).bounds if bound})


def pick_dtype(dtype: str) -> str:
    """"auto" is bfloat16 where the processor has instructions for it, else float32."""
    if dtype != "auto":
        return dtype
    import torch

    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32"
