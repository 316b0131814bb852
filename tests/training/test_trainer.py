"""The training loop on a tiny target: what it learns from, that it goes on where it stopped, and when it stops."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from fullpipe.errors import DamagedModel, UsageError
from fullpipe.models.spd_checkpoint import CONFIG, WEIGHTS, check_parity, load_config
from fullpipe.models.spd_module import PipelineDraftModule, fixture_logits
from fullpipe.models.weights import open_model
from fullpipe.stations.drafts.module import build_spd
from fullpipe.training.features import FeatureStore, Outer, Teacher
from fullpipe.training.objective import Filling, divergence
from fullpipe.training.plan import Plan
from fullpipe.training.run import draw_curve, train
from fullpipe.training.state import load_state, save_state
from fullpipe.training.trainer import Material, Trainer
from tiny_module import material_of, write_letters

PLAN = Plan(stages=(3,), steps=12, warmup=3, batch_tokens=64, max_length=64, precision="fp32", validation=0.0, seed=3)
SILENT: Callable[..., None] = lambda *_: None  # noqa: E731


def texts(count: int, length: int | None = None, seed: int = 0) -> list[list[int]]:
    source = np.random.default_rng(seed)
    return [source.integers(0, tiny.VOCAB, length or int(source.integers(12, 40))).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.tiny_model("qwen3", seed=2, eos_token_id=None)
    return write_letters(tiny.save(model, tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def material(target: Path) -> Material:
    return material_of(target, texts(9), texts(2, seed=1))


def changed(plan: Plan = PLAN, **values: Any) -> Plan:
    return dataclasses.replace(plan, **values)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / WEIGHTS)


# ---- the teacher -------------------------------------------------------------------------------------------------


def test_the_teacher_says_what_transformers_says(target: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(texts(1, 30)[0])
    hidden, best = Teacher(open_model(target), (1, 3, 5), dtype=torch.float32, max_length=40).read(tokens)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(target).eval().model(tokens[None], output_hidden_states=True)
        whole = AutoModelForCausalLM.from_pretrained(target).eval()(tokens[None]).logits[0]
    for column, layer in enumerate((1, 3)):
        torch.testing.assert_close(hidden[:, column], theirs.hidden_states[layer][0], atol=1e-4, rtol=1e-4)
    outer = Outer(open_model(target), torch.arange(tiny.VOCAB), torch.float32)
    torch.testing.assert_close(outer.logits(hidden[:, 2]), whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(best, whole.argmax(-1))
    assert torch.equal(outer.embed(tokens), theirs.hidden_states[0][0])


def test_features_are_computed_once_and_kept(target: Path, tmp_path: Path) -> None:
    made = [np.array(text, np.int32) for text in texts(4)]
    teacher = Teacher(open_model(target), (2, 5), dtype=torch.float32, max_length=40)
    store = FeatureStore(tmp_path / "store", teacher, made, "key")
    hidden, best = teacher.read(torch.from_numpy(made[2].astype(np.int64)))
    for found in (store, store, FeatureStore(tmp_path / "store", asked_nothing(teacher), made, "key")):
        assert torch.equal(found[2][0], hidden.to(torch.bfloat16)) and torch.equal(found[2][1], best)
        assert torch.equal(found.best(2), best)
    with pytest.raises(UsageError, match="features of another model, other taps or another text"):
        FeatureStore(tmp_path / "store", teacher, made, "another")


def asked_nothing(teacher: Teacher) -> Teacher:
    """One that cannot be asked."""
    other = Teacher.__new__(Teacher)
    other.config, other.taps, other.dtype = teacher.config, teacher.taps, teacher.dtype
    return other


def test_a_sample_whose_writing_was_cut_off_is_computed_again(target: Path, tmp_path: Path) -> None:
    made = [np.array(text, np.int32) for text in texts(3)]
    teacher = Teacher(open_model(target), (5,), dtype=torch.float32, max_length=40)
    wanted = FeatureStore(tmp_path / "store", teacher, made, "key")[1][0]
    (tmp_path / "store" / "done.bin").write_bytes(bytes(3))
    hidden = (tmp_path / "store" / "hidden.bin").read_bytes()
    (tmp_path / "store" / "hidden.bin").write_bytes(hidden[: len(hidden) // 2] + bytes(len(hidden) - len(hidden) // 2))
    assert torch.equal(FeatureStore(tmp_path / "store", teacher, made, "key")[1][0], wanted)


# ---- the loss ----------------------------------------------------------------------------------------------------


class Bench:
    """A student of the tiny target, and a batch of texts."""

    def __init__(self, target: Path, folder: Path, made: list[list[int]], ids: Tensor | None = None,
                 **options: Any) -> None:
        plan = Plan(**({"stages": (3,), "steps": 1, "precision": "fp32"} | options))
        files = open_model(target)
        material = material_of(target, made)
        material = material if ids is None else dataclasses.replace(material, draft_ids=ids)
        trainer = Trainer(plan, material, folder)
        self.module, self.student, self.trainer = trainer.module, trainer._student, trainer
        self.outer, self.ids, self.files = trainer._outer, material.draft_ids, files
        self.batch = trainer._batch(range(len(made)))

    def gradients(self, filling: Filling) -> tuple[Tensor, list[Tensor | None]]:
        self.module.zero_grad()
        loss, _ = self.student(self.batch, filling)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in self.module.parameters()]


def test_the_loss_is_the_mean_over_the_labels_in_the_vocabulary(target: Path, tmp_path: Path) -> None:
    ids = torch.arange(10, 80)
    bench = Bench(target, tmp_path, texts(3), ids)
    filling = Filling(3, 2, 0, 0, (0, 1), weight=0.5)
    bench.batch.learn[:, :4] = False
    loss, counts = bench.student(bench.batch, filling)
    hidden, final, best = bench.student.answers(bench.batch, filling)
    rows = []
    right = 0
    for row in range(len(best)):
        if int(best[row]) in ids:
            scores = bench.module.logits(hidden[row])
            rows.append(divergence(scores, bench.outer.logits(final[row]), "forward-kl").item())
            right += int(ids[scores.argmax()]) == int(best[row])
    assert loss.item() == pytest.approx(0.5 * sum(rows) / len(rows), abs=1e-5)
    lengths = [len(text) for text in texts(3)]
    assert counts.tolist() == [sum(length - 5 for length in lengths), len(rows), right]
    assert 0 < len(rows) < counts[0]


def test_a_batch_without_labels_moves_nothing(target: Path, tmp_path: Path) -> None:
    bench = Bench(target, tmp_path, texts(2))
    bench.batch.learn[:] = False
    loss, gradients = bench.gradients(Filling(3, 1, 0, 0, (0,)))
    assert loss == 0 and all(one is None or not one.any() for one in gradients)


@pytest.mark.parametrize("options", [{"recompute_logits": True}, {"checkpointing": True},
                                     {"recompute_logits": True, "checkpointing": True}], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_what_saves_memory_changes_no_gradient(target: Path, tmp_path: Path, options: dict[str, bool],
                                               layers: int) -> None:
    filling, made = Filling(3, 3, 0, 0, (0, 1, 2)), texts(24, 60)  # more rows than are made at a time
    plain = Bench(target, tmp_path / "plain", made, layers=layers)
    saving = Bench(target, tmp_path / "saving", made, layers=layers, **options)
    loss, gradients = plain.gradients(filling)
    again, others = saving.gradients(filling)
    assert again.item() == pytest.approx(loss.item(), abs=1e-6)
    for first, second in zip(gradients, others, strict=True):
        assert first is not None and second is not None
        torch.testing.assert_close(second, first, atol=1e-6, rtol=0)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_step_of_several_batches_is_one_of_a_larger_batch(target: Path, tmp_path: Path, accumulate: int) -> None:
    """Its loss is the mean over all labels, however many each batch has. (One stage: all fillings are alike.)"""
    material, found = material_of(target, texts(16, 16)), []
    for number, sample in enumerate(material.train):
        sample.learn[: number] = False
    for parts in (1, accumulate):
        plan = changed(stages=(1,), bounds=(0, 5), steps=1, refreshed=0.0, ahead=0.0, accumulate=parts,
                       batch_tokens=256 // parts)
        trainer = Trainer(plan, material, tmp_path / str(parts))
        assert trainer._batches_per_epoch == parts
        loss, counts, tokens = trainer._step(0.0)
        moments = [trainer._optimizer.state[parameter]["exp_avg"] for parameter in trainer.module.parameters()
                   if parameter in trainer._optimizer.state]
        found.append((loss, counts.tolist(), tokens, moments))
    (loss, counts, tokens, moments), (again, *same, others) = found
    assert again == pytest.approx(loss, abs=1e-5) and same == [counts, tokens] and tokens == 256
    assert len(moments) == len(others) > 10
    for first, second in zip(moments, others, strict=True):
        torch.testing.assert_close(second, first, atol=1e-5, rtol=0)


def test_fillings_of_a_run_follow_from_the_seed(material: Material, tmp_path: Path) -> None:
    lines = []
    for name in ("one", "two"):
        said: list[str] = []
        train(changed(precision="bf16"), material, tmp_path / name,
              lambda step, done, line, said=said: said.append(line.split(", ")[0]))
        lines.append(said)
    assert lines[0] == lines[1] and len(set(lines[0])) > 6
    assert all(torch.equal(value, weights(tmp_path / "two")[name]) for name, value in weights(tmp_path / "one").items())


@pytest.mark.parametrize("changes", [{}, {"kind": "exit"}, {"layers": 2, "shared_head": False}, {"stages": (1, 2, 5)},
                                     {"loss": "reverse-kl"}, {"loss": "total-variation"}, {"power": 1.0}], ids=str)
def test_it_learns(target: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = changed(steps=80, warmup=5, rate=3e-3, **changes)
    points: list[str] = []
    trainer = Trainer(plan, material_of(target, texts(2, 30), texts(1, 30)), tmp_path)
    summary = trainer.run(lambda step, done, line: points.append(line))
    assert trainer.curve[0]["accuracy"] > 0.05 and summary["steps"] == 80
    first, last = (float(line.split()[1].rstrip(",")) for line in (points[9], points[-1]))
    assert last < 0.8 * first


# ---- what is left ------------------------------------------------------------------------------------------------


def test_a_checkpoint_says_what_it_was_made_of(material: Material, tmp_path: Path) -> None:
    summary = train(changed(stages=(2, 5), steps=3), material, tmp_path, SILENT)
    config = load_config(tmp_path)
    assert config.stages == ((3, 5), (1, 2, 3, 4, 5)) and config.bounds[0] == 0 and config.bounds[-1] == 5
    assert config.verifier == material.identity and config.train_span == 64 and config.qk_norm
    assert config.training == summary and summary["plan"]["steps"] == 3
    rows = summary["acceptance"]
    assert [(row["stages"], row["fill"]) for row in rows if not row["depth"]] == [
        (2, 1), (2, 2), (5, 1), (5, 2), (5, 5)]
    assert all(0 <= row["top1"] <= row["top4"] <= 1 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} >= {"summary.json", "curve.json", "state", "features"}


@pytest.mark.parametrize("changes", [{}, {"kind": "exit", "layers": 2}, {"shared_head": False}], ids=str)
def test_the_parity_fixture_of_a_trained_module_holds(target: Path, material: Material, tmp_path: Path,
                                                      changes: dict[str, Any]) -> None:
    train(changed(steps=6, **changes), material, tmp_path, SILENT)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.05)):
        build_spd(module=str(tmp_path), model=str(target), dtype=dtype, vocab=tiny.VOCAB)
        share = check_parity(tmp_path, lambda fixture, dtype=dtype: fixture_logits(loaded(tmp_path, target, dtype),
                                                                                   fixture), tolerance=tolerance)
        assert share is not None and (share == 0) <= (dtype == "float32")
    values = load_file(tmp_path / WEIGHTS)
    values["aggr_projs.0.weight"] *= 1.5
    save_file(values, tmp_path / WEIGHTS)
    with pytest.raises(DamagedModel, match="does not compute what it did when it was made"):
        build_spd(module=str(tmp_path), model=str(target), dtype="float32", vocab=tiny.VOCAB)
    build_spd(module=str(tmp_path), model=str(target), dtype="float32", vocab=tiny.VOCAB, parity=False)


def loaded(folder: Path, target: Path, dtype: str) -> PipelineDraftModule:
    """As for decoding, but not packed."""
    files, kind = open_model(target), getattr(torch, dtype)
    config = load_config(folder)
    module = PipelineDraftModule(config, files.config)
    module.load_state_dict({name: value.to(kind if value.ndim > 1 else torch.float32)
                            for name, value in load_file(folder / WEIGHTS).items() if name in config.tensor_shapes()},
                           assign=True)
    head = files.tensor("lm_head.weight", kind) if config.shared_head else None
    module.adopt(files.tensor("model.norm.weight", torch.float32), head)
    return module


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    draw_curve([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    draw_curve([{"step": 50, "loss": 2.0, "accuracy": 0.1}, {"step": 100, "loss": 1.0, "accuracy": 0.4}],
               tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---- going on ----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Somebody ended the process."""


def stop_at(last: int) -> Callable[[int, float, str], None]:
    def report(step: int, done: float, line: str) -> None:
        if step == last:
            raise Stopped

    return report


@pytest.fixture(scope="module")
def whole(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    train(PLAN, material, out, SILENT)
    return out


def test_a_run_that_was_stopped_ends_with_the_same_weights(material: Material, whole: Path, tmp_path: Path) -> None:
    """Bit for bit, whatever happened, and its optimizer too."""
    for stop in (1, 4, 5, 11):
        with pytest.raises(Stopped):
            train(PLAN, material, tmp_path, stop_at(stop), save_every_s=0.0)
        assert not (tmp_path / CONFIG).exists()
    steps: list[int] = []
    train(PLAN, material, tmp_path, lambda step, *_: steps.append(step))
    assert steps == [11, 12], "the save came after the report: the step that was stopped at is done again"
    for name in (WEIGHTS, "state/step-12/optimizer.safetensors", "state/step-12/module.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "state").glob("*step*")] == ["step-12"]


def test_a_finished_run_is_finished(material: Material, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    steps: list[int] = []
    summary = train(PLAN, material, tmp_path / "copy", lambda step, *_: steps.append(step))
    assert not steps and summary["steps"] == 12
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("changes", "named"), [
    ({"rate": 2e-3}, "rate"), ({"seed": 4}, "seed"), ({"steps": 13}, "steps"), ({"batch_tokens": 65}, "batch_tokens"),
    ({"loss": "reverse-kl", "warmup": 4}, "loss, warmup"), ({"accumulate": 2}, "accumulate"),
])
def test_other_options_are_another_run(material: Material, whole: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match="holds a run with another setting") as caught:
        Trainer(changed(**changes), material, whole)
    assert caught.value.message.endswith(f": {named}") and "name another folder" in (caught.value.hint or "")


def test_another_text_is_another_run(material: Material, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another setting: key"):
        Trainer(PLAN, dataclasses.replace(material, key="other"), whole, features=tmp_path / "features")


def test_a_damaged_state_is_named(material: Material, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    file = tmp_path / "copy" / "state" / "step-12" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedModel, match="step-12 cannot be read") as caught:
        Trainer(PLAN, material, tmp_path / "copy")
    assert caught.value.hint == "Delete that folder to begin anew."


def test_saving_leaves_the_newest_whole_state_only(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    (tmp_path / ".step-1.99").mkdir()  # of one that was killed while it saved
    (tmp_path / "step-3").mkdir()  # without its last file
    for step in (9, 10):
        save_state(tmp_path, step, module, optimizer, {"note": step})
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]
    other = torch.nn.Linear(3, 2)
    again = torch.optim.AdamW(other.parameters())
    assert load_state(tmp_path, other, again) == {"step": 10, "note": 10}
    assert torch.equal(other.weight, module.weight)
    for first, second in zip(module.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[first].items():
            assert torch.equal(again.state[second][name], value)


def test_a_folder_without_a_state(tmp_path: Path) -> None:
    module = torch.nn.Linear(1, 1)
    assert load_state(tmp_path / "none", module, torch.optim.AdamW(module.parameters())) is None


# ---- what stops a run ----------------------------------------------------------------------------------------------


def test_a_run_whose_labels_are_all_masked(target: Path, tmp_path: Path) -> None:
    material = material_of(target, texts(3))
    for sample in material.train:
        sample.learn[:] = False
    with pytest.raises(UsageError, match="every label is masked"):
        Trainer(PLAN, material, tmp_path)


def test_a_vocabulary_without_an_end(material: Material, tmp_path: Path) -> None:
    lacking = dataclasses.replace(material, draft_ids=torch.arange(5, 50), eos=frozenset({0, 77}))
    with pytest.raises(UsageError, match=r"lacks every end-of-text token \(\[0, 77\]\)"):
        Trainer(PLAN, lacking, tmp_path)
    Trainer(PLAN, dataclasses.replace(lacking, eos=frozenset({0, 33})), tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite(material: Material, tmp_path: Path, precision: str) -> None:
    with pytest.raises(UsageError, match=r"the (loss|gradient) of step \d+ is (nan|inf|not finite)") as caught:
        train(changed(rate=1e25, warmup=0, steps=30, precision=precision), material, tmp_path, SILENT)
    assert "`rate`" in (caught.value.hint or "")
    assert not list(tmp_path.glob("state/step-*")), "what is lost is not saved"


def test_nothing_is_learnt(target: Path, tmp_path: Path) -> None:
    plan = changed(rate=1e-12, warmup=0, steps=400, stages=(1,), bounds=(0, 5), refreshed=0.0, ahead=0.0)
    with pytest.raises(UsageError, match="nothing is learnt: after 200 steps the loss is"):
        train(plan, material_of(target, texts(1, 16)), tmp_path, SILENT)


def test_a_target_that_is_not_finite_is_named(target: Path, tmp_path: Path) -> None:
    """Not the module's fault, and no step is taken."""
    material = material_of(target, texts(2))
    trainer = Trainer(PLAN, material, tmp_path)
    trainer._store.best(0), trainer._store.best(1)
    trainer._outer.head_rows = trainer._outer.head_rows * math.nan
    with pytest.raises(UsageError, match=r"of step 1 is (nan|not finite)"):
        trainer.run(SILENT)
