"""Packed and plain products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fullpipe.models.linear import MIN_ROWS, Linear, can_pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_it_is_the_product(dtype: torch.dtype, packed: bool, has_bias: bool) -> None:
    if packed and not can_pack(dtype):
        pytest.skip("this torch cannot pack weights")
    weight = torch.randn(80, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.linspace(-1, 1, 80).to(dtype) if has_bias else None
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-4 if dtype is torch.float32 else 0.15
    with torch.inference_mode():
        linear = Linear(weight.clone(), bias, packed=packed)
        for rows in (MIN_ROWS, 8, 33, 300):
            torch.testing.assert_close(linear(x[:rows]).double(), expected[:rows], rtol=0, atol=tolerance)


def test_a_dtype_that_onednn_does_not_know_cannot_be_packed() -> None:
    assert not can_pack(torch.int32)
