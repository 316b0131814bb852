"""What goes wrong: a sentence, a hint, an exit code; no traceback unless asked for, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import count
from pathlib import Path

import psutil
import pytest
from command import CONTEXT, PIPELINES, Models, asking, run, running

import tiny
from fullpipe.errors import StationFailed
from fullpipe.hub import CATALOGUE
from fullpipe.messages import Event
from fullpipe.pipeline.workers import WorkersPipeline

LONG = ("--max-tokens", "15000")

# What is asked for, the exit code, what the error says, and what the hint does ("" for none: the error says it all).
USAGE = [
    ("no prompt", {"prompt": ""}, (), "the prompt is empty", "Write "),
    ("blank prompt", {"prompt": " \n"}, (), "the prompt is empty", "Write "),
    ("long prompt", {"prompt": "x" * CONTEXT}, ("--no-chat-template",),
     f"the prompt has {CONTEXT} tokens, the context holds {CONTEXT}", "Shorten the prompt"),
    ("many stages", {"stages": 6}, (), "cannot cut 5 layers into 6 stages", "stages"),
    ("no stages", {"stages": 0}, (), "cannot cut 5 layers into 0 stages", "stages"),
    ("negative stages", {"stages": -1}, (), "cannot cut 5 layers into -1 stages", "stages"),
    *((f"accept {text}", {}, ("--accept-typical", text), f"accept_typical must be in [0, 1] (got {text})", "")
      for text in ("2.0", "-0.1", "nan")),
    ("refresh", {}, ("--method", "pipedec", "--refresh"), "the method pipedec has no refresh",
     "one of: spd, fullpipe"),
    ("width 0", {}, ("--width", "0"), "width must be 1 or more (got 0)", ""),
    ("depth 0", {}, ("--method", "chain", "--depth", "0"), "depth must be 1 or more (got 0)", ""),
    ("no draft", {"draft": "none"}, ("--method", "fullpipe"), "the method fullpipe needs a draft",
     "or use the method pp"),
    ("half a draft", {"draft": "ngram,"}, (), "'ngram,' names no draft", "Use none, ngram, a model"),
    ("negative temperature", {}, ("--temperature", "-1"), "temperature must be 0 or more (got -1.0)", ""),
    ("negative link", {"stages": 2}, ("--link-ms", "-1"), "the link latency must be 0 or more (got -1.0 ms)", ""),
    ("a depth without a layer", {"stages": 2}, ("--depth", "3"), "the method fullpipe has no depth (got 3)",
     "use one of: chain, static-tree"),
    ("no time to start", {"stages": 2}, ("--start-timeout", "0"), "the time to start must be above 0", ""),
    ("no time", {"stages": 2}, ("--timeout", "0"), "the time-out must be above 0 (got 0 s)", ""),
    ("no tokens", {}, ("--max-tokens", "0"), "max_tokens must be 1 or more (got 0)", ""),
    ("top-p 0", {}, ("--top-p", "0"), "top_p must be in (0, 1] (got 0.0)", ""),
    ("links without stages", {}, ("--link-ms", "5"), "link_ms is for stage processes, and there are none",
     "--stages 2"),
    ("a time-out without stages", {}, ("--timeout", "5"), "timeout is for stage processes", "--stages 2"),
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


@pytest.mark.parametrize("more", [("--method", "magic"), ("--dtype", "int3"), ("--pipeline", "inprocess"),
                                  ("--clock", "wall"), ("--accept-typical", "x"), ("--wdith", "3"),
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
    assert "Traceback" in result.stderr and "make_method" in result.stderr
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
    assert said == f"{copy} has no tokenizer.json and no tokenizer.model" and "save_pretrained" in hint


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("stages", PIPELINES)
def test_truncated_safetensors(copy: Path, stages: int | None) -> None:
    cut_short(copy / "model.safetensors")
    said, hint = refused(asking(copy, stages=stages), 3)
    assert f"{copy / 'model.safetensors'} is cut short" in said and "again" in hint


def test_truncated_gguf(tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.tiny_model("llama"), tmp_path / "model.gguf")
    cut_short(path)
    said, hint = refused(asking(path), 3)
    assert str(path) in said and "short" in said and "again" in hint


@pytest.mark.parametrize("stages", PIPELINES)
def test_a_draft_that_is_damaged(models: Models, copy: Path, stages: int | None) -> None:
    """It is opened on its own station; with processes, in another process than the command."""
    cut_short(copy / "model.safetensors")
    said, hint = refused(asking(models.target, draft=copy, stages=stages), 3)
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
def test_a_station_that_dies_is_replaced_and_the_text_goes_on(models: Models, tmp_path: Path, number: int,
                                                              station: str) -> None:
    asked = asking(models.target, "--max-tokens", "150", "--method", "fullpipe", stages=2)
    with running(asked, tmp_path / "temporary") as command:
        said = command.first_bytes().decode()
        command.workers[number].kill()
        code, rest, err = command.end()
    assert code == 0 and "Traceback" not in err
    assert f"{station} failed: its process was ended by SIGKILL" in err
    assert err.splitlines()[-1].startswith("[150 tokens, length; ")
    assert said + rest == run(*asking(models.target, "--max-tokens", "150", "--method", "pp")).stdout


@pytest.mark.processes
def test_a_station_that_hangs_is_replaced_too(models: Models, tmp_path: Path) -> None:
    asked = asking(models.target, "--max-tokens", "150", "--method", "fullpipe", "--timeout", "2", stages=2)
    with running(asked, tmp_path / "temporary") as command:
        said = command.first_bytes().decode()
        command.workers[1].send_signal(signal.SIGSTOP)
        code, rest, err = command.end()
    assert code == 0 and "Traceback" not in err
    assert "stage 1 failed: no " in err and "for 2 s" in err
    assert len(said + rest) == 151


def broken_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stations die after some tokens, and none can be started again."""
    monkeypatch.setattr("fullpipe.supervision._PAUSES_S", (0.0,))
    real, looks = WorkersPipeline.events, count()

    def events(self: WorkersPipeline, wait: float | None = None) -> list[Event]:
        if next(looks) == 200:
            raise StationFailed("stage 1", "its process was ended by SIGKILL", hint="What was emitted is kept.")
        return real(self, wait)

    def start(*arguments: object, **more: object) -> None:
        if next(looks) > 200:
            raise StationFailed("stage 0", "not ready", hint="Is the machine busy?")
        build(*arguments, **more)  # type: ignore[arg-type]

    build = WorkersPipeline.__init__
    monkeypatch.setattr(WorkersPipeline, "events", events)
    monkeypatch.setattr(WorkersPipeline, "__init__", start)


@pytest.mark.processes
@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_said_before_stations_were_gone_for_good_is_kept(models: Models, monkeypatch: pytest.MonkeyPatch,
                                                                  as_json: bool) -> None:
    broken_for_good(monkeypatch)
    result = run(*asking(models.target, *LONG, "--method", "pp", *(["--json"] if as_json else []), stages=2))
    *_, error, hint = result.stderr.splitlines()
    assert result.exit_code == 7 and "Traceback" not in result.stderr
    assert (error, hint) == ("error: stage 0 failed: not ready", "Is the machine busy?")
    if as_json:
        told = json.loads(result.stdout)
        said = told["text"]
        assert told["finish_reason"] == "error" and told["timing"]["wall_s"] > 0
        assert 0 < len(said) == len(told["token_ids"]) == told["usage"]["completion_tokens"]
    else:
        said = result.stdout.removesuffix("\n")
        assert f"[{len(said)} tokens, error;" in result.stderr
    assert said + "\n" == run(*asking(models.target, "--max-tokens", len(said), "--method", "pp")).stdout
