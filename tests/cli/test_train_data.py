"""`fullpipe train vocab` and `distill` as a user meets them, and a distillation that ends in the middle."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from command import Models, run
from typer.testing import Result

from fullpipe.errors import CacheError
from fullpipe.llm import LLM
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.training.data import Report, read_samples
from fullpipe.training.distill import Distiller, Settings, read_conversations
from fullpipe.training.vocab import load_vocab

PROMPTS = [f"question {number}, and {'more ' * (number % 3)}" for number in range(7)]
SETTINGS = ("--max-tokens", "12", "--temperature", "0", "--temperature", "1", "--max-num-seqs", "3", "--dtype",
            "float32", "--threads", "1")


@pytest.fixture(scope="module")
def ending(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target, but every letter ends its answers, so that they end at many places and out of order."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(models.target, folder)
    tokenizer = load_tokenizer(folder)
    ends = [id for id, token in tokenizer.tokens.items() if len(token) == 1 and token in "abcdefghijklm"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


def distill(model: Path, prompts: Path, out: Path, *more: str) -> Result:
    return run("train", "distill", "--model", model, "--data", prompts, "--out", out, *(more or SETTINGS))


@pytest.fixture(scope="module")
def whole(ending: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a distillation that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    result = distill(ending, folder / "prompts.txt", folder / "out.jsonl")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{folder / 'out.jsonl'}: 7 answers, 7 of them new (")
    return (folder / "out.jsonl").read_bytes()


def test_answers_stand_in_order_and_are_the_models(whole: bytes, ending: Path) -> None:
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == PROMPTS
    assert [line["temperature"] for line in lines] == [0, 1, 0, 1, 0, 1, 0]
    assert [line["seed"] for line in lines] == list(range(7))
    assert {line["model"] for line in lines} == {str(ending)}
    assert len({line["finish_reason"] for line in lines}) == 2, "some end by themselves, some by their length"
    with LLM(str(ending), draft="none", method="pp", dtype="float32", threads=1) as llm:
        settings = Settings(str(ending), "float32", 12, (0.0, 1.0))
        for place in range(7):
            said = llm.chat([{"role": "user", "content": PROMPTS[place]}], settings.params(place))
            assert lines[place]["messages"][1] == {"role": "assistant", "content": said.text}
            assert lines[place]["finish_reason"] == said.finish_reason


def test_running_again_goes_on_where_it_stopped(whole: bytes, ending: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert distill(ending, prompts, out, *SETTINGS, "--limit", "2").exit_code == 0
    assert whole.startswith(out.read_bytes()) and out.read_bytes().count(b"\n") == 2
    out.write_bytes(whole[: len(out.read_bytes()) + 30])  # killed while it wrote the third
    result = distill(ending, prompts, out)
    assert out.read_bytes() == whole and ": 7 answers, 5 of them new (" in result.stdout
    result = distill(ending, prompts, out)
    assert out.read_bytes() == whole and ": 7 answers, 0 of them new (0 tokens)" in result.stdout


def test_another_setting_is_refused(whole: bytes, ending: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_bytes(whole)
    result = distill(ending, prompts, tmp_path / "out.jsonl", *SETTINGS, "--seed", "1")
    assert result.exit_code == 2 and "line 1: made with seed 0, not 1" in result.stderr
    assert "Name another file" in result.stderr and (tmp_path / "out.jsonl").read_bytes() == whole


def test_an_interrupt_loses_only_what_is_under_way(whole: bytes, ending: Path, prompts: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, subject: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)  # which the main thread gets

    distiller = distiller_of(ending, prompts, tmp_path / "out.jsonl", interrupt)
    with opened(ending, distiller) as llm, pytest.raises(KeyboardInterrupt):
        distiller.run(llm)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert lines == whole.splitlines()[: len(lines)] and len(lines) >= 3
    assert distill(ending, prompts, tmp_path / "out.jsonl").exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_full_disk_is_said(whole: bytes, ending: Path, prompts: Path, tmp_path: Path) -> None:
    distiller = distiller_of(ending, prompts, tmp_path / "out.jsonl", lambda done, total, subject: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(ending, distiller) as llm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, hard))
        try:
            with pytest.raises(CacheError, match="cannot write"):
                distiller.run(llm)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out.jsonl").read_bytes() == whole[: len(whole) // 2], "nothing was written after the tear"


def distiller_of(model: Path, prompts: Path, out: Path, progress: object) -> Distiller:
    settings = Settings(str(model), "float32", 12, (0.0, 1.0))
    return Distiller(out, read_conversations(prompts), settings, progress)  # type: ignore[arg-type]


def opened(model: Path, distiller: Distiller) -> LLM:
    return LLM(str(model), draft="none", method="pp", dtype="float32", threads=1,
               max_num_seqs=3, listeners=[distiller.listener])


def test_prompts_longer_than_the_context_are_left_out(ending: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("a", "b" * 20_000, "c")))
    result = distill(ending, tmp_path / "p.jsonl", tmp_path / "out.jsonl")
    assert result.exit_code == 0 and "1 prompts are longer than the context and were left out" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["messages"][0]["content"], line["seed"]) for line in lines] == [("a", 0), ("c", 2)]


def test_what_was_distilled_can_be_learnt(models: Models, prompts: Path, tmp_path: Path) -> None:
    """This model never ends by itself. What it says is what is learnt, where its text spells its tokens."""
    out = tmp_path / "out.jsonl"
    result = distill(models.target, prompts, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer, report = load_tokenizer(models.target), Report()
    samples = read_samples([out], tokenizer, max_length=100, min_length=2, report=report)
    assert report.used == 7 and {line["finish_reason"] for line in lines} == {"length"}
    assert any(line["retokenises"] for line in lines)
    for line, sample in zip(lines, samples):
        assert tokenizer.decode(sample.tokens[sample.learn]) == line["messages"][1]["content"]
        assert (int(sample.learn.sum()) == 12) == line["retokenises"]
    altered = sum(not line["retokenises"] for line in lines)
    assert (f"{altered} do not tokenise back" in result.stderr) == bool(altered)


def test_a_vocabulary_of_distilled_text(whole: bytes, ending: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "vocab.json"
    data.write_bytes(whole)
    result = run("train", "vocab", "--model", ending, "--data", data, "--size", "64", "--out", out)
    assert result.exit_code == 0, result.stderr
    vocab = load_vocab(out, tokenizer=load_tokenizer(ending))
    (row,) = [line for line in result.stdout.splitlines() if str(out) in line]
    assert row.split()[:2] == ["64", f"{vocab.mass:.2%}"] and f"{vocab.total:,} labels" in result.stdout
    assert "7 documents used" in result.stderr
    result = run("train", "vocab", "--model", ending, "--data", data, "--size", "5000", "--out", out)
    assert result.exit_code == 2 and "a draft vocabulary of 5000 tokens cannot be" in result.stderr


def test_train_alone_lists_its_verbs() -> None:
    result = run("train", "--help")
    assert result.exit_code == 0 and "vocab" in result.stdout and "distill" in result.stdout
