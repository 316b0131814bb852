"""Recordings: appended answer by answer, gone on with after a kill, refused with the field or the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fullpipe.errors import UsageError
from fullpipe.prompts import FilePrompt
from fullpipe_lab.record import check_prompts, recording_path, task_of, wanted_ids
from fullpipe_lab.recording import Answer, Head, Recording
from fullpipe_lab.recording import digest as digest_of

HEAD = Head("a model", "bfloat16", 16, 0.7, 7, (2, 3), 96)
ONE = Answer("set/1#0", "set", [1, 2, 3], [4, 5], "stop", [0.5, None])
TWO = Answer("set/1#1", "set", [1, 2, 3, 4], [6], "length", [1.25], digest_of(["a", "b"]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "recording.jsonl"
    recording = Recording.open(path, HEAD)
    recording.add(ONE)
    recording.add(TWO)
    return path


def test_what_was_added_is_there(path: Path) -> None:
    loaded = Recording.load(path)
    assert loaded.head == HEAD and loaded.answers == {ONE.id: ONE, TWO.id: TWO}
    assert Recording.open(path, HEAD).answers == loaded.answers


def test_a_recording_goes_on_where_it_was_killed(path: Path) -> None:
    """The answer that was being written is lost, and nothing else."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert Recording.load(path).answers == {ONE.id: ONE}
    again = Recording.open(path, HEAD)
    again.add(TWO)
    assert path.read_bytes() == whole


def test_reading_changes_nothing(path: Path) -> None:
    path.write_bytes(cut := path.read_bytes()[:-9])
    Recording.load(path)
    assert path.read_bytes() == cut


@pytest.mark.parametrize(("field", "value"), [
    ("model", "another"), ("dtype", "float32"), ("max_new_tokens", 17), ("temperature", 0.0), ("seed", 8),
    ("eos", (2,)), ("vocab", 97)])
def test_other_parameters_are_refused_by_name(path: Path, field: str, value: Any) -> None:
    before = path.read_bytes()
    with pytest.raises(UsageError, match=f"was recorded with {field} ") as caught:
        Recording.open(path, replace(HEAD, **{field: value}))
    assert str(path) in caught.value.message and "another file" in (caught.value.hint or "")
    assert path.read_bytes() == before


def _line(number: int, change: Callable[[str], str]) -> Callable[[list[str]], None]:
    def edit(lines: list[str]) -> None:
        lines[number] = change(lines[number])

    return edit


@pytest.mark.parametrize(("edit", "says", "way_out"), [
    (_line(1, lambda line: line[:-3]), "line 2: not a JSON object", "delete the line"),
    (_line(2, lambda line: "[1]"), "line 3: not a JSON object", "delete the line"),
    (_line(1, lambda line: line.replace('"finish"', '"finished"')), "line 2: not an answer", "delete the line"),
    (_line(2, lambda line: '{"id": "x"}'), "line 3: not an answer", "delete the line"),
    (_line(0, lambda line: line.replace('"version": 1', '"version": 2')), "version 2 cannot be read", "Record again"),
    (_line(0, lambda line: line.replace('"eos"', '"ends"')), "line 1: not the head", "record again"),
    (_line(0, lambda line: "{}"), "is not a recording", "fullpipe-lab record"),
])
def test_a_damaged_file_says_where(path: Path, edit: Callable[[list[str]], None], says: str, way_out: str) -> None:
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for read in (lambda: Recording.load(path), lambda: Recording.open(path, HEAD)):
        with pytest.raises(UsageError, match=says) as caught:
            read()
        assert str(path) in caught.value.message and way_out in (caught.value.hint or "")
    assert path.read_bytes() == before


def test_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    for path, says in ((tmp_path / "bytes", "cannot read"), (tmp_path / "nowhere", "there is no recording"),
                       (tmp_path, "cannot read")):
        with pytest.raises(UsageError, match=says):
            Recording.load(path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder"):
        Recording.open(tmp_path / "file" / "recording.jsonl", HEAD)


def test_a_margin_that_is_no_number_is_not_written(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        Recording.open(path, HEAD).add(replace(ONE, id="set/2#0", margins=[float("nan")]))
    assert path.read_bytes() == before


# ---- which prompts -----------------------------------------------------------------------------------------

PROMPTS = [FilePrompt("set/1", "chat", ("a", "b", "c")), FilePrompt("prompts/2", "code", ("d",))]


def test_answers_are_named_by_prompt_and_turn() -> None:
    assert wanted_ids(PROMPTS, None) == ["set/1#0", "set/1#1", "set/1#2", "prompts/2#0"]
    assert wanted_ids(PROMPTS, 2) == ["set/1#0", "set/1#1", "prompts/2#0"]
    assert [task_of(prompt) for prompt in PROMPTS] == ["set", "code"]
    assert recording_path(Path("out"), 0.7) == Path("out/recording-t0.7.jsonl")


def test_another_prompt_of_the_same_name_is_refused(path: Path) -> None:
    """ONE does not say what was asked, as recordings made before did not; TWO answers to "a" and "b"."""
    check_prompts(Recording.load(path), PROMPTS, None)
    other = [replace(PROMPTS[0], turns=("a", "B", "c"))]
    check_prompts(Recording.load(path), other, 1)
    with pytest.raises(UsageError, match="answers another prompt 'set/1#1'"):
        check_prompts(Recording.load(path), other, None)


def test_the_head_is_a_line_that_people_can_read(path: Path) -> None:
    first = json.loads(path.read_text().splitlines()[0])
    assert first["format"] == "fullpipe-recording" and first["model"] == "a model" and first["seed"] == 7
