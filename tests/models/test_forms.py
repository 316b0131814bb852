"""One table says what becomes of a tensor; loading goes by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from fullpipe.kernels import Form, load
from fullpipe.models.forms import bytes_kept, bytes_stored, kept, kept_tensor
from fullpipe.models.native.slice import NativeSlice
from fullpipe.models.weights import open_model
from tiny import save, tiny_model, write_gguf

QUANTISED = ("int8", "int4")


def test_a_form_that_has_a_kernel_stays() -> None:
    for form in Form:
        assert kept(Kind[form.name], "stored").form == Kind[form.name]
        assert kept(Kind[form.name], "stored").how == "as stored"


@pytest.mark.parametrize(("kind", "form", "how"), [
    (Kind.Q3_K, Kind.Q6_K, "widened"), (Kind.MXFP4, Kind.Q8_0, "widened"), (Kind.IQ4_NL, Kind.Q8_0, "widened"),
    (Kind.IQ4_XS, Kind.F16, "rounded"), (Kind.Q2_K, Kind.F16, "rounded"), (Kind.F64, Kind.F32, "rounded")])
def test_others_become_the_nearest(kind: Kind, form: Kind, how: str) -> None:
    assert (kept(kind, "stored").form, kept(kind, "stored").how) == (form, how)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_what_came_quantised_is_never_quantised_anew(dtype: str) -> None:
    for kind in (Kind.Q4_0, Kind.Q4_K, Kind.Q8_0, Kind.Q3_K, Kind.IQ4_XS):
        assert kept(kind, dtype) == kept(kind, "stored")


def test_floats_are_quantised_where_that_is_asked_for_and_blocks_fit() -> None:
    assert kept(Kind.BF16, "int8").form == Kind.Q8_0 and kept(Kind.F32, "int4").form == Kind.Q4_1
    assert kept(Kind.F16, "int4", is_table=True).form == Kind.Q8_0
    assert kept(Kind.F16, "int4").how == "quantised"
    assert kept(Kind.F16, "int8", inputs=48) == kept(Kind.F16, "stored")


def test_torch_and_the_gpu_have_all_in_one_dtype() -> None:
    assert (kept(Kind.Q4_K, "bfloat16").form, kept(Kind.Q4_K, "bfloat16").how) == (Kind.BF16, "rounded")
    assert (kept(Kind.Q4_K, "float32").by, kept(Kind.Q4_K, "float32").how) == ("torch", "widened")
    assert (kept(Kind.BF16, "bfloat16", "cuda:0").by, kept(Kind.BF16, "bfloat16", "cuda:0").how) == ("gpu", "as stored")


@pytest.mark.skipif(load() is None, reason="the native kernels were not built")
@pytest.mark.parametrize("dtype", ["stored", *QUANTISED])
def test_loading_takes_what_the_table_says(tmp_path: Path, dtype: str) -> None:
    native = load()
    assert native is not None
    for stored, path in ((Kind.F32, save(tiny_model("qwen2"), tmp_path / "folder")),
                         (Kind.BF16, write_gguf(tiny_model("llama"), tmp_path / "half.gguf", kind=Kind.BF16)),
                         (Kind.Q8_0, write_gguf(tiny_model("llama"), tmp_path / "eight.gguf", kind=Kind.Q8_0))):
        files = open_model(path)
        whole = NativeSlice(native, files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=dtype)
        assert whole.nbytes == sum(-(-bytes_kept(native, files, name, dtype) // 64) * 64 for name in files.matrices)
        assert bytes_stored(files, files.matrices[0]) > 0
        kinds = {kept_tensor(files, name, dtype).form for name in files.matrices}
        wanted = {"stored": {stored}, "int8": {Kind.Q8_0}, "int4": {Kind.Q4_1, Kind.Q8_0}}[dtype]
        assert kinds == (wanted if stored != Kind.Q8_0 else {Kind.Q8_0})
