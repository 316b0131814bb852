"""Files of the SPD reference become checkpoints of ours, or are refused with the reason."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fullpipe.errors import DamagedModel, DraftMismatch, ModelNotFound, UnsupportedModel, UsageError
from fullpipe.hub import resolve
from fullpipe.models.hf_config import read_hf
from fullpipe.models.spd_checkpoint import (
    ModuleConfig,
    VerifierIdentity,
    check_fits,
    config_hash,
    identity_of,
    load_checkpoint,
    tokenizer_hash,
)
from fullpipe.models.spd_convert import Converted, auto_bounds, convert_file, read_reference
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from spd_reference import (
    BOUNDS,
    DRAFT_IDS,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    VOCAB,
    config,
    state_dict,
    write,
    write_base,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def read(folder: Path, tensors: dict[str, Tensor] | None = None, base: Path | None = None, *,
         stage_layers: list[int] | None = None, changes: dict[str, Any] | None = None) -> Converted:
    file = write(folder / "head.pt", tensors, **(changes or {}))
    return read_reference(file, base or write_base(folder / "base"), stage_layers=stage_layers)


# ---- what it becomes -------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "llama without q/k norm": ("llama", {"qk_norm": False}),
    "llama with the reference's borrowed q/k norm": ("llama", {"qk_norm": True}),
    "with biases": ("llama", {"bias": True}),
    "one layer": ("qwen3", {"spec_layers": 1}),
}


@pytest.mark.parametrize(("family", "shape"), FAMILIES.values(), ids=FAMILIES)
def test_a_file_of_the_reference(tmp_path: Path, family: str, shape: dict[str, Any]) -> None:
    base, tensors = write_base(tmp_path / "base", family), state_dict(**shape)
    spec_layers = shape.get("spec_layers", 2)
    file = write(tmp_path / "head.pt", tensors, num_spec_layers=None if spec_layers == 1 else spec_layers)
    convert_file(file, base, tmp_path / "out")
    found, loaded, ids = load_checkpoint(tmp_path / "out")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert ids is not None and ids.tolist() == DRAFT_IDS
    assert (found.bounds, found.stages, found.num_layers) == (tuple(BOUNDS), ((2, 4, 6, 8),), spec_layers)
    assert (found.hidden, found.head_dim, found.verifier_layers, found.vocab_size) == (HIDDEN, HEAD_DIM, LAYERS, VOCAB)
    assert found.qk_norm == shape.get("qk_norm", True)
    assert found.attention_bias == found.o_bias == shape.get("bias", False)
    assert found.use_deepest and found.train_span == 2048 and not found.output_gate
    assert found.training["base_model_path"] == "/private/models/base"


def test_the_module_knows_its_base_model(base: Path, tmp_path: Path) -> None:
    found = read(tmp_path, base=base).config
    target = read_hf(json.loads((base / "config.json").read_text()))
    assert found.verifier == VerifierIdentity(
        name="base", architecture="Qwen3ForCausalLM", config_hash=config_hash(target),
        tokenizer_hash=tokenizer_hash(load_tokenizer(base)), dtype="bfloat16")
    assert check_fits(found, target, found.verifier, (2, 4, 6, 8), "bfloat16") == []


@pytest.mark.weights
def test_a_gguf_file_as_base_model(tmp_path: Path) -> None:
    """Only its configuration and tokenizer are asked; that its weights are quantised is not the labels' business."""
    base = resolve("smollm2-135m")
    target = open_model(base).config
    module = ModuleConfig(
        kind="spd", hidden=target.hidden, heads=target.heads, kv_heads=target.kv_heads, head_dim=target.head_dim,
        intermediate=target.intermediate, rms_eps=target.rms_eps, num_layers=1, bounds=(0, 10, 29),
        verifier_layers=target.num_layers, vocab_size=target.vocab_size, draft_vocab_size=len(DRAFT_IDS),
        stages=((10, 20, 30),), train_span=2048, verifier=identity_of(base))
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in module.tensor_shapes().items()}
    found = read(tmp_path, tensors, base, changes={
        "hidden_size": target.hidden, "vocab_size": target.vocab_size, "num_stages": 3, "num_spec_layers": 1,
        "num_aggr_types": 3, "aggr_feature_bound": [0, 10, 29], "base_model_path": "smollm2-135m"})
    assert found.config == replace(module, verifier=found.config.verifier, training=found.config.training)
    assert module.verifier.quantisation is not None
    assert found.config.verifier == replace(module.verifier, dtype="bfloat16", quantisation=None)
    assert found.warnings == []


def test_the_whole_vocabulary(tmp_path: Path) -> None:
    found = read(tmp_path, state_dict(draft_vocab=VOCAB), changes={"draft_vocab_size": VOCAB, "draft_token_ids": None})
    assert found.draft_ids is None and found.config.draft_vocab_size == VOCAB


def test_a_base_with_a_gate_is_converted_and_said_not_to_run(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3_5_text")
    text = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(
        {"model_type": "qwen3_5", "architectures": [text.pop("architectures")[0]], "text_config": text}))
    found = read(tmp_path, state_dict(gated=True), base)
    assert found.config.output_gate and found.config.zero_centred_norm
    assert any("not yet run" in warning for warning in found.warnings)
    with pytest.raises(UnsupportedModel):
        found.config.check_decodable()


def test_a_mixture_of_experts_without_a_dense_width(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3_moe", intermediate_size=None)
    found = read(tmp_path, state_dict(intermediate=48), base, changes={"spec_intermediate_size_fallback": 48})
    assert found.config.intermediate == 48 and not found.config.output_gate


# ---- taps and stages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "stages", "bounds"), [
    (32, 4, (0, 8, 24, 31, 32)), (32, 8, (0, 4, 12, 24, 31)), (32, 16, (0, 2, 6, 12, 31)), (36, 4, (0, 9, 27, 35, 36)),
    (28, 7, (0, 4, 12, 24, 27))])
def test_the_rule_for_taps_gives_the_table_of_the_notes(layers: int, stages: int, bounds: tuple[int, ...]) -> None:
    assert auto_bounds(layers, stages) == bounds


@pytest.mark.parametrize("stages", [1, 2])
def test_the_rule_has_no_answer_for_few_stages(stages: int) -> None:
    with pytest.raises(UsageError, match=f"{stages} stages"):
        auto_bounds(32, stages)


def test_taps_by_the_rule_are_said_and_so_is_what_tapping_the_end_means(tmp_path: Path) -> None:
    found = read(tmp_path, changes={"aggr_feature_bound": None})
    assert found.config.bounds == (0, 2, 6, 7, 8)
    assert [warning for warning in found.warnings if "0, 2, 6, 7, 8" in warning]
    assert [warning for warning in found.warnings if "index 8" in warning and "final norm" in warning]


@pytest.mark.parametrize(("in_file", "given", "ends"), [
    ("3;3;1;1", None, (3, 6, 7, 8)), ([3, 3, 1, 1], None, (3, 6, 7, 8)), (None, [1, 1, 3, 3], (1, 2, 5, 8)),
    ("3;3;1;1", [1, 1, 3, 3], (1, 2, 5, 8))])
def test_stages_of_unequal_size(tmp_path: Path, in_file: Any, given: list[int] | None, ends: tuple[int, ...]) -> None:
    assert read(tmp_path, stage_layers=given, changes={"stage_layers": in_file}).config.stages == (ends,)


@pytest.mark.parametrize(("changes", "given", "named"), [
    ({"num_stages": 3}, None, "how its 3 stages divide 8 layers"),
    ({}, [4, 4], "4, 4 layers are not 4 stages"), ({}, [2, 2, 2, 3], "are not 4 stages of 8 layers"),
    ({"aggr_feature_bound": None}, [3, 3, 1, 1], "needs equal stages")])
def test_stages_that_cannot_be_known(tmp_path: Path, changes: dict[str, Any], given: list[int] | None,
                                     named: str) -> None:
    with pytest.raises(UsageError, match=named):
        read(tmp_path, stage_layers=given, changes=changes)


# ---- what is refused -------------------------------------------------------------------------------------------


def test_no_version_and_version_0_are_version_11(tmp_path: Path) -> None:
    assert read(tmp_path, changes={"version": None}).config == read(tmp_path, changes={"version": 0}).config


@pytest.mark.parametrize(("changes", "named", "way_out"), [
    ({"version": 10}, "version 10", "archived branch"),
    ({"version": None, "shallow_hidden_layer_indices": [[0], [8]]}, "version 10", "archived branch"),
    ({"version": 12, "stage_layer_ranges": [[0, 8]]}, "version 12", "version 11"),
    ({"version": "11"}, "version '11'", "version 11")])
def test_another_version_is_refused(tmp_path: Path, changes: dict[str, Any], named: str, way_out: str) -> None:
    with pytest.raises(UnsupportedModel, match=named) as caught:
        read(tmp_path, changes=changes)
    assert caught.value.hint is not None and way_out in caught.value.hint


@pytest.mark.parametrize(("changes", "named"), [
    ({"hidden_size": 32}, "hidden size of 32, base has 16"), ({"vocab_size": 41}, "vocabulary of 41, base has 40"),
    ({"model_type": "llama"}, "type 'llama', base is of type 'qwen3'")])
def test_a_file_for_another_base_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(DraftMismatch, match=named) as caught:
        read(tmp_path, changes=changes)
    assert caught.value.hint is not None and "/private/models/base" in caught.value.hint


@pytest.mark.parametrize(("base", "named"), [
    ({"head_dim": 16, "num_attention_heads": 2}, "a head size of 8, base has 16"),
    ({"num_key_value_heads": 1}, "key-value heads numbering 2, base has 1"),
    ({"num_attention_heads": 8}, "heads numbering 4, base has 8")])
def test_heads_are_compared_with_the_shapes(tmp_path: Path, base: dict[str, Any], named: str) -> None:
    with pytest.raises(DraftMismatch, match=named):
        read(tmp_path, base=write_base(tmp_path / "base", **base))


@pytest.mark.parametrize(("changes", "named"), [
    ({"num_aggr_types": 4}, "4 row types for 5 taps"), ({"aggr_feature_bound": "auto"}, "aggr_feature_bound"),
    ({"aggr_feature_bound": [1, 2, 4, 6, 7]}, "bounds 1, 2"), ({"num_spec_layers": 0}, "0 for num_spec_layers"),
    ({"num_stages": 4.0}, "4.0 for num_stages"), ({"trained_with_use_deepest": 1}, "trained_with_use_deepest"),
    ({"draft_token_ids": None}, "does not say which"), ({"draft_token_ids": [5, *DRAFT_IDS[1:]]}, "8 rising token ids"),
    ({"draft_token_ids": [*DRAFT_IDS[:-1], 40]}, "below 40"), ({"draft_token_ids": DRAFT_IDS[1:]}, "8 rising"),
    ({"stage_layers": "2;2;x;2"}, "stage_layers"), ({"num_spec_layers": 3}, r"spec_layers\.2\.\S+ is missing"),
    ({"num_spec_layers": 1}, r"spec_layers\.1\.\S+ is not known")])
def test_a_config_that_makes_no_sense_says_where(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(DamagedModel, match=named):
        read(tmp_path, changes=changes)


@pytest.mark.parametrize(("change", "named"), [
    (lambda t: t.pop("aggr_projs.2.weight"), r"aggr_projs\.2\.weight is missing"),
    (lambda t: t.update(embed=torch.zeros(2)), "embed is not known"),
    (lambda t: t.update({"aggr_projs.1.weight": torch.zeros(16, 16)}), r"\[16, 16\] instead of \[16, 32\]"),
    (lambda t: t.pop("spec_layers.1.self_attn.q_norm.weight"), "q_norm.weight is missing"),
    (lambda t: t.update({"lm_head.weight": "a string"}), "no tensor of numbers"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(8, 16, dtype=torch.int64)}), "no tensor of numbers"),
    (lambda t: t["lm_head.weight"].fill_(float("nan")), "not finite")])
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, named: str) -> None:
    tensors = state_dict()
    change(tensors)
    with pytest.raises(DamagedModel, match=named):
        read(tmp_path, tensors)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_the_file_is_ever_run(tmp_path: Path, base: Path, zipped: bool) -> None:
    content = {"state_dict": state_dict(), "config": config() | {"base_model_path": Malicious(tmp_path / "made")}}
    torch.save(content, tmp_path / "head.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DamagedModel, match=r"(?s)head\.pt cannot be read as tensors.*mkdir"):
        read_reference(tmp_path / "head.pt", base)
    assert not (tmp_path / "made").exists()


def test_a_file_cut_short(tmp_path: Path, base: Path) -> None:
    file = write(tmp_path / "head.pt")
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DamagedModel, match=r"head\.pt"):
            read_reference(file, base)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"config": {}, "state_dict": []}])
def test_a_file_of_something_else(tmp_path: Path, base: Path, content: Any) -> None:
    torch.save(content, tmp_path / "head.pt")
    with pytest.raises(DamagedModel, match="no draft module"):
        read_reference(tmp_path / "head.pt", base)


def test_no_file_and_no_base(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"head\.pt"):
        read_reference(tmp_path / "head.pt", base)
    file = write(tmp_path / "head.pt")
    (base / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        read_reference(file, base)
    (base / "config.json").write_text("[")
    with pytest.raises(DamagedModel, match=r"config\.json"):
        read_reference(file, base)


# ---- what is said ----------------------------------------------------------------------------------------------


def test_a_plain_file_gives_no_warning(tmp_path: Path) -> None:
    assert read(tmp_path).warnings == []


@pytest.mark.parametrize(("changes", "said"), [
    ({"dropout": 0.1, "alpha": 2}, "alpha, dropout"), ({"base_model_path": "/x/Other-4B"}, "trained for /x/Other-4B")])
def test_a_strange_config_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (warning,) = read(tmp_path, changes=changes).warnings
    assert said in warning


def test_rounding_and_left_out_parts_are_said(tmp_path: Path, base: Path) -> None:
    tensors = {name: value.half() for name, value in state_dict().items()}
    torch.save({"state_dict": tensors, "config": config(), "optimizer": {}}, tmp_path / "head.pt")
    left_out, rounded = read_reference(tmp_path / "head.pt", base).warnings
    assert "optimizer" in left_out and "float16" in rounded


def test_an_error_leaves_no_folder(tmp_path: Path, base: Path) -> None:
    with pytest.raises(DamagedModel):
        convert_file(write(tmp_path / "head.pt", num_spec_layers=3), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
