"""Checkpoints of draft modules: what is written comes back, what is damaged or foreign is named."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spd_reference
from fullpipe.errors import DamagedModel, DraftMismatch, ModelNotFound, UnsupportedModel, UsageError
from fullpipe.models.config import ModelConfig
from fullpipe.models.hf_config import read_hf
from fullpipe.models.spd_checkpoint import (
    CONFIG,
    FIXTURE,
    TAP_CONVENTION,
    WEIGHTS,
    ModuleConfig,
    ParityFixture,
    VerifierIdentity,
    _exchange,
    _exchange_in_steps,
    as_stored,
    check_fits,
    check_parity,
    config_hash,
    identity_of,
    load_checkpoint,
    load_config,
    load_fixture,
    save_checkpoint,
    tokenizer_hash,
)
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from tiny import save, tiny_model, write_gguf

IDENTITY = VerifierIdentity(name="org/base", architecture="Qwen3ForCausalLM", revision="abc", config_hash="c" * 64,
                            tokenizer_hash="d" * 64, dtype="bfloat16", quantisation="Q4_1")
CONFIGURATION = ModuleConfig(
    kind="spd", hidden=8, heads=4, kv_heads=2, head_dim=4, intermediate=12, rms_eps=1e-6, num_layers=2,
    bounds=(0, 2, 5), verifier_layers=6, vocab_size=20, draft_vocab_size=5, stages=((2, 4, 6), (3, 6)), train_span=512,
    verifier=IDENTITY, qk_norm=True, training={"steps": 100, "loss": 1.5, "files": ["a.txt"]})
DRAFT_IDS = torch.tensor([0, 3, 4, 11, 19])


def changed(**values: Any) -> ModuleConfig:
    return dataclasses.replace(CONFIGURATION, **values)


def random_tensors(config: ModuleConfig, seed: int = 0) -> dict[str, Tensor]:
    """Float32; matrices already hold bfloat16 values, vectors do not."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in config.tensor_shapes().items()}
    return {name: value.bfloat16().float() if value.ndim > 1 else value for name, value in made.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint."""
    save_checkpoint(tmp_path / "module", CONFIGURATION, random_tensors(CONFIGURATION), DRAFT_IDS)
    return tmp_path / "module"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


# ---- there and back --------------------------------------------------------------------------------------------

VARIANTS = {
    "spd": CONFIGURATION,
    "exit": changed(kind="exit", bounds=(2,), num_layers=0),
    "no q/k norm, with biases": changed(qk_norm=False, attention_bias=True, o_bias=True),
    "of Qwen3.5": changed(output_gate=True, zero_centred_norm=True),
    "shared head": changed(shared_head=True),
    "an empty last stage": changed(stages=((3, 6, 6),)),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_checkpoint_comes_back(tmp_path: Path, config: ModuleConfig) -> None:
    tensors = random_tensors(config)
    save_checkpoint(tmp_path / "module", config, tensors, DRAFT_IDS)
    loaded, found, ids = load_checkpoint(tmp_path / "module")
    assert loaded == config and ids is not None and torch.equal(ids, DRAFT_IDS) and ids.dtype == torch.int64
    assert found.keys() == tensors.keys() == config.tensor_shapes().keys()
    for name, value in found.items():
        assert value.dtype == (torch.bfloat16 if value.ndim > 1 else torch.float32), name
        assert torch.equal(value.float(), tensors[name]), name


def test_the_whole_vocabulary_needs_no_ids(tmp_path: Path) -> None:
    config = changed(draft_vocab_size=20)
    save_checkpoint(tmp_path, config, random_tensors(config))
    assert load_checkpoint(tmp_path)[2] is None
    assert not {"d2t", "t2d"} & set(load_file(tmp_path / WEIGHTS))


def test_the_vocabulary_is_stored_as_speculators_stores_it(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    assert stored["d2t"].tolist() == [0, 2, 2, 8, 15]  # offsets, not ids
    assert stored["t2d"].nonzero().flatten().tolist() == DRAFT_IDS.tolist() and stored["t2d"].shape == (20,)


def test_the_config_tells_other_tools_what_it_is(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    assert values["architectures"] == ["SpdSpeculator"] and values["speculators_model_type"] == "spd"
    assert values["aux_hidden_state_layer_ids"] == [0, 2, 5] and values["tap_convention"] == TAP_CONVENTION
    assert values["stages"] == [{"num_stages": 3, "ends": [2, 4, 6]}, {"num_stages": 2, "ends": [3, 6]}]
    theirs = values["speculators_config"]
    assert theirs["algorithm"] == "spd" and theirs["verifier"]["name_or_path"] == "org/base"
    assert theirs["proposal_methods"][0]["speculative_tokens"] == 3
    assert values["transformer_layer_config"]["vocab_size"] == 20 and values["draft_vocab_size"] == 5


def test_what_is_stored_is_what_a_fixture_must_be_made_of(folder: Path) -> None:
    given = {name: value + 1e-4 for name, value in random_tensors(CONFIGURATION).items()}
    save_checkpoint(folder, CONFIGURATION, given, DRAFT_IDS)
    found = load_checkpoint(folder)[1]
    assert all(torch.equal(found[name], value) for name, value in as_stored(given).items())


# ---- config.json -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["torch_dtype", "transformers_version", "_name_or_path"])
def test_keys_of_hugging_face_are_let_pass(folder: Path, key: str) -> None:
    edit(folder, lambda values: values.update({key: "x"}))
    edit(folder, lambda values: values["transformer_layer_config"].update({key: "x"}))
    assert load_config(folder) == CONFIGURATION


def test_unknown_keys_are_refused_by_name(folder: Path) -> None:
    edit(folder, lambda values: values.update(norm_before_fc=True))
    edit(folder, lambda values: values["transformer_layer_config"].update(sliding_window=7))
    edit(folder, lambda values: values.pop("bounds"))
    with pytest.raises(UnsupportedModel, match=r"transformer_layer_config\.sliding_window, norm_before_fc"):
        load_config(folder)


@pytest.mark.parametrize(("change", "named"), [
    (lambda v: v.pop("train_span"), "train_span"),
    (lambda v: v.update(train_span=0), "train_span"),
    (lambda v: v.update(use_deepest="yes"), "use_deepest"),
    (lambda v: v["speculators_config"]["verifier"].pop("tokenizer_hash"), "verifier.tokenizer_hash"),
    (lambda v: v["transformer_layer_config"].update(hidden_act="gelu"), "hidden_act"),
    (lambda v: v.update(aux_hidden_state_layer_ids=[0, 3, 5]), "aux_hidden_state_layer_ids"),
    (lambda v: v.update(target_hidden_size=9), "target_hidden_size"),
    (lambda v: v["stages"][0].update(num_stages=4), "num_stages"),
    (lambda v: v["speculators_config"].update(algorithm="exit"), "algorithm"),
    (lambda v: v.update(bounds=[1, 2], aux_hidden_state_layer_ids=[1, 2]), "bounds 1, 2"),
    (lambda v: v.update(bounds=[0, 7], aux_hidden_state_layer_ids=[0, 7]), "bounds 0, 7 .* for 6 layers"),
    (lambda v: v.update(bounds=[0, 2, 2], aux_hidden_state_layer_ids=[0, 2, 2]), "bounds 0, 2, 2"),
    (lambda v: v.update(stages=[{"num_stages": 2, "ends": [4, 5]}]), "end after 4, 5 of 6"),
    (lambda v: v.update(stages=[]), "stages that end after nothing"),
    (lambda v: v.update(draft_vocab_size=21), "21 tokens out of 20"),
    (lambda v: v.update(num_spec_layers=0), "0 decoder layers"),
    (lambda v: v["transformer_layer_config"].update(num_key_value_heads=3), "4 heads cannot share 3"),
    (lambda v: v["transformer_layer_config"].update(head_dim=5), "odd head size"),
])
def test_a_config_that_is_wrong_says_where(folder: Path, change: Callable[[dict[str, Any]], object],
                                           named: str) -> None:
    with pytest.raises(DamagedModel, match=named):
        load_config(edit(folder, change))


@pytest.mark.parametrize(("change", "named"), [
    (lambda v: v.update(checkpoint_version=2), "checkpoint_version 2; this Fullpipe reads 1"),
    (lambda v: v.pop("checkpoint_version"), "checkpoint_version None"),
    (lambda v: v.update(speculators_model_type="eagle3"), "'eagle3'"),
    (lambda v: v.update(tap_convention="k is layer k"), "'k is layer k'"),
])
def test_another_format_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        load_config(edit(folder, change))


def test_a_config_that_is_not_json(folder: Path) -> None:
    for text in ("{", "[]"):
        (folder / CONFIG).write_text(text)
        with pytest.raises(DamagedModel, match=CONFIG):
            load_checkpoint(folder)


def test_a_folder_without_a_module(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelNotFound, match=str(place)):
            load_checkpoint(place)


# ---- model.safetensors -----------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(DamagedModel, match=WEIGHTS):
            load_checkpoint(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(DamagedModel, match=f"{WEIGHTS} is missing"):
        load_checkpoint(folder)


def test_every_missing_strange_and_misshapen_tensor_is_named(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["aggr_projs.1.weight"], tensors["spec_layers.0.mlp.up_proj.weight"]
        tensors["midlayer.weight"] = torch.zeros(2)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:4].clone()

    with pytest.raises(DamagedModel) as caught:
        load_checkpoint(edit_tensors(folder, change))
    for part in ("aggr_projs.1.weight is missing", "spec_layers.0.mlp.up_proj.weight is missing",
                 "midlayer.weight is not known", "lm_head.weight has shape [4, 8] instead of [5, 8]", WEIGHTS):
        assert part in caught.value.message


def test_a_shared_head_has_no_head_stored(folder: Path) -> None:
    with pytest.raises(DamagedModel, match=r"lm_head\.weight is not known"):
        load_checkpoint(edit(folder, lambda values: values.update(shared_head=True)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(folder: Path, bad: float) -> None:
    tensors = random_tensors(CONFIGURATION)
    tensors["lm_head.weight"][2, 3] = bad
    with pytest.raises(DamagedModel, match=r"lm_head\.weight holds numbers that are not finite"):
        save_checkpoint(folder, CONFIGURATION, tensors, DRAFT_IDS)
    edit_tensors(folder, lambda stored: stored.update({"lm_head.weight": tensors["lm_head.weight"]}))
    with pytest.raises(DamagedModel, match=r"lm_head\.weight holds numbers that are not finite"):
        load_checkpoint(folder)


@pytest.mark.parametrize("change", [
    lambda t: t.pop("d2t"),
    lambda t: t.pop("t2d"),
    lambda t: (t.pop("d2t"), t.pop("t2d")),
    lambda t: t["d2t"].copy_(DRAFT_IDS),  # ids where offsets must be
    lambda t: t.update(d2t=t["d2t"].int()),
    lambda t: t["d2t"].sub_(1),
    lambda t: t["t2d"].logical_not_(),
    lambda t: t.update(t2d=t["t2d"][:-1].clone()),
])
def test_a_damaged_draft_vocabulary(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with pytest.raises(DamagedModel, match="d2t"):
        load_checkpoint(edit_tensors(folder, change))


# ---- writing ---------------------------------------------------------------------------------------------------


def test_a_new_checkpoint_replaces_the_old_one_and_leaves_other_files(folder: Path) -> None:
    (folder / "run.yaml").write_text("lr: 1")
    (folder / "resume").mkdir()
    (folder / "resume" / CONFIG).write_text("not ours")
    (folder / "best").symlink_to("resume")
    (folder / FIXTURE).write_bytes(b"of the old one")
    exit_head = changed(kind="exit", bounds=(2,), num_layers=1)
    save_checkpoint(folder, exit_head, random_tensors(exit_head), DRAFT_IDS)
    assert load_checkpoint(folder)[0] == exit_head
    assert (folder / "run.yaml").read_text() == "lr: 1" and (folder / "best" / CONFIG).read_text() == "not ours"
    assert not (folder / FIXTURE).exists()
    assert os.listdir(folder.parent) == ["module"]


def test_a_folder_with_other_files_becomes_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 1")
    save_checkpoint(tmp_path, CONFIGURATION, random_tensors(CONFIGURATION), DRAFT_IDS)
    assert load_checkpoint(tmp_path)[0] == CONFIGURATION
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, "run.yaml"]


def test_a_link_to_a_checkpoint_stays_a_link(folder: Path) -> None:
    link = folder.parent / "best"
    link.symlink_to(folder)
    save_checkpoint(link, changed(train_span=7), random_tensors(CONFIGURATION), DRAFT_IDS)
    assert link.is_symlink() and load_config(folder).train_span == 7


@pytest.mark.parametrize("foreign", [
    {CONFIG: '{"model_type": "llama"}'}, {CONFIG: "{"}, {CONFIG: "[]"}, {WEIGHTS: "weights"}])
def test_a_model_that_is_no_draft_module_is_not_replaced(tmp_path: Path, foreign: dict[str, str]) -> None:
    for name, text in foreign.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="not replaced"):
        save_checkpoint(tmp_path, CONFIGURATION, random_tensors(CONFIGURATION), DRAFT_IDS)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == foreign


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "module").write_text("precious")
    with pytest.raises(UsageError, match="is a file"):
        save_checkpoint(tmp_path / "module", CONFIGURATION, random_tensors(CONFIGURATION), DRAFT_IDS)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 4000], ids=["in config.json", "in the weights"])
def test_a_full_disk_leaves_what_was_there(folder: Path, size: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert 1000 < len(before[CONFIG]) < 4000 < len(before[WEIGHTS])
    with room_for(size), pytest.raises(UsageError, match="cannot write the checkpoint"):
        save_checkpoint(folder, changed(train_span=7), random_tensors(CONFIGURATION, 1), DRAFT_IDS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["module"]


def test_what_killed_processes_left_behind_is_removed_when_it_is_old(folder: Path) -> None:
    for name in (".module.12-abc", ".module.13-abc.replaced", ".module.14-fresh", ".other.12-abc"):
        (folder.parent / name).mkdir()
        if "fresh" not in name:
            os.utime(folder.parent / name, (0, 0))
    save_checkpoint(folder, CONFIGURATION, random_tensors(CONFIGURATION), DRAFT_IDS)
    assert sorted(os.listdir(folder.parent)) == [".module.14-fresh", ".other.12-abc", "module"]


@pytest.mark.parametrize("swap", [_exchange, _exchange_in_steps])
def test_two_ways_to_swap_folders(tmp_path: Path, swap: Callable[[Path, Path], object]) -> None:
    """The second is for file systems without the first; both leave the new folder in the old one's place."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    assert swap(tmp_path / "new", tmp_path / "old") in (True, None)
    assert (tmp_path / "old" / "which").read_text() == "new"


def test_a_swap_in_steps_that_fails_is_taken_back(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "which").write_text("old")
    with pytest.raises(FileNotFoundError):
        _exchange_in_steps(tmp_path / "nothing", tmp_path / "old")
    assert (tmp_path / "old" / "which").read_text() == "old" and os.listdir(tmp_path) == ["old"]


# ---- whom it is for --------------------------------------------------------------------------------------------


def verifier(**changes: Any) -> ModelConfig:
    values = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12, "vocab_size": 20, **changes}
    return read_hf(values)


def fits(config: ModuleConfig = CONFIGURATION, *, ends: tuple[int, ...] = (2, 4, 6), dtype: str = "bfloat16",
         target: ModelConfig | None = None, **identity: Any) -> list[str]:
    return check_fits(config, target or verifier(), dataclasses.replace(IDENTITY, **identity), ends, dtype)


def test_a_module_that_fits_gives_no_warning() -> None:
    """The verifier's heads are no business of the module's; only their size is, for RoPE."""
    assert fits() == fits(ends=(3, 6)) == fits(revision=None) == fits(name="another/copy") == []


@pytest.mark.parametrize(("changes", "named"), [
    ({"vocab_size": 21}, "20 vocabulary rows.* 21"), ({"hidden_size": 16}, "8 hidden numbers.* 16"),
    ({"num_hidden_layers": 5}, "6 layers.* 5"), ({"head_dim": 8}, "4 numbers a head.* 8")])
def test_a_module_for_another_model_is_refused(changes: dict[str, int], named: str) -> None:
    with pytest.raises(DraftMismatch, match=named):
        fits(target=verifier(**changes))


def test_a_module_for_another_tokenizer_is_refused() -> None:
    with pytest.raises(DraftMismatch, match=r"tokenizer of org/base"):
        fits(tokenizer_hash="e" * 64)


@pytest.mark.parametrize("special", ["output_gate", "zero_centred_norm", "o_bias"])
def test_a_module_that_we_cannot_compute_is_refused(special: str) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be run yet"):
        fits(changed(**{special: True}))


@pytest.mark.parametrize(("changes", "named"), [
    ({"dtype": "float32"}, "bfloat16, this run computes in float32"),
    ({"quantisation": None}, "Q4_1 weights, these are unquantised"),
    ({"quantisation": "Q8_0"}, "Q4_1 weights, these are Q8_0"),
    ({"config_hash": "f" * 64}, "another configuration"),
    ({"revision": "def"}, "revision abc of the model, this is def"),
    ({"ends": (1, 2, 6)}, "end after layers 2, 4, 6, these end after 1, 2, 6"),
    ({"ends": (1, 2, 3, 4, 5, 6)}, "trained for 2 or 3 stages, not for 6")])
def test_what_costs_acceptance_is_warned_of(changes: dict[str, Any], named: str) -> None:
    (warning,) = fits(**changes)
    assert named in warning


def test_what_is_not_known_is_not_warned_of() -> None:
    unknown = dataclasses.replace(IDENTITY, dtype=None, revision=None)
    assert fits(changed(verifier=unknown), dtype="float32") == []


# ---- who a model is --------------------------------------------------------------------------------------------


def test_a_folder_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("qwen3").bfloat16()
    folder = tmp_path / "models--org--tiny" / "snapshots" / "0123abc"
    folder.parent.mkdir(parents=True)
    spd_reference.write_tokenizer(save(model, folder))
    found = identity_of(folder)
    assert (found.name, found.revision, found.architecture) == ("org/tiny", "0123abc", "Qwen3ForCausalLM")
    assert (found.dtype, found.quantisation) == ("bfloat16", None)
    assert found.tokenizer_hash == tokenizer_hash(load_tokenizer(folder))
    assert identity_of(folder, name="mine", dtype="float32") == dataclasses.replace(found, name="mine", dtype="float32")


@pytest.mark.parametrize(("kind", "dtype", "quantisation"), [
    (gguf.GGMLQuantizationType.Q4_1, None, "Q4_1"), (gguf.GGMLQuantizationType.F16, "float16", None)])
def test_a_gguf_file(tmp_path: Path, kind: gguf.GGMLQuantizationType, dtype: str | None,
                     quantisation: str | None) -> None:
    tokenizer = load_tokenizer(spd_reference.write_tokenizer(tmp_path))
    found = identity_of(write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", kind=kind), tokenizer=tokenizer)
    assert (found.name, found.revision, found.dtype, found.quantisation) == ("tiny", None, dtype, quantisation)


def test_the_config_hash_is_of_the_arithmetic_not_of_the_file(tmp_path: Path) -> None:
    model = tiny_model("qwen2", rms_norm_eps=1e-6)
    one = open_model(save(model, tmp_path / "folder")).config
    other = open_model(write_gguf(model, tmp_path / "m.gguf")).config
    assert one.rms_eps != other.rms_eps  # GGUF has single precision
    assert config_hash(one) == config_hash(other)
    hashes = {config_hash(verifier(**change)) for change in (
        {}, {"num_hidden_layers": 7}, {"hidden_size": 16}, {"vocab_size": 21}, {"rms_norm_eps": 1e-5},
        {"rope_theta": 5e5}, {"num_attention_heads": 4}, {"attention_bias": True})}
    assert len(hashes) == 8


def test_the_tokenizer_hash_is_of_tokens_and_ids(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    one, same, other = (tokenizer_hash(load_tokenizer(spd_reference.write_tokenizer(folder, first)))
                        for folder, first in zip(folders, "aab"))
    assert one == same != other


# ---- parity ----------------------------------------------------------------------------------------------------


def fixture_for(config: ModuleConfig) -> ParityFixture:
    generator = torch.Generator().manual_seed(3)
    return ParityFixture(
        features={kind: torch.randn(2, kind + 1, config.hidden, generator=generator) for kind in (0, 2)},
        rows={0: torch.tensor([2, 3]), 2: torch.tensor([0, 1])}, positions=torch.tensor([4, 5, 6, 6]),
        mask=torch.ones(4, 4, dtype=torch.bool).tril(), queries=torch.tensor([3]),
        logits=torch.randn(1, config.draft_vocab_size, generator=generator))


def forward_of(folder: Path) -> Callable[[ParityFixture], Tensor]:
    """Stands for a module: the asked rows' first features through the head."""
    tensors = load_checkpoint(folder)[1]

    def forward(fixture: ParityFixture) -> Tensor:
        rows = torch.zeros(len(fixture.positions), CONFIGURATION.hidden)
        for kind, places in fixture.rows.items():
            rows[places] = fixture.features[kind][:, 0]
        return rows[fixture.queries] @ tensors["lm_head.weight"].float().T

    return forward


@pytest.fixture
def fixed(folder: Path) -> Path:
    """A checkpoint with a fixture that agrees with `forward_of`."""
    tensors, fixture = random_tensors(CONFIGURATION), fixture_for(CONFIGURATION)
    fixture = dataclasses.replace(fixture, logits=forward_of(folder)(fixture))
    save_checkpoint(folder, CONFIGURATION, tensors, DRAFT_IDS, fixture)
    return folder


def test_a_fixture_comes_back_and_agrees(fixed: Path) -> None:
    found = load_fixture(fixed)
    assert found is not None and torch.equal(found.features[2], fixture_for(CONFIGURATION).features[2])
    assert check_parity(fixed, forward_of(fixed)) == 0
    wrong_by = 0.01 * found.logits.abs().max()
    assert check_parity(fixed, lambda one: one.logits + wrong_by, tolerance=0.02) == pytest.approx(0.01, rel=1e-3)


def test_a_checkpoint_may_have_no_fixture(folder: Path) -> None:
    assert load_fixture(folder) is None and check_parity(folder, forward_of(folder)) is None


def test_altered_weights_do_not_agree(fixed: Path) -> None:
    edit_tensors(fixed, lambda tensors: tensors["lm_head.weight"][1].neg_())
    with pytest.raises(DamagedModel, match="does not compute what it did"):
        check_parity(fixed, forward_of(fixed))


@pytest.mark.parametrize(("forward", "named"), [
    (lambda one: one.logits.log(), "differs by nan"), (lambda one: one.logits[:, :-1], "expects logits")])
def test_what_is_no_answer_does_not_agree(fixed: Path, forward: Callable[[ParityFixture], Tensor], named: str) -> None:
    with pytest.raises(DamagedModel, match=named):
        check_parity(fixed, forward)


@pytest.mark.parametrize("changes", [
    {"rows": {0: torch.tensor([2, 3]), 2: torch.tensor([0, 3])}}, {"queries": torch.tensor([4])},
    {"queries": torch.tensor([], dtype=torch.int64)}, {"mask": torch.ones(4, 4)}, {"logits": torch.zeros(1, 6)},
    {"features": {0: torch.zeros(2, 1, 8)}}, {"positions": torch.zeros(4)}, {"rows": {}, "features": {}}])
def test_a_fixture_that_makes_no_sense(folder: Path, changes: dict[str, Any]) -> None:
    fixture = dataclasses.replace(fixture_for(CONFIGURATION), **changes)
    with pytest.raises(DamagedModel, match="does not fit"):
        save_checkpoint(folder, CONFIGURATION, random_tensors(CONFIGURATION), DRAFT_IDS, fixture)


def test_a_damaged_fixture_is_named(fixed: Path) -> None:
    whole = (fixed / FIXTURE).read_bytes()
    strange = load_file(fixed / FIXTURE) | {"more": torch.zeros(1)}
    (fixed / FIXTURE).write_bytes(whole[:-3])
    with pytest.raises(DamagedModel, match=FIXTURE):
        check_parity(fixed, forward_of(fixed))
    save_file(strange, fixed / FIXTURE)
    with pytest.raises(DamagedModel, match="more is not known"):
        check_parity(fixed, forward_of(fixed))
