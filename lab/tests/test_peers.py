"""Peers beside Fullpipe: the conversation with their runners, what may go wrong with them, the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tokenizers

from fullpipe.errors import FetchError, UsageError
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.options import ModelOptions
from fullpipe.prompts import bundled
from fullpipe.request import SamplingParams
from fullpipe_lab.cli import beside
from fullpipe_lab.files import Journal
from fullpipe_lab.peers import (
    PEERS,
    Peer,
    PeerModels,
    PeerResult,
    PeerSample,
    better_mode,
    envs,
    peer_table,
    run_peers,
)
from fullpipe_lab.peers.process import RunnerFailed, peak_memory
from fullpipe_lab.peers.run import Job, Question, compare, measure, measure_all
from fullpipe_lab.peers.weights import as_folder
from fullpipe_lab.receipts import load_receipt
from fullpipe_lab.report import render

HERE = Path(__file__).parent
END = 9
HELLO = json.dumps({"version": "1", "load_s": 0.5, "settings": {}})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FULLPIPE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def job(tmp_path: Path) -> Job:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(id_): id_ for id_ in range(20)}, unk_token="0"))
    questions = [Question("a", "counting", [1, 2]), Question("b", "counting", [1, 6]), Question("c", "counting", [3])]
    return Job(questions, Tokenizer(words, frozenset({END})), tmp_path / "m.gguf", None, max_tokens=5,
               dtype="bfloat16", threads=4, repeats=1, limit_s=60.0)


def fake(mode: str, **changes: Any) -> Peer:
    return replace(Peer("fake", "A fake", None, HERE / "fake_peer.py", "any", {"mode": mode}), **changes)


def mute(hello: str, answer: str) -> Peer:
    return Peer("mute", "A mute", None, HERE / "mute_peer.py", "any", {"hello": hello, "answer": answer})


def silent(line: str) -> None:
    pass


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ---- one peer --------------------------------------------------------------------------------------------


def test_every_prompt_is_answered_in_turn_and_timed(job: Job) -> None:
    said: list[str] = []
    result = measure(fake("counts", processes=2), replace(job, repeats=2), said.append)
    assert (result.status, result.version, result.settings) == ("ok", "1.2", {"threads": 2})
    assert [(one.prompt, one.repeat) for one in result.samples] == [(p, r) for r in (0, 1) for p in "abc"]
    first = result.samples[0]
    assert first.tokens == [3, 4, 5, 6, 7]
    assert first.times[0] == first.times[1] <= first.times[2] == first.times[3] <= first.times[4]
    assert first.tbt_s == (first.times[-1] - first.times[0]) / 4
    assert result.load_s is not None and result.peak_rss_bytes
    assert len(said) == 1 + 6


def test_the_end_token_and_what_follows_are_no_text(job: Job) -> None:
    result = measure(fake("counts"), job, silent)
    assert result.samples[1].tokens == [7, 8] and len(result.samples[1].times) == 2
    assert result.samples[0].text_sha != result.samples[1].text_sha


def test_a_crash_while_loading_is_one_line(job: Job) -> None:
    result = measure(fake("load crashes"), job, silent)
    assert (result.status, result.reason) == ("failed", "ValueError: no such model")
    assert result.samples == []


def test_what_was_answered_before_a_peer_died_is_kept(job: Job) -> None:
    result = measure(fake("dies"), job, silent)  # its third answer is the second that counts
    assert (result.status, result.reason) == ("failed", "its process exited with code 3: out of luck")
    assert [sample.prompt for sample in result.samples] == ["a"]


def test_a_peer_that_hangs_is_given_up(job: Job) -> None:
    result = measure(fake("hangs"), replace(job, limit_s=0.3), silent)
    assert (result.status, result.reason) == ("failed", "did not answer within 0.3 s")
    assert not [child for child in psutil.Process().children() if "fake_peer.py" in " ".join(child.cmdline())]


def test_nothing_that_a_peer_started_outlives_it(job: Job) -> None:
    result = measure(fake("has a child"), job, silent)
    assert result.status == "ok"
    until = time.monotonic() + 10
    while alive(result.settings["child"]):  # a signal takes effect a moment after it was sent
        assert time.monotonic() < until


def test_a_runner_ends_when_its_parent_is_gone() -> None:
    command = [sys.executable, str(HERE / "fake_peer.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          start_new_session=True) as runner:
        assert runner.stdin and runner.stdout
        runner.stdin.write(b'{"mode": "hangs", "threads": 1}\n{"prompt": [1], "max_tokens": 1}\n')
        runner.stdin.flush()
        assert b"load_s" in runner.stdout.readline()
        runner.stdin.close()  # as the system does when the parent dies
        assert runner.wait(30) != 0


@pytest.mark.parametrize("hello", ["good morning", "[1]", "{}", '{"version": 1, "load_s": 1.0, "settings": {}}'])
def test_a_peer_that_does_not_introduce_itself_fails(job: Job, hello: str) -> None:
    result = measure(mute(hello, ""), job, silent)
    assert result.status == "failed" and result.reason


@pytest.mark.parametrize("answer", [
    "not json",
    "{}",
    '{"tokens": [1, 2], "times": [0.1]}',
    '{"tokens": [1, 2], "times": [0.2, 0.1]}',
    '{"tokens": [1], "times": [-0.1]}',
    '{"tokens": [1], "times": [NaN]}',
    '{"tokens": ["1"], "times": [0.1]}',
    '{"tokens": 5, "times": 0.1}',
    '{"failed": "no memory"}',
])
def test_an_answer_that_makes_no_sense_is_a_failure(job: Job, answer: str) -> None:
    result = measure(mute(HELLO, answer), job, silent)
    assert result.status == "failed" and result.reason and "\n" not in result.reason
    assert result.samples == []


def test_more_tokens_than_asked_for_are_a_failure(job: Job) -> None:
    assert measure(fake("too many"), job, silent).status == "failed"


def test_a_long_reason_is_cut(job: Job) -> None:
    result = measure(mute("x" * 5000, ""), job, silent)
    assert result.reason.startswith("said what is no answer: xxx") and len(result.reason) <= 300


def test_a_runner_that_cannot_be_started_is_a_failure(job: Job, home: Path) -> None:
    python = home / "peers" / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("not a program")
    (home / "peers" / "vllm" / "fullpipe.json").write_text("{}")
    result = measure(fake("counts", environment="vllm"), job, silent)
    assert result.status == "failed" and "ermission" in result.reason


# ---- what a peer may lack --------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_a_line_in_the_report(job: Job) -> None:
    result = measure(PEERS["llamacpp"], job, silent)
    assert (result.status, result.reason) == (
        "missing", "not installed; `python -m fullpipe_lab.peers llamacpp` does it")


def test_a_half_made_environment_does_not_count(job: Job, home: Path) -> None:
    python = home / "peers" / "llamacpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert measure(PEERS["llamacpp"], job, silent).status == "missing"


def test_a_peer_that_needs_a_draft_is_left_out_without_one(job: Job) -> None:
    result = measure(fake("counts", needs_draft=True), job, silent)
    assert (result.status, result.reason) == ("missing", "no draft model was named")


def test_a_folder_is_nothing_for_a_peer_that_reads_gguf(job: Job, tmp_path: Path) -> None:
    result = measure(fake("counts", weights="gguf"), replace(job, model=tmp_path), silent)
    assert (result.status, result.reason) == ("missing", "reads GGUF files only")


def test_converting_needs_the_transformers_environment(job: Job, tmp_path: Path) -> None:
    job.model.write_bytes(b"GGUF")
    assert as_folder(tmp_path, "bfloat16") == tmp_path
    with pytest.raises(RunnerFailed, match="not installed"):
        as_folder(job.model, "bfloat16")
    assert measure(fake("counts", weights="folder"), job, silent).status == "failed"


# ---- environments ----------------------------------------------------------------------------------------


def test_an_environment_that_is_complete_is_left_alone(home: Path) -> None:
    folder = home / "peers" / "llamacpp"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "fullpipe.json").write_text('{"xllamacpp": "1"}')
    before = sorted(folder.rglob("*"))
    said: list[str] = []
    assert envs.make("llamacpp", said.append) == {"xllamacpp": "1"}
    assert sorted(folder.rglob("*")) == before and said == []


def test_an_unknown_environment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert envs.main(["nonesuch"]) == UsageError.exit_code
    assert "llamacpp" in capsys.readouterr().err


def test_a_failing_step_says_which_and_how() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such package\\n')"]
    with pytest.raises(FetchError, match="the environment vllm cannot be made: no such package"):
        envs._run("vllm", command)


# ---- all of them -----------------------------------------------------------------------------------------


def result_of(name: str, answers: dict[str, list[int]], step: float = 0.1, **changes: Any) -> PeerResult:
    samples = [PeerSample(prompt, "t", 0, tokens, [0.5 + step * index for index in range(len(tokens))], "sha")
               for prompt, tokens in answers.items()]
    return replace(PeerResult(name, name.title(), samples=samples, version="1"), **changes)


def test_texts_are_compared_with_those_of_pp() -> None:
    reference = result_of("fullpipe-pp", {"a": [1, 2, 3], "b": [4, 5]})
    other = result_of("x", {"a": [1, 2, 3], "b": [4, 6], "c": [1]})
    shorter = result_of("y", {"a": [1, 2], "b": [4, 5, 6]})
    found = {result.name: result.agreement for result in compare([other, reference, shorter])}
    assert found == {"fullpipe-pp": {"a": None, "b": None}, "x": {"a": None, "b": 1}, "y": {"a": 2, "b": 2}}
    assert compare([other])[0].agreement == {}


def test_an_interruption_keeps_what_is_done(job: Job) -> None:
    def interrupt(line: str) -> None:
        if line == "second: loading":
            raise KeyboardInterrupt

    peers = [fake("counts", name="fullpipe-pp"), fake("counts", name="second")]
    kept: list[list[PeerResult]] = []
    with pytest.raises(KeyboardInterrupt):
        measure_all(peers, job, interrupt, kept.append)
    ((only,),) = kept
    assert (only.name, only.status, only.agreement) == ("fullpipe-pp", "ok", dict.fromkeys("abc"))


def test_the_table_says_what_was_measured() -> None:
    failed = PeerResult("z", "Z|Z", "failed", "out of memory")
    rows = peer_table(compare([result_of("fullpipe-pp", {"a": [1, 2, 3], "b": [4, 5]}, 0.2),
                               result_of("x", {"a": [1, 2, 3], "b": [4, 6]}, 0.1, note="reads less"), failed]))
    reference, other, broken = rows
    assert (reference["tbt_ms"], reference["over_pp"], reference["same_text"]) == (200.0, 1.0, "yes")
    assert (other["tbt_ms"], other["tbt_spread_ms"], other["ttft_ms"]) == (100.0, "100.0 to 100.0", 500.0)
    assert other["tokens_per_s"] == round(5 / (0.7 + 0.6), 2)
    assert (other["over_pp"], other["same_text"]) == (2.0, "1 of 2; differs from token 1 on")
    assert (other["remark"], broken["remark"]) == ("reads less", "failed: out of memory")
    assert broken["tbt_ms"] is broken["tokens_per_s"] is broken["same_text"] is None
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    lines = render("peers.md.j2", rows=rows, better=[]).splitlines()
    assert len(lines) == 2 + 3 and "Z\\|Z" in lines[-1]


def test_answers_of_one_token_have_no_time_between_tokens() -> None:
    row = peer_table(compare([result_of("fullpipe-pp", {"a": [1], "b": []})]))[0]
    assert row["tbt_ms"] is row["over_pp"] is None and row["ttft_ms"] == 500.0 and row["tokens_per_s"] == 2.0


def test_raw_samples_are_plain_json() -> None:
    result = result_of("x", {"a": [1, 2]})
    value = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert value["samples"][0]["ttft_s"] == 0.5 and value["samples"][0]["tokens"] == [1, 2]
    assert PeerResult.from_dict(value) == result
    (row,) = result.answers()
    assert (row["peer"], row["prompt"], row["times"]) == ("x", "a", [0.5, 0.6])


def test_the_better_mode_is_chosen_prompt_by_prompt() -> None:
    prompts = {"code/1": [1, 2, 3], "code/2": [1, 2, 3], "math/1": [1, 2, 3]}
    ours = result_of("fullpipe-1", prompts, 0.1)
    plain, draft = result_of("llamacpp", prompts, 0.2), result_of("llamacpp-draft", prompts, 0.4)
    for sample in draft.samples[:1]:
        sample.times[:] = [0.5, 0.525, 0.55]
    one_token = result_of("fullpipe", {"code/1": [1]})
    code, math, together = better_mode([one_token, ours, plain, draft])
    assert (code["peer"], code["set"], code["prompts"]) == ("Fullpipe-1", "code", 2)
    assert code["tbt_ahead"] == round((0.25 * 2) ** 0.5, 3) and code["best"] == "llamacpp-draft 1, llamacpp 1"
    assert (math["tbt_ms"], math["theirs_tbt_ms"], math["tbt_ahead"]) == (100.0, 200.0, 2.0)
    assert (math["tokens_per_s"], math["theirs_tokens_per_s"]) == (round(3 / 0.7, 2), round(3 / 0.9, 2))
    assert together["set"] == "all" and together["prompts"] == 3 and together["tbt_ahead"] == 1.0
    assert "| Fullpipe-1 | math | 1 | 100 | 200 | 2 |" in render("peers.md.j2", rows=[], better=[math])


def test_without_one_of_theirs_there_is_nothing_to_be_ahead_of() -> None:
    assert better_mode([result_of("fullpipe", {"a": [1, 2]}), result_of("vllm", {"a": [1, 2]})]) == []
    (by_task, _) = better_mode([result_of("fullpipe", {"f/a": [1, 2]}), result_of("llamacpp", {"f/a": [1, 2]})])
    assert by_task["set"] == "t"


def test_peers_that_answered_in_a_run_that_was_cut_off_are_not_asked_again(job: Job, tmp_path: Path) -> None:
    path, said = tmp_path / "journal.jsonl", list[str]()
    peers = [fake("counts", name="fullpipe-pp"), fake("dies", name="second")]
    first = measure_all(peers, job, silent, lambda _: None, Journal(path))
    again = measure_all(peers, job, said.append, lambda _: None, Journal(path))
    assert said[0] == "fullpipe-pp: asked already" and said[1] == "second: loading"
    assert again[0] == first[0] and again[1].status == "failed"


@pytest.mark.parametrize("changes, word", [
    ({"params": SamplingParams(temperature=1.0)}, "greedily"),
    ({"which": ["ollama"]}, "ollama"),
    ({"prompts": []}, "prompts"),
    ({"repeats": 0}, "repeats"),
])
def test_a_wrong_option_is_refused_before_anything_starts(changes: dict[str, Any], word: str) -> None:
    arguments: dict[str, Any] = {"prompts": bundled(), "params": SamplingParams(), "models": PeerModels("nonesuch")}
    with pytest.raises(UsageError, match=word):
        run_peers(**arguments | changes)


def test_memory_is_summed_over_descendants() -> None:
    alone = peak_memory(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline()
        together, own = peak_memory(os.getpid()), peak_memory(child.pid)
    assert alone and together and own and together >= alone + own
    assert peak_memory(2**30) is None


@pytest.mark.weights
@pytest.mark.processes
def test_fullpipe_is_a_peer_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FULLPIPE_HOME")
    results = run_peers(bundled()[:1], SamplingParams(max_tokens=6), PeerModels("smollm2-135m"),
                        ["fullpipe-pp", "fullpipe"], dtype="float32", threads=1)
    assert [result.status for result in results] == ["ok", "ok"]
    assert results[1].agreement == {results[1].samples[0].prompt: None}
    assert len(results[1].samples[0].tokens) == 6


# ---- the verb's tables -------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[PeerResult | KeyboardInterrupt]:
    """What the peers that `fullpipe-lab peers` asks will say, one after another."""
    said: list[PeerResult | KeyboardInterrupt] = []

    def ask(*_: Any, keep: Any, repeats: int, **__: Any) -> list[PeerResult]:
        assert repeats == 3
        done: list[PeerResult] = []
        for one in said:
            if isinstance(one, KeyboardInterrupt):
                raise one
            done.append(one)
            keep(done)
        return done

    monkeypatch.setattr("fullpipe_lab.peers.run_peers", ask)
    monkeypatch.setattr(beside, "fetch_all", lambda *_: None)
    return said


def ask_all(out: Path, model: str = "m") -> None:
    beside.peers(ModelOptions(model=model, draft="none", dtype="float32"), SamplingParams(max_tokens=8), None, 1, None,
                 3, out)


def test_no_other_program_runs_a_draft_module(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="spd:there is a draft module"):
        beside.peers(ModelOptions(model="m", draft="spd:there,ngram"), SamplingParams(), None, 1, None, 3, tmp_path)


def names(path: Path) -> list[str]:
    return [row["peer"] for row in load_receipt(path).peers]


def test_ctrl_c_leaves_the_table_of_the_peers_that_answered(answers: list[Any], tmp_path: Path) -> None:
    answers[:] = [result_of("x", {"a": [1, 2]}), KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        ask_all(tmp_path)
    assert names(tmp_path / "peers.json") == ["X"]
    receipt = load_receipt(tmp_path / "peers.json")
    assert receipt.settings["repeats"] == 3 and [row["tokens"] for row in receipt.answers] == [[1, 2]]


def test_an_earlier_table_stays_until_the_new_one_is_whole(answers: list[Any], tmp_path: Path) -> None:
    answers[:] = [result_of("x", {"a": [1, 2]}), result_of("y", {"a": [1, 2]})]
    ask_all(tmp_path)
    before = (tmp_path / "peers.json").read_bytes()
    answers[:] = [result_of("z", {"a": [1, 2]}), KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        ask_all(tmp_path)
    assert (tmp_path / "peers.json").read_bytes() == before
    assert names(tmp_path / "peers-unfinished.json") == ["Z"]
    answers.pop()
    ask_all(tmp_path)
    assert names(tmp_path / "peers.json") == ["Z"] and not (tmp_path / "peers-unfinished.json").exists()


def test_auto_is_what_the_product_computes_in(answers: list[Any], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    answers[:] = [result_of("x", {"a": [1, 2]})]
    monkeypatch.setattr("fullpipe.hub.resolve", Path)
    monkeypatch.setattr("fullpipe.models.weights.open_model", lambda path: path)
    monkeypatch.setattr("fullpipe.models.dtypes.pick_dtype", lambda name, files: {Path("m"): "stored"}[files])
    beside.peers(ModelOptions(model="m", draft="none"), SamplingParams(max_tokens=8), None, 1, None, 3, tmp_path)
    assert load_receipt(tmp_path / "peers.json").model.dtype == "stored"


def test_rows_of_earlier_runs_say_when_and_by_what(answers: list[Any], tmp_path: Path) -> None:
    answers[:] = [result_of("x", {"a": [1, 2]})]
    ask_all(tmp_path)
    receipt = load_receipt(tmp_path / "peers.json")
    found = beside.kept(tmp_path, "m")
    assert found["agreement"] == []
    (row,) = found["peers"]
    assert row["peer"] == "X" and row["date"] == receipt.date and row["commit"].startswith(receipt.commit[:12])
    assert row["commit"].endswith(" with changes") == receipt.dirty


def test_rows_on_another_model_are_left_out(
    answers: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers[:] = [result_of("x", {"a": [1, 2]})]
    ask_all(tmp_path, "another")
    assert beside.kept(tmp_path, "m") == {"peers": [], "agreement": []}
    assert "is of another, not of m" in capsys.readouterr().err.replace("\n", " ")


def test_a_damaged_table_costs_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "agreement.json").write_text("{")
    assert beside.kept(tmp_path, "m") == {"peers": [], "agreement": []}
    assert "left out of the report" in capsys.readouterr().err
    assert (tmp_path / "agreement.json").read_text() == "{"
