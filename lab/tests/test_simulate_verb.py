"""`fullpipe-lab simulate`: real tokens on an imagined clock, with pictures; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Models
from typer.testing import CliRunner, Result

from fullpipe_lab.cli.main import app


def simulate(model: Path | str, *more: str | Path, stages: int = 4) -> Result:
    arguments = ["simulate", "hello there, hello there", "--model", model, "--draft", "ngram", "--stages", stages,
                 "--dtype", "float32", "--threads", 1, "--max-tokens", 12, *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_steps_are_units_and_the_text_is_that_of_pp(models: Models) -> None:
    ours, plain = (json.loads(simulate(models.target, "--costs", "unit", "--json", "--method", method).stdout)
                   for method in ("fullpipe", "pp"))
    assert ours["text"] == plain["text"] and len(plain["token_ids"]) == 12 and plain["finish_reason"] == "length"
    assert plain["timing"]["clock"] == "virtual" and plain["timing"]["tbt_s"] == pytest.approx(4)
    assert plain["speculation"]["steps_per_token"] == 4 and ours["timing"]["tbt_s"] <= 4


def test_a_clusters_time_and_pictures(models: Models, tmp_path: Path) -> None:
    cluster = tmp_path / "two.toml"
    cluster.write_text('[cluster]\nname = "two boards"\nkind = "modelled"\n\n[[devices]]\nname = "board"\ncount = 2\n'
                       'stage_ms = [[1, 10.0]]\ndraft_ms = [[1, 1.0]]\n\n[links]\nlatency_ms = 5.0\n\n'
                       '[placement]\nstages = ["board0", "board1"]\n')
    files = [tmp_path / name for name in ("run.svg", "run.html", "run.json")]
    result = simulate(models.target, "--cluster", cluster, "--method", "pp", "--events", tmp_path / "run.jsonl",
                      *(part for file in files for part in ("--trace", file)))
    assert result.exit_code == 0, result.output
    assert "pp on 2 stages, simulated" in result.output and "TBT 30.0 ms in virtual time" in result.output
    assert all(file.stat().st_size > 1000 for file in (*files, tmp_path / "run.jsonl"))


def test_the_text_streams_and_is_whole(models: Models) -> None:
    result = simulate(models.target, "--costs", "unit")
    text = json.loads(simulate(models.target, "--costs", "unit", "--json").stdout)["text"]
    assert result.stdout.startswith(text)


@pytest.mark.parametrize(("more", "says"), [
    (("--cluster", "gpus-8", "--costs", "unit"), "a cluster has its own costs"),
    (("--cluster", "gpus-9"), "edge-5, gpus-14, gpus-8, home-6"), (("--method", "spqr"), "spqr"),
    (("--dtype", "float8"), "float8"), (("--width", "0"), "width must be 1"),
    (("--method", "pp", "--depth", "3"), "has no depth"), (("--trace", "run.pdf"), "does not end in")])
def test_what_cannot_be_is_refused(models: Models, more: tuple[str, ...], says: str) -> None:
    result = simulate(models.target, *more)
    assert result.exit_code == 2 and says in " ".join(result.output.split())
