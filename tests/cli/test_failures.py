"""What goes wrong: a sentence, a hint, an exit code; no traceback unless asked for, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from command import CONTEXT, PIPELINES, Models, asking, run, running

import tiny
from fullpipe.hub import CATALOGUE

LONG = ("--max-new-tokens", "15000")

# What is asked for, the exit code, what the error says, and what the hint does ("" for none: the error says it all).
USAGE = [
    ("no prompt", {"prompt": ""}, (), "the prompt is empty", "Write "),
    ("blank prompt", {"prompt": " \n"}, (), "the prompt is empty", "Write "),
    ("long prompt", {"prompt": "x" * CONTEXT}, ("--no-chat-template",),
     f"the prompt has {CONTEXT} tokens, the context holds {CONTEXT}", "Shorten the prompt"),
    ("many stages", {"stages": 6}, (), "cannot cut 5 layers into 6 stages", "stages"),
    ("no stages", {"stages": 0}, (), "cannot cut 5 layers into 0 stages", "stages"),
    ("negative stages", {"stages": -1}, (), "cannot cut 5 layers into -1 stages", "stages"),
    *((f"accept {text}", {}, ("--accept", text), f"takes exact, or typical:EPS with EPS above 0 and at most 1 (got "
       f"'{text}')", "typical:0.3") for text in ("typical", "typical:0", "typical:2", "typical:x", "typical:nan", "x")),
    ("refresh", {}, ("--method", "pipedec", "--refresh"), "the method pipedec cannot refresh", "one of: spd, fullpipe"),
    ("width 0", {}, ("--width", "0"), "width must be 1 or more (got 0)", ""),
    ("depth 0", {}, ("--method", "chain", "--depth", "0"), "depth must be 1 or more (got 0)", ""),
    ("no draft", {"draft": "none"}, (), "the method fullpipe needs a draft", "or use the method pp"),
    ("half a draft", {"draft": "ngram,"}, (), "'ngram,' names no draft", "Use none, ngram, a model"),
    ("negative temperature", {}, ("--temperature", "-1"), "temperature must be 0 or more (got -1.0)", ""),
    ("negative link", {}, ("--link-ms", "-1"), "the link latency must be 0 or more (got -1.0 ms)", ""),
    ("a depth without a layer", {}, ("--depth", "3"), "the method fullpipe has no depth (got 3)",
     "use one of: chain, static-tree"),
    ("no time to start", {}, ("--start-timeout", "0"), "the time to start must be above 0", ""),
    ("no time", {}, ("--timeout", "0"), "the time-out must be above 0 (got 0 s)", ""),
    ("no tokens", {}, ("--max-new-tokens", "0"), "max_tokens must be 1 or more (got 0)", ""),
    ("top-p 0", {}, ("--top-p", "0"), "top_p must be in (0, 1] (got 0.0)", ""),
    ("trace nowhere", {}, ("--events", "/nowhere/trace"), "cannot write the trace /nowhere/trace",
     "Name a file in a folder"),
]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """No process, and no temporary file."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = psutil.Process().children(recursive=True)  # of other tests: multiprocessing's resource tracker
    yield
    assert not set(psutil.Process().children(recursive=True)).difference(before)
    assert not list(temporary.iterdir())


def refused(arguments: list[str], code: int) -> tuple[str, str]:
    """Message and hint."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert "Traceback" not in result.stderr
    told = result.stderr[result.stderr.index("error: ") :].splitlines()
    assert len(told) <= 2, told
    return told[0].removeprefix("error: "), told[1] if len(told) > 1 else ""


@pytest.mark.parametrize(("how", "more", "message", "hint"), [case[1:] for case in USAGE],
                         ids=[case[0] for case in USAGE])
def test_what_cannot_be_done_as_asked(models: Models, how: dict[str, object], more: tuple[str, ...], message: str,
                                      hint: str) -> None:
    said, advice = refused(asking(models.target, *more, **how), 2)
    assert message in said
    assert hint in advice and bool(hint) <= bool(advice)


@pytest.mark.parametrize("more", [("--method", "magic"), ("--dtype", "int3"), ("--pipeline", "tube"), ("--wdith", "3"),
                                  ("--stages", "two"), ("--width", "2.5")])
def test_what_cannot_be_parsed(models: Models, more: tuple[str, str]) -> None:
    """The parser's own words: the option, and what it may be."""
    result = run(*asking(models.target, *more))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr and "Usage: " in result.stderr and more[0] in result.stderr
    if more[0] == "--method":
        assert "static-tree" in result.stderr


def test_debug_adds_the_traceback(models: Models) -> None:
    result = run(*asking(models.target, "--width", "0", "--debug"))
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "make_policy" in result.stderr
    assert "error: width must be 1 or more (got 0)" in result.stderr


def test_a_draft_with_another_vocabulary(models: Models) -> None:
    said, hint = refused(asking(models.target, draft=models.stranger), 2)
    assert said == ("the draft stranger has another vocabulary than target: 96 tokens against 96; the first difference "
                    "is token 1, '~' against 'Ġ'")
    assert "--draft ngram" in hint


# ---- models ----------------------------------------------------------------------------------------------


def test_a_model_nobody_knows() -> None:
    said, hint = refused(asking("smollm"), 3)
    assert said == "no model is called 'smollm'" and "smollm2-135m" in hint


def test_a_draft_nobody_knows(models: Models) -> None:
    assert refused(asking(models.target, draft="smollm"), 3)[0] == "no model is called 'smollm'"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refused(asking(tmp_path / "nothing"), 3)[0] == f"there is no file or folder {tmp_path / 'nothing'}"


@pytest.fixture
def copy(models: Models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models.target, tmp_path / "copy"))


def test_missing_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    said, hint = refused(asking(copy), 3)
    assert str(copy) in said and "safetensors" in said and hint


def test_a_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    said, hint = refused(asking(copy), 3)
    assert said == f"{copy} has no tokenizer.json" and "save_pretrained" in hint


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_truncated_safetensors(copy: Path, pipeline: str) -> None:
    cut_short(copy / "model.safetensors")
    said, hint = refused(asking(copy, "--pipeline", pipeline), 3)
    assert f"{copy / 'model.safetensors'} is cut short" in said and "again" in hint


def test_truncated_gguf(tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.tiny_model("llama"), tmp_path / "model.gguf")
    cut_short(path)
    said, hint = refused(asking(path), 3)
    assert str(path) in said and "short" in said and "again" in hint


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_draft_that_is_damaged(models: Models, copy: Path, pipeline: str) -> None:
    """It is opened on its own station; with processes, in another process than the command."""
    cut_short(copy / "model.safetensors")
    said, hint = refused(asking(models.target, "--pipeline", pipeline, draft=copy), 3)
    assert f"{copy / 'model.safetensors'} is cut short" in said and "again" in hint


def test_a_wrong_checksum_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLPIPE_HOME", str(tmp_path / "home"))
    model = CATALOGUE["smollm2-135m"]
    file = tmp_path / "home" / "models" / f"{model.name}.gguf"
    file.parent.mkdir(parents=True)
    with file.open("wb") as altered:
        altered.truncate(model.size)
    said, hint = refused(asking(model.name), 3)
    assert f"{file} was altered: SHA-256 expected {model.sha256}" in said
    assert "`fullpipe pull smollm2-135m`" in hint


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLPIPE_HOME", "/proc/nope")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said, hint = refused(asking("smollm2-135m"), 4)
    assert "cannot write in the cache folder /proc/nope" in said and "FULLPIPE_HOME" in hint


# ---- processes that die or hang --------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(("number", "station"), [(0, "stage 0"), (1, "stage 1"), (2, "draft")])
def test_a_station_that_dies(models: Models, tmp_path: Path, number: int, station: str) -> None:
    with running(asking(models.target, *LONG, "--pipeline", "distributed"), tmp_path / "temporary") as command:
        said = command.first_bytes().decode()
        command.workers[number].kill()
        code, rest, err = command.end()
    assert code == 7 and "Traceback" not in err
    summary, error, hint = err.splitlines()[-3:]
    assert error.startswith(f"error: {station} failed: its process was ended by SIGKILL")
    assert hint.startswith("What was emitted is kept.")
    said += rest
    assert said.endswith("\n") and summary.startswith(f"[{len(said) - 1} tokens, error;")
    assert said == run(*asking(models.target, "--max-new-tokens", len(said) - 1)).stdout


@pytest.mark.processes
def test_a_station_that_hangs(models: Models, tmp_path: Path) -> None:
    asked = asking(models.target, *LONG, "--pipeline", "distributed", "--timeout", "2")
    with running(asked, tmp_path / "temporary") as command:
        said = command.first_bytes().decode()
        command.workers[1].send_signal(signal.SIGSTOP)
        code, rest, err = command.end()
    assert code == 7 and "Traceback" not in err
    assert "error: stage 1 failed: no " in err and "for 2 s" in err and "longer time-out" in err
    assert (said + rest).endswith("\n") and f"[{len(said + rest) - 1} tokens, error;" in err


@pytest.mark.processes
def test_the_object_holds_what_was_said_before_a_station_died(models: Models, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    asked = asking(models.target, *LONG, "--pipeline", "distributed", "--json", "--events", trace)
    with running(asked, tmp_path / "temporary") as command:
        command.until_it_speaks(trace)
        command.workers[0].send_signal(signal.SIGKILL)
        code, out, err = command.end()
    told = json.loads(out)
    assert code == 7 and "error: stage 0 failed: " in err
    assert told["finish_reason"] == "error" and told["timing"]["wall_s"] > 0
    assert 0 < len(told["text"]) == len(told["token_ids"]) == told["usage"]["completion_tokens"]
