"""A model with a LoRA adapter says what transformers says with the merged weights, and what is no plain LoRA is refused
by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from test_decoder import TEXT, Pipe, close, gguf_by_transformers, others, reference

from adapters import PROJECTIONS, merge, shapes_of, write_adapter
from fullpipe.errors import DamagedModel, ModelNotFound, UnsupportedModel
from fullpipe.hub import cache, resolve
from fullpipe.kernels import load
from fullpipe.models.lora import open_merged
from fullpipe.models.weights import open_model
from tiny import FAMILIES, save, tiny_model, write_gguf

DTYPES = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


@others
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_merged_weights(tmp_path: Path, family: str, kind: str) -> None:
    model = tiny_model(family)
    folder = save(model, tmp_path / "model")
    added = write_adapter(tmp_path / "adapter", shapes_of(model))
    before = reference(model, TEXT)
    merge(model, added)
    files = open_merged(folder, tmp_path / "adapter")
    ours = Pipe.of(files, [2], kind=kind).chain(TEXT)
    close(ours, reference(model, TEXT))
    assert (ours - before).abs().max() > 0.1


@pytest.mark.parametrize(("changes", "more"), [
    ({"use_rslora": True}, {}), ({"r": 1, "lora_alpha": 16}, {}), ({"lora_alpha": 2.5}, {}),
    ({}, {"ranks": {"q_proj": 2, "down_proj": 8}, "alphas": {"down_proj": 3}}),
    ({"init_lora_weights": "gaussian"}, {"dtype": torch.bfloat16}), ({"task_type": None}, {"dtype": torch.float16}),
], ids=["rslora", "rank 1", "a fraction", "patterns", "bfloat16", "float16"])
def test_scales_and_ranks_are_peft_s(tmp_path: Path, changes: dict[str, Any], more: dict[str, Any]) -> None:
    model = tiny_model("llama")
    folder = save(model, tmp_path / "model")
    merge(model, write_adapter(tmp_path / "adapter", shapes_of(model, layers=[1, 3]), **changes, **more))
    files = open_merged(folder, tmp_path / "adapter")
    for name, values in model.state_dict().items():
        assert torch.equal(files.tensor(name, torch.float32), values), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
def test_matrices_stay_what_they_are_stored_in_or_become_float16(tmp_path: Path, kind: Kind) -> None:
    """Llama's q and k lie interleaved in a GGUF file."""
    model = tiny_model("llama")
    path = write_gguf(model, tmp_path / "m.gguf", kind=kind)
    added = write_adapter(tmp_path / "adapter", shapes_of(model, ["q_proj", "v_proj", "up_proj"]))
    base, files = open_model(path), open_merged(path, tmp_path / "adapter")
    assert files.is_quantised == base.is_quantised and files.is_half == base.is_half
    for name in files.matrices:
        own = base.tensor(name, torch.float32)
        if (module := name.removesuffix(".weight")) not in added:
            assert files.kind(name) == kind and torch.equal(files.tensor(name, torch.float32), own)
            continue
        assert files.kind(name) == (kind if kind in DTYPES else Kind.F16)
        wanted = (own.double() + added[module]).to(DTYPES[files.kind(name)])
        assert torch.equal(files.tensor(name, torch.float32), wanted.float())
        assert torch.equal(files.raw_rows(name, 0, len(own)).reshape(-1), wanted.view(torch.uint8).reshape(-1))
    assert ("quantised" in files.told()) == (kind not in DTYPES) and "15 matrices" in files.told()


@pytest.mark.skipif(load() is None, reason="the native kernels were not built")
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0])
def test_the_native_kernels_compute_with_what_became_of_a_quantised_model(tmp_path: Path, kind: Kind) -> None:
    model = tiny_model("qwen2")
    path = write_gguf(model, tmp_path / "m.gguf", kind=kind)
    write_adapter(tmp_path / "adapter", shapes_of(model))
    files = open_merged(path, tmp_path / "adapter")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(files.tensor(name, torch.float32))
    ours, theirs = Pipe.of(files, [2], kind="native").chain(TEXT), reference(model, TEXT)
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max(), "rows are rounded to eight bits for the rest"


def test_how_many_rows_are_read_at_a_time_changes_no_bit(tmp_path: Path) -> None:
    model, name = tiny_model("qwen2"), "model.layers.2.mlp.up_proj.weight"
    write_adapter(tmp_path / "adapter", shapes_of(model, ["up_proj"], [2]), r=32)
    files = open_merged(save(model, tmp_path), tmp_path / "adapter")
    whole = files.tensor(name, torch.float32)
    for rows in (1, 2, 3, 5, 17, 96):
        for first in range(0, 96 - rows + 1, 7):
            part = torch.empty(rows, 64)
            files.read_into(name, part, first)
            assert torch.equal(part, whole[first : first + rows])


@pytest.mark.weights
def test_a_real_model_says_what_transformers_says_with_the_merged_weights(tmp_path: Path) -> None:
    path = resolve("smollm2-135m")
    model = gguf_by_transformers(path)
    added = write_adapter(tmp_path / "adapter", shapes_of(model), r=8, lora_alpha=16, size=0.03)
    files = open_merged(path, tmp_path / "adapter")
    merge(model, added, DTYPES[files.kind("model.layers.0.mlp.up_proj.weight")])
    tokens = random.Random(0).sample(range(49152), 40)
    ours, theirs = Pipe.of(files, [11, 20]).chain(tokens), reference(model, tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # of logits up to 30, in float32


def test_its_files_can_be_given_to_hosts(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", {"model.layers.0.mlp.up_proj": (96, 64)})
    manifest = cache.manifest(tmp_path / "adapter")
    assert manifest.name == "adapter"
    assert [file.name for file in manifest.files] == ["adapter/adapter_config.json",
                                                      "adapter/adapter_model.safetensors"]


# ---- what is refused -------------------------------------------------------------------------------------------------

UP = {"model.layers.0.mlp.up_proj": (96, 64)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("qwen2"), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("changes", "named"), [
    ({"peft_type": "IA3"}, "peft_type"), ({"peft_type": None}, "peft_type"), ({"task_type": "SEQ_CLS"}, "task_type"),
    ({"use_dora": True}, "use_dora"), ({"use_qalora": True}, "use_qalora"),
    ({"use_something_new": True}, "use_something_new"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"bias": "all"}, "bias"), ({"bias": "lora_only"}, "bias"), ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save"),
    ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["experts.w"]}, "target_parameters"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
])
def test_what_is_more_than_lora_is_refused_by_its_name(
        tmp_path: Path, model: Path, changes: dict[str, Any], named: str) -> None:
    write_adapter(tmp_path, UP, **changes)
    with pytest.raises(UnsupportedModel, match=rf" has {named}=") as caught:
        open_merged(model, tmp_path)
    assert "merge_and_unload" in (caught.value.hint or "")


@pytest.mark.parametrize(("name", "shape", "what"), [
    ("model.embed_tokens.lora_embedding_A", (4, 96), "changes the embedding"),
    ("model.layers.0.mlp.up_proj.lora_magnitude_vector", (96,), "DoRA"),
    ("model.layers.0.mlp.up_proj.lora_B.bias", (96,), "is a bias"),
    ("lm_head.modules_to_save.weight", (96, 64), "whole module"),
    ("model.layers.0.mlp.up_proj.lora_C.weight", (4, 4), "no such tensor"),
])
def test_a_tensor_that_is_no_part_of_lora_is_refused_by_its_name(
        tmp_path: Path, model: Path, name: str, shape: tuple[int, ...], what: str) -> None:
    write_adapter(tmp_path, UP, tensors={f"base_model.model.{name}": torch.zeros(shape)})
    with pytest.raises(UnsupportedModel, match=what) as caught:
        open_merged(model, tmp_path)
    assert name in caught.value.message


@pytest.mark.parametrize(("module", "shape", "named"), [
    ("lm_head", (96, 64), "lm_head"), ("model.embed_tokens", (96, 64), "embed_tokens"),
    ("model.layers.9.mlp.up_proj", (96, 64), "layers.9"), ("model.layers.0.self_attn.qkv_proj", (128, 64), "qkv_proj"),
    ("model.layers.0.mlp.experts.0.up_proj", (96, 64), "experts"),
])
def test_modules_that_cannot_be_changed_are_named(
        tmp_path: Path, model: Path, module: str, shape: tuple[int, int], named: str) -> None:
    write_adapter(tmp_path, {module: shape})
    with pytest.raises(UnsupportedModel, match=named) as caught:
        open_merged(model, tmp_path)
    assert all(part.rpartition(".")[2] in caught.value.message for part in PROJECTIONS)


def test_an_adapter_of_another_model_names_its_own(tmp_path: Path, model: Path) -> None:
    write_adapter(tmp_path, {"model.layers.0.mlp.up_proj": (96, 32)})
    with pytest.raises(UnsupportedModel, match="for another model") as caught:
        open_merged(model, tmp_path)
    assert "org/base" in (caught.value.hint or "")


def test_one_that_changes_nothing(tmp_path: Path, model: Path) -> None:
    write_adapter(tmp_path, {})
    with pytest.raises(UnsupportedModel, match="changes nothing"):
        open_merged(model, tmp_path)


def test_a_folder_without_one(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no adapter_config\.json"):
        open_merged(model, tmp_path / "nowhere")
    write_adapter(tmp_path, UP)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match="never loaded"):
        open_merged(model, tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(ModelNotFound, match=r"adapter_model\.safetensors is missing"):
        open_merged(model, tmp_path)


@pytest.mark.parametrize("changes", [{"r": 5}, {"lora_alpha": None}, {"r": "4"}, {"lora_alpha": True}])
def test_a_configuration_that_does_not_fit_the_matrices(tmp_path: Path, model: Path, changes: dict[str, Any]) -> None:
    write_adapter(tmp_path, UP)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DamagedModel, match="rank 4"):
        open_merged(model, tmp_path)


@pytest.mark.parametrize("patterns", [{"(": 4}, {"up_proj": None}, ["up_proj"]])
def test_patterns_that_are_none(tmp_path: Path, model: Path, patterns: Any) -> None:
    write_adapter(tmp_path, UP)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": patterns}))
    with pytest.raises(DamagedModel, match="is damaged"):
        open_merged(model, tmp_path)


def test_half_of_a_pair(tmp_path: Path, model: Path) -> None:
    write_adapter(tmp_path, UP, tensors={"base_model.model.model.layers.1.mlp.up_proj.lora_A.weight":
                                         torch.zeros(4, 64)})
    with pytest.raises(DamagedModel, match=r"layers\.1\.mlp\.up_proj"):
        open_merged(model, tmp_path)


def test_numbers_that_are_not_finite_are_found_where_they_are_read(tmp_path: Path, model: Path) -> None:
    write_adapter(tmp_path, UP)
    path = tmp_path / "adapter_model.safetensors"
    module = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file({f"{module}A.weight": torch.full((4, 64), torch.inf), f"{module}B.weight": torch.ones(96, 4)}, path)
    files = open_merged(model, tmp_path)
    with pytest.raises(DamagedModel, match="not finite") as caught:
        files.tensor("model.layers.0.mlp.up_proj.weight", torch.float32)
    assert str(path) in caught.value.message


def test_a_file_that_was_cut_short(tmp_path: Path, model: Path) -> None:
    write_adapter(tmp_path, UP)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DamagedModel, match="cut short"):
        open_merged(model, tmp_path)
