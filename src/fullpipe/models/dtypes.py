"""In which numbers a model computes."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_dtype(name: str, device: str = "cpu") -> str:
    """Turn "auto" into bfloat16 on a GPU and where the processor has instructions for it, else into float32; other
    names stay."""
    if name != "auto":
        return name
    if device != "cpu":
        return "bfloat16"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
