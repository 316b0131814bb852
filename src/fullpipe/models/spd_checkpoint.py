"""Checkpoints of draft modules (SPD and early exit): a folder in the manner of vLLM's speculators.

    config.json                  shape, taps, stages, and whom it was trained for; see `ModuleConfig`
    model.safetensors            matrices in bfloat16, vectors in bfloat16 or float32; no pickle
    parity_fixture.safetensors   a few rows and the logits they must give; see `ParityFixture`; may be missing

A module is bound to one target: its vocabulary, its layers, even its quantisation (a module trained on labels of bf16
weights agreed with a 4-bit target in a fifth of the cases only; notes, field.md A-bis). So the file says whom it was
trained for, and `check_fits` compares before anything runs.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fullpipe.errors import DamagedModel, DraftMismatch, ModelNotFound, UnsupportedModel, UsageError
from fullpipe.models.config import FAMILIES, ModelConfig
from fullpipe.models.gguf_file import read_tensors
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.models.weights import open_model

CONFIG, WEIGHTS, FIXTURE = "config.json", "model.safetensors", "parity_fixture.safetensors"
VERSION = 1
TAP_CONVENTION = ("A tap index is the number of decoder layers finished: 0 is the token's embedding, k the output of "
                  "layer k - 1 (counted from 0), before the final norm. Row type j reads the first j + 1 bounds, "
                  "concatenated in rising order.")

Kind = Literal["spd", "exit"]
_ARCHITECTURES: dict[Kind, str] = {"spd": "SpdSpeculator", "exit": "ExitSpeculator"}

# Keys that Hugging Face's tools write into every config.json; they change nothing here.
_TOLERATED = frozenset({"_name_or_path", "auto_map", "dtype", "model_type", "speculators_version", "torch_dtype",
                        "transformers_version"})
_TOLERATED_OF_LAYERS = _TOLERATED | {"initializer_range", "max_position_embeddings", "rope_parameters", "rope_scaling",
                                     "rope_theta", "use_cache"}

_LEFT_BEHIND = 3600.0  # seconds; no checkpoint takes so long to write

_MAKE_AGAIN = "Copy or convert the checkpoint again, or train it anew."
_ANOTHER = "Name a module that was trained for this model, or train one: `fullpipe train spd`."


# ---- the config ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierIdentity:
    """The model that a module was trained for, or that it is to work for.

    revision: commit on Hugging Face, or None. config_hash, tokenizer_hash: see the functions of these names.
    dtype: what it computed the labels in ("bfloat16"); None: unknown. quantisation: type of the stored weights
    ("Q4_1"); None: not quantised.
    """

    name: str
    architecture: str
    config_hash: str
    tokenizer_hash: str
    revision: str | None = None
    dtype: str | None = None
    quantisation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleConfig:
    """Shape of a draft module, and what it was trained for.

    hidden .. rms_eps: of its decoder layers. num_layers: how many there are. RoPE is the verifier's, not stored.
    qk_norm: RMS norm over each head of query and key. zero_centred_norm: norms scale by 1 + w. attention_bias: query,
    key and value have a bias; o_bias: the attention's output too. output_gate: q_proj is twice as wide, a query and a
    gate for each head.
    bounds: tap indices, rising (`TAP_CONVENTION`); of an exit module one. verifier_layers: the verifier's.
    vocab_size: rows of the verifier's head; draft_vocab_size: of the module's. shared_head: it has no head of its own
    and uses the verifier's rows of the draft vocabulary, frozen.
    stages: each split of the verifier that it was trained for, as the layers finished after each stage.
    use_deepest: completed tokens show all they have, whatever their distance. train_span: tokens of a training text.
    training: free summary (JSON values).

    Raises `DamagedModel` when the values make no sense together.
    """

    kind: Kind
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rms_eps: float
    num_layers: int
    bounds: tuple[int, ...]
    verifier_layers: int
    vocab_size: int
    draft_vocab_size: int
    stages: tuple[tuple[int, ...], ...]
    train_span: int
    verifier: VerifierIdentity
    qk_norm: bool = False
    zero_centred_norm: bool = False
    attention_bias: bool = False
    o_bias: bool = False
    output_gate: bool = False
    shared_head: bool = False
    use_deepest: bool = True
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for ok, what in (
            (self.num_layers >= (self.kind == "spd"), f"{self.num_layers} decoder layers"),
            (self.kv_heads >= 1 and self.heads % self.kv_heads == 0,
             f"{self.heads} heads cannot share {self.kv_heads} key-value heads"),
            (self.head_dim % 2 == 0, f"an odd head size of {self.head_dim}"),
            (self.draft_vocab_size <= self.vocab_size,
             f"a draft vocabulary of {self.draft_vocab_size} tokens out of {self.vocab_size}"),
            (_rises(self.bounds) and self._bounds_fit(), f"the bounds {_listed(self.bounds)} of a module of kind "
             f"{self.kind} for {self.verifier_layers} layers"),
            (self.stages and all(self._is_split(ends) for ends in self.stages),
             f"stages that end after {' or '.join(map(_listed, self.stages)) or 'nothing'} of {self.verifier_layers} "
             "layers"),
        ):
            if not ok:
                raise DamagedModel(f"the draft module's configuration makes no sense: {what}", hint=_MAKE_AGAIN)

    def _bounds_fit(self) -> bool:
        if not self.bounds or self.bounds[-1] > self.verifier_layers:
            return False
        return self.bounds[0] == 0 if self.kind == "spd" else len(self.bounds) == 1 and self.bounds[0] >= 1

    def _is_split(self, ends: tuple[int, ...]) -> bool:
        return list(ends) == sorted(ends) and bool(ends) and ends[0] >= 0 and ends[-1] == self.verifier_layers

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, named as in the reference's version 11 (notes, spd.md section 5.1)."""
        hidden = self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            f"aggr_projs.{k}.weight": (hidden, (k + 1) * hidden) for k in range(len(self.bounds))}
        for layer in range(self.num_layers):
            shapes |= {f"spec_layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        return shapes if self.shared_head else shapes | {"lm_head.weight": (self.draft_vocab_size, hidden)}

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, wide, narrow = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        queries = wide * (2 if self.output_gate else 1)
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden), "self_attn.k_proj.weight": (narrow, hidden),
            "self_attn.v_proj.weight": (narrow, hidden), "self_attn.o_proj.weight": (hidden, wide),
            "mlp.gate_proj.weight": (self.intermediate, hidden), "mlp.up_proj.weight": (self.intermediate, hidden),
            "mlp.down_proj.weight": (hidden, self.intermediate)}
        if self.qk_norm:
            shapes |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        if self.attention_bias:
            shapes |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (narrow,),
                       "self_attn.v_proj.bias": (narrow,)}
        return shapes | {"self_attn.o_proj.bias": (hidden,)} if self.o_bias else shapes

    def check_decodable(self) -> None:
        """Raises `UnsupportedModel` naming what `spd_module.py` does not compute."""
        for has, what in ((self.output_gate, "a gate on the attention's output, as Qwen3.5 has it"),
                          (self.zero_centred_norm, "zero-centred norms, as Qwen3.5 has them"),
                          (self.o_bias, "a bias on the attention's output")):
            if has:
                raise UnsupportedModel(f"draft modules with {what}, cannot be run yet",
                                       hint="Use a module of a dense Llama, Mistral, Qwen2 or Qwen3 model.")

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, in the shape that speculators gives to its own."""
        proposal = {"proposal_type": "greedy", "speculative_tokens": max(map(len, self.stages)),
                    "verifier_accept_k": 1, "accept_tolerance": 0.0}
        verifier = self.verifier
        return {
            "architectures": [_ARCHITECTURES[self.kind]],
            "speculators_model_type": self.kind,
            "checkpoint_version": VERSION,
            "speculators_config": {
                "algorithm": self.kind, "proposal_methods": [proposal], "default_proposal_method": "greedy",
                "verifier": {
                    "name_or_path": verifier.name, "architectures": [verifier.architecture],
                    "revision": verifier.revision, "config_hash": verifier.config_hash,
                    "tokenizer_hash": verifier.tokenizer_hash, "dtype": verifier.dtype,
                    "quantisation": verifier.quantisation, "num_hidden_layers": self.verifier_layers}},
            "transformer_layer_config": {
                "hidden_size": self.hidden, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim, "intermediate_size": self.intermediate, "rms_norm_eps": self.rms_eps,
                "hidden_act": "silu", "attention_bias": self.attention_bias, "attention_output_bias": self.o_bias,
                "attention_output_gate": self.output_gate, "qk_norm": self.qk_norm,
                "zero_centred_norm": self.zero_centred_norm, "vocab_size": self.vocab_size},
            "num_spec_layers": self.num_layers,
            "target_hidden_size": self.hidden,
            "draft_vocab_size": self.draft_vocab_size,
            "shared_head": self.shared_head,
            "tie_word_embeddings": False,
            "tap_convention": TAP_CONVENTION,
            "bounds": list(self.bounds),
            "aux_hidden_state_layer_ids": list(self.bounds),
            "stages": [{"num_stages": len(ends), "ends": list(ends)} for ends in self.stages],
            "use_deepest": self.use_deepest,
            "train_span": self.train_span,
            "training": self.training,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = CONFIG) -> ModuleConfig:
        """From what `to_dict` gives; `where` names the file in errors.

        Raises `UnsupportedModel` for another kind of speculator, another version, or a key that nobody knows;
        `DamagedModel` naming the field that is missing or wrong.
        """
        file = _parsed(values, where)
        layers, verifier = file.transformer_layer_config, file.speculators_config.verifier
        return cls(
            kind=file.speculators_model_type, hidden=layers.hidden_size, heads=layers.num_attention_heads,
            kv_heads=layers.num_key_value_heads, head_dim=layers.head_dim, intermediate=layers.intermediate_size,
            rms_eps=layers.rms_norm_eps, num_layers=file.num_spec_layers, bounds=tuple(file.bounds),
            verifier_layers=verifier.num_hidden_layers, vocab_size=layers.vocab_size,
            draft_vocab_size=file.draft_vocab_size, stages=tuple(tuple(split.ends) for split in file.stages),
            train_span=file.train_span, qk_norm=layers.qk_norm, zero_centred_norm=layers.zero_centred_norm,
            attention_bias=layers.attention_bias, o_bias=layers.attention_output_bias,
            output_gate=layers.attention_output_gate, shared_head=file.shared_head, use_deepest=file.use_deepest,
            training=file.training,
            verifier=VerifierIdentity(
                name=verifier.name_or_path, architecture=verifier.architectures[0], revision=verifier.revision,
                config_hash=verifier.config_hash, tokenizer_hash=verifier.tokenizer_hash, dtype=verifier.dtype,
                quantisation=verifier.quantisation))


_Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Verifier(_Part):
    name_or_path: str
    architectures: Annotated[list[str], Field(min_length=1, max_length=1)]
    revision: str | None
    config_hash: str
    tokenizer_hash: str
    dtype: str | None
    quantisation: str | None
    num_hidden_layers: _Count


class _Speculators(_Part):
    algorithm: str
    proposal_methods: list[dict[str, Any]]
    default_proposal_method: str
    verifier: _Verifier


class _Layers(_Part):
    hidden_size: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Count
    intermediate_size: _Count
    rms_norm_eps: Annotated[float, Field(ge=0)]
    hidden_act: Literal["silu"]
    attention_bias: bool
    attention_output_bias: bool
    attention_output_gate: bool
    qk_norm: bool
    zero_centred_norm: bool
    vocab_size: _Count


class _Stages(_Part):
    num_stages: _Count
    ends: list[int]


class _File(_Part):
    """config.json. What stands in it twice, for readers of other tools, must agree."""

    architectures: list[str]
    speculators_model_type: Kind
    checkpoint_version: Literal[1]
    speculators_config: _Speculators
    transformer_layer_config: _Layers
    num_spec_layers: Annotated[int, Field(ge=0)]
    target_hidden_size: _Count
    draft_vocab_size: _Count
    shared_head: bool
    tie_word_embeddings: Literal[False] = False
    tap_convention: str
    bounds: list[int]
    aux_hidden_state_layer_ids: list[int]
    stages: list[_Stages]
    use_deepest: bool
    train_span: _Count
    training: dict[str, Any]

    def contradiction(self) -> str | None:
        for differs, what in (
            (self.speculators_config.algorithm != self.speculators_model_type, "speculators_config.algorithm"),
            (self.target_hidden_size != self.transformer_layer_config.hidden_size, "target_hidden_size"),
            (self.aux_hidden_state_layer_ids != self.bounds, "aux_hidden_state_layer_ids"),
            (any(split.num_stages != len(split.ends) for split in self.stages), "stages.num_stages"),
        ):
            if differs:
                return what
        return None


def _parsed(values: Mapping[str, Any], where: str) -> _File:
    kind, version = values.get("speculators_model_type"), values.get("checkpoint_version")
    if kind not in _ARCHITECTURES:
        raise UnsupportedModel(f"{where} describes no draft module (speculators_model_type is {kind!r})",
                               hint=f"Draft modules are of the kinds {', '.join(_ARCHITECTURES)}.")
    if version != VERSION:
        raise UnsupportedModel(f"{where} has checkpoint_version {version!r}; this Fullpipe reads {VERSION}",
                               hint="Use the version of Fullpipe that wrote it, or convert or train it anew.")
    kept = {key: value for key, value in values.items() if key not in _TOLERATED}
    if isinstance(layers := kept.get("transformer_layer_config"), Mapping):
        kept["transformer_layer_config"] = {k: v for k, v in layers.items() if k not in _TOLERATED_OF_LAYERS}
    try:
        file = _File.model_validate(kept)
    except ValidationError as error:
        raise _invalid(error, where) from error
    if file.tap_convention != TAP_CONVENTION:
        raise UnsupportedModel(f"{where} counts taps in another way: {file.tap_convention!r}",
                               hint=f"Known is: {TAP_CONVENTION}")
    if (what := file.contradiction()) is not None:
        raise DamagedModel(f"{where} contradicts itself: {what} does not agree with the rest", hint=_MAKE_AGAIN)
    return file


def _invalid(error: ValidationError, where: str) -> DamagedModel | UnsupportedModel:
    """The first thing that is wrong, an unknown key before all: it may be why others are missing."""
    errors = error.errors(include_url=False)
    unknown = [_dotted(one["loc"]) for one in errors if one["type"] == "extra_forbidden"]
    if unknown:
        return UnsupportedModel(f"{where} has keys that this Fullpipe does not know: {', '.join(unknown)}",
                                hint="They may change what the module computes. Remove them if they do not.")
    first = errors[0]
    said = first["msg"].removeprefix("Value error, ")
    return DamagedModel(f"{where} is wrong at {_dotted(first['loc'])}: {said}", hint=_MAKE_AGAIN)


def _dotted(place: Iterable[int | str]) -> str:
    return ".".join(map(str, place))


def _rises(values: Sequence[int]) -> bool:
    return all(low < high for low, high in itertools.pairwise(values))


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


# ---- files -----------------------------------------------------------------------------------------------------


def as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as `save_checkpoint` writes them: matrices rounded to bfloat16, vectors as they are (float16 vectors
    become float32). Logits of a parity fixture must be made of these."""
    return {name: value.detach().to("cpu", _stored_dtype(value), copy=True).contiguous()
            for name, value in tensors.items()}


def _stored_dtype(value: Tensor) -> torch.dtype:
    return torch.bfloat16 if value.ndim > 1 or value.dtype == torch.bfloat16 else torch.float32


def save_checkpoint(folder: Path, config: ModuleConfig, tensors: Mapping[str, Tensor],
                    draft_ids: Tensor | None = None, fixture: ParityFixture | None = None) -> None:
    """Write a checkpoint. `folder` holds the old one whole or the new one whole, whatever happens on the way.

    tensors: as `config.tensor_shapes` lists them, any float dtype; see `as_stored`. draft_ids: int64 [draft vocab],
    rising: the verifier's token for each row of the head; None: the whole vocabulary. Other files in the folder stay;
    nobody may write there meanwhile. A killed process may leave `.NAME.*` beside the folder; a later call removes it.

    Raises `UsageError` when the folder holds something else, or cannot be written (a full disk); `DamagedModel` when
    tensors do not fit the config or are not finite.
    """
    folder = Path(os.path.realpath(folder))
    _refuse_foreign(folder)
    stored = as_stored(tensors)
    check_tensors(config, stored, "the draft module")
    files = {CONFIG: (json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
             WEIGHTS: save_safetensors(stored | _vocabulary(config, draft_ids), metadata={"format": "pt"})}
    if fixture is not None:
        fixture.check(config, "the draft module's parity fixture")
        files[FIXTURE] = save_safetensors(fixture.to_tensors())
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(3)}")
    try:
        fresh.mkdir(parents=True)
        for name, content in files.items():
            _write(fresh / name, content)
        _sync(fresh)
        _put_in_place(fresh, folder)
        _sync(folder.parent)
        _sweep(folder)
    except OSError as error:
        raise UsageError(f"cannot write the checkpoint {folder}: {error.strerror or error}",
                         hint="Name a folder that is writable and has room. What was there is as it was.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # by now nothing, or what was replaced


def load_config(folder: Path) -> ModuleConfig:
    """config.json alone. Raises `ModelNotFound`, `UnsupportedModel`, `DamagedModel`."""
    file = Path(folder) / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFound(f"there is no draft module in {folder}: {CONFIG} is missing",
                            hint="Name a folder that `fullpipe train` or `fullpipe convert` wrote.") from error
    except (OSError, ValueError) as error:
        raise DamagedModel(f"{file} cannot be read: {error}", hint=_MAKE_AGAIN) from error
    if not isinstance(values, dict):
        raise DamagedModel(f"{file} holds no JSON object", hint=_MAKE_AGAIN)
    return ModuleConfig.from_dict(values, str(file))


def load_checkpoint(folder: Path) -> tuple[ModuleConfig, dict[str, Tensor], Tensor | None]:
    """Config, tensors as stored, and draft_ids: int64 [draft vocab], or None for the whole vocabulary.

    Raises `ModelNotFound`; `UnsupportedModel`; `DamagedModel` naming the file, and every tensor that is missing, not
    known, or of another shape.
    """
    config, file = load_config(folder), Path(folder) / WEIGHTS
    tensors = _read_tensors(file)
    draft_ids = _take_draft_ids(config, tensors, file)
    check_tensors(config, tensors, str(file))
    return config, tensors, draft_ids


def _read_tensors(file: Path) -> dict[str, Tensor]:
    # Read, not mapped: a file that is cut short while it is in use must not end the process.
    try:
        tensors: dict[str, Tensor] = load_safetensors(file.read_bytes())
        return tensors
    except FileNotFoundError as error:
        raise DamagedModel(f"{file} is missing", hint=_MAKE_AGAIN) from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DamagedModel(f"{file} is damaged: {error}", hint=_MAKE_AGAIN) from error


def check_tensors(config: ModuleConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises `DamagedModel` unless the tensors are those of the config, and finite."""
    wanted = config.tensor_shapes()
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} is not known" for name in tensors if name not in wanted]
    faults += [f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
               for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape]
    faults = faults or [f"{name} holds numbers that are not finite" for name, value in tensors.items()
                        if not (value.is_floating_point() and math.isfinite(value.sum(dtype=torch.float64)))]
    if faults:
        raise DamagedModel(f"the tensors of {where} are not those of its configuration: {'; '.join(faults)}",
                           hint=_MAKE_AGAIN)


def _vocabulary(config: ModuleConfig, draft_ids: Tensor | None) -> dict[str, Tensor]:
    """d2t int64 [draft vocab]: token id minus row (an offset, as in speculators). t2d bool [vocab]: has a row."""
    if draft_ids is None:
        assert config.draft_vocab_size == config.vocab_size, "a part of the vocabulary needs draft_ids"
        return {}
    ids = draft_ids.detach().to("cpu", torch.int64)
    assert _are_draft_ids(config, ids), "draft_ids must rise, in the vocabulary, one for each row of the head"
    has_row = torch.zeros(config.vocab_size, dtype=torch.bool)
    has_row[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": has_row}


def _are_draft_ids(config: ModuleConfig, ids: Tensor) -> bool:
    return (ids.shape == (config.draft_vocab_size,) and bool((ids.diff() > 0).all())
            and int(ids[0]) >= 0 and int(ids[-1]) < config.vocab_size)


def _take_draft_ids(config: ModuleConfig, tensors: dict[str, Tensor], file: Path) -> Tensor | None:
    """Removes d2t and t2d from `tensors`."""
    offsets, has_row = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if offsets is None and has_row is None and config.draft_vocab_size == config.vocab_size:
        return None
    if offsets is None or has_row is None:
        raise DamagedModel(f"{file} lacks d2t or t2d, which say what the {config.draft_vocab_size} rows of the head "
                           f"stand for", hint=_MAKE_AGAIN)
    if offsets.dtype == torch.int64 and offsets.shape == (config.draft_vocab_size,):
        ids = offsets + torch.arange(len(offsets))
        if (_are_draft_ids(config, ids) and has_row.dtype == torch.bool and has_row.shape == (config.vocab_size,)
                and torch.equal(has_row.nonzero().flatten(), ids)):
            return ids
    raise DamagedModel(f"the draft vocabulary in {file} makes no sense: d2t must be offsets of rising token ids, and "
                       "t2d mark the same tokens", hint=_MAKE_AGAIN)


def _refuse_foreign(folder: Path) -> None:
    """Raises `UsageError` where weights would be replaced that are not a draft module's."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; a checkpoint is a folder", hint="Name a new folder.")
    if not any((folder / name).exists() for name in (CONFIG, WEIGHTS)):
        return
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["speculators_model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind not in _ARCHITECTURES:
        raise UsageError(f"{folder} holds a model that is no draft module; it is not replaced",
                         hint="Name another folder, or empty this one.")


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Names in a folder are safe only when the folder itself is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(fresh, folder)
    elif not (folder / CONFIG).exists():
        # What makes the folder a checkpoint comes last.
        for name in (FIXTURE, WEIGHTS, CONFIG):
            if (fresh / name).exists():
                os.replace(fresh / name, folder / name)
        _sync(folder)
    else:
        _keep_others(folder, fresh)
        if not _exchange(fresh, folder):
            _exchange_in_steps(fresh, folder)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside `folder`. Only what is old: the rest may be another's, at work."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*-*"):
        if time.time() - left.stat().st_mtime > _LEFT_BEHIND:
            shutil.rmtree(left, ignore_errors=True)


def _keep_others(folder: Path, fresh: Path) -> None:
    """Give the files of `folder` that are no part of a checkpoint a second name in `fresh`."""
    ours = {CONFIG, WEIGHTS, FIXTURE}
    shutil.copytree(folder, fresh, symlinks=True, copy_function=os.link, dirs_exist_ok=True,
                    ignore=lambda place, names: ours & set(names) if Path(place) == folder else ())
    _sync(fresh)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, by Linux's renameat2, which Python does not offer. False: cannot be had here."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL):
        return False  # an old kernel, or a file system without it
    raise OSError(number, os.strerror(number), str(other))


def _exchange_in_steps(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`. A kill between the two steps leaves both, whole, under hidden names."""
    aside = fresh.with_name(f"{fresh.name}.replaced")
    os.rename(folder, aside)
    try:
        os.rename(fresh, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


# ---- parity ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParityFixture:
    """One forward over a few rows, and what it must say. It shows that another program, or this one a year later,
    still computes what was trained.

    features: by row type k, float32 [rows of this type, k + 1, hidden]; rows: by row type, int64 [rows of this type],
    where they stand in the forward. positions: int64 [rows]. mask: bool [rows, rows], True = attend, in every layer.
    queries: int64 [q], the rows that are asked. logits: float32 [q, draft vocab], by the stored weights in float32 and
    with the verifier's final norm (and rows of its head, if shared).
    """

    features: dict[int, Tensor]
    rows: dict[int, Tensor]
    positions: Tensor
    mask: Tensor
    queries: Tensor
    logits: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        named = {"positions": self.positions, "mask": self.mask, "queries": self.queries, "logits": self.logits}
        named |= {f"features.{kind}": value for kind, value in self.features.items()}
        named |= {f"rows.{kind}": value for kind, value in self.rows.items()}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ParityFixture:
        """Raises KeyError or ValueError when there are others than `to_tensors` gives."""
        kinds = [int(name.removeprefix("features.")) for name in tensors if name.startswith("features.")]
        named = {"positions", "mask", "queries", "logits", *(f"{part}.{kind}" for part in ("features", "rows")
                                                              for kind in kinds)}
        if extra := sorted(set(tensors) - named):
            raise ValueError(f"{extra[0]} is not known")
        return cls({kind: tensors[f"features.{kind}"] for kind in kinds},
                   {kind: tensors[f"rows.{kind}"] for kind in kinds},
                   tensors["positions"], tensors["mask"], tensors["queries"], tensors["logits"])

    def check(self, config: ModuleConfig, where: str) -> None:
        """Raises `DamagedModel` unless shapes and types are those of a forward of this module."""
        count, asked = self.positions.numel(), self.queries.numel()
        fits = [
            self.positions.shape == (count,), self.queries.shape == (asked,), asked > 0, bool(self.rows),
            _is(self.mask, torch.bool, (count, count)),
            _is(self.logits, torch.float32, (asked, config.draft_vocab_size)),
            self.features.keys() == self.rows.keys() and set(self.rows) <= set(range(len(config.bounds))),
            *(_is(value, torch.float32, (self.rows[kind].numel(), kind + 1, config.hidden))
              for kind, value in self.features.items() if kind in self.rows),
            all(value.dtype == torch.int64 for value in (self.positions, self.queries, *self.rows.values())),
        ]
        if not all(fits) or not self._covers(count):
            raise DamagedModel(f"{where} does not fit the module's configuration", hint=_MAKE_AGAIN)

    def _covers(self, count: int) -> bool:
        """Every row has one type, and only rows are asked."""
        placed = torch.cat([value.flatten() for value in self.rows.values()]).sort().values
        return torch.equal(placed, torch.arange(count)) and bool(
            ((self.queries >= 0) & (self.queries < count)).all())


def load_fixture(folder: Path) -> ParityFixture | None:
    """The checkpoint's parity fixture, checked against its config; None when it has none. Raises `DamagedModel`."""
    file = Path(folder) / FIXTURE
    if not file.exists():
        return None
    try:
        fixture = ParityFixture.from_tensors(_read_tensors(file))
    except (KeyError, ValueError) as error:
        raise DamagedModel(f"{file} is no parity fixture: {error}", hint=_MAKE_AGAIN) from error
    fixture.check(load_config(folder), str(file))
    return fixture


def check_parity(folder: Path, forward: Callable[[ParityFixture], Tensor], *, tolerance: float = 1e-3) -> float | None:
    """Run the checkpoint's fixture through `forward` (which returns logits [q, draft vocab]).

    tolerance: greatest difference of a logit that is let pass, as a share of the greatest expected one (or of 1, if
    that is less). 1e-3 is for float32; bfloat16 has 8 bits, so 0.05 over several layers.

    Returns the greatest share met, or None when there is no fixture. Raises `DamagedModel` when it is more than the
    tolerance, or not a number.
    """
    fixture = load_fixture(folder)
    if fixture is None:
        return None
    found = forward(fixture).detach().to("cpu", torch.float32)
    if found.shape != fixture.logits.shape:
        raise DamagedModel(f"the parity fixture of {folder} expects logits {list(fixture.logits.shape)}, the module "
                           f"gives {list(found.shape)}", hint=_MAKE_AGAIN)
    scale = max(1.0, fixture.logits.abs().max().item())
    share = (found - fixture.logits).abs().max().item() / scale
    if not share <= tolerance:  # also when it is not a number
        raise DamagedModel(
            f"{folder} does not compute what it did when it was made: a logit differs by {share:.2g} of the greatest, "
            f"more than {tolerance:.2g}",
            hint="Either its weights were altered, or the target (its final norm, its head) is another. "
                 "Fetch both again.")
    return share


def _is(value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return value.dtype == dtype and value.shape == shape


# ---- whom it is for --------------------------------------------------------------------------------------------

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def identity_of(path: Path, *, name: str | None = None, dtype: str | None = None,
                tokenizer: Tokenizer | None = None) -> VerifierIdentity:
    """Who the model at `path` (a GGUF file or safetensors folder) is. Reads headers and the tokenizer: about a second.

    name: what to call it; None: by its path, "org/model" in Hugging Face's cache. dtype: what it computes in; None:
    as it is stored, or unknown when that is quantised. tokenizer: the model's, if it is loaded already.

    Raises what opening it raises: `ModelNotFound`, `UnsupportedModel`, `DamagedModel`.
    """
    path = Path(path)
    config = open_model(path).config
    stored = _dominant_type(path)
    called, revision = name_and_revision(path)
    return VerifierIdentity(
        name=name or called, revision=revision, architecture=FAMILIES[config.family].architecture,
        config_hash=config_hash(config), tokenizer_hash=tokenizer_hash(tokenizer or load_tokenizer(path)),
        dtype=dtype or _FLOATS.get(stored), quantisation=None if stored in _FLOATS else stored)


def config_hash(config: ModelConfig) -> str:
    """SHA-256 over what decides the arithmetic, whatever file it came from.

    Numbers that are not counts go in with four digits: GGUF keeps them in single precision.
    """
    facts = {"layers": config.num_layers, "hidden": config.hidden, "heads": config.heads, "kv_heads": config.kv_heads,
             "head_dim": config.head_dim, "intermediate": config.intermediate, "vocab": config.vocab_size,
             "rms_eps": f"{config.rms_eps:.3e}", "qkv_bias": config.qkv_bias, "o_bias": config.o_bias,
             "qk_norm": config.qk_norm, "rope": [f"{frequency:.3e}" for frequency in config.rope.inv_freq],
             "rope_factor": f"{config.rope.attention_factor:.3e}"}
    return hash_of(facts)


def hash_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 over every token's text and id, special tokens among them.

    Not over merges, nor over which tokens count as special: the module is only ever given ids, and GGUF calls tokens
    special that transformers does not.
    """
    digest = hashlib.sha256()
    for id_, token in sorted(tokenizer.tokens.items()):
        digest.update(f"{id_}\t{token}\n".encode())
    return digest.hexdigest()


def check_fits(config: ModuleConfig, verifier: ModelConfig, identity: VerifierIdentity, ends: Sequence[int],
               dtype: str) -> list[str]:
    """Compare a module with the model that it is to draft for.

    ends: layers finished after each stage. dtype: what the model will compute in ("bfloat16").

    Returns warnings: what may cost acceptance, never exactness. Raises `DraftMismatch` when it cannot work (another
    vocabulary, tokenizer, hidden size, number of layers, head size), `UnsupportedModel` when we cannot compute it.
    """
    config.check_decodable()
    for what, trained, found in (
        ("vocabulary rows", config.vocab_size, verifier.vocab_size),
        ("hidden numbers a token", config.hidden, verifier.hidden),
        ("layers, which its taps count", config.verifier_layers, verifier.num_layers),
        ("numbers a head, for whose rotation it is made", config.head_dim, verifier.head_dim),
    ):
        if trained != found:
            raise DraftMismatch(f"the draft module is for a model with {trained} {what}; {identity.name} has {found}",
                                hint=f"It was trained for {config.verifier.name}. {_ANOTHER}")
    if config.verifier.tokenizer_hash != identity.tokenizer_hash:
        raise DraftMismatch(f"the draft module was trained with the tokenizer of {config.verifier.name}, in which ids "
                            f"mean other tokens than in that of {identity.name}", hint=_ANOTHER)
    return [*_doubts(config.verifier, identity, dtype), *_doubts_of_stages(config, tuple(ends))]


def _doubts(trained: VerifierIdentity, found: VerifierIdentity, dtype: str) -> list[str]:
    """Differences that a module survives. What is not known is not compared."""
    doubts = []
    if trained.config_hash != found.config_hash:
        doubts.append(f"the module was trained for another configuration ({trained.name}) than that of {found.name}")
    if trained.revision and found.revision and trained.revision != found.revision:
        doubts.append(f"the module was trained for revision {trained.revision} of the model, this is {found.revision}")
    if trained.quantisation != found.quantisation:
        doubts.append(f"the module was trained on labels of {trained.quantisation or 'unquantised'} weights, these are "
                      f"{found.quantisation or 'unquantised'}: it may be right much less often")
    exact = dtype == "stored" and not found.quantisation  # rows and sums in float32: no coarser than bfloat16
    if trained.dtype and trained.dtype != dtype and not exact:
        doubts.append(f"the module was trained on labels computed in {trained.dtype}, this run computes in {dtype}")
    return doubts


def _doubts_of_stages(config: ModuleConfig, ends: tuple[int, ...]) -> list[str]:
    if not config.use_deepest:
        return ["the module was trained with completed tokens shown shallower than they are; they are shown whole here"]
    if ends in config.stages:
        return []
    same = [split for split in config.stages if len(split) == len(ends)]
    if same:
        return [f"the module was trained for stages that end after layers {_listed(same[0])}, these end after "
                f"{_listed(ends)}"]
    counts = " or ".join(str(count) for count in sorted({len(split) for split in config.stages}))
    return [f"the module was trained for {counts} stages, not for {len(ends)}"]


def name_and_revision(path: Path) -> tuple[str, str | None]:
    """What to call a model. In Hugging Face's cache it lies in models--org--name/snapshots/COMMIT."""
    resolved = path.absolute()
    for folder in (resolved, resolved.parent):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    return (path.name if path.is_dir() else path.stem), None


def _dominant_type(path: Path) -> str:
    """The type in which most numbers of the layers are stored: "BF16", "Q4_1"."""
    numbers: Counter[str] = Counter()
    for name, kind, shape in _stored_tensors(path):
        if ".layers." in name or name.startswith("blk."):
            numbers[kind] += math.prod(shape)
    return numbers.most_common(1)[0][0]


def _stored_tensors(path: Path) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    if not path.is_dir():
        for name, tensor in read_tensors(path)[1].items():
            yield name, tensor.kind.name, tensor.shape
        return
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                yield name, part.get_dtype(), tuple(part.get_shape())
