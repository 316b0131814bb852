"""Formats without a kernel become wider ones that say the same numbers, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from fullpipe.errors import UnsupportedModel
from fullpipe.models.dequant import block_shape
from fullpipe.models.native.widening import WIDENED


def blocks(kind: Kind, count: int = 300) -> np.ndarray:
    """Any bits, with scales that are ordinary numbers."""
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, (count, block_shape(kind)[1]), dtype=np.uint8)
    if kind == Kind.MXFP4:
        raw[:, 0] = rng.integers(128 - 24, 128 + 16, count)
    else:
        at = 108 if kind == Kind.Q3_K else 0
        raw[:, at : at + 2] = rng.normal(0, 0.01, count).astype(np.float16)[:, None].view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", WIDENED, ids=lambda kind: kind.name)
def test_the_numbers_are_the_same(kind: Kind) -> None:
    form, widen = WIDENED[kind]
    raw = blocks(kind)
    wide = widen(torch.from_numpy(raw)).numpy()
    assert wide.shape[1] == block_shape(Kind[form.name])[1]
    assert np.array_equal(dequantize(wide, Kind[form.name]), dequantize(raw, kind))


def test_scales_that_no_half_holds_are_refused() -> None:
    raw = torch.zeros(2, 17, dtype=torch.uint8)
    _, widen = WIDENED[Kind.MXFP4]
    assert not widen(raw)[:, 2:].any()  # a block of zeros may have any
    raw[1, 3] = 0x21
    with pytest.raises(UnsupportedModel, match="MXFP4"):
        widen(raw)
