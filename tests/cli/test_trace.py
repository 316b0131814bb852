"""`fullpipe trace`, and `fullpipe generate` with `--trace` and `--events`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from command import Models, asking, run, running

from fullpipe.cli.trace import Traces
from fullpipe.errors import UsageError
from fullpipe.events import Emitted
from fullpipe.messages import Event
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.trace.recorder import JsonlRecorder, read_events
from recorded import recorded

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return recorded(tokens=8)


@pytest.fixture
def file(events: list[Event], tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    with JsonlRecorder(path) as recorder:
        for event in events:
            recorder(event)
    return path


def page_data(path: Path) -> dict[str, object]:
    text = path.read_text(encoding="utf-8").split('type="application/json">')[1].split("</script>")[0]
    found: dict[str, object] = json.loads(text)
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


# ---- fullpipe trace ----------------------------------------------------------------------------------------


def test_without_options_all_three_are_written_beside_the_file(file: Path) -> None:
    result = run("trace", file)
    assert result.exit_code == 0, result.output
    outputs = [file.parent / name for name in ("run.trace.json", "run.svg", "run.html")]
    assert result.stdout.split() == [str(path) for path in outputs]
    assert names(file.parent) == {"run.jsonl", *(path.name for path in outputs)}
    assert json.loads(outputs[0].read_text())["traceEvents"]
    assert "steps since the run began" in outputs[1].read_text()
    assert page_data(outputs[2])["clock"] == "virtual time"


def test_with_options_only_what_they_name(file: Path) -> None:
    result = run("trace", file, "--picture", file.parent / "p.png", "--page", file.parent / "q.html")
    assert result.exit_code == 0 and names(file.parent) == {"run.jsonl", "p.png", "q.html"}
    assert (file.parent / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_spells_tokens_with_a_tokenizer(file: Path, models: Models) -> None:
    page = file.parent / "p.html"
    assert run("trace", file, "--page", page).exit_code == 0
    assert page_data(page)["texts"] == {}
    assert run("trace", file, "--page", page, "--tokenizer", models.target).exit_code == 0
    spelled = page_data(page)["texts"]
    assert isinstance(spelled, dict) and spelled["1"] == " " and spelled["2"] == "!"


def test_a_special_token_reads_as_its_name(models: Models) -> None:
    assert load_tokenizer(models.target).token_text(0) == "<|im_end|>"


def test_the_clock_is_what_the_file_or_the_user_says(events: list[Event], tmp_path: Path) -> None:
    path = tmp_path / "later.jsonl"
    with JsonlRecorder(path) as recorder:
        for event in events[20:]:  # from the middle of a run
            recorder(event)
    page = tmp_path / "p.html"
    for more, clock in (((), "time"), (("--clock", "wall"), "wall-clock time"),
                        (("--clock", "virtual"), "virtual time")):
        assert run("trace", path, "--page", page, *more).exit_code == 0
        assert page_data(page)["clock"] == clock


def test_a_part_of_the_run(file: Path) -> None:
    picture = file.parent / "p.svg"
    assert run("trace", file, "--picture", picture, "--start", "2", "--end", "5").exit_code == 0
    assert "shown: 2 to 5 steps of" in picture.read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    (("--chrome", "out.txt"), "out.txt does not end in .json"),
    (("--picture", "out.html"), "out.html does not end in .png or .svg"),
    (("--page", "nowhere/out.html"), "cannot write the trace nowhere/out.html: No such file or directory"),
    (("--picture", "out.png", "--start", "1e9"), "the window begins at 1e+09 s"),
])
def test_what_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
                                message: str) -> None:
    monkeypatch.chdir(file.parent)
    result = run("trace", file, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert names(file.parent) == {"run.jsonl"}


@pytest.mark.parametrize(("content", "message"), [
    ("nonsense\n", "line 1 is not an event"), ("", "the trace shows no work"),
    ('{"type": "Ready", "time": 0.0}\n', "the trace shows no work"),
])
def test_a_bad_file_leaves_the_pictures_of_a_good_one(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    for name in ("bad.svg", "bad.html", "bad.trace.json"):
        (tmp_path / name).write_text("old")
    result = run("trace", tmp_path / "bad.jsonl")
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert {path.read_text() for path in tmp_path.iterdir() if path.suffix != ".jsonl"} == {"old"}
    result = run("trace", tmp_path / "missing.jsonl")
    assert result.exit_code == 2 and "cannot read the trace" in result.stderr


def test_the_run_itself_is_not_overwritten(file: Path) -> None:
    odd = file.rename(file.with_name("run.html"))
    before = odd.read_bytes()
    result = run("trace", odd, "--page", odd)
    assert result.exit_code == 2 and "is the recorded run itself" in result.stderr
    assert odd.read_bytes() == before


def test_without_matplotlib_the_rest_is_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("trace", file)
    assert result.exit_code == 0 and names(file.parent) == {"run.jsonl", "run.trace.json", "run.html"}
    assert "no picture: a picture of the pipeline needs matplotlib (pip install" in result.stderr
    result = run("trace", file, "--picture", file.parent / "p.svg")
    assert result.exit_code == 6 and "needs matplotlib" in result.stderr


# ---- fullpipe generate --trace -----------------------------------------------------------------------------


def test_the_ending_says_what_is_written(models: Models, tmp_path: Path) -> None:
    files = [tmp_path / f"run{suffix}" for suffix in (".json", ".svg", ".html", ".jsonl")]
    wanted = [part for path in files for part in ("--trace", path)]
    result = run(*asking(models.target, "--max-tokens", "12", *wanted))
    assert result.exit_code == 0, result.output
    assert result.stdout == run(*asking(models.target, "--max-tokens", "12")).stdout
    assert names(tmp_path) == {path.name for path in files}
    told = [event for event in read_events(files[3]) if isinstance(event, Emitted)]
    data = page_data(files[2])
    assert len(told) == 12 == len(data["emissions"]["node"])  # type: ignore[index, call-overload]
    assert data["title"] == f"chain on 1 stage, {models.target}" and data["texts"]
    assert "wall-clock time since the run began" in files[1].read_text()
    assert [line for line in result.stderr.splitlines() if line.startswith("wrote ")] == [
        f"wrote {path}" for path in files[:3]]


@pytest.mark.parametrize(("more", "message"), [
    (("--trace", "{}/t.bmp"), "does not end in .json or .png or .svg or .html or .jsonl"),
    (("--trace", "{}/nowhere/t.html"), "cannot write the trace"),
    (("--trace", "{}"), "does not end in"),
    (("--trace", "{}/t.html", "--trace", "{}/t.jsonl", "--events", "{}/e", "--width", "0"), "width must be 1"),
    (("--trace", "{}/t.jsonl", "--events", "{}/e", "--stages", "99"), "cannot cut"),
    (("--events", "{}/e", "--model", "no-such-model"), "no model is called"),
])
def test_what_is_refused_leaves_every_file_as_it_was(models: Models, tmp_path: Path, more: tuple[str, ...],
                                                     message: str) -> None:
    old = dict.fromkeys(("e", "t.jsonl", "t.html"), "old")
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    result = run(*asking(models.target, *(part.format(tmp_path) for part in more)))
    assert result.exit_code in (2, 3) and message in result.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == old


def test_files_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    result = run(*asking("no-such-model", "--trace", tmp_path / "t.bmp"))
    assert result.exit_code == 2 and "does not end in" in result.stderr


def test_a_prompt_that_is_too_long_leaves_the_file_of_the_last_run(models: Models, tmp_path: Path) -> None:
    """Refused after everything has been loaded, before the first event."""
    (tmp_path / "e").write_text("old")
    result = run(*asking(models.target, "--events", tmp_path / "e", "--trace", tmp_path / "t.html",
                         prompt="x" * 20_000))
    assert result.exit_code == 2 and "the context holds" in result.stderr
    assert (tmp_path / "e").read_text() == "old" and names(tmp_path) == {"e"}


def test_ctrl_c_still_writes_the_traces(models: Models, tmp_path: Path) -> None:
    home, page, file = tmp_path / "home", tmp_path / "t.html", tmp_path / "t.jsonl"
    home.mkdir()
    asked = asking(models.target, "--max-tokens", "15000", "--trace", page, "--trace", file)
    with running(asked, home) as command:
        command.first_bytes()
        command.interrupt()
        code, _, err = command.end()
    assert code == 130 and "Traceback" not in err and f"wrote {page}" in err
    emitted = [event for event in read_events(file) if isinstance(event, Emitted)]
    assert emitted and len(page_data(page)["emissions"]["node"]) == len(emitted)  # type: ignore[index, call-overload]


@pytest.mark.processes
def test_a_station_that_dies_does_not_end_the_traces(models: Models, tmp_path: Path) -> None:
    home, page = tmp_path / "home", tmp_path / "t.html"
    home.mkdir()
    asked = asking(models.target, "--max-tokens", "120", "--trace", page, stages=2)
    with running(asked, home) as command:
        command.first_bytes()
        command.workers[1].send_signal(signal.SIGKILL)
        code, _, err = command.end()
    assert code == 0 and "Traceback" not in err and f"wrote {page}" in err and "stage 1 failed" in err
    assert page_data(page)["clock"] == "wall-clock time"


def test_a_trace_that_fails_at_the_end_does_not_hide_what_ended_the_run(
        events: list[Event], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gone"
    for error in (None, KeyboardInterrupt):
        folder.mkdir()
        traces = Traces([folder / "t.html", tmp_path / "t.json"], None, title="", clock="time")
        with pytest.raises(error or UsageError, match=None if error else "cannot write the trace"), traces:
            for event in events:
                traces(event)
            folder.rmdir()
            if error:
                raise error
        assert names(tmp_path) == {"t.json"}, "the others are written all the same"
    assert "cannot write the trace" in capsys.readouterr().err
