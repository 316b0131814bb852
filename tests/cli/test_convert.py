"""`fullpipe convert spd` as a user meets it: what goes to which stream, exit codes, what is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run

from fullpipe.models.spd_checkpoint import load_checkpoint
from spd_reference import DRAFT_IDS, write, write_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def test_a_file_is_converted(tmp_path: Path, base: Path) -> None:
    file, out = write(tmp_path / "head.pt"), tmp_path / "module"
    result = run("convert", "spd", file, "--model", base, "--out", out)
    assert result.exit_code == 0 and result.stdout == f"{out}\n"
    assert result.stderr == "2 decoder layers for 4 stages of base, taps 0, 2, 4, 6, 7, 8 of 40 tokens\n"
    config, _, ids = load_checkpoint(out)
    assert ids is not None and ids.tolist() == DRAFT_IDS and config.train_span == 2048


def test_stages_and_span_are_options_and_warnings_are_said(tmp_path: Path, base: Path) -> None:
    file, out = write(tmp_path / "head.pt", base_model_path="/x/other"), tmp_path / "module"
    result = run("convert", "spd", file, "-m", base, "-o", out, "--stage-layers", "3,3,1,1", "--train-span", "4096")
    assert result.exit_code == 0 and "warning: it says that it was trained for /x/other" in result.stderr
    config = load_checkpoint(out)[0]
    assert config.stages == ((3, 6, 7, 8),) and config.train_span == 4096


def test_a_checkpoint_is_replaced_by_a_whole_one_only(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "module"
    assert run("convert", "spd", write(tmp_path / "head.pt"), "-m", base, "-o", out).exit_code == 0
    broken = write(tmp_path / "broken.pt", num_spec_layers=3)
    assert run("convert", "spd", broken, "-m", base, "-o", out).exit_code == 3
    assert load_checkpoint(out)[0].num_layers == 2
    assert run("convert", "spd", tmp_path / "head.pt", "-m", base, "-o", out, "--train-span", "7").exit_code == 0
    assert load_checkpoint(out)[0].train_span == 7


@pytest.mark.parametrize(("changes", "more", "code", "said"), [
    ({"version": 10}, (), 3, "archived branch"),
    ({"version": 12}, (), 3, "of version 12"),
    ({"vocab_size": 41}, (), 2, "vocabulary of 41"),
    ({"num_stages": 3}, (), 2, "Say it with --stage-layers"),
    ({}, ("--stage-layers", "2,two"), 2, "--stage-layers is '2,two'"),
    ({}, ("--train-span", "0"), 2, "--train-span"),
])
def test_what_cannot_be_converted(tmp_path: Path, base: Path, changes: dict[str, int], more: tuple[str, ...],
                                  code: int, said: str) -> None:
    file = write(tmp_path / "head.pt", **changes)
    result = run("convert", "spd", file, "-m", base, "-o", tmp_path / "module", *more)
    assert (result.exit_code, result.stdout) == (code, "") and said in result.stderr
    assert not (tmp_path / "module").exists()


def test_the_base_model_is_not_overwritten(tmp_path: Path, base: Path) -> None:
    before = (base / "config.json").read_text()
    result = run("convert", "spd", write(tmp_path / "head.pt"), "-m", base, "-o", base)
    assert result.exit_code == 2 and "not replaced" in result.stderr
    assert (base / "config.json").read_text() == before and not (base / "model.safetensors").exists()
