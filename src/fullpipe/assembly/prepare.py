"""Names and options become a description of every station: resolve, check, cut. Nothing heavy is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from fullpipe.cluster.partition import cut
from fullpipe.costs import Machine
from fullpipe.errors import DraftMismatch, UsageError
from fullpipe.hub import CATALOGUE, resolve
from fullpipe.methods import Method, make_method, options_of
from fullpipe.options import EngineOptions, Options
from fullpipe.stations.base import DraftLike, StageLike
from fullpipe.stations.drafts.names import module_folder
from fullpipe.stations.spec import StationSpec

if TYPE_CHECKING:
    from fullpipe.models.config import ModelConfig
    from fullpipe.models.files import ModelFiles
    from fullpipe.models.generation import Generation
    from fullpipe.models.tokens.tokenizer import Tokenizer

Say = Callable[[str], None]
_NGRAM = "fullpipe.stations.drafts.ngram:build_ngram"
# Beside a model, a match of a single token only displaces better guesses (docs/log).
MIXED_MIN_N = 2


def silent(line: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is to be served. ends: layers finished after each stage. vocab: number of real tokens. device:
    what stages and draft model compute on, "cpu" or "cuda:N". kv_pool_mib, kv_cache_dtype: see `PipelineOptions`.
    sharing: stations that share the memory of a machine; 0: all of them do. lora: the adapter that stages merge."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: str
    vocab: int
    ends: tuple[int, ...]
    device: str = "cpu"
    kv_pool_mib: int | None = None
    kv_cache_dtype: str = "auto"
    sharing: int = 0
    lora: Path | None = None

    @property
    def numbers(self) -> str:
        """In what it computes, as it is told."""
        kept = {"stored": "as they are stored", "int8": "quantised to int8", "int4": "quantised to int4"}
        return f"with weights {kept[self.dtype]}" if self.dtype in kept else f"in {self.dtype}"

    @property
    def placed(self) -> dict[str, Any]:
        """What a builder of a station is told of its device and its cache. The machine's memory is for all stages, and
        for a draft model."""
        sharing = self.sharing or len(self.ends) + 1
        where: dict[str, Any] = {"sharing": sharing} if self.device == "cpu" else {"device": self.device}
        if self.kv_pool_mib is not None:
            where["kv_pool_mib"] = self.kv_pool_mib
        if self.kv_cache_dtype != "auto":
            where["kv_cache_dtype"] = self.kv_cache_dtype
        return where


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before the first weight is read.

    options: with nothing left to be decided: the method, the draft and the dtype have names. stages, draft: how each
    station is built. drafts: who guesses, by name. max_model_len: tokens of prompt and answer together.
    generation: how the model's files want it sampled where a request says nothing.
    """

    options: Options
    target: Target
    stages: tuple[StationSpec, ...]
    draft: StationSpec | None
    drafts: tuple[str, ...]
    max_model_len: int
    generation: Generation

    @property
    def tokenizer(self) -> Tokenizer:
        return self.target.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of real tokens, padding of the matrices not counted."""
        return self.target.vocab

    @property
    def row_bytes(self) -> int:
        """Size of one row's hidden state on its way from stage to stage."""
        return self.target.config.sizes(2 if self.target.dtype == "bfloat16" else 4).row_bytes

    @property
    def distributed(self) -> bool:
        """Whether the stations are processes of their own."""
        return _distributed(self.options)

    @property
    def reads_taps(self) -> bool:
        """Whether the draft reads hidden states of the stages."""
        return any(module_folder(name) for name in self.drafts)

    def engine_options(self, asked: EngineOptions) -> EngineOptions:
        """What an engine may do with these stations: a draft that reads hidden states would never hear of rows that
        another request has computed, so with one prefixes are not shared. `unshared` says so."""
        return replace(asked, enable_prefix_caching=asked.enable_prefix_caching and not self.reads_taps)

    def cache_told(self, total: int) -> str:
        """What a user should know of a cache of so many slots."""
        from fullpipe.models.slice import cache_bytes

        target = self.target
        slot = target.config.num_layers * cache_bytes(target.config, target.dtype, target.device, target.kv_cache_dtype)
        return (f"the cache holds {total:,} tokens of all requests together: {total * slot >> 20:,} MiB over all "
                "stages of the model when it is full")

    def unshared(self, asked: EngineOptions) -> str | None:
        """Why prefixes are not shared although that is asked for; None where they are, or it is not."""
        if not (asked.enable_prefix_caching and self.reads_taps):
            return None
        return "prefixes are not shared: the draft module reads hidden states, which shared rows do not bring"

    def method(self, machine: Machine | None = None, name: str | None = None, **changes: Any) -> Method:
        """The method of the options; or another one, to which those of its options go that it has. changes: options
        that differ; None changes nothing. A draft of kind spd answers better when it is asked again about a node, so
        unless somebody has said otherwise it is. Raises UsageError as `make_method` does."""
        own, name = self.options.method, name or self.options.method.method
        values = {one.name: getattr(own, one.name) for one in fields(own) if one.name != "method"}
        if values["refresh"] is None:
            values["refresh"] = any(draft.startswith("spd:") for draft in self.drafts) or None
        values = options_of(name, **values)
        return make_method(name, machine=machine, **values | {k: v for k, v in changes.items() if v is not None})

    def build(self) -> tuple[list[StageLike], DraftLike | None]:
        """Every station, made in this process."""
        return [spec.build() for spec in self.stages], self.draft.build() if self.draft else None  # type: ignore


def prepare(options: Options, say: Say = silent) -> Prepared:
    """Find the models, check that they fit together and with the options, and cut the target into stages."""
    from fullpipe.models.dtypes import pick_dtype, pick_kv_cache_dtype
    from fullpipe.models.generation import sampling_of
    from fullpipe.models.tokens.loading import load_tokenizer, with_template

    name, asked, device = options.model.model, options.method, _device(options.pipeline.device)
    names = draft_names(name, options.model.draft)
    if asked.method == "auto":
        asked = replace(asked, method=_what_auto_means(names, distributed=_distributed(options)))
    check = make_method(asked.method, width=asked.width, depth=asked.depth, floor=asked.floor, refresh=asked.refresh,
                        prefill_share=asked.prefill_share)
    if check.needs_draft and not names:
        raise UsageError(f"the method {asked.method} needs a draft",
                         hint="Name one (a model, or ngram), or use the method pp.")
    if options.model.draft == "auto" and not check.needs_draft:
        names = []
    if names and not check.needs_draft:
        say(f"warning: the method {asked.method} asks no draft, so {options.model.draft} changes nothing")
    path = resolve(name)
    files = _opened(path, options, say)
    tokenizer = with_template(load_tokenizer(path), options.model.chat_template,
                              options.model.default_chat_template_kwargs, say)
    vocab = min(max(tokenizer.tokens) + 1, files.config.vocab_size)  # rows beyond it are padding
    # On hosts the plan cuts, later (`hosts.py`).
    asked_for = options.pipeline.stages if options.pipeline.hosts is None else None
    ends = stage_ends(files.config, 1 if asked_for is None else asked_for)
    dtype = pick_dtype(options.model.dtype, device, files, options.model.quantization)
    pick_kv_cache_dtype(options.pipeline.kv_cache_dtype, dtype, device)
    target = Target(path, files.config, tokenizer, dtype, vocab, ends, device, options.pipeline.kv_pool_mib,
                    options.pipeline.kv_cache_dtype, lora=options.model.adapter[1] if options.model.adapter else None)
    draft = draft_spec(names, target, say)
    length = _length(options.model.max_model_len, files.config.max_positions)
    stages = stage_specs(target, margins=options.model.margins, taps=taps_of(names))
    generation = sampling_of(path, options.model.generation_config)
    return Prepared(replace(options, method=asked), target, tuple(stages), draft, tuple(names), length,
                    generation)


def _opened(path: Path, options: Options, say: Say) -> ModelFiles:
    """The model, with the adapter that is to be merged into it."""
    from fullpipe.models.lora import open_merged
    from fullpipe.models.weights import open_model

    if options.model.adapter is None:
        return open_model(path)
    files = open_merged(path, options.model.adapter[1])
    if files.is_quantised and options.pipeline.hosts is not None:
        raise UsageError(f"{path.name} is quantised, and with a LoRA adapter its matrices become larger than hosts are "
                         "measured and planned with", param="lora",
                         hint="Name files of the model whose weights have 16 bits, or leave out `hosts`.")
    say(files.told())
    return files


def _device(name: str) -> str:
    """The device with its number. Raises UsageError where there is none."""
    if name == "cpu":
        return name
    from fullpipe.models.gpu.devices import find_device

    return find_device(name)


def _length(asked: int | None, most: int) -> int:
    """Tokens of prompt and answer together. Raises UsageError for more than the model was made for, as vLLM does."""
    if asked is not None and asked > most:
        raise UsageError(f"max_model_len is {asked}, and the model takes {most} tokens",
                         hint="Ask for no more than that, or leave it out. If the model is made for more, its files "
                              "must say so: max_position_embeddings or rope_scaling in config.json, context_length or "
                              "rope.scaling in a GGUF file.")
    return asked or most


def _distributed(options: Options) -> bool:
    return options.pipeline.stages is not None or options.pipeline.hosts is not None


def _what_auto_means(names: Sequence[str], *, distributed: bool) -> str:
    """Stages that work at the same time want to be filled. A single process does one thing after another: there a text
    that was guessed is verified at once, if guessing pays."""
    if not names:
        return "pp"
    return "fullpipe" if distributed or any(map(module_folder, names)) else "chain"


# ---- cutting and describing ------------------------------------------------------------------------------


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
                "is_last": k == len(target.ends) - 1, "dtype": target.dtype, "vocab": target.vocab, "margins": margins,
                **target.placed}
        if mine := [tap for tap in taps if first < tap <= last]:
            args["taps"] = mine
        if target.lora:
            args["lora"] = str(target.lora)
        specs.append(StationSpec("fullpipe.stations.target:build_stage", args))
        first = last
    return specs


def draft_names(model: str, draft: str) -> list[str]:
    """The drafts that `draft` stands for, in order; empty for "none"."""
    names = [name.strip() for name in default_draft(model, draft).split(",")]
    if names == ["none"]:
        return []
    if not all(names) or "none" in names:
        raise UsageError(f"{draft!r} names no draft",
                         hint="Use none, ngram, a model, spd:DIR, exit:DIR, or several with commas between.")
    return names


def default_draft(model: str, draft: str) -> str:
    """What "auto" means: n-gram, together with the model's partner where the catalogue has one."""
    if draft != "auto":
        return draft
    partner = CATALOGUE[model].draft if model in CATALOGUE else "ngram"
    return partner if partner == "ngram" else f"{partner},ngram"


def draft_spec(names: Sequence[str], target: Target, say: Say) -> StationSpec | None:
    """The draft station's spec, or None without names. Raises DraftMismatch for what does not fit the target."""
    if not names:
        return None
    # Models judge every token, n-gram knows a few: the order that `mix.merge` wants.
    specs = [_one_draft(name, target, say) for name in sorted(names, key=lambda name: name == "ngram")]
    if len(specs) == 1:
        return specs[0]
    if specs[-1].builder == _NGRAM:
        beside = specs[0].args.get("model", specs[-1].args["tokenizer"])  # of a model that the station reads anyway
        specs[-1] = StationSpec(_NGRAM, {"min_n": MIXED_MIN_N, "tokenizer": beside, "vocab": target.vocab})
    return StationSpec("fullpipe.stations.drafts.mix:build_mix", {"drafts": to_builtins(specs)})


def _one_draft(name: str, target: Target, say: Say) -> StationSpec:
    from fullpipe.models.tokens.loading import load_tokenizer
    from fullpipe.models.tokens.tokenizer import check_same_vocabulary

    if name == "ngram":
        return StationSpec(_NGRAM, {"tokenizer": [str(target.path.parent), target.path.name], "vocab": target.vocab})
    if folder := module_folder(name):
        return _module_spec(name, folder, target, say)
    path = resolve(name)
    check_same_vocabulary(target.tokenizer, load_tokenizer(path))
    return StationSpec("fullpipe.stations.drafts.model:build_draft_model",
                       {"model": str(path), "dtype": target.dtype, "vocab": target.vocab, **target.placed})


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
    if target.lora:
        say(f"warning: {name} was trained with the model without its LoRA adapter, so it will be right less often")
    same = config.verifier.quantisation == identity.quantisation
    return StationSpec("fullpipe.stations.drafts.module:build_spd", {
        "module": str(folder), "model": str(target.path), "dtype": target.dtype, "vocab": target.vocab, "parity": same})


def taps_of(names: Sequence[str]) -> list[int]:
    """After how many layers the stages are tapped for these sources, rising."""
    from fullpipe.models.spd_checkpoint import load_config

    folders = [folder for name in names if (folder := module_folder(name))]
    return sorted({bound for folder in folders for bound in load_config(folder).bounds if bound})
