"""Our dequantisers give the numbers that the gguf package gives, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from fullpipe.errors import UnsupportedModel
from fullpipe.models.dequant import block_shape, dequantise

KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K,
         Kind.Q6_K)
BY_PACKAGE = (Kind.Q2_K, Kind.Q3_K, Kind.IQ4_NL)
SCALES_AT = {Kind.Q4_1: (0, 2), Kind.Q5_1: (0, 2), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
             Kind.Q2_K: (80, 82), Kind.Q3_K: (108,)}


def random_blocks(kind: Kind, blocks: int = 300) -> np.ndarray:
    """Any bytes, but scales that are ordinary numbers."""
    rng = np.random.default_rng(int(kind))
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        numbers = rng.standard_normal((blocks, 1)).astype(np.float32)
        return quantize(numbers, kind).view(np.uint8).reshape(blocks, -1)
    raw = rng.integers(0, 256, (blocks, block_shape(kind)[1]), dtype=np.uint8)
    for at in SCALES_AT.get(kind, (0,)):
        raw[:, at : at + 2] = rng.standard_normal((blocks, 1)).astype(np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", KINDS + BY_PACKAGE, ids=lambda kind: kind.name)
def test_the_same_bits_as_the_gguf_package(kind: Kind) -> None:
    raw = random_blocks(kind)
    ours = dequantise(torch.from_numpy(raw), kind)
    stored = raw.view({Kind.F32: np.float32, Kind.F16: np.float16}.get(kind, np.uint8))
    theirs = dequantize(stored, kind).reshape(ours.shape)
    assert ours.dtype is torch.float32 and ours.shape == (len(raw), block_shape(kind)[0])
    assert np.array_equal(ours.numpy().view(np.int32), theirs.view(np.int32))


def test_a_type_that_nobody_reads_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="Q8_K"):
        dequantise(torch.zeros(2, block_shape(Kind.Q8_K)[1], dtype=torch.uint8), Kind.Q8_K)
