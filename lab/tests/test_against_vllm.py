"""The comparison of servers (studies.serving): start and end, going on after a kill, what is reported."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fullpipe.errors import StationFailed, UsageError
from fullpipe.server.load import LoadResult, LoadSample
from fullpipe_lab.files import Journal
from fullpipe_lab.studies.serving import against_vllm
from fullpipe_lab.studies.serving.against_vllm import make_receipt, report_of
from fullpipe_lab.studies.serving.figures import Level, levels_of, same_texts
from fullpipe_lab.studies.serving.servers import (
    CONTENDERS,
    Contender,
    Running,
    Setup,
    gguf_of,
    grown,
    read_counters,
    running,
)

FAKE = next((Path(__file__).parents[2] / "tests").rglob("fake_openai.py"))
SETUP = Setup(Path("weights"), "ngram", "bfloat16", 512, 16, file=Path("m.gguf"))


@dataclass(frozen=True)
class Pretended(Contender):
    """A server that is a script."""

    script: str = ""

    def command(self, setup: Setup, port: int) -> list[str]:
        if self.script:
            return [sys.executable, "-c", self.script]
        return [sys.executable, str(FAKE), str(port)]


def result(tokens: int = 10, span: float = 1.0, texts: tuple[str, ...] = ("a", "b"), prompt_tokens: int = 4,
           **more: Any) -> LoadResult:
    """Two answers at once, each of half the tokens over all the time."""
    samples = [LoadSample(index=place, prompt=str(place), sent_s=0.0, late_s=0.0, arrivals=[0.1, span], end_s=span,
                          prompt_tokens=prompt_tokens, tokens=tokens // 2, finish="length", text=text, error=None,
                          detail="") for place, text in enumerate(texts)]
    return LoadResult.model_validate({
        "url": "http://x", "model": "m", "endpoint": "chat", "concurrency": 2, "rate": None, "max_tokens": 8,
        "temperature": 0.0, "seed": 7, "ignore_eos": False, "asked": 2, "interrupted": False, "client_cpu_s": 0.05,
        "samples": samples} | more)


# ---- servers ---------------------------------------------------------------------------------------------


def test_the_same_for_both_but_what_is_theirs() -> None:
    commands = {name: one.command(SETUP, 99) for name, one in CONTENDERS.items()}
    for name, command in commands.items():
        text, read = " ".join(command), "m.gguf --served-model-name measured --dtype stored"
        if name == "fullpipe-native":
            read = "weights --served-model-name measured --dtype stored"
        elif not name.endswith("-stored"):
            read = "weights --served-model-name measured --dtype bfloat16"
        assert f"--model {read} --host 127.0.0.1 --port 99" in text
        assert "--max-model-len 512 --max-num-seqs 16" in text
    assert commands["vllm"] == commands["vllm-auto"]  # told apart by the environment
    assert commands["fullpipe"][-4:] == ["--draft", "ngram", "--stages", "2"]
    assert commands["pp"][-6:-2] == ["--method", "pp", "--draft", "none"]


def test_only_who_serves_a_gguf_file_needs_one(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert gguf_of(str(tmp_path), ["fullpipe", "vllm"]) is None
    assert gguf_of(str(file), ["pp-stored"]) == file
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="fullpipe-stored serves a GGUF file"):
        gguf_of(str(tmp_path / "folder"), ["vllm", "fullpipe-stored"])


def test_thread_counts_of_the_user_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for one in CONTENDERS.values():
        assert "OMP_NUM_THREADS" not in one.variables() and one.variables()["HF_HUB_OFFLINE"] == "1"


def test_counters_are_read_and_gauges_and_buckets_are_not() -> None:
    text = ("# TYPE a counter\na_total{model_name=\"m\",engine=\"0\"} 3\n# TYPE g gauge\ng 7\n"
            "# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 2\nh_sum 1.5\nh_count 2\n"
            "# TYPE s counter\ns_total{station=\"stage 1\"} 0.25\n")
    before = read_counters(text)
    assert before == {"a_total": 3.0, "h_sum": 1.5, "h_count": 2.0, "s_total{station=stage 1}": 0.25}
    assert grown(before, before | {"a_total": 5.0, "new_total": 1.0}) == {"a_total": 2.0, "new_total": 1.0}


def test_a_server_that_dies_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    dying = Pretended("fullpipe", "", script="print('one'); print('no weights'); raise SystemExit(3)")
    with pytest.raises(StationFailed, match=r"fullpipe failed: ended with code 3 \| one \| no weights"), \
         running(dying, SETUP, tmp_path / "log"):
        pass


def test_nothing_is_left_of_a_server_that_does_not_listen_to_signals(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullpipe_lab.studies.serving.servers._LEAVE_S", 0.2)
    monkeypatch.setattr("fullpipe_lab.studies.serving.servers._FOLLOW_S", 0.1)
    marker = tmp_path / "child"

    def until_it_has_a_child(server: Running, log: Path) -> None:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.01)
        raise UsageError("it takes too long")

    monkeypatch.setattr("fullpipe_lab.studies.serving.servers._await_ready", until_it_has_a_child)
    deaf = Pretended("fullpipe", "", script=(
        "import pathlib, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"pathlib.Path({str(marker)!r}).write_text(str(one.pid)); time.sleep(60)"))
    with pytest.raises(UsageError, match="too long"), running(deaf, SETUP, tmp_path / "log"):
        pass
    child = int(marker.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


# ---- a whole comparison ----------------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fullpipe", "vllm"):
        monkeypatch.setitem(CONTENDERS, name, Pretended(name, f"{name} by script"))
    monkeypatch.setattr(against_vllm, "missing", lambda names: "")
    monkeypatch.setattr(against_vllm, "shared_folder", lambda model, dtype, place: place)


def compare(tmp_path: Path, *more: str) -> None:
    (tmp_path / "some.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    against_vllm.main(["--contenders", "fullpipe", "vllm", "--levels", "1", "2", "--out", str(tmp_path),
                       "--prompts", str(tmp_path / "some.jsonl"), *more])


def test_a_comparison_goes_on_where_it_was(pretended: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path, "--rounds", "1")
    first = Journal(tmp_path / "journal.jsonl").rows
    assert {"0/fullpipe/1", "0/fullpipe/2", "0/vllm/1", "0/vllm/2"} <= first.keys()
    # The last level is lost, with the end of a line.
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    (tmp_path / "journal.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:50]]))
    capsys.readouterr()
    compare(tmp_path, "--rounds", "1")
    said = capsys.readouterr()
    assert "starting vllm" in said.err and "starting fullpipe" not in said.err and "vllm, 1 at once" not in said.err
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert [(cell["level"], cell["contender"]) for cell in receipt["cells"]] == [
        (1, "fullpipe"), (1, "vllm"), (2, "fullpipe"), (2, "vllm")]
    one = receipt["cells"][0]
    assert one["counters"]["fullpipe_stage_busy_seconds_total{station=stage 1}"] == 8 / 500
    assert any(name.startswith("server (") for name in one["cpu"]) or not one["cpu"]
    assert [sample["prompt"] for sample in one["load"]["samples"]][:2] == ["1[1.0]", "2[1.1]"]
    report = (tmp_path / "report.md").read_text()
    assert "fullpipe over vllm" in report and "| 8 of 8 |" in report and report in said.out


def test_another_plan_is_refused(tmp_path: Path, pretended: None) -> None:
    Journal(tmp_path / "journal.jsonl").add("plan", {
        "model": "smollm2-135m", "draft": "ngram", "dtype": "bfloat16", "max_tokens": 9})
    with pytest.raises(SystemExit, match="was measured with max_tokens 9, not 64"):
        compare(tmp_path)


def test_a_contender_that_fails_does_not_stop_the_others(pretended: None, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "fullpipe", Pretended("fullpipe", "", script="raise SystemExit('out of luck')"))
    compare(tmp_path, "--rounds", "1")
    report = (tmp_path / "report.md").read_text()
    assert "round 1, `fullpipe` failed: ended with code 1 | out of luck" in report
    assert "| 2 | " in report


def test_unknown_contenders_are_named() -> None:
    with pytest.raises(SystemExit, match="no contender is called 'sglang'"):
        against_vllm.main(["--contenders", "sglang", "--out", "/nonexistent"])


def test_a_journal_without_a_level_is_no_receipt(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no level yet"):
        make_receipt(Journal(tmp_path / "journal.jsonl"))


# ---- figures and report ----------------------------------------------------------------------------------


def test_rates_and_times_of_a_level_by_hand() -> None:
    one = Level("pp", 2, [result(10, 1.0), result(10, 2.0), result(10, 4.0)], [{"server (1)": 0.7}] * 3)
    assert one.rates == [10.0, 5.0, 2.5] and one.tokens_per_s == 5.0
    assert one.tbt and one.tbt.median == pytest.approx(1.9 / 4) and one.tbt.count == 6
    assert one.cpu_per_token == pytest.approx(2.1 / 30)


def receipt_of(*cells: tuple[str, int, LoadResult]) -> dict[str, Any]:
    return {"benchmark": "serving_vllm", "command": "against_vllm.py", "commit": "c" * 40, "dirty": False,
            "date": "2026-01-02T03:04:05Z", "versions": {}, "machine": {"cpu": "a cpu", "cores": 2}, "clock": "wall",
            "plan": {"model": "m", "draft": "ngram", "dtype": "bfloat16", "max_tokens": 8}, "runs": [], "failed": [],
            "cells": [{"contender": name, "round": round_, "level": 2, "load": load.to_dict(), "counters": {},
                       "cpu": {}} for name, round_, load in cells]}


def test_texts_are_compared_prompt_by_prompt() -> None:
    levels = levels_of(receipt_of(("pp", 0, result(texts=("a", "b", "c"))), ("vllm", 0, result(texts=("a", "x")))))
    assert same_texts(levels) == [["2", "pp, vllm", "1 of 2"]]


def test_the_report_says_ratios() -> None:
    report = report_of(receipt_of(("fullpipe", 0, result()), ("pp", 0, result(span=2.0)),
                                  ("vllm", 0, result(span=0.5))))
    assert "| fullpipe over vllm | pp over vllm |" in report
    assert "| 2 | 10.0 (10.0 to 10.0) | 5.0 (5.0 to 5.0) | 20.0 (20.0 to 20.0) | **0.50** | **0.25** |" in report
