"""Prompt files: what is read, and what is refused with its line and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullpipe.errors import UsageError
from fullpipe.prompts import FilePrompt, read_prompts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.jsonl"


def test_every_kind_of_line(file: Path) -> None:
    file.write_text('plain text\n\n{"prompt": "p"}\n{"question_id": 9, "category": "code", "turns": ["t", "u"]}\n'
                    '{"question_id": "a/1", "turns": ["v"], "reference": [1]}')
    assert read_prompts(file) == [
        FilePrompt("1", "mine", ("plain text",)), FilePrompt("3", "mine", ("p",)), FilePrompt("9", "code", ("t", "u")),
        FilePrompt("a/1", "mine", ("v",)),
    ]


def test_the_text_is_the_first_turn() -> None:
    assert FilePrompt("1", "chat", ("first", "second")).text == "first"


def test_a_limit_takes_the_first_lines_and_checks_all(file: Path) -> None:
    file.write_text("one\ntwo\nthree\n")
    assert [prompt.text for prompt in read_prompts(file, limit=2)] == ["one", "two"]
    file.write_text('one\ntwo\n{"turns": 3}\n')
    with pytest.raises(UsageError, match="line 3"):
        read_prompts(file, limit=2)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused(file: Path, limit: int) -> None:
    file.write_text("one\n")
    with pytest.raises(UsageError, match=f"the number of prompts must be 1 or more \\(got {limit}\\)"):
        read_prompts(file, limit=limit)


@pytest.mark.parametrize("content", [
    b'\xef\xbb\xbf{"question_id": 1, "turns": ["caf\xc3\xa9"]}\n',  # with a byte order mark
    '{"question_id": 1, "turns": ["café"]}\r\n\r\n'.encode(),  # from Windows
    b'{"question_id": 1, "turns": ["caf\\u00e9"]}',  # in ASCII, the last line without its end
], ids=["mark", "windows", "ascii"])
def test_what_editors_do_to_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert read_prompts(file) == [FilePrompt("1", "mine", ("café",))]


def test_only_ends_of_lines_end_a_line(file: Path) -> None:
    """U+2028 and a form feed end a line for Python, but not for JSON."""
    file.write_text('{"prompt": "a\u2028b"}\nc\x0cd\n', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(file)] == ["a\u2028b", "c\x0cd"]


@pytest.mark.parametrize(("line", "reason"), [
    ('{"prompt": "no end"', "it begins like JSON, but "),
    ("{" * 5000, "it begins like JSON, but "),
    ('{"a":' * 100_000, "it begins like JSON, but "),
    ('{"question": "no"}', "it has neither turns nor prompt"),
    ('{"turns": null}', "it has neither turns nor prompt"),
    ('{"turns": []}', "`turns` must be a list of texts, at least one"),
    ('{"turns": "text"}', "`turns` must be a list of texts, at least one"),
    ('{"turns": {"0": "text"}}', "`turns` must be a list of texts, at least one"),
    ('{"turns": ["fine", " "]}', "turns and prompts must be texts, and not empty"),
    ('{"turns": ["fine", {"role": "user", "content": "text"}]}', "turns and prompts must be texts, and not empty"),
    ('{"prompt": 3}', "turns and prompts must be texts, and not empty"),
    ('{"prompt": "half \\ud83d a smile"}', "turns and prompts must be texts, and not empty"),
    ('{"prompt": "p", "question_id": null}', "`question_id` must be a whole number or a text"),
    ('{"prompt": "p", "question_id": 1.5}', "`question_id` must be a whole number or a text"),
    ('{"prompt": "p", "question_id": true}', "`question_id` must be a whole number or a text"),
    ('{"prompt": "p", "category": ["code"]}', "`category` must be a text"),
])
def test_a_line_that_is_no_prompt(file: Path, line: str, reason: str) -> None:
    file.write_text(f"fine\n{line}\n")
    with pytest.raises(UsageError) as caught:
        read_prompts(file)
    assert caught.value.message.startswith(f"{file}, line 2: not a prompt: {reason}")
    assert caught.value.hint == 'Write {"prompt": "..."} or {"turns": ["..."]}, or plain text.'


@pytest.mark.parametrize(("content", "line", "id"), [
    ('{"question_id": 7, "prompt": "a"}\nb\n{"question_id": "7", "prompt": "c"}\n', 3, "7"),
    ('a\n{"question_id": 1, "prompt": "b"}\n', 2, "1"),  # the first line's number
])
def test_two_lines_with_one_id(file: Path, content: str, line: int, id: str) -> None:
    file.write_text(content)
    with pytest.raises(UsageError, match=f"line {line}: line 1 has the id {id} already\nGive each line a question_id"):
        read_prompts(file)


@pytest.mark.parametrize("content", ['[{"prompt": "a"}]', '\n[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n', "[]"])
def test_an_array_of_prompts_is_not_lines(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(UsageError, match=r"the file is one JSON array\n.*jq -c '\.\[\]' "):
        read_prompts(file)


def test_a_bracket_begins_plain_text_too(file: Path) -> None:
    file.write_text("[draft] Write a haiku.\n")
    assert read_prompts(file)[0].text == "[draft] Write a haiku."


@pytest.mark.parametrize(("content", "reason"), [
    (b"\xff\xfe\x00", "can't decode byte 0xff"), (b"\x89PNG\r\n\x1a\n\x00\x00", "can't decode byte 0x89"),
    ("prompt".encode("utf-16-le"), "it holds zero bytes"),
], ids=["bytes", "picture", "utf-16"])
def test_a_file_that_is_not_text(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UsageError, match=f"cannot read prompts from .*{reason}.*\nGive a text file in UTF-8"):
        read_prompts(file)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"], ids=["empty", "blank", "mark"])
def test_a_file_without_prompts(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine.jsonl holds no prompts\nOne prompt per line"):
        read_prompts(file)


@pytest.mark.parametrize(("name", "reason"), [("absent", "No such file"), (".", "Is a directory")])
def test_what_cannot_be_opened(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"cannot read prompts from {tmp_path}.*: {reason}.*\nGive a text file"):
        read_prompts(tmp_path / name)
