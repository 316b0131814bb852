"""The study of costs: what is tried, what the journal keeps, who is compared with whom, and what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fullpipe.cluster.provenance import provenance
from fullpipe.errors import UsageError
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe_lab.clusters import unit_cluster
from fullpipe_lab.files import Journal
from fullpipe_lab.recording import Answer, Head, Recording
from fullpipe_lab.studies.costs import measuring
from fullpipe_lab.studies.costs.__main__ import main
from fullpipe_lab.studies.costs.comparing import Results, best_of, heat_ratios, others
from fullpipe_lab.studies.costs.measuring import (
    ALL,
    HIT_RATES,
    OTHERS,
    OURS,
    Cell,
    Measuring,
    between,
    climb,
    try_settings,
)
from fullpipe_lab.studies.costs.report import many_rows, write_receipt, write_report
from fullpipe_lab.studies.costs.tables import apart_table, heat_table, main_table, ratio_lines, work_table, worst_table
from fullpipe_lab.studies.costs.targets import targets
from fullpipe_lab.sweep import Setting

# Texts that repeat themselves, so that n-gram has something to find.
ANSWERS = [Answer(f"{name}/{k}#0", name, [1, 2, 3, 4 + k, 5, 1, 2, 3], ([4 + k, 5, 1, 2, 3] * 5)[:24], "length")
           for name in ("code", "talk") for k in range(2)]


# ---- what is tried -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, tried", [
    ([5, 4, 3, 2, 1], 5),
    ([1, 2, 3, 0, 0], 3),  # two in a row were no better: the best is missed, as the report says
    ([2, 3, 1, 2, 1], 5),  # one alone stops nothing
    ([1, 1, 1, 0, 0], 3)])
def test_larger_sizes_are_left_out_once_two_in_a_row_did_not_help(seconds: list[float], tried: int) -> None:
    asked: list[int] = []

    def of(size: int) -> float:
        asked.append(size)
        return seconds[size]

    assert climb(range(5), of) == min(seconds[:tried])
    assert asked == list(range(tried))


def settings_of(method: str, seconds: Callable[[Setting], float]) -> list[Setting]:
    found: list[Setting] = []

    def of(setting: Setting) -> float:
        found.append(setting)
        return seconds(setting)

    try_settings(method, "model", of)
    return found


def test_each_method_is_tried_at_its_own_sizes_and_ours_at_none() -> None:
    def falling(setting: Setting) -> float:
        return 1 / ((setting.width or 1) + (setting.depth or 1))

    assert settings_of("pp", falling) == [Setting("pp", "none")]
    assert settings_of(OURS, falling) == [Setting(OURS, "model")]
    assert [one.depth for one in settings_of("chain", falling)] == [2, 3, 4, 6, 8, 12, 16]
    assert [one.width for one in settings_of("pipedec", falling)] == [1, 2, 3, 4, 8, 16, 32]
    trees = settings_of("static-tree", lambda one: 1 / (100 * (one.depth or 0) + (one.width or 0)))
    assert [(one.width, one.depth) for one in trees] == [
        (w, d) for d in (3, 5, 8, 12) for w in (2, 4, 8, 16) if w * d <= 128]


def test_where_nothing_helps_three_trees_are_tried_at_three_depths() -> None:
    rising = settings_of("static-tree", lambda one: float((one.width or 0) * (one.depth or 0)))
    assert [(one.width, one.depth) for one in rising] == [(w, d) for d in (3, 5, 8) for w in (2, 4, 8)]


def test_a_method_that_is_not_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="does not compare 'spd'"):
        try_settings("spd", "model", lambda _: 0.0)


# ---- measuring ---------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with recordings at temperatures 0 and 1, and a cluster file."""
    for heat in (0.0, 1.0):
        recording = Recording.open(tmp_path / f"recording-t{heat:g}.jsonl", Head("big", "float32", 24, heat, 7, (), 96))
        for answer in ANSWERS:
            recording.add(answer)
    (tmp_path / "cpu-3.toml").write_text(unit_cluster(3).text)
    return tmp_path


def measuring_of(bench: Path, journal: Journal, *, limit: int = 2) -> Measuring:
    return Measuring(bench, None, [str(bench / "cpu-3.toml")], 0.0, limit, journal)


def measured(bench: Path, *methods: str, limit: int = 2) -> Journal:
    journal = Journal(bench / "journal-t0.jsonl")
    study = measuring_of(bench, journal, limit=limit)
    for cell in study.cells(["ngram"]):
        for method in methods:
            study.run(cell, method)
    return journal


def test_a_row_of_pp_is_counted_by_hand(bench: Path) -> None:
    journal = measured(bench, "pp")
    assert [row["cell"] for row in journal.rows.values()] == [
        {"temperature": 0.0, "cluster": "cpu-3", "draft": "none", "set": name} for name in ("code", "talk")]
    row = next(iter(journal.rows.values()))
    assert row["prompts"] == ["code/0#0", "code/1#0"]
    assert row["runs"] == [[24, pytest.approx(23 * 3e-3), 0, 23, 24, 0, 0]] * 2
    assert between(row) == pytest.approx(2 * 23 * 3e-3)


def test_a_run_goes_on_where_it_was_and_another_version_is_measured_again_where_asked(
        bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = "pp", "chain", OURS
    rows = dict(measured(bench, *methods, limit=1).rows)
    assert {row["method"] for row in rows.values()} == set(methods)
    again = measured(bench, *methods, limit=1)
    assert again.rows == rows and len((bench / "journal-t0.jsonl").read_text().splitlines()) == len(rows)
    monkeypatch.setattr(measuring, "code_digest", lambda: "another version of the code")
    newer = measured(bench, OURS, limit=1)
    assert newer.rows.keys() == rows.keys()
    assert {row["method"] for row in newer.rows.values() if row["version"] == "another version "} == {OURS}
    assert all(newer.rows[key]["runs"] == row["runs"] for key, row in rows.items())


def test_ours_knows_its_machine_where_rows_cost(bench: Path) -> None:
    """Rows that cost more than they are worth are not launched: what `fullpipe` is not told it would not know."""
    path = bench / "cpu-3.toml"
    free = measured(bench, OURS).rows
    path.write_text(path.read_text().replace("stage_ms = [[1, 1.0]]", "stage_ms = [[1, 1.0], [2, 9.0], [4, 30.0]]"))
    dear = {key: row for key, row in measured(bench, OURS).rows.items() if key not in free}
    assert sum(run[4] for row in dear.values() for run in row["runs"]) < sum(
        run[4] for row in free.values() for run in row["runs"])


def test_another_cluster_of_the_same_name_is_not_taken_for_the_first(bench: Path) -> None:
    measured(bench, "pp")
    path = bench / "cpu-3.toml"
    path.write_text(path.read_text().replace("stage_ms = [[1, 1.0]]", "stage_ms = [[1, 2.0]]"))
    rows = list(measured(bench, "pp").rows.values())
    assert [round(between(row), 3) for row in rows] == [0.138, 0.138, 0.276, 0.276]
    with pytest.raises(UsageError, match="two versions of cpu-3"):
        best_of(rows)


def test_what_became_of_guesses_is_told_by_what_was_claimed(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_right = ScriptedDraft({"kind": "hash", "vocab": 50, "seed": 1}, accuracy=0.5, vocab=50)
    monkeypatch.setattr("fullpipe_lab.sweep.Worker._draft", lambda *_: half_right)
    journal = Journal(bench / "journal-t0.jsonl")
    study = measuring_of(bench, journal)
    study.watch("cpu-3", "model")
    rows = list(journal.rows.values())
    assert {row["version"] for row in rows} == {study.version}
    assert rows and {(row["T"], row["draft"], row["cluster"]) for row in rows} == {("0", "model", "cpu-3")}
    for row in rows:
        low, high = map(float, row["claimed"].split(" to "))
        assert low - 1e-3 <= row["at its word"] <= high + 1e-3 and row["guesses"] > 0 and 0 <= row["seen"] <= 1
    word, believed = (sum(abs(row[name] - row["seen"]) * row["guesses"] for row in rows)
                      for name in ("at its word", "believed"))
    assert believed < word


def test_a_draft_of_no_known_name_is_refused(bench: Path) -> None:
    study = measuring_of(bench, Journal(bench / "journal.jsonl"))
    with pytest.raises(UsageError, match="no draft is called 'bigram'"):
        list(study.cells(["bigram"]))


# ---- comparing ---------------------------------------------------------------------------------------------


def row(method: str, seconds: float, *, name: str = "mt_bench", size: str = "", heat: float = 0.0,
        cluster: str = "cpu-2", draft: str = "model") -> dict[str, Any]:
    """Two prompts of eleven tokens that share the seconds."""
    cell = Cell(heat, cluster, "none" if method == "pp" else draft, name)
    return {"key": f"{cell}/{method}/{size}", "cell": asdict(cell), "method": method, "size": size, "version": "v",
            "inputs": "i", "prompts": [f"{name}/1", f"{name}/2"],
            "runs": [[11, seconds / 4, 6, 4, 30, 20, 60], [11, 3 * seconds / 4, 8, 2, 25, 10, 50]]}


def rows_of(ours: float, *, name: str, heat: float = 0.0, cluster: str = "cpu-2") -> list[dict[str, Any]]:
    """`pp` 12 s; on gsm8k chain is the best other, on mt_bench pipedec."""
    chain, wide = (4.0, 6.0) if name == "gsm8k" else (6.0, 3.0)
    made = [("pp", 12.0, ""), ("chain", chain + 2, "d2"), ("chain", chain, "d4"), ("pipedec", wide + 1, "w1"),
            ("pipedec", wide, "w2"), ("static-tree", 8.0, "w2 d3"), (OURS, ours, "")]
    return [row(method, seconds, size=size, name=name, heat=heat, cluster=cluster) for method, seconds, size in made]


def results(*groups: Iterable[dict[str, Any]]) -> Results:
    return Results(best_of(one for group in groups for one in group))


def test_each_method_counts_at_its_best_and_the_others_stand_beside_it() -> None:
    found = {one["method"]: one for one in best_of(rows_of(2.0, name="gsm8k"))}
    assert (found["chain"]["size"], found["chain"]["tried"]) == ("d4", {"d2": 6.0, "d4": 4.0})
    assert "tried" not in found[OURS] and not {"key", "inputs", "prompts"} & set(found["pp"])


def test_ours_is_compared_with_the_best_other_of_each_set() -> None:
    found = results(rows_of(2.0, name="gsm8k"), rows_of(4.0, name="mt_bench"))
    assert [(one.cell.set, one.other, one.ratio) for one in found.compared] == [
        ("gsm8k", "chain d4", 2.0), ("mt_bench", "pipedec w2", 0.75)]
    (together,) = found.together  # the others' 4 + 3 s, each set with a method of its own
    assert (together.ratio, together.over_pp, together.other_over_pp) == (
        pytest.approx(7 / 6), pytest.approx(4.0), pytest.approx(24 / 7))
    assert main_table(found, 0.0) == [["cpu-2", "3.43", "4.00", "**1.17**"]]
    assert [line[3:] for line in worst_table(found, 1)] == [["mt_bench", "pipedec w2", "4.00", "3.00", "0.75"]]
    assert ratio_lines(found) == [["0", "cpu-2", "model", "2.00", "0.75", "1.17"]]
    assert work_table(found, 0.0, "model") == [["cpu-2", "70.0%", "2.5", "1.36", "5.0", "3.7"]]


def test_no_speculation_at_all_is_one_of_the_others() -> None:
    slow = [one | {"runs": [[11, 40.0, 0, 9, 30, 20, 60]]} if one["method"] in OTHERS else one
            for one in rows_of(13.0, name="gsm8k")]
    (one,) = results(slow).compared
    assert (one.other, round(one.ratio, 3)) == ("pp", 0.923)


def test_a_cell_without_all_methods_is_not_compared() -> None:
    lacking = [one for one in rows_of(2.0, name="gsm8k") if one["method"] != "static-tree"]
    found = results(lacking, rows_of(2.0, name="mt_bench"))
    assert [one.cell.set for one in found.compared] == ["mt_bench"] and not found.together


def test_clusters_stand_in_the_order_of_their_numbers() -> None:
    names = ["cpu-2-100ms", "cpu-2-0.1ms", "gpus-8", "cpu-2-50ms"]
    found = results(*(rows_of(2.0, name="gsm8k", cluster=name) for name in names))
    assert found.clusters == ["cpu-2-0.1ms", "cpu-2-50ms", "cpu-2-100ms", "gpus-8"]


def test_what_does_not_change_while_the_policy_does_is_told_apart() -> None:
    assert others(results(rows_of(2.0, name="gsm8k"))) == {
        "pp_s": {"0": {"cpu-2": {"gsm8k": 12.0}}},
        "0": {"cpu-2": {"model": {"gsm8k": {
            "chain": [3.0, "d4"], "pipedec": [2.0, "w2"], "static-tree": [1.5, "w2 d3"]}}}}}


# ---- targets -----------------------------------------------------------------------------------------------


def reached(found: Results) -> dict[str, tuple[str, bool]]:
    return {one.what: (one.found, one.reached) for one in targets(found)}


@pytest.mark.parametrize("ours, least, mean", [(2.0, True, True), (3.0, True, False), (4.0, True, False),
                                               (4.1, False, False)])
def test_no_cell_may_fall_short_and_the_mean_must_lead_where_rows_cost(ours: float, least: bool, mean: bool) -> None:
    found = reached(results(rows_of(ours, name="gsm8k")))
    assert found["`fullpipe` / the best other method, every cell"][1] is least
    assert found["the same, mean over the cells of CPU clusters"] == (f"{4 / ours:.3f}", mean)


def test_the_presets_have_targets_of_their_own_over_pp_and_over_trees() -> None:
    easy = rows_of(0.9, name="gsm8k", cluster="gpus-8")
    fast = reached(results(easy, rows_of(2.0, name="mt_bench", cluster="gpus-8")))
    assert fast["gpus-8, draft model, T 0, over `pp`: all"] == ("8.28", False)
    assert fast["gpus-8, draft model, T 0, over `pp`: mt_bench"] == ("6.00", False)
    assert fast["over `static-tree`, every cell of the GPU presets"] == ("4.000 at the worst; 0 of 2 cells below", True)
    faster = reached(results(easy, rows_of(0.9, name="mt_bench", cluster="gpus-8")))
    assert all(met for _, met in faster.values()) and not any("CPU" in what for what in faster)


def test_many_requests_may_nowhere_be_slower_than_pp() -> None:
    loads = [{"cluster": "cpu-4", "at once": 8, "ratio": 1.2}, {"cluster": "cpu-4", "at once": 32, "ratio": 0.97}]
    (line,) = targets(results(), loads)
    assert (line.found, line.reached, line.where) == ("0.970 at the worst", False, "32 on cpu-4 0.97")


def test_temperatures_are_compared_by_their_speedups_and_the_others_say_what_the_texts_make_of_it() -> None:
    found = results(rows_of(2.0, name="gsm8k"), rows_of(2.5, name="gsm8k", heat=1.0))
    assert heat_ratios(found, OURS) == {("cpu-2", "model", "gsm8k"): pytest.approx(0.8)}
    assert heat_table(found) == [["model", "0.800", "1.000", "1.000", "1.000"]]
    assert apart_table(found) == [["gsm8k", "model", "1 of 1", "0.800", "1.000", "1.000", "1.000"]]
    (line,) = [one for one in targets(found) if "temperature 1" in one.what]
    assert (line.found, line.reached, line.where) == ("0.800", False, "1 of 1 cells alone are further apart")


# ---- the report --------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "journal-t0.jsonl")
    made.add("run/1", provenance() | {"version": "v", "command": "costs measure"})
    made.add("run/2", provenance() | {"version": "of which no row is left"})
    for one in (*rows_of(2.0, name="gsm8k"), *rows_of(4.0, name="mt_bench"), *rows_of(2.2, name="gsm8k", heat=1.0)):
        made.add(one["key"], one)
    return made


ABOUT = {"target": "big", "draft": "small", "dtype": "bfloat16", "tokens": 11}


def test_the_report_comes_of_the_receipt_alone(journal: Journal, tmp_path: Path) -> None:
    write_receipt([journal], ABOUT, [], tmp_path)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**Virtual time**, all figures" in text and "2 of gsm8k, 2 of mt_bench" in text
    assert "| cpu-2 | 3.43 | 4.00 | **1.17** |" in text
    assert "| at least 0.98 | 0.750 at the worst; 1 of 3 cells below | **no** |" in text
    assert "`chain` is best at the largest that there is (16) in 0 of 3 cells." in text
    assert "\ncosts measure\n" in text
    assert "hit rates" not in text and "Many requests" not in text and "versions of the code" not in text
    (tmp_path / "journal-t0.jsonl").unlink()
    write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == text


def test_the_report_has_a_place_for_hit_rates_and_for_many_requests(journal: Journal, tmp_path: Path) -> None:
    journal.add(f"{HIT_RATES}model/0.5", {"source": "model", "expected": 0.52, "seen": 0.61})
    journal.add("later", row("pp", 12.0) | {"version": "w"})
    crowd = {"samples": [crowd_row("fullpipe", 8.0), crowd_row("pp", 5.0), crowd_row("pp-bunched", 4.0)]}
    write_receipt([journal], ABOUT, [crowd], tmp_path)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| model | 0.52 | 0.61 |" in text and "| cpu-4 | 2 | 8 | 5 | 1.6 |" in text
    assert "| at least 1 | 1.600 at the worst | yes |  |" in text
    assert "Cells are of 2 versions of the code" in text


def crowd_row(method: str, throughput: float) -> dict[str, Any]:
    return {"cell": {"method": method, "load": "closed", "amount": 2.0}, "preset": "cpu-4", "tokens": 22,
            "span_s": 22 / throughput, "requests": [["a", 0.0, 1.0, 2.0, 11, 0, 0, 0, 0]]}


def test_many_requests_are_set_against_the_better_plain_pipeline() -> None:
    rows = [crowd_row("fullpipe", 3.0), crowd_row("pp", 2.0), crowd_row("pp-bunched", 4.0)]
    assert many_rows({"samples": rows}) == [{"cluster": "cpu-4", "at once": 2, "fullpipe": 3.0, "pp": 4.0,
                                            "ratio": 0.75}]
    assert many_rows({"samples": rows[:1]}) == []


# ---- the command -------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["lab/costs/__main__.py", *words])
    main()


def test_measure_compare_and_report_are_one_after_another(bench: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    class OfNoModel(Measuring):
        def __init__(self, bench: Path, draft: str | None, *args: Any) -> None:
            super().__init__(bench, None, *args)

    monkeypatch.setattr("fullpipe_lab.studies.costs.__main__.Measuring", OfNoModel)
    where = "--bench", str(bench)
    cluster = "--clusters", str(bench / "cpu-3.toml"), "--drafts", "ngram", "--limit", "1"
    command(monkeypatch, "measure", *where, *cluster, "--only", "pp,chain,pipedec,static-tree")
    with pytest.raises(UsageError, match="no cell has all methods yet"):
        command(monkeypatch, "compare", *where)
    command(monkeypatch, "measure", *where, *cluster, "--only", "fullpipe")
    capsys.readouterr()
    command(monkeypatch, "compare", *where, "--others", str(bench / "others.json"))
    assert "within 5%" in capsys.readouterr().out
    assert set(json.loads((bench / "others.json").read_text())) == {"pp_s", "0", "1"}
    command(monkeypatch, "report", *where, "--out", str(bench / "report"))
    receipt = json.loads((bench / "report" / "receipt.json").read_text())
    assert len(receipt["samples"]) == 2 * 2 * len(ALL)
    assert receipt["results"]["runs"][-1]["command"].endswith("--only fullpipe")
    assert receipt["command"].startswith("costs measure --bench")
    assert (bench / "report" / "report.md").read_text().count("| cpu-3 |") >= 2
