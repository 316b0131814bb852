"""`fullpipe profile` on a tiny model: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import CONTEXT, Models, run

from fullpipe.cluster.profile import Profile


@pytest.mark.processes
def test_it_measures_and_writes_what_can_be_loaded(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "here.json"
    result = run("profile", "--model", models.target, "--draft", models.draft, "--rows", "1,8", "--contexts", "8,64",
                 "--repeats", "1", "--dtype", "float32", "--out", out)
    assert result.exit_code == 0, result.output
    found = Profile.load(out)
    assert found.target.name == str(models.target) and found.num_layers == 5 and found.row_bytes == 64 * 4
    assert found.draft_model is not None and found.draft_model.name == str(models.draft)
    assert found.layers.rows == (1, 8) and found.layers.contexts == (8, 64) and found.dtype == "float32"
    assert found.heads.costs[0].samples == 1 and found.messages.costs[0].samples > 1
    # Real work took real time, and all of it is in the stage.
    assert min(found.head(1), found.embedding(1), found.draft(1, 8), found.message(1)) > 0
    assert found.stage(5, 8, 64, is_first=True, is_last=True) > found.head(8) + found.embedding(8)
    for part in ("one layer", "a flight, beside its layers", "a draft call", "HEAD", "MESSAGE", "64 TOKENS"):
        assert part in result.stdout
    assert "measuring: 8 of 8 (layers)" in result.stderr and f"wrote {out}" in result.stderr


@pytest.mark.parametrize(("options", "says"), [
    (("--rows", "1,x"), "--rows takes whole numbers"), (("--rows", "0"), "--rows takes whole numbers"),
    (("--rows", "4,2"), "rows must be 1 or more and rise"), (("--contexts", ""), "--contexts takes whole numbers"),
    (("--contexts", str(CONTEXT)), f"takes {CONTEXT} tokens"), (("--repeats", "0"), "repeats must be 1 or more"),
    (("--threads", "0"), "threads must be 1 or more"),
])
def test_what_cannot_be_measured_leaves_the_old_file(models: Models, tmp_path: Path, options: tuple[str, str],
                                                     says: str) -> None:
    out = tmp_path / "old.json"
    out.write_text("mine")
    result = run("profile", "--model", models.target, "--draft", "none", "--out", out, *options)
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert out.read_text() == "mine"


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(models: Models, tmp_path: Path) -> None:
    result = run("profile", "--model", models.target, "--out", tmp_path / "nowhere" / "profile.json")
    assert result.exit_code == 2 and "there is no folder" in result.stderr and "layers" not in result.stderr


def test_a_draft_module_is_no_model_to_measure(models: Models, tmp_path: Path) -> None:
    result = run("profile", "--model", models.target, "--draft", "spd:somewhere", "--out", tmp_path / "profile.json")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and "so many of the target's layers" in said and "--draft none" in said


def test_two_drafts_are_one_too_many(models: Models, tmp_path: Path) -> None:
    result = run("profile", "--model", models.target, "--draft", f"{models.draft},{models.target}", "--out",
                 tmp_path / "profile.json")
    assert result.exit_code == 2 and "one draft model" in result.stderr


@pytest.mark.processes
def test_as_json_it_prints_the_file(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    result = run("profile", "--model", models.target, "--draft", "ngram", "--rows", "2", "--contexts", "16",
                 "--repeats", "1", "--dtype", "float32", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(out.read_text())
    assert Profile.load(out).drafts is None
