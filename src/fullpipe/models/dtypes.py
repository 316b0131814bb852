"""In which numbers a model computes.

"stored" leaves weights as their file stores them, above all in blocks of small integers, and computes with the native
kernels (`fullpipe.kernels`) on the processor. "float32" and "bfloat16" widen all weights to that, for torch.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from gguf import GGMLQuantizationType as Kind

from fullpipe.errors import UsageError
from fullpipe.kernels import ASKED, Kernels, load
from fullpipe.models.config import Sizes
from fullpipe.models.files import ModelFiles

STORED = "stored"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LOG = logging.getLogger(__name__)


def pick_dtype(name: str, device: str = "cpu", files: ModelFiles | None = None) -> str:
    """Turn "auto" into a name that says what is done; other names stay.

    files: the model; where it is quantised and there are kernels for this processor, its weights stay as they are
    stored. Else it is bfloat16 on a GPU and where the processor has instructions for it, or float32.

    Raises UsageError for "stored" on a GPU, and where the kernels were not built.
    """
    if name == STORED:
        if device != "cpu":
            raise UsageError("dtype=stored is for the processor, and the device is " + device, param="dtype",
                             hint="Leave out `dtype`, or use `device=cpu`.")
        native_kernels()
    if name != "auto":
        return name
    if device != "cpu":
        return "bfloat16"
    if files is not None and files.is_quantised and _has_fast_kernels():
        return STORED
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def torch_dtype(name: str) -> torch.dtype:
    """In what torch computes beside a model of this dtype, a draft module for example."""
    return DTYPES[pick_dtype("auto") if name == STORED else name]


def sizes_in(files: ModelFiles, dtype: str) -> Sizes:
    """Bytes and operations of a model's parts, for a planner."""
    if dtype != STORED:
        return files.sizes(DTYPES[dtype])
    from fullpipe.models.native.weights import form_of

    return files.stored_sizes(lambda kind: Kind[form_of(kind).name])


def native_kernels() -> Kernels:
    """The native kernels. Raises UsageError where they were not built."""
    if (native := load()) is None:
        raise UsageError("the native kernels were not built when Fullpipe was installed", param="dtype",
                         hint="Install a C compiler and then Fullpipe again, or use `dtype=bfloat16`.")
    return native


@cache
def _has_fast_kernels() -> bool:
    """Whether the native kernels beat torch's here; plain C does not, and is used where somebody asks for it."""
    native = load()
    if native is None:
        _LOG.warning("the native kernels were not built: quantised weights are widened, which takes several times the "
                     "memory and the time")
    return native is not None and (native.level != "portable" or bool(os.environ.get(ASKED)))
