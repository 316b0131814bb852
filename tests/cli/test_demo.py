"""`fullpipe demo` on tiny models: two runs that were lived through, one text, and a picture of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import Models, run

from fullpipe.cli import demo_show
from fullpipe.cluster import netlab


@pytest.mark.processes
def test_the_demo_shows_both_runs_and_what_comes_next(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "both.svg"
    result = run("demo", "hello there", "--processes", "--model", models.target, "--draft", models.draft, "--dtype",
                 "float32", "--stages", "2", "--link-ms", "5", "--max-tokens", "12", "--picture", picture)
    assert result.exit_code == 0, result.output
    plain, ours, *told = [line for line in result.stdout.splitlines() if line]
    assert plain == ours
    assert told[0] == "text identical: yes" and told[1].startswith("speedup: ")
    assert told[2] == f"picture of both pipelines over time: {picture}" and "stage 1" in picture.read_text()
    for part in ("loading target as 2 stages", "measuring what rows cost", "--- plain pipeline parallelism",
                 "--- fullpipe", "emulated links of 5 ms", "fullpipe serve --hosts ray", "fullpipe-lab simulate"):
        assert part in result.stderr


@pytest.mark.processes
def test_where_no_hosts_can_be_made_it_says_why_and_takes_processes(
        models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlab, "available", lambda: "making network namespaces needs root")
    result = run("demo", "hello there", "--model", models.target, "--draft", models.draft, "--dtype",
                 "float32", "--stages", "2", "--link-ms", "0", "--max-tokens", "4", "--picture", tmp_path / "both.svg")
    assert result.exit_code == 0 and "text identical: yes" in result.stdout, result.output
    assert "processes of this machine (not on hosts: making network namespaces needs root)" in result.stderr


def test_hosts_that_are_asked_for_and_cannot_be_made_are_an_error(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlab, "available", lambda: "making network namespaces needs root")
    result = run("demo", "--namespaces", "--picture", tmp_path / "both.svg")
    assert result.exit_code == 2 and "needs root" in result.stderr and "--processes" not in result.stdout


def test_a_picture_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    result = run("demo", "--picture", tmp_path / "nowhere" / "p.png")
    assert result.exit_code == 2 and "nowhere" in result.stderr and "loading" not in result.stderr


@pytest.mark.parametrize(("ours", "plain", "said"), [
    ([1, 2], [1, 2], "yes"), ([1, 3, 4], [1, 2, 4], "NO, from token 1 ("),
    ([1], [1, 2], "NO: one text ends earlier (")])
def test_it_says_where_two_texts_part(ours: list[int], plain: list[int], said: str) -> None:
    both: list[Any] = [SimpleNamespace(token_ids=tokens) for tokens in (ours, plain)]
    assert demo_show._sameness(*both).startswith(said)


@pytest.mark.processes
def test_two_texts_that_differ_end_it_with_1(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = demo_show._run

    def cut_short(llm: Any, method: str, *rest: Any) -> Any:
        completion, events = honest(llm, method, *rest)
        kept = completion.token_ids[:-1] if method == "pp" else completion.token_ids
        return replace(completion, token_ids=kept), events

    monkeypatch.setattr(demo_show, "_run", cut_short)
    result = run("demo", "hello there", "--processes", "--model", models.target, "--draft", models.draft, "--dtype",
                 "float32", "--stages", "2", "--link-ms", "0", "--max-tokens", "6", "--picture", tmp_path / "both.svg")
    assert result.exit_code == 1 and "text identical: NO: one text ends earlier" in result.stdout, result.output
