"""The comparison of servers (bench/serving): starting and ending them, going on after a kill, and what is reported."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from serving import against_vllm
from serving.figures import Agreement, Level, agreement, blame, levels_of, parts_of, steady
from serving.receipt import make_receipt, read_receipt, write_receipt
from serving.report import report_of
from serving.servers import CONTENDERS, Contender, Running, Setup, grown, read_counters, running
from spd_study.journal import Journal

from fullpipe.bench.load import LoadResult, LoadSample
from fullpipe.errors import StationFailed, UsageError

SETUP = Setup(Path("weights"), "ngram", "bfloat16", 512, 16)


@dataclass(frozen=True)
class Pretended(Contender):
    """A server that is a script."""

    script: str = ""

    def command(self, setup: Setup, port: int) -> list[str]:
        if self.script:
            return [sys.executable, "-c", self.script]
        return [sys.executable, str(Path(__file__).with_name("fake_openai.py")), str(port)]


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


def level(contender: str = "dynamic", busy: float | None = None, alive: float = 0.0, **more: Any) -> Level:
    """Seconds of the busiest stage over one second and ten tokens."""
    counters = {} if busy is None else {
        "fullpipe_stage_busy_seconds_total{station=stage 0}": 0.01,
        "fullpipe_stage_busy_seconds_total{station=stage 1}": busy,
        "fullpipe_stage_alive_seconds_total{station=stage 1}": alive,
        "fullpipe_engine_seconds_total": 0.2, "fullpipe_hits_total": 3.0, "fullpipe_misses_total": 1.0}
    return Level(contender, 2, [result(**more)], [counters], [{"server (10)": 0.5, "worker (12)": 0.4,
                                                                "worker (11)": 0.1}])


# ---- servers ---------------------------------------------------------------------------------------------


def test_the_same_for_both_but_what_is_theirs() -> None:
    commands = {name: one.command(SETUP, 99) for name, one in CONTENDERS.items()}
    for command in commands.values():
        text = " ".join(command)
        assert "--model weights --served-model-name measured --dtype bfloat16 --host 127.0.0.1 --port 99" in text
        assert "--max-model-len 512 --max-num-seqs 16" in text
    assert commands["vllm"] == commands["vllm-auto"]  # told apart by the environment
    assert commands["dynamic"][-6:] == ["--draft", "ngram", "--stages", "2", "--pipeline", "distributed"]
    assert commands["pp"][-8:-4] == ["--method", "pp", "--draft", "none"]


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
    dying = Pretended("dynamic", "", script="print('one'); print('no weights'); raise SystemExit(3)")
    with pytest.raises(StationFailed, match=r"dynamic failed: ended with code 3 \| one \| no weights"), \
         running(dying, SETUP, tmp_path / "log"):
        pass


def test_nothing_is_left_of_a_server_that_does_not_listen_to_signals(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.servers._LEAVE_S", 0.2)
    monkeypatch.setattr("serving.servers._FOLLOW_S", 0.1)
    marker = tmp_path / "child"

    def until_it_has_a_child(server: Running, log: Path) -> None:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.01)
        raise UsageError("it takes too long")

    monkeypatch.setattr("serving.servers._await_ready", until_it_has_a_child)
    deaf = Pretended("dynamic", "", script=(
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
    for name in ("dynamic", "vllm"):
        monkeypatch.setitem(CONTENDERS, name, Pretended(name, f"{name} by script"))
    monkeypatch.setattr(against_vllm, "missing", lambda names: "")
    monkeypatch.setattr(against_vllm, "shared_folder", lambda model, dtype, place: place)


def compare(tmp_path: Path, *more: str) -> None:
    (tmp_path / "some.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    against_vllm.main(["--contenders", "dynamic", "vllm", "--levels", "1", "2", "--out", str(tmp_path),
                       "--prompts", str(tmp_path / "some.jsonl"), *more])


def test_a_comparison_goes_on_where_it_was(pretended: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path, "--rounds", "1")
    first = Journal(tmp_path / "journal.jsonl").rows
    assert {"0/dynamic/1", "0/dynamic/2", "0/vllm/1", "0/vllm/2"} <= first.keys()
    # The last level is lost, with the end of a line.
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    (tmp_path / "journal.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:50]]))
    capsys.readouterr()
    compare(tmp_path, "--rounds", "1")
    said = capsys.readouterr()
    assert "starting vllm" in said.err and "starting dynamic" not in said.err and "vllm, 1 at once" not in said.err
    receipt = read_receipt(tmp_path / "receipt.json")
    assert [(cell["level"], cell["contender"]) for cell in receipt["cells"]] == [
        (1, "dynamic"), (1, "vllm"), (2, "dynamic"), (2, "vllm")]
    one = receipt["cells"][0]
    assert one["counters"]["fullpipe_stage_busy_seconds_total{station=stage 1}"] == 8 / 500
    assert any(name.startswith("server (") for name in one["cpu"]) or not one["cpu"]
    assert [sample["prompt"] for sample in one["load"]["samples"]][:2] == ["1[1.0]", "2[1.1]"]
    report = (tmp_path / "report.md").read_text()
    assert "`dynamic` / `vllm`" in report and "| 8 of 8 |" in report and report in said.out


def test_another_plan_is_refused(tmp_path: Path, pretended: None) -> None:
    Journal(tmp_path / "journal.jsonl").add("plan", {
        "model": "smollm2-135m", "draft": "ngram", "dtype": "bfloat16", "max_tokens": 9})
    with pytest.raises(SystemExit, match="was measured with max_tokens 9, not 64"):
        compare(tmp_path)


def test_a_contender_that_fails_does_not_stop_the_others(pretended: None, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "dynamic", Pretended("dynamic", "", script="raise SystemExit('out of luck')"))
    compare(tmp_path, "--rounds", "1")
    report = (tmp_path / "report.md").read_text()
    assert "round 1, `dynamic` failed: ended with code 1 | out of luck" in report
    assert "| 2 | " in report


def test_unknown_contenders_are_named() -> None:
    with pytest.raises(SystemExit, match="no contender is called 'sglang'"):
        against_vllm.main(["--contenders", "sglang", "--out", "/nonexistent"])


def test_a_journal_without_a_level_is_no_receipt(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no level yet"):
        make_receipt(Journal(tmp_path / "journal.jsonl"))


# ---- figures ---------------------------------------------------------------------------------------------


def test_rates_and_times_of_a_level_by_hand() -> None:
    one = Level("pp", 2, [result(10, 1.0), result(10, 2.0), result(10, 4.0)], [{}] * 3, [{}] * 3)
    assert one.rates == [10.0, 5.0, 2.5] and one.tokens_per_s == 5.0
    assert one.token_s == 7.0 / 30
    assert one.tbt and one.tbt.median == pytest.approx(1.9 / 4) and one.tbt.count == 6
    assert parts_of(one) is None and one.per_token("hits") is None


def test_the_parts_of_a_token_add_up() -> None:
    one = level(busy=0.6, alive=0.45)
    parts = parts_of(one)
    assert parts and parts.station == "stage 1"
    assert (parts.useful, parts.wasted, parts.waiting) == pytest.approx((0.045, 0.015, 0.04))
    assert parts.useful + parts.wasted + parts.waiting == pytest.approx(one.token_s)
    assert one.per_token("hits") == {"": 0.3} and one.cores_busy == 1.0
    assert one.cpu_per_token() == pytest.approx(
        {"server": 0.05, "worker 1": 0.01, "worker 2": 0.04, "load generator": 0.005})


@pytest.mark.parametrize(("theirs", "says"), [
    (2.0, "ahead"),
    (0.4, "computing: stage 1 works 45.00 ms per token on rows that count, more than vLLM takes altogether (40.00 ms)"),
    (0.5, "speculation: rows thrown away cost stage 1 15.00 ms per token; without them it works 45.00 ms, less than "
          "vLLM takes altogether (50.00 ms)"),
    (0.9, "waiting: stage 1, the busiest, works 60.00 ms per token and has nothing to do for 40.00 ms (vLLM "
          "altogether: 90.00 ms); meanwhile per token: engine 20.00 ms, draft 0.00 ms; the server's "
          "processes kept 1.0 cores busy"),
])
def test_the_part_to_blame(theirs: float, says: str) -> None:
    assert blame(level(busy=0.6, alive=0.45), level("vllm", span=theirs)) == says


def test_nobody_is_blamed_without_counters_or_answers() -> None:
    assert blame(level(), level("vllm", span=0.5)) == "behind; the server's counters do not tell why"
    assert blame(level(texts=()), level("vllm")) == "nothing was answered"


def test_texts_are_compared_prompt_by_prompt() -> None:
    ours, theirs = level(texts=("a", "b", "c")), level("vllm", texts=("a", "x"), prompt_tokens=5)
    assert agreement(ours, theirs) == Agreement(2, 1, 0)
    again = Level("pp", 2, [result(), result(texts=("a", "z"))], [{}, {}], [{}, {}])
    assert steady(again) == (2, 1) and agreement(again, ours) == Agreement(2, 2, 2)


# ---- receipt and report ----------------------------------------------------------------------------------


def receipt_of(*cells: tuple[str, int, LoadResult, dict[str, float]]) -> dict[str, Any]:
    return {"benchmark": "serving_vllm", "command": "against_vllm.py", "commit": "c" * 40, "dirty": False,
            "date": "2026-01-02T03:04:05Z", "versions": {}, "machine": {"cpu": "a cpu", "cores": 2}, "clock": "wall",
            "plan": {"model": "m", "draft": "ngram", "dtype": "bfloat16", "max_tokens": 8},
            "runs": [{"contender": name, "server": ["serve", "a b"], "environment": {"A": "1"}, "load_s": 3.0,
                      "version_served": "9"} for name in dict.fromkeys(cell[0] for cell in cells)],
            "failed": [], "cells": [{"contender": name, "round": round_, "level": 2, "load": load.to_dict(),
                                     "counters": counters, "cpu": {}} for name, round_, load, counters in cells]}


def test_a_receipt_survives_its_file(tmp_path: Path) -> None:
    value = receipt_of(("pp", 0, result(), {}), ("vllm", 0, result(), {}))
    write_receipt(value, tmp_path / "one.json")
    assert read_receipt(tmp_path / "one.json") == value
    assert sum('"contender": "pp", "round"' in line for line in (tmp_path / "one.json").read_text().splitlines()) == 1
    assert levels_of(value)[2, "pp"].results == [result()]


def test_the_report_says_ratios_blame_and_failures() -> None:
    busy = {"fullpipe_stage_busy_seconds_total{station=stage 1}": 0.6,
            "fullpipe_stage_alive_seconds_total{station=stage 1}": 0.6,
            "fullpipe_flights_total": 4.0, "fullpipe_launched_rows_total": 10.0}
    spoilt = result(span=0.5)
    spoilt = spoilt.model_copy(update={"samples": [
        *spoilt.samples, spoilt.samples[0].model_copy(update={"error": "timeout"})]})
    report = report_of(receipt_of(("dynamic", 0, result(), busy), ("pp", 0, result(span=2.0), {}),
                                  ("vllm", 0, result(span=0.5), {}), ("vllm", 1, spoilt, {})))
    ratios = "10.0 (10.0 to 10.0) | 5.0 (5.0 to 5.0) | 20.0 (20.0 to 20.0) | **0.50** | **0.25** | **2.00** |"
    assert "| `dynamic` / `vllm` | `pp` / `vllm` | `dynamic` / `pp` |" in report
    assert f"| 2 | {ratios}" in report
    assert "| 2.5 |" in report and "computing: stage 1" in report and "do not tell why" in report
    assert "round 2, `vllm` at 2: failed requests: {'timeout': 1}" in report
    assert "`A=1 serve 'a b'`, ready after 3 s" in report


def test_the_journal_is_plain_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add("plan", {"model": "m"})
    about = {"command": "x", "commit": "c", "dirty": False, "date": time.strftime("%Y"), "versions": {}, "machine": {}}
    journal.add("run/0/pp/now", about | {"contender": "pp", "round": 0, "load_s": 1.0, "server": [],
                                        "version_served": "1", "environment": {}})
    journal.add("0/pp/2", {"contender": "pp", "round": 0, "level": 2, "load": result(span=1 / 3).to_dict(),
                           "counters": {}, "cpu": {}})
    value = make_receipt(Journal(tmp_path / "journal.jsonl"))
    assert value["cells"][0]["load"]["samples"][0]["end_s"] == 0.333333 and "key" not in value["cells"][0]
    assert json.loads(json.dumps(value)) == value
