"""In which numbers a model computes.

"stored" leaves weights as their file stores them, above all in blocks of small integers, and computes with the native
kernels (`fullpipe.kernels`) on the processor. "int8" and "int4" (`--quantization`) do the same, and quantise what is
not yet so while it is read. "float32" and "bfloat16" widen all weights to that, for torch. The table: `models.forms`.
"""

from __future__ import annotations

import logging
import os
from functools import cache, partial

import torch

from fullpipe.errors import UsageError
from fullpipe.kernels import ASKED, Kernels, load
from fullpipe.models.config import Sizes
from fullpipe.models.files import ModelFiles

STORED = "stored"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LOG = logging.getLogger(__name__)


def pick_dtype(name: str, device: str = "cpu", files: ModelFiles | None = None,
               quantization: str | None = None) -> str:
    """Turn "auto" into a name that says what is done; other names stay.

    files: the model; where it is quantised, or has 16 bits, and there are kernels for this processor, its weights stay
    as they are stored. Else it is bfloat16 on a GPU and where the processor has instructions for it, or float32.
    quantization: "int8" or "int4", which is then the name.

    Raises UsageError for "stored" and a quantization on a GPU, and where the kernels were not built; for a quantization
    of a model that is quantised, or beside a dtype.
    """
    if quantization is not None:
        _check_quantization(quantization, name, device, files)
        return quantization
    if name == STORED:
        if device != "cpu":
            raise UsageError("dtype=stored is for the processor, and the device is " + device, param="dtype",
                             hint="Leave out `dtype`, or use `device=cpu`.")
        native_kernels()
    if name != "auto":
        return name
    if device != "cpu":
        return "bfloat16"
    if files is not None and _stays_as_stored(files):
        return STORED
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def _check_quantization(quantization: str, dtype: str, device: str, files: ModelFiles | None) -> None:
    asked = f"quantization={quantization}"
    if device != "cpu":
        raise UsageError(f"{asked} is for the processor, and the device is {device}", param="quantization",
                         hint="Leave out `quantization`, or use `device=cpu`.")
    if dtype in DTYPES:
        raise UsageError(f"{asked} and dtype={dtype} ask for two kinds of weights", param="quantization",
                         hint="Leave out one of `quantization` and `dtype`.")
    if files is not None and files.is_quantised:
        raise UsageError(f"{files.path} is quantised already, and quantising it anew would lose more than it saves",
                         param="quantization",
                         hint="Leave out `quantization`, or name files whose weights have 16 or 32 bits.")
    native_kernels()


def pick_kv_cache_dtype(name: str, dtype: str, device: str = "cpu") -> str:
    """Turn "auto" into a name: float16 on the native kernels, else what the model computes in.

    dtype: see above, not "auto". Raises UsageError for other names where it is not the native kernels that compute.
    """
    if dtype not in DTYPES:
        return "float16" if name == "auto" else name
    if name != "auto":
        raise UsageError(f"kv_cache_dtype={name} is for the native kernels, and the model is computed in {dtype} on "
                         f"{device}", param="kv_cache_dtype",
                         hint="Leave out `kv_cache_dtype`, or use `dtype=stored` and `device=cpu`.")
    return dtype


def torch_dtype(name: str) -> torch.dtype:
    """In what torch computes beside a model of this dtype, a draft module for example."""
    return DTYPES[name if name in DTYPES else pick_dtype("auto")]


def sizes_in(files: ModelFiles, dtype: str) -> Sizes:
    """Bytes and operations of a model's parts, for a planner."""
    if dtype in DTYPES:
        return files.sizes(DTYPES[dtype])
    from fullpipe.models.forms import bytes_kept

    return files.stored_sizes(partial(bytes_kept, native_kernels(), files, dtype=dtype))


def native_kernels() -> Kernels:
    """The native kernels. Raises UsageError where they were not built."""
    if (native := load()) is None:
        raise UsageError("the native kernels were not built when Fullpipe was installed", param="dtype",
                         hint="Install a C compiler and then Fullpipe again, or use `dtype=bfloat16`.")
    return native


def _stays_as_stored(files: ModelFiles) -> bool:
    """Quantised weights stay wherever there are fast kernels. So do those of 16 bits, unless the processor has units
    for matrices in bfloat16 (AMX), which torch uses and our kernels do not."""
    if files.is_quantised:
        return _has_fast_kernels()
    return files.is_half and load() is not None and not torch.cpu._is_amx_tile_supported() and _has_fast_kernels()


@cache
def _has_fast_kernels() -> bool:
    """Whether the native kernels beat torch's here; plain C does not, and is used where somebody asks for it."""
    native = load()
    if native is None:
        _LOG.warning("the native kernels were not built: quantised weights are widened, which takes several times the "
                     "memory and the time")
    return native is not None and (native.level != "portable" or bool(os.environ.get(ASKED)))
