"""`fullpipe-lab bench` end to end on a recording that is there already, so that no model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command import Models
from typer.testing import CliRunner, Result

from fullpipe.engine import RequestStats
from fullpipe.options import Options
from fullpipe_lab.asking import Said
from fullpipe_lab.cli.main import app
from fullpipe_lab.receipts import load_receipt
from fullpipe_lab.recording import Answer, Head, Recording, digest

TOKENS = 20


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


QUESTIONS = {1: "Say it again.", 2: "And again."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prompts, and in out/ what "a model" said to them: texts that repeat themselves."""
    lines = [json.dumps({"question_id": id, "category": "echo", "turns": [text]}) for id, text in QUESTIONS.items()]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    record(tmp_path / "out")
    return tmp_path


def record(out: Path, temperature: float = 0.0) -> None:
    recording = Recording.open(out / f"recording-t{temperature:g}.jsonl",
                               Head("a model", "float32", TOKENS, temperature, 7, (), 96))
    for id, text in QUESTIONS.items():
        recording.add(Answer(f"questions/{id}#0", "questions", [9, 1, 2, 3, id, 1, 2], [3, id, 1, 2] * 5, "length",
                             [0.5, 0.01] * 10, digest([text])))


def bench(folder: Path, *more: str | Path, **changes: str) -> Result:
    """changes: options that differ; an empty value leaves one out."""
    values = {"model": "a model", "draft": "ngram", "stages": "4", "methods": "pp,chain,fullpipe", "widths": "2,4",
              "depths": "2,3", "max-tokens": str(TOKENS), "dtype": "float32", "workers": "1", "real": "0",
              "out": str(folder / "out"), "prompts": str(folder / "questions.jsonl")}
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    return run("bench", *(part for name, value in values.items() if value for part in (f"--{name}", value)), *more)


def refused(result: Result) -> str:
    """What it said; one error, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    return " ".join(result.output.split())


def test_a_receipt_a_report_and_a_table(folder: Path) -> None:
    result = bench(folder)
    assert result.exit_code == 0, result.output
    receipt = load_receipt(folder / "out" / "receipt.json")
    assert {(one.method, one.prompt) for one in receipt.samples} \
        == {(method, f"questions/{id}#0") for method in ("pp", "chain", "fullpipe") for id in QUESTIONS}
    assert {one.method: len(one.candidates) for one in receipt.tuning} == {"pp": 1, "chain": 2, "fullpipe": 2}
    assert (receipt.clock, [one.label for one in receipt.clusters]) == ("virtual", ["unit"])
    assert any("20 stand less than" in note for note in receipt.notes)
    assert (folder / "out" / "report.md").stat().st_size > 2_000
    assert "simulated" in result.output
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["cluster", "T", "method", "all"]  # of one class there is no column
    table = {row.split()[-2]: float(row.split()[-1].rstrip("x")) for row in rows}
    assert table["pp"] == 1 < table["chain"] < table["fullpipe"]


class Placed:
    """Stands where hosts would be: an answer of five tokens takes what `SECONDS` says of the method."""

    SECONDS: ClassVar[dict[str, float]] = {"pp": 0.4, "chain": 0.2, "fullpipe": 0.1}
    asked: ClassVar[list[Options]] = []

    def __init__(self, options: Options, *, progress: Any) -> None:
        self.asked.append(options)
        self.plan, self._method = self, ""

    def __enter__(self) -> Placed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def model_dump(self, mode: str) -> dict[str, str]:
        return {"order": "a, b"}

    def encode(self, messages: Any) -> list[int]:
        return [1, 2, 3]

    def use(self, method: str, **_: Any) -> None:
        self._method = method

    def ask(self, prompts: list[list[int]], params: Any) -> list[Said]:
        spent = 4 * self.SECONDS[self._method]
        return [Said(RequestStats(0.0, first_token=1.0, last_token=1.0 + spent, num_emitted=5), [1, 2, 3, 4, 5])]


def test_hosts_are_measured_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullpipe_lab.asking.Placed", Placed)
    monkeypatch.setattr("fullpipe_lab.cli.bench_hosts.fetch_all", lambda *_: None)
    result = bench(folder, hosts="ray", ray_address="head:6379", stages="", workers="", real="")
    assert result.exit_code == 0, result.output
    options = Placed.asked.pop().pipeline
    assert (options.hosts, options.ray_address) == ("ray", "head:6379")
    receipt = json.loads((folder / "out" / "receipt.json").read_text())
    cells = {one["method"]: one["speedup"] for one in receipt["results"]["cells"]}
    assert cells == {"pp": 1.0, "chain": 2.0, "fullpipe": 4.0}
    assert receipt["results"]["plan"] == {"order": "a, b"} and len(receipt["samples"]) == 1  # the other is for sizes


@pytest.mark.parametrize(("changes", "why"), [
    ({}, "stages is for replays"),
    ({"stages": "", "workers": "", "real": "", "methods": "pp,chian"}, "unknown method 'chian'"),
    ({"stages": "", "workers": "", "real": "", "limit": "1"}, "one prompt is not enough"),
    ({"hosts": "", "ray_address": "head:6379"}, "ray_address is of hosts"),
])
def test_what_hosts_have_no_use_for_is_refused(folder: Path, changes: dict[str, str], why: str) -> None:
    assert why in refused(bench(folder, **{"hosts": "ray", **changes}))


def test_again_runs_nothing_and_says_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench(folder)
    samples = (folder / "out" / "samples.jsonl").read_bytes()
    before = load_receipt(folder / "out" / "receipt.json")

    def no_pool(*_: Any, **__: Any) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr("fullpipe_lab.sweep.ProcessPoolExecutor", no_pool)
    again = bench(folder)
    assert (first.exit_code, again.exit_code) == (0, 0) and again.stdout == first.stdout
    assert (folder / "out" / "samples.jsonl").read_bytes() == samples
    assert load_receipt(folder / "out" / "receipt.json").samples == before.samples


def test_an_interrupted_run_is_gone_on_with(folder: Path) -> None:
    """Killed while it wrote a sample: that one is measured again, and no other."""
    bench(folder)
    path = folder / "out" / "samples.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:40])
    assert bench(folder).exit_code == 0
    mended = path.read_text().splitlines()
    assert mended[:-1] == whole[:-1]
    timed = {"engine_s", "wall_s"}
    assert {k: v for k, v in json.loads(mended[-1]).items() if k not in timed} \
        == {k: v for k, v in json.loads(whole[-1]).items() if k not in timed}


def test_what_is_named_twice_is_measured_once(folder: Path) -> None:
    assert bench(folder, stages="4,4", widths="2,2", temperatures="0,0", methods="pp,fullpipe").exit_code == 0
    receipt = load_receipt(folder / "out" / "receipt.json")
    assert len(receipt.clusters) == 1 and len(receipt.samples) == 2 * len(QUESTIONS)
    assert {one.method: len(one.candidates) for one in receipt.tuning} == {"pp": 1, "fullpipe": 1}


def test_two_temperatures_have_a_recording_and_a_tuning_each(folder: Path) -> None:
    record(folder / "out", 0.5)
    assert bench(folder, temperatures="0,0.5", methods="pp,fullpipe").exit_code == 0
    receipt = load_receipt(folder / "out" / "receipt.json")
    assert {(one.temperature, one.method) for one in receipt.tuning} \
        == {(heat, method) for heat in (0.0, 0.5) for method in ("pp", "fullpipe")}
    assert {one.temperature for one in receipt.samples} == {0.0, 0.5}


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "says"), [
    ({"cluster": "gpus-8"}, "--cluster or --stages, not both"),
    ({"stages": "", "cluster": "gpus-9"}, "edge-5, gpus-14, gpus-8, home-6"),
    ({"methods": "pp,spqr"}, "unknown method 'spqr'"),
    ({"widths": "4,x"}, "--widths takes whole numbers from 1 on"),
    ({"widths": "0"}, "--widths takes whole numbers from 1 on"),
    ({"depths": "0,2"}, "--depths takes whole numbers from 1 on"),
    ({"stages": "0"}, "--stages takes whole numbers from 1 on"),
    ({"stages": "4,4,-1"}, "--stages takes whole numbers from 1 on"),
    ({"temperatures": "nan"}, "--temperatures takes numbers from 0 on"),
    ({"temperatures": "-1"}, "--temperatures takes numbers from 0 on"),
    ({"draft": "smollm2-135m,qwen2.5-0.5b"}, "Run it once for each"),
    ({"draft": "none"}, "Name one with --draft"),
    ({"draft": "spd:somewhere"}, "spd:somewhere reads the target's hidden states, and a recording"),
    ({"draft": "ngram,exit:somewhere"}, "fullpipe-lab simulate"),
    ({"limit": "0"}, "--limit"), ({"turns": "0"}, "--turns"),
    ({"tune": "0"}, "--tune"), ({"workers": "-1"}, "--workers"),
    ({"max_tokens": "21"}, "was recorded with max_new_tokens 20, not 21"),
    ({"seed": "8"}, "was recorded with seed 7, not 8"),
    ({"dtype": "bfloat16"}, "was recorded with dtype 'float32', not 'bfloat16'"),
    ({"model": "another"}, "was recorded with model 'a model', not 'another'"),
    ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"stages": "4,,8"}, "--stages takes whole numbers"),
], ids=str)
def test_what_cannot_be_run_is_refused_before_anything_runs(folder: Path, changes: dict[str, str], says: str) -> None:
    assert says in refused(bench(folder, **changes))
    assert [path.name for path in (folder / "out").iterdir()] == ["recording-t0.jsonl"]


def test_prompts_in_another_format_name_the_line(folder: Path) -> None:
    path = folder / "questions.jsonl"
    path.write_text(path.read_text() + '{"question_id": 3, "category": "echo"}\n')
    assert "line 3" in refused(bench(folder))


def test_other_prompts_under_the_same_names(folder: Path) -> None:
    path = folder / "questions.jsonl"
    path.write_text(path.read_text().replace("And again.", "And then?"))
    assert "answers another prompt 'questions/2#0'" in refused(bench(folder))


def test_a_measured_cluster_cannot_be_replayed(folder: Path) -> None:
    (folder / "here.toml").write_text('[cluster]\nname = "here"\nkind = "measured"\n\n[[devices]]\nname = "this"\n'
                                      'speed = 1.0\n\n[placement]\nstages = ["this"]\n')
    assert "fullpipe profile" in refused(bench(folder, stages="", cluster=str(folder / "here.toml")))


def test_a_cluster_that_was_edited_since(folder: Path) -> None:
    from fullpipe_lab.clusters import unit_cluster

    path = folder / "mine.toml"
    path.write_text(unit_cluster(2).text)
    assert bench(folder, stages="", cluster=str(path), methods="pp").exit_code == 0
    path.write_text(unit_cluster(2).text.replace("1.0]]", "3.0]]"))
    assert "samples of another cluster" in refused(bench(folder, stages="", cluster=str(path), methods="pp"))


def test_a_folder_that_is_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    assert "cannot make the folder" in refused(bench(folder, out=str(folder / "file")))


# ---- with a model ------------------------------------------------------------------------------------------


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text('{"question_id": "a", "turns": ["hello there", "and again"]}\n'
                    '{"question_id": "b", "turns": ["hey"]}\n')
    return path


def test_a_recording_goes_on_and_a_later_turn_sees_the_answer_before_it(talk: Path, models: Models) -> None:
    out = talk.with_name("recording.jsonl")
    arguments = ("record", "--model", models.target, "--prompts", talk, "--max-tokens", "6", "--dtype", "float32",
                 "--threads", "1", "--out", out)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "3 answers" in result.stdout
    found = Recording.load(out).answers
    assert set(found) == {"talk/a#0", "talk/a#1", "talk/b#0"}
    first, second = found["talk/a#0"], found["talk/a#1"]
    assert len(first.tokens) == len(first.margins) == 6 and first.asked == digest(["hello there"])
    start = len(first.prompt)
    assert second.prompt[:start] == first.prompt and second.prompt[start : start + 6] == first.tokens
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:30])
    assert run(*arguments).exit_code == 0
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)


def test_with_a_draft_model_and_real_stages_it_comes_out_as_replayed(talk: Path, models: Models) -> None:
    """Everything that a user runs, once: recording, tuning, measuring, the memo, the check with all stages real."""
    result = bench_on(talk, models, stages="4", methods="pp,chain,static-tree,pipedec,fullpipe")
    assert result.exit_code == 0, result.output
    receipt = load_receipt(talk.parent / "out" / "receipt.json")
    assert len(receipt.samples) == 5 * 3 and len(receipt.checks) == 5
    for row in receipt.checks:
        assert row["text equal"] and row["hits, misses and rows equal"], row
        assert row["TBT ms, real stages"] == row["TBT ms, replayed"]
    assert sum(one.hits for one in receipt.samples) > 20
    assert {len(one.candidates) for one in receipt.tuning if one.method == "fullpipe"} == {2}  # with n-gram and without
    assert len(list((talk.parent / "out" / "memo").iterdir())) == 3


def test_a_check_that_cannot_be_made_costs_no_measurement(talk: Path, models: Models) -> None:
    """A model of 5 layers does not make 8 real stages."""
    result = bench_on(talk, models, stages="8", methods="pp")
    assert result.exit_code == 0, result.output
    assert "no check with real stages: cannot cut 5 layers into 8 stages" in result.output
    assert load_receipt(talk.parent / "out" / "receipt.json").samples


def test_a_draft_that_spells_otherwise_is_refused_before_the_target_runs(talk: Path, models: Models) -> None:
    assert "vocabular" in refused(bench_on(talk, models, draft=str(models.stranger)))
    assert not (talk.parent / "out").exists()


def bench_on(talk: Path, models: Models, **changes: str) -> Result:
    values = {"model": str(models.target), "draft": f"{models.draft},ngram", "prompts": str(talk), "widths": "4",
              "depths": "3", "max_tokens": "12", "real": "1", "threads": "1"}
    return bench(talk.parent, **values | changes)
