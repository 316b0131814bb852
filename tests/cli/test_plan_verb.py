"""`fullpipe plan` on a tiny model: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Models, run

from fullpipe.cluster.plan import Plan
from fullpipe.cluster.survey import Survey
from fullpipe.hub import cache


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Survey:
    """Two hosts in place of what would be measured."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
    from imagined import host, imagined

    found = imagined({"a": host(), "b": host(0.8)}, 0.004)
    monkeypatch.setattr("fullpipe.cluster.survey.survey", lambda *args, **options: found)
    return found


def test_it_shows_layouts_beside_each_other_and_says_why(models: Models, hosts: Survey) -> None:
    result = run("plan", "--model", models.target, "--draft", f"{models.draft},ngram")
    assert result.exit_code == 0, result.output
    for part in ("STAGES", "MS A TOKEN", "PP THERE", "best", "1 host", "uniform", "no draft", "a token", "hits"):
        assert part in result.stdout


def test_it_writes_a_plan_and_prints_the_same_as_json(models: Models, hosts: Survey, tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    result = run("plan", "--model", models.target, "--draft", models.draft, "--order", "b,a", "--cut", "uniform",
                 "--draft-host", "a", "--width", "8", "--method", "fullpipe", "--json", "--write", out)
    assert result.exit_code == 0, result.output
    found, plan = json.loads(result.stdout), Plan.load(out)
    assert found["plan"] == plan.model_dump(mode="json", by_alias=True)
    assert found["best"]["hosts"] == ["b", "a"] and found["best"]["layers"] == [14, 14] == list(plan.layout.layers)
    assert plan.width == 8 and plan.draft_host == "a" and plan.draft == str(models.draft)
    assert found["best"]["ms_per_token"] == plan.promise.plan_ms and found["pp"]["method"] == "pp"  # type: ignore
    assert any("plain pipeline parallelism" in line for line in found["verdict"])


@pytest.mark.processes
def test_without_hosts_it_measures_this_machine(models: Models, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.HOME_VARIABLE, str(tmp_path))
    monkeypatch.setattr("fullpipe.cluster.quick.CONTEXT", 8)
    monkeypatch.setattr("fullpipe.cluster.quick.WIDTHS", (1, 8))
    result = run("plan", "--model", models.target, "--draft", "ngram", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "measuring what stations cost here" in result.stderr and "a token" in result.stdout


@pytest.mark.parametrize(("options", "says"), [
    (("--order", "a,z"), "there is no host z"), (("--layers", "5"), "whose order is not"),
    (("--stages", "2"), "stages of a plan are hosts, and there is one"), (("--host-ip", "::1"), "is for several hosts"),
    (("--layers", "x"), "--layers takes whole numbers"), (("--width", "0"), "1 row or more"),
    (("--draft", "none", "--method", "fullpipe"), "needs a draft"), (("--cut", "best"), "cut")])
def test_what_cannot_be_planned_is_told(models: Models, hosts: Survey, options: tuple[str, ...], says: str) -> None:
    result = run("plan", "--model", models.target, *options)
    assert result.exit_code == 2 and says in result.stderr, result.output


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(models: Models, tmp_path: Path) -> None:
    result = run("plan", "--model", models.target, "--write", tmp_path / "nowhere" / "plan.toml")
    assert result.exit_code == 2 and "there is no folder" in result.stderr and "measuring" not in result.stderr
