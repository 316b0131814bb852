"""Products of the native kernels: what they must be, and the same bits for a row in any company, with any number of
threads, on every level of instructions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullpipe.errors import UsageError
from fullpipe.kernels import ASKED, Form, Kernels, load
from kernels.blocks import Tiles, dequantised, looked_up, product, quantised, stored, tiles

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

FORMS = tuple(Form)
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
OUTPUTS, INPUTS = 53, 512  # the last tile has five channels; two blocks of 256


@pytest.fixture(scope="module")
def native() -> Kernels:
    found = load()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def weights(native: Kernels) -> dict[Form, Tiles]:
    bias = np.random.default_rng(5).normal(size=OUTPUTS).astype(np.float32)
    return {form: tiles(native, form, stored(form, OUTPUTS, INPUTS), INPUTS, bias=bias if form % 2 else None)
            for form in FORMS}


def rows(count: int, seed: int = 1, inputs: int = INPUTS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, inputs)) * np.exp(rng.normal(size=(count, 1)))).astype(np.float32)


@forms
def test_dequantised_tiles_are_what_the_gguf_package_says(native: Kernels, weights: dict[Form, Tiles],
                                                          form: Form) -> None:
    assert np.array_equal(looked_up(native, weights[form].weight), dequantised(form, stored(form, OUTPUTS, INPUTS)))


@forms
def test_rows_may_be_repacked_in_parts_of_any_size(native: Kernels, weights: dict[Form, Tiles], form: Form) -> None:
    raw = stored(form, OUTPUTS, INPUTS)
    for step in (1, 7, 16, 48):
        parts = tiles(native, form, raw, INPUTS, step=step)
        assert np.array_equal(looked_up(native, parts.weight), looked_up(native, weights[form].weight))


@forms
def test_a_product_is_that_of_the_quantised_row_in_exact_numbers(native: Kernels, weights: dict[Form, Tiles],
                                                                 form: Form) -> None:
    x, matrix = rows(9), dequantised(form, stored(form, OUTPUTS, INPUTS)).astype(np.float64)
    seen = x.astype(np.float64)
    if not form.is_float:
        q, scales = quantised(native, x)
        seen = (q.reshape(-1, 32) * scales[:, None].astype(np.float64)).reshape(x.shape)
        assert (np.abs(seen - x).max(1) <= np.abs(x).max(1) / 253).all()
    bias = weights[form].bias
    wanted = seen @ matrix.T + (0 if bias is None else bias)
    size = np.abs(seen) @ np.abs(matrix.T)  # rounding is of what was summed, not of the sum
    assert (np.abs(product(native, weights[form].weight, x) - wanted) / size).max() < 4e-6


@forms
@settings(max_examples=12)
@given(count=st.integers(1, 70), at=st.integers(0, 10**6), threads=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_row_has_the_same_bits_in_any_company(native: Kernels, weights: dict[Form, Tiles], form: Form, count: int,
                                                at: int, threads: int, seed: int) -> None:
    x, where = rows(count, seed), at % count
    alone = product(native, weights[form].weight, x[where : where + 1])
    for level in native.levels:
        with native.at(level):
            assert np.array_equal(product(native, weights[form].weight, x, threads)[where], alone[0]), level


@forms
def test_rows_and_tiles_may_be_any_number(native: Kernels, form: Form) -> None:
    """However many of each are worked off at once; there are seven tiles and a part of one, and all smaller numbers."""
    raw, x = stored(form, 7 * 16 + 3, 256), rows(17, inputs=256)
    whole = tiles(native, form, raw, 256)
    alone = np.stack([product(native, whole.weight, row[None])[0] for row in x])
    parts = {outputs: tiles(native, form, raw[:outputs], 256) for outputs in (16, 32, 48, 64, 80, 96, len(raw))}
    for level in native.levels:
        with native.at(level):
            for count in range(1, 18):
                for outputs, part in parts.items():
                    assert np.array_equal(product(native, part.weight, x[:count]), alone[:count, :outputs]), level


@pytest.mark.parametrize("inputs", [1, 2, 31, 96])
@pytest.mark.parametrize("outputs", [1, 16, 17])
def test_weights_that_are_floats_may_have_any_shape(native: Kernels, outputs: int, inputs: int) -> None:
    weight = tiles(native, Form.BF16, raw := stored(Form.BF16, outputs, inputs), inputs)
    x = rows(3, inputs=inputs)
    wanted = x.astype(np.float64) @ dequantised(Form.BF16, raw).T
    for level in native.levels:
        with native.at(level):
            assert product(native, weight.weight, x) == pytest.approx(wanted, abs=1e-5)


def test_rows_of_zeros_and_of_tiny_and_huge_numbers_are_quantised(native: Kernels) -> None:
    x = np.zeros((4, 64), np.float32)
    x[1], x[2, ::2], x[3] = 1e-38, 3e38, np.arange(64)
    found = {}
    for level in native.levels:
        with native.at(level):
            found[level] = quantised(native, x)
    q, scales = found["portable"]
    assert all(np.array_equal(q, other) and np.array_equal(scales, its) for other, its in found.values())
    assert (q[0] == 0).all() and (scales[:2] == 0).all() and (q[2, ::2] == 127).all()
    assert q[3, 31] == 127 and q[3, 63] == 127 and q[3, 32] == round(32 * 127 / 63)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_stay_so(native: Kernels, weights: dict[Form, Tiles], bad: float) -> None:
    x = rows(3)
    x[1, 77] = bad
    for level in native.levels:
        with native.at(level):
            found = product(native, weights[Form.Q4_K].weight, x)
            assert np.isfinite(found[[0, 2]]).all() and not np.isfinite(found[1]).any()


@forms
def test_numbers_that_are_not_finite_are_told(native: Kernels, form: Form) -> None:
    raw = stored(form, 16, 256)
    at = {Form.Q6_K: 208, Form.F32: 0, Form.F16: 0, Form.BF16: 0}.get(form, 0)
    raw[3, at : at + 4] = np.array([0, 0x7C, 0x80, 0x7F], np.uint8)[: len(raw[3, at : at + 4])]
    if form in (Form.F32, Form.BF16):
        raw[3, :4] = np.array([0x80, 0x7F, 0x80, 0x7F], np.uint8)
    with pytest.raises(AssertionError):
        tiles(native, form, raw, 256)


@pytest.mark.parametrize(("level", "said"), [("sse9", "unknown level 'sse9'"), ("", "portable")])
def test_the_environment_names_a_level(level: str, said: str) -> None:
    code = "from fullpipe.kernels import load; print(load().level)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         env={ASKED: level or "portable", "PYTHONPATH": ":".join(sys.path)})
    assert said in run.stdout + run.stderr


def test_a_level_that_the_processor_does_not_have_is_an_error(native: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "levels", ("portable",))
    with pytest.raises(UsageError, match="does not have"):
        native.choose("avx2")
