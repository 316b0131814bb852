"""Draft modules on imagined clusters: their size in layers of the target, and what a job takes by the way in which a
cluster describes the draft's device."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_cluster import GOOD, PROFILED, parse, profile

from fullpipe.cluster.profile import Profile
from fullpipe.errors import UsageError
from fullpipe.models.spd_checkpoint import ModuleConfig, VerifierIdentity
from fullpipe.stations.drafts.names import ModuleSize, module_folder
from fullpipe_lab.clusters import Cluster, DraftCosts, unit_cluster

WHOM = VerifierIdentity(name="m", architecture="LlamaForCausalLM", config_hash="c", tokenizer_hash="t")
# Of 8 x 8 weights a matrix as wide as the model has one unit: q, o 2, k, v 1, MLP 3 x 2; 9 units a layer.
SPD = ModuleConfig(kind="spd", hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, rms_eps=1e-6, num_layers=2,
                   bounds=(0, 3, 6), verifier_layers=6, vocab_size=64, draft_vocab_size=16, stages=((3, 6),),
                   train_span=64, verifier=WHOM, shared_head=True)
EXIT = ModuleConfig(kind="exit", hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, rms_eps=1e-6,
                    num_layers=0, bounds=(3,), verifier_layers=6, vocab_size=64, draft_vocab_size=64,
                    stages=((3, 6),), train_span=64, verifier=WHOM)


def write(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def module(tmp_path: Path) -> str:
    return f"spd:{write(tmp_path / 'spd', SPD.to_dict())}"


def costs(cluster: Cluster, *sources: str) -> DraftCosts:
    found = DraftCosts(cluster, sources)
    found.check()
    return found


# ---- size ------------------------------------------------------------------------------------------------------


def test_names_of_modules() -> None:
    assert module_folder("spd:a/b") == Path("a/b") and module_folder("exit:/x") == Path("/x")
    assert module_folder("spd:~/m") == Path.home() / "m"
    assert [module_folder(name) for name in ("ngram", "spd", "qwen2.5-0.5b", "org:model", "none")] == [None] * 5


@pytest.mark.parametrize(("config", "layers", "depth", "head"), [(SPD, 2 + 6 / 9, 2, 0.25), (EXIT, 1 / 9, 0, 1.0)])
def test_a_size_is_in_layers_of_the_target(tmp_path: Path, config: ModuleConfig, layers: float, depth: int,
                                           head: float) -> None:
    size = ModuleSize.of(write(tmp_path, config.to_dict()))
    assert (size.layers, size.depth, size.head) == (pytest.approx(layers), depth, head)


@pytest.mark.parametrize("config", [SPD, EXIT], ids=["spd", "exit"])
def test_it_is_that_of_the_matrices_in_the_file(tmp_path: Path, config: ModuleConfig) -> None:
    matrices = {name: math.prod(shape) for name, shape in config.tensor_shapes().items()
                if len(shape) > 1 and name != "lm_head.weight"}
    layer = sum(math.prod(shape) for name, shape in SPD.tensor_shapes().items()
                if len(shape) > 1 and name.startswith("spec_layers.0."))
    assert ModuleSize.of(write(tmp_path, config.to_dict())).layers == pytest.approx(sum(matrices.values()) / layer)


@pytest.mark.parametrize("text", ["", "[]", '{"bounds": [0]}', '{"transformer_layer_config": 3}'])
def test_a_file_that_does_not_say_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="does not say how large") as caught:
        DraftCosts(Cluster.load("gpus-8"), [f"spd:{tmp_path}"])
    assert "train spd" in str(caught.value) and str(tmp_path) in str(caught.value)


# ---- what a job takes ------------------------------------------------------------------------------------------


def test_on_a_roofline_the_weights_are_read_once(module: str) -> None:
    """The 70B: 855,638,016 weights a layer, 1,050,673,152 in the head, read in 16 bit at 1008 GB/s; a context of 512
    leaves 2048 numbers a token in each of the two layers."""
    weights = (2 + 6 / 9) * 855_638_016 + 0.25 * 1_050_673_152
    seconds = (2 * weights + 2 * 2 * 2048 * 512) / 1008e9 + 0.3e-3
    found = costs(Cluster.load("gpus-8"), module)
    assert found("draft", 1, 9.0, 512) == pytest.approx(seconds)
    assert found("draft", 0, 9.0, 512) == 0
    assert found("stage 3", 8, 9.0, 512) == Cluster.load("gpus-8")("stage 3", 8, 9.0, 512)


def test_rows_in_flight_are_computed_too(module: str) -> None:
    """79 rows are free on these cards, and eight stages hold eight tokens."""
    found = costs(Cluster.load("gpus-8"), module)
    free = found("draft", 1, 9.0, 0)
    assert found("draft", 79 - 8, 9.0, 0) == free < found("draft", 80 - 8, 9.0, 0)


def test_a_module_is_not_quantised_with_the_target(module: str) -> None:
    """On home-6 the target has 4.5 bits; the module keeps its 16, on cards of 360 GB/s with 0.5 ms beside."""
    cluster = Cluster.load("home-6")
    device = cluster.file.devices[cluster.file.blocks[cluster.device_of("draft")]]
    weights = (2 + 6 / 9) * 855_638_016 + 0.25 * 1_050_673_152
    assert costs(cluster, module)("draft", 1, 9.0, 0) == pytest.approx(
        2 * weights / (device.bandwidth_gb_s or 0) / 1e9 + device.overhead_ms / 1e3)


def test_several_sources_are_asked_one_after_another(module: str) -> None:
    cluster = Cluster.load("gpus-8")
    alone = costs(cluster, module)("draft", 4, 9.0, 100)
    ngram, model = (costs(cluster, name)("draft", 4, 9.0, 100) for name in ("ngram", "a model"))
    assert costs(cluster, module, "ngram")("draft", 4, 9.0, 100) == pytest.approx(alone + ngram)
    assert costs(cluster, module, "a model", "ngram")("draft", 4, 9.0, 100) == pytest.approx(alone + model + ngram)


def test_with_a_profile_its_layers_are_the_profiled_ones(module: str, tmp_path: Path) -> None:
    """On a machine of twice the speed: 2 2/3 layers of 2 ms (1 row) to 3 ms (5), a quarter of a head of 4 ms."""
    profile().save(tmp_path / "here.json")
    found = costs(parse(PROFILED, tmp_path), module)
    assert found("draft", 1, 9.0, 100) == pytest.approx(((2 + 6 / 9) * 2.5e-3 + 0.25 * 4e-3) / 2)  # of 3 rows


def test_a_profile_without_a_draft_model_will_do(module: str, tmp_path: Path) -> None:
    """Whose draft is placed nowhere sits with stage 0."""
    found: Profile = profile(drafts=False)
    found.save(tmp_path / "here.json")
    assert costs(parse(PROFILED.replace('draft = "fast"\n', ""), tmp_path), module)("draft", 1, 9.0, 0) > 0


def test_a_draft_curve_is_meant_for_a_module_too(module: str) -> None:
    assert costs(unit_cluster(4), module, "ngram")("draft", 64, 9.0, 100) == 1e-3


def test_a_measured_draft_counts_what_it_took(module: str) -> None:
    cluster = Cluster.parse(unit_cluster(2).text.replace("draft_ms = [[1, 1.0]]", "speed = 4.0"), "here", Path())
    for sources in ([module], [module, "ngram"], ["a model", "ngram"]):
        assert costs(cluster, *sources)("draft", 3, 2.0, 0) == 0.5
    assert costs(cluster, "ngram")("draft", 3, 2.0, 0) == pytest.approx(5e-5 + 3 * 4e-5)


def test_no_draft_model_need_be_described_for_a_module(module: str) -> None:
    text = GOOD[: GOOD.index("[draft]")] + GOOD[GOOD.index("[[devices]]") :].replace('draft = "board1"\n', "")
    cluster = parse(text)
    assert costs(cluster, module)("draft", 1, 9.0, 0) > 0
    with pytest.raises(UsageError, match="no draft is described"):
        costs(cluster, "a model")


@pytest.mark.parametrize(("edit", "says", "hint"), [
    (('draft_ms = [[1, 1.0]]', 'bandwidth_gb_s = 100\ntflop_s = 5'), "no target is described", "[target]"),
    (('draft = "drafter"', ""), "has no draft_ms", "draft_ms = [[rows"),
])
def test_what_a_module_costs_must_be_said(module: str, edit: tuple[str, str], says: str, hint: str) -> None:
    """A draft device of some bandwidth on a cluster of curves; stage 0's device, which has a curve for stages only."""
    text = unit_cluster(2).text.replace(*edit)
    if "bandwidth" in edit[1]:
        text += '\n[draft]\nname = "d"\nlayers = 1\nlayer_params = 1\nhead_params = 1\nhidden = 1\nkv_size = 1\n'
    with pytest.raises(UsageError, match=says) as caught:
        costs(Cluster.parse(text, "here", Path()), module)
    assert hint in str(caught.value)


def test_the_documented_figures() -> None:
    """A layer of SmolLM2 has 576 x (2 x 576 + 2 x 192 + 3 x 1536) weights, 32/3 of 576 x 576; one in six tokens."""
    text = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| ([\w-]+) \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) ms \|", text)
    assert [name for name, *_ in rows] == ["gpus-8", "edge-5", "home-6"]
    for name, *said in rows:
        cluster = Cluster.load(name)
        sizes = [ModuleSize(1 + matrices * 3 / 32, 1, 1 / 6) for matrices in (15, 1)]
        found = [*(cluster.module_seconds(size, 1, 0) for size in sizes), cluster.draft_seconds(1, 0),
                 cluster.stage_seconds(2, 1, 0)]
        assert [float(one) for one in said] == pytest.approx([1e3 * one for one in found], abs=0.06), name
