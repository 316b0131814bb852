"""`--quantization` on every way in: what it does, what it is refused for, and that nothing is confused with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Models, run
from gguf import GGMLQuantizationType as Kind

from fullpipe.assembly import prepare
from fullpipe.assembly.costs import kept_costs, kept_fates
from fullpipe.errors import UsageError
from fullpipe.kernels import load
from fullpipe.llm import LLM
from fullpipe.models import dtypes
from fullpipe.models.dtypes import pick_dtype, torch_dtype
from fullpipe.models.weights import open_model
from fullpipe.options import Options
from fullpipe.request import SamplingParams
from tiny import tiny_model, write_gguf

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

SHORT = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_every_method_says_what_the_quantised_model_says(models: Models, quantization: str) -> None:
    with LLM(str(models.target), draft=f"{models.draft},ngram", method="fullpipe", quantization=quantization,
             threads=1) as llm:
        assert llm.dtype == quantization
        ours = llm.generate("hello there", SHORT)[0]
        llm.use("pp")
        assert llm.generate("hello there", SHORT)[0].token_ids == ours.token_ids


def test_stages_and_draft_model_are_told(models: Models) -> None:
    prepared = prepare(Options.of(model=str(models.target), draft=str(models.draft), stages=2, quantization="int8"))
    assert prepared.draft is not None and prepared.target.numbers == "with weights quantised to int8"
    assert {spec.args["dtype"] for spec in (*prepared.stages, prepared.draft)} == {"int8"}


def test_what_was_measured_with_other_weights_is_not_reused(models: Models) -> None:
    prepared = [prepare(Options.of(model=str(models.target), draft=str(models.draft), quantization=kind))
                for kind in (None, "int8", "int4")]
    assert len({kept_costs(one).path for one in prepared}) == 3
    assert len({fates.path for one in prepared if (fates := kept_fates(one))}) == 3


def test_what_is_quantised_already_is_refused(tmp_path: Path) -> None:
    files = open_model(write_gguf(tiny_model("llama"), tmp_path / "m.gguf", kind=Kind.Q4_0))
    with pytest.raises(UsageError, match="is quantised already") as told:
        pick_dtype("auto", files=files, quantization="int8")
    assert told.value.param == "quantization"


def test_what_it_does_not_go_with_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="two kinds of weights"):
        prepare(Options.of(model=str(models.target), quantization="int8", dtype="bfloat16"))
    with pytest.raises(UsageError, match="unknown quantization 'int3'"):
        Options.of(quantization="int3")
    with pytest.raises(UsageError, match="Did you mean quantization"):
        Options.of(load_in_8bit=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="is for the processor, and the device is cuda:0"):
        prepare(Options.of(model=str(models.target), quantization="int4", device="cuda"))
    monkeypatch.setattr(dtypes, "load", lambda: None)
    with pytest.raises(UsageError, match="not built"):
        prepare(Options.of(model=str(models.target), quantization="int4"))


def test_beside_it_torch_computes_as_it_would(models: Models) -> None:
    assert torch_dtype("int8") == torch_dtype("stored") == dtypes.DTYPES[pick_dtype("auto")]


def test_show_tells_what_becomes_of_each_form(models: Models) -> None:
    result = run("show", models.target, "--quantization", "int4", "--stages", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["dtype"] == "int4"
    how = {(form["type"], form["kept_as"], form["how"]): form for form in found["forms"]}
    assert set(how) >= {("F32", "Q4_1", "quantised"), ("F32", "Q8_0", "quantised"), ("F32", "F32", "as stored")}
    assert sum(form["memory_bytes"] for form in found["forms"]) < sum(form["file_bytes"] for form in found["forms"]) / 3
    assert all(form["kernels"].startswith("native (") for form in found["forms"])
    table = run("show", models.target, "-q", "int4", "--stages", "2").stdout.split("\n\n")[1].splitlines()
    assert table[0].startswith("STORED AS") and len(table) == 1 + len(found["forms"])


def test_show_tells_of_a_gpu_that_is_not_here(models: Models) -> None:
    found = json.loads(run("show", models.target, "--device", "cuda", "--json").stdout)
    assert found["dtype"] == "bfloat16" and {form["kernels"] for form in found["forms"]} == {"GPU (cuda)"}
