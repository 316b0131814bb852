"""Which kernels multiply with a matrix, and in what form it lies in memory: one table, by which weights are loaded and
which `fullpipe show` prints.

    kept(Kind.Q3_K, "stored").form     # Kind.Q6_K: the same numbers in more bits
    kept(Kind.BF16, "int8").form       # Kind.Q8_0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gguf import GGMLQuantizationType as Kind

from fullpipe.kernels import Form, Kernels
from fullpipe.models.dequant import block_shape
from fullpipe.models.files import ModelFiles
from fullpipe.models.native.widening import WIDENED

By = Literal["native", "torch", "gpu"]

_FLOATS = (Kind.F64, Kind.F32, Kind.F16, Kind.BF16)
_TORCH = {"float32": Kind.F32, "bfloat16": Kind.BF16}
# Numbers that a model computes in: what its layers become, and what embedding and head do, where an error costs most.
_QUANTISED = {"int8": (Kind.Q8_0, Kind.Q8_0), "int4": (Kind.Q4_1, Kind.Q8_0)}
# What the native kernels keep a form as. All others are rounded to float16.
_NATIVE = {Kind[form.name]: Kind[form.name] for form in Form} | {Kind.F64: Kind.F32} | {
    kind: Kind[form.name] for kind, (form, _) in WIDENED.items()}
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Kept:
    """How a tensor lies in memory. by: whose kernels compute with it. how: what became of its numbers."""

    form: Kind
    by: By
    how: Literal["as stored", "widened", "rounded", "quantised"]


def kernels_of(dtype: str, device: str = "cpu") -> By:
    """Whose kernels compute in these numbers (see `models.dtypes`) on a device."""
    if dtype not in _TORCH:
        return "native"
    return "torch" if device == "cpu" else "gpu"


def kept(kind: Kind, dtype: str, device: str = "cpu", *, inputs: int = 32, is_table: bool = False) -> Kept:
    """What becomes of a matrix. inputs: numbers of a row. is_table: it is the embedding or the head.

    Weights that came quantised are never quantised anew, whatever is asked for.
    """
    by = kernels_of(dtype, device)
    if by != "native":
        return Kept(_TORCH[dtype], by, _told(kind, _TORCH[dtype]))
    if dtype in _QUANTISED and kind in _FLOATS and inputs % block_shape(Kind.Q8_0)[0] == 0:
        return Kept(_QUANTISED[dtype][is_table], by, "quantised")
    form = _NATIVE.get(kind, Kind.F16)
    return Kept(form, by, _told(kind, form))


def _told(kind: Kind, form: Kind) -> Literal["as stored", "widened", "rounded"]:
    if kind == form:
        return "as stored"
    exact = kind != Kind.F64 if form == Kind.F32 else kind in WIDENED and form == _NATIVE[kind]
    return "widened" if exact else "rounded"


def kept_tensor(files: ModelFiles, name: str, dtype: str, device: str = "cpu") -> Kept:
    """What becomes of a tensor of a model. Vectors are float32; biases are what torch computes in."""
    kind, shape = files.kind(name), files.shape(name)
    if len(shape) == 2:
        return kept(kind, dtype, device, inputs=shape[1], is_table=name in _TABLES)
    by = kernels_of(dtype, device)
    form = _TORCH[dtype] if by != "native" and name.endswith(".bias") else Kind.F32
    return Kept(form, by, _told(kind, form))


def bytes_stored(files: ModelFiles, name: str) -> int:
    """What a tensor takes in its file."""
    numbers, size = block_shape(files.kind(name))
    return math.prod(files.shape(name)) // numbers * size


def bytes_kept(native: Kernels | None, files: ModelFiles, name: str, dtype: str, device: str = "cpu") -> int:
    """What a tensor takes in memory. native: needed for what lies in tiles."""
    found, shape = kept_tensor(files, name, dtype, device), files.shape(name)
    if found.by == "native" and len(shape) == 2:
        assert native is not None
        return sum(native.sizes(Form[found.form.name], *shape))
    return math.prod(shape) * block_shape(found.form)[1]
