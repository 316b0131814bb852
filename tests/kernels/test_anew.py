"""Weights that came as floats become blocks: the same on every level of instructions, and with little error."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fullpipe.kernels import Form, Kernels, load

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

forms = pytest.mark.parametrize("form", [Form.Q8_0, Form.Q4_1], ids=lambda form: form.name)


@pytest.fixture(scope="module")
def native() -> Kernels:
    found = load()
    assert found is not None
    return found


def anew(native: Kernels, form: Form, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows of a file, uint8 [rows, bytes of a row]."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.full((len(x), native.row_bytes(form, x.shape[1])), 0xAA, np.uint8)
    native.anew(form, x.ctypes.data, *x.shape, out.ctypes.data)
    return out


def said(form: Form, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(dequantize(blocks, Kind[form.name]))


def error(form: Form, blocks: NDArray[np.uint8], x: NDArray[np.float32]) -> float:
    return float(np.square(said(form, blocks) - x).sum())


def numbers(rows: int, inputs: int, seed: int, size: float = 0.02) -> NDArray[np.float32]:
    """Weights as models have them: with a few that stand out."""
    return (np.random.default_rng(seed).standard_t(4, (rows, inputs)) * size).astype(np.float32)


@forms
@settings(max_examples=20)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 99),
       size=st.sampled_from([0.0, 1e-30, 1e-7, 0.02, 1.0, 300.0]))
def test_a_row_has_the_same_blocks_on_every_level_and_in_any_company(native: Kernels, form: Form, rows: int,
                                                                     blocks: int, seed: int, size: float) -> None:
    x = numbers(rows, 32 * blocks, seed, size)
    wanted, at = anew(native, form, x), seed % rows
    for level in native.levels:
        with native.at(level):
            assert np.array_equal(anew(native, form, x), wanted), level
            assert np.array_equal(anew(native, form, x[at : at + 1])[0], wanted[at]), level


def test_eight_bits_are_as_near_as_they_can_be(native: Kernels) -> None:
    x = numbers(33, 256, 1)
    blocks = anew(native, Form.Q8_0, x)
    scales = blocks.reshape(33, 8, 34)[..., :2].copy().view(np.float16).astype(np.float32)
    off = np.abs(said(Form.Q8_0, blocks) - x).reshape(33, 8, 32)
    assert (off <= 0.5 * scales + 127 * scales * 2.0**-11).all()  # the scale is a half: the greatest may lie beyond it
    assert error(Form.Q8_0, blocks, x) <= 1.001 * error(Form.Q8_0, quantize(x, Kind.Q8_0), x)


def test_four_bits_have_less_error_than_the_range_gives(native: Kernels) -> None:
    """The gguf package, as llama.cpp, takes the least and the greatest number of a block."""
    x = numbers(64, 512, 2)
    found = error(Form.Q4_1, anew(native, Form.Q4_1, x), x)
    assert found < 0.85 * error(Form.Q4_1, quantize(x, Kind.Q4_1), x)
    assert found < 0.6 * error(Form.Q4_0, quantize(x, Kind.Q4_0), x)


def test_what_four_bits_can_say_is_said(native: Kernels) -> None:
    rng = np.random.default_rng(3)
    steps = rng.integers(0, 16, (40, 32))
    steps[:, :2] = 0, 15
    x = (steps * 2.0 ** rng.integers(-9, 3, (40, 1)) + 2.0 ** rng.integers(-3, 3, (40, 1))).astype(np.float32)
    assert np.array_equal(said(Form.Q4_1, anew(native, Form.Q4_1, x)), x)


@forms
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0, 1e-9])
def test_blocks_of_one_number_hold_it(native: Kernels, form: Form, value: float) -> None:
    x = np.full((2, 64), value, np.float32)
    assert said(form, anew(native, form, x)) == pytest.approx(x, rel=1e-3, abs=1e-7)
