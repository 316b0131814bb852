"""The bundled prompts, and prompts of several files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fullpipe.errors import UsageError
from fullpipe.prompts import bundled, read_all

CATEGORIES = {"code", "math", "conversation", "summarisation", "translation", "qa"}


def test_the_bundled_prompts_cover_every_category_alike() -> None:
    prompts = bundled()
    counts = Counter(prompt.category for prompt in prompts)
    assert set(counts) == CATEGORIES and len(prompts) == 40
    assert set(counts.values()) <= {6, 7}
    assert [prompt.id for prompt in prompts] == [f"prompts/{number}" for number in range(1, 41)]


def test_bundled_conversations_have_two_turns_and_the_others_one() -> None:
    assert {(prompt.category == "conversation", len(prompt.turns)) for prompt in bundled()} == {(True, 2), (False, 1)}


def test_no_bundled_text_comes_twice() -> None:
    turns = [turn for prompt in bundled() for turn in prompt.turns]
    assert len(set(turns)) == len(turns)


def test_texts_to_summarise_are_long() -> None:
    words = [len(prompt.text.split()) for prompt in bundled() if prompt.category == "summarisation"]
    assert all(150 <= count <= 260 for count in words), words


def write(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text('{"question_id": 1, "category": "code", "turns": ["a", "b"]}\nplain\n')
    return folder / name


def test_ids_of_several_files_differ(tmp_path: Path) -> None:
    files = [write(tmp_path, "one.jsonl"), write(tmp_path, "two.txt")]
    found = [(prompt.id, prompt.category, prompt.turns) for prompt in read_all(files)]
    assert found == [("one/1", "code", ("a", "b")), ("one/2", "one", ("plain",)),
                     ("two/1", "code", ("a", "b")), ("two/2", "two", ("plain",))]
    assert [prompt.id for prompt in read_all(files, limit=1)] == ["one/1", "two/1"]
    assert read_all([]) == []


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", "set.jsonl"), write(tmp_path / "b", "set.txt")
    with pytest.raises(UsageError) as caught:
        read_all([first, second])
    assert caught.value.message.startswith(f"{first} and {second} have the same name") and caught.value.hint
    with pytest.raises(UsageError, match="Give each file once"):
        read_all([first, first])


def test_a_file_that_cannot_be_read_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"turns": []}\n')
    with pytest.raises(UsageError, match=r"bad.jsonl, line 1: not a prompt"):
        read_all([write(tmp_path, "good.jsonl"), tmp_path / "bad.jsonl"])
