"""Draft modules of the SPD reference (`speculation_head_final.pt`, version 11) into checkpoints of ours.

The file is what `torch.save` makes of a dictionary with `state_dict` and `config` (notes, spd.md section 5). It is read
with `weights_only`: tensors and plain values, no code. It does not say how many heads, layers or norms there are; those
are the base model's, whose configuration is read beside it and compared with the tensors' shapes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullpipe.errors import DamagedModel, DraftMismatch, ModelNotFound, UnsupportedModel, UsageError
from fullpipe.models.config import FAMILIES
from fullpipe.models.hf_config import read_hf
from fullpipe.models.spd_checkpoint import (
    ModuleConfig,
    VerifierIdentity,
    as_stored,
    check_tensors,
    config_hash,
    hash_of,
    name_and_revision,
    save_checkpoint,
    tokenizer_hash,
)
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model

REFERENCE_SPAN = 2048  # its trainer's greatest text by default; the file does not say

# What the reference's version 11 writes or reads; what is not here is named in a warning.
_KEYS = frozenset({
    "aggr_feature_bound", "base_model_path", "draft_token_ids", "draft_vocab_size", "hidden_size", "model_type",
    "num_aggr_types", "num_spec_layers", "num_stages", "spec_init_from_base_layers", "spec_intermediate_size_fallback",
    "stage_layers", "trained_with_use_deepest", "version", "vocab_size",
})
_VERSION_10_KEY = "shallow_hidden_layer_indices"

# Base models whose draft modules have a gate on the attention's output and norms that scale by 1 + w.
_GATED = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
# Bases that we cannot run, but whose modules can be converted.
_FOREIGN = (*_GATED, "qwen3_moe")


@dataclass(frozen=True, slots=True)
class Converted:
    """A reference file in our terms. warnings: what a user should know before trusting it."""

    config: ModuleConfig
    tensors: dict[str, Tensor]
    draft_ids: Tensor | None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Base:
    """What is needed of the base model. intermediate: None where its config has none (mixtures of experts)."""

    model_type: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int | None
    vocab_size: int
    rms_eps: float
    identity: VerifierIdentity

    @property
    def gated(self) -> bool:
        return self.model_type in _GATED


def convert_file(file: Path, base: Path, out: Path, *, name: str | None = None,
                 stage_layers: Sequence[int] | None = None, train_span: int = REFERENCE_SPAN) -> Converted:
    """Read a reference file, write the checkpoint `out`. For the arguments and what is raised see `read_reference`;
    what writing raises, see `save_checkpoint`."""
    found = read_reference(file, base, name=name, stage_layers=stage_layers, train_span=train_span)
    save_checkpoint(out, found.config, found.tensors, found.draft_ids)
    return found


def read_reference(file: Path, base: Path, *, name: str | None = None, stage_layers: Sequence[int] | None = None,
                   train_span: int = REFERENCE_SPAN) -> Converted:
    """A module of the reference, checked against its base model.

    base: a GGUF file, or a folder with config.json and tokenizer.json; weights are not read. name: what to call it.
    stage_layers: layers of each stage; None: as the file says, else equal stages. train_span: tokens of its training
    texts, which the file does not say.

    Raises `ModelNotFound`; `UnsupportedModel` for another version; `DamagedModel` when the file is no such thing;
    `DraftMismatch` when it was made for another base model; `UsageError` when the stages cannot be known.
    """
    values, tensors, warnings = _load(file)
    _check_version(values, file)
    model = _base_of(base, name)
    _check_base(values, tensors, model, file)
    read = _Values(values, file)
    splits, uniform = _split(read, model.num_layers, stage_layers)
    bounds = _bounds(read, model.num_layers, splits, uniform, warnings)
    config = _config(read, tensors, model, bounds, splits, train_span)
    check_tensors(config, tensors, str(file))
    warnings += _remarks(values, tensors, config)
    return Converted(config, as_stored(tensors), _draft_ids(read, config), warnings)


# ---- the file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Values:
    """Reads the file's config; a wrongly typed value is a damaged file."""

    values: Mapping[str, Any]
    file: Path

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a count")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...] | None:
        """None when the key is not there."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise self.wrong(key, "a list of whole numbers")
        return tuple(value)

    def wrong(self, key: str, what: str) -> DamagedModel:
        return DamagedModel(f"the config in {self.file} has {self.values.get(key)!r} for {key}, where {what} is needed",
                            hint=_AGAIN)


_AGAIN = "Fetch the file again from where it was published."


def _load(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """config, state_dict, and warnings."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelNotFound(f"there is no file {file}", hint="Name a .pt file of the SPD reference.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = _reason(error)
        raise DamagedModel(f"{file} cannot be read as tensors and plain values: {reason}",
                           hint="It is damaged, or it holds Python objects, which could run anything and are never "
                                f"loaded. {_AGAIN}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("state_dict", "config")):
        raise DamagedModel(f"{file} is no draft module of the SPD reference: it has no state_dict and config",
                           hint="The reference calls it speculation_head_final.pt.")
    tensors = content["state_dict"]
    if strange := [name for name, value in tensors.items()
                   if not (isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point())]:
        raise DamagedModel(f"the state_dict in {file} has {strange[0]!r}, which is no tensor of numbers", hint=_AGAIN)
    extra = sorted(str(key) for key in content if key not in ("state_dict", "config"))
    return content["config"], dict(tensors), [f"{file.name} also holds {', '.join(extra)}, left out"] if extra else []


def _reason(error: Exception) -> str:
    """torch explains at length how to allow what it refused; the one line that says what that was is enough."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (named or lines or [type(error).__name__])[0][:200]


def _check_version(values: Mapping[str, Any], file: Path) -> None:
    version = values.get("version") or 11  # 0 and nothing mean 11 to the reference too
    if version == 10 or _VERSION_10_KEY in values:
        raise UnsupportedModel(
            f"{file} is of version 10 of the reference, whose rows and masks are others; only 11 can be converted",
            hint="Version 10 belongs to the archived branch of the reference (speculative_pipeline_decoding): run it "
                 "there, or train the module anew, as version 11 or with `fullpipe train spd`.")
    if version != 11:
        raise UnsupportedModel(f"{file} is of version {version!r} of the reference; only 11 can be converted",
                               hint="Train the module as version 11, or anew with `fullpipe train spd`.")


# ---- the base model --------------------------------------------------------------------------------------------


def _base_of(path: Path, name: str | None) -> _Base:
    """The labels' dtype and quantisation are the reference's (bfloat16, none), whatever is stored at `path`."""
    values = _hf_values(path)
    foreign = values is not None and values.get("model_type") in _FOREIGN
    tokens = tokenizer_hash(load_tokenizer(path))
    called, revision = name_and_revision(path)
    name = name or called
    if values is not None and foreign:
        return _foreign_base(values, name, revision, tokens, path)
    config = open_model(path).config if values is None else read_hf(values)
    identity = VerifierIdentity(name=name, revision=revision, architecture=FAMILIES[config.family].architecture,
                                config_hash=config_hash(config), tokenizer_hash=tokens, dtype="bfloat16")
    return _Base(config.family, config.num_layers, config.hidden, config.heads, config.kv_heads, config.head_dim,
                 config.intermediate, config.vocab_size, config.rms_eps, identity)


def _hf_values(path: Path) -> dict[str, Any] | None:
    """config.json of a folder, None for a file. Of a model that also sees images, the language model's part."""
    if not path.is_dir():
        return None
    file = path / "config.json"
    try:
        values: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ModelNotFound(f"there is no config.json in {path}", hint="Name the base model's own folder.") from error
    except (OSError, ValueError, TypeError) as error:
        raise DamagedModel(f"{file} cannot be read: {error}", hint="Fetch the base model again.") from error
    text = values.get("text_config")
    return values | text if isinstance(text, dict) else values


def _foreign_base(values: dict[str, Any], name: str, revision: str | None, tokens: str, path: Path) -> _Base:
    def count(key: str) -> int:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DamagedModel(f"config.json of {path} has {value!r} for {key}, where a count is needed",
                               hint="Fetch the base model again, or write the value that its authors mean.")
        return value

    facts = {key: values.get(key) for key in (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta")}
    architectures = values.get("architectures") or [str(values["model_type"])]
    identity = VerifierIdentity(name=name, revision=revision, architecture=str(architectures[0]),
                                config_hash=hash_of(facts), tokenizer_hash=tokens, dtype="bfloat16")
    heads = count("num_attention_heads")
    head_dim = count("head_dim") if values.get("head_dim") else count("hidden_size") // heads
    return _Base(str(values["model_type"]), count("num_hidden_layers"), count("hidden_size"), heads,
                 count("num_key_value_heads"), head_dim,
                 count("intermediate_size") if values.get("intermediate_size") else None, count("vocab_size"),
                 float(values.get("rms_norm_eps") or 1e-6), identity)


def _check_base(values: Mapping[str, Any], tensors: Mapping[str, Tensor], base: _Base, file: Path) -> None:
    """Sizes that the file states, and heads as the shapes of its first layer tell them."""
    prefix = "spec_layers.0.self_attn."
    first = {name.removeprefix(prefix): value.shape for name, value in tensors.items() if value.ndim}
    size = max(1, first.get("q_norm.weight", (base.head_dim,))[0])
    for what, theirs, ours in (
        ("a hidden size of", values.get("hidden_size"), base.hidden),
        ("a vocabulary of", values.get("vocab_size"), base.vocab_size),
        ("a head size of", size, base.head_dim),
        ("key-value heads numbering", first.get("k_proj.weight", (base.kv_heads * size,))[0] / size, base.kv_heads),
        ("heads numbering", first.get("o_proj.weight", (0, base.heads * size))[-1] / size, base.heads),
    ):
        if theirs != ours:
            shown = f"{theirs:g}" if isinstance(theirs, int | float) else repr(theirs)
            raise DraftMismatch(f"{file} is for a model with {what} {shown}, {base.identity.name} has {ours}",
                                hint=f"Name its base model with `model`. {_trained_for(values)}")
    own = values.get("model_type")
    if own is not None and _family(str(own)) != _family(base.model_type):
        raise DraftMismatch(f"{file} is for a model of type {own!r}, {base.identity.name} is of type "
                            f"{base.model_type!r}", hint=f"Name its base model with `model`. {_trained_for(values)}")


def _family(model_type: str) -> str:
    """The language model of one that sees images too is the same; a Mistral in a GGUF file is a llama."""
    return {"mistral": "llama"}.get(model_type, model_type.removesuffix("_text"))


def _trained_for(values: Mapping[str, Any]) -> str:
    return f"The file says that it was trained for {values.get('base_model_path') or 'nothing it names'}."


# ---- the config ------------------------------------------------------------------------------------------------


def _split(read: _Values, layers: int, given: Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
    """Layers finished after each stage, and whether all stages are equal."""
    count = read.integer("num_stages")
    counts = tuple(given) if given is not None else _stage_layers(read)
    if counts is None:
        if layers % count:
            raise UsageError(f"{read.file} does not say how its {count} stages divide {layers} layers",
                             hint="Say it with `stage_layers`, the number of layers of each stage, commas between.")
        counts = (layers // count,) * count
    if len(counts) != count or sum(counts) != layers or min(counts) < 0:
        raise UsageError(f"stages of {', '.join(map(str, counts))} layers are not {count} stages of {layers} layers, "
                         f"which {read.file} was trained for",
                         hint="`stage_layers` is the number of layers of each stage, commas between.")
    return tuple(accumulate(counts)), len(set(counts)) == 1


def _stage_layers(read: _Values) -> tuple[int, ...] | None:
    """`stage_layers`: a list, or a text with semicolons; None when the file has none."""
    value = read.values.get("stage_layers")
    if not isinstance(value, str):
        return read.integers("stage_layers")
    try:
        return tuple(int(part) for part in value.split(";") if part.strip()) or None
    except ValueError as error:
        raise read.wrong("stage_layers", "a number of layers for each stage") from error


def _bounds(read: _Values, layers: int, ends: tuple[int, ...], uniform: bool, warnings: list[str]) -> tuple[int, ...]:
    bounds = read.integers("aggr_feature_bound")
    if bounds is None:
        if not uniform:
            raise UsageError(f"{read.file} names no taps, and the reference's rule for them needs equal stages",
                             hint="Convert it with equal stages, as it was trained.")
        bounds = auto_bounds(layers, len(ends))
        warnings.append(f"the file names no taps; the reference's rule gives {', '.join(map(str, bounds))}")
    if (types := read.values.get("num_aggr_types", len(bounds))) != len(bounds):
        raise DamagedModel(f"the config in {read.file} has {types!r} row types for {len(bounds)} taps", hint=_AGAIN)
    if bounds and bounds[-1] == layers:
        warnings.append(f"it taps index {layers}, the last layer's output: of the prompt the reference gave it that "
                        "output after the final norm, in training and decoding before it. Here it is always before.")
    return bounds


def auto_bounds(layers: int, stages: int) -> tuple[int, ...]:
    """The taps of a file that names none (notes, spd.md section 1.2): 0, 1, 3 and 6 stages' layers, and all but the
    last layer. Raises `UsageError` where the reference has no answer either: with one or two stages."""
    each = layers // stages
    bounds = tuple(sorted({min(max(bound, 0), layers) for bound in (0, each, 3 * each, 6 * each, layers - 1)}))
    if len(bounds) > stages + 1:
        raise UsageError(f"the reference has no rule for the taps of {stages} stages, and the file names none",
                         hint="Only files with aggr_feature_bound in their config can be converted then.")
    return bounds


def _config(read: _Values, tensors: Mapping[str, Tensor], base: _Base, bounds: tuple[int, ...], ends: tuple[int, ...],
            train_span: int) -> ModuleConfig:
    return ModuleConfig(
        kind="spd", hidden=base.hidden, heads=base.heads, kv_heads=base.kv_heads, head_dim=base.head_dim,
        intermediate=base.intermediate or read.integer("spec_intermediate_size_fallback", default=9216),
        rms_eps=base.rms_eps,
        num_layers=read.integer("num_spec_layers", default=1), bounds=bounds, verifier_layers=base.num_layers,
        vocab_size=base.vocab_size, draft_vocab_size=read.integer("draft_vocab_size", default=base.vocab_size),
        stages=(ends,), train_span=train_span, verifier=base.identity, qk_norm=_has(tensors, "q_norm.weight"),
        zero_centred_norm=base.gated, attention_bias=_has(tensors, "q_proj.bias"),
        o_bias=_has(tensors, "o_proj.bias"), output_gate=base.gated,
        use_deepest=read.flag("trained_with_use_deepest", default=True),
        training={"source": "speculative_pipeline_decoding, version 11",
                  "base_model_path": str(read.values.get("base_model_path")),
                  "spec_init_from_base_layers": list(read.integers("spec_init_from_base_layers") or ())})


def _has(tensors: Mapping[str, Tensor], name: str) -> bool:
    return f"spec_layers.0.self_attn.{name}" in tensors


def _draft_ids(read: _Values, config: ModuleConfig) -> Tensor | None:
    ids = read.integers("draft_token_ids")
    if ids is None:
        if config.draft_vocab_size != config.vocab_size:
            raise DamagedModel(f"the config in {read.file} has a draft vocabulary of {config.draft_vocab_size} tokens "
                               "and does not say which", hint=_AGAIN)
        return None
    if len(ids) != config.draft_vocab_size or list(ids) != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < (
            config.vocab_size):
        raise DamagedModel(f"draft_token_ids in {read.file} are not {config.draft_vocab_size} rising token ids below "
                           f"{config.vocab_size}", hint=_AGAIN)
    return torch.tensor(ids, dtype=torch.int64)


def _remarks(values: Mapping[str, Any], tensors: Mapping[str, Tensor], config: ModuleConfig) -> list[str]:
    remarks = []
    if unknown := sorted(str(key) for key in values if key not in _KEYS):
        remarks.append(f"its config has keys that version 11 does not define, left out: {', '.join(unknown)}")
    path = values.get("base_model_path")
    if isinstance(path, str) and Path(path).name.lower() != Path(config.verifier.name).name.lower():
        remarks.append(f"it says that it was trained for {path}; you named {config.verifier.name}")
    if rounded := {value.dtype for value in tensors.values() if value.ndim > 1} - {torch.bfloat16}:
        remarks.append(f"its matrices are {', '.join(sorted(str(one).removeprefix('torch.') for one in rounded))}, "
                       "rounded to bfloat16")
    try:
        config.check_decodable()
    except UnsupportedModel as error:
        remarks.append(f"it can be converted, not yet run: {error.message}")
    return remarks
