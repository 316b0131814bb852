"""Distilled answers without a model: which prompts, and a file that whoever was killed goes on with."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fullpipe.errors import CacheError, UsageError
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.training.data import Message
from fullpipe.training.distill import Answers, Settings, read_conversations, retokenises

SETTINGS = Settings("a model", "float32", 16, (0.0, 1.0), 7)
ASKED: list[list[Message]] = [[{"role": "user", "content": f"question {number}"}] for number in range(4)]


def line(place: int, **changes: Any) -> dict[str, Any]:
    messages = [*ASKED[place], {"role": "assistant", "content": f"antwort \u2028 {place}"}]
    return {"messages": messages, "finish_reason": "stop", **SETTINGS.told(place), "retokenises": place != 1, **changes}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "answers.jsonl"
    answers = Answers.open(path, ASKED, SETTINGS, range(4))
    for place in range(3):
        answers.add(line(place))
    assert (answers.number, answers.altered) == (3, 1)
    return path


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    system = {"role": "system", "content": "s"}
    entries = [{"messages": [system, user]}, {"messages": [user, said, user, said]}, {"prompt": "a"}, {"text": "a"},
               {"turns": ["a", "c"]}, {"conversations": [{"from": "human", "value": "a"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, entries)))
    asked = read_conversations(tmp_path / "p.jsonl")
    assert asked == [[system, user], [user, said, user], [user], [user], [user], [user]]
    assert read_conversations(tmp_path / "p.jsonl", 2) == asked[:2]
    (tmp_path / "p.txt").write_text("a\n\nanother\n")
    assert read_conversations(tmp_path / "p.txt") == [[user], [{"role": "user", "content": "another"}]]
    assert read_conversations(tmp_path / "p.txt", 1) == [[user]]


@pytest.mark.parametrize("entry", [
    {}, {"prompt": " "}, {"prompt": 3}, {"turns": []}, {"messages": [{"role": "assistant", "content": "b"}]}])
def test_a_line_without_a_prompt_is_named(entry: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + json.dumps(entry))
    with pytest.raises(UsageError, match=r"p\.jsonl, line 2: no prompt in it"):
        read_conversations(tmp_path / "p.jsonl")


def test_no_prompts_at_all(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_conversations(tmp_path / "p.jsonl")
    for name in ("p.jsonl", "p.txt"):
        with pytest.raises(UsageError, match="must be 1 or more"):
            read_conversations(tmp_path / name, 0)


def test_settings_take_turns() -> None:
    assert [SETTINGS.params(place).temperature for place in range(3)] == [0.0, 1.0, 0.0]
    assert [SETTINGS.params(place).seed for place in range(3)] == [7, 8, 9]
    with pytest.raises(UsageError, match="no temperature"):
        replace(SETTINGS, temperatures=())


# ---- the file ------------------------------------------------------------------------------------------------------


def test_a_file_is_gone_on_with_wherever_it_was_cut(path: Path) -> None:
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in [0, 1, ends[0] - 1, ends[0], ends[0] + 5, ends[1], ends[2] - 1, ends[2]]:
        path.write_bytes(whole[:length])
        answers = Answers.open(path, ASKED, SETTINGS, range(4))
        assert answers.number == sum(end <= length for end in ends), length
        assert answers.altered == (answers.number >= 2)
        for place in range(answers.number, 3):
            answers.add(line(place))
        assert path.read_bytes() == whole


def test_fewer_prompts_leave_the_rest_alone(path: Path) -> None:
    before = path.read_bytes()
    assert Answers.open(path, ASKED[:2], SETTINGS, range(2)).number == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(("changes", "says"), [
    ({"model": "other"}, "line 1: made with model 'a model', not 'other'"),
    ({"dtype": "bfloat16"}, "line 1: made with dtype 'float32'"),
    ({"max_tokens": 17}, "line 1: made with max_tokens 16, not 17"),
    ({"temperatures": (0.0,)}, r"line 2: made with temperature 1.0, not 0.0"),
    ({"seed": 8}, "line 1: made with seed 7, not 8"),
])
def test_other_settings_are_refused(changes: dict[str, Any], says: str, path: Path) -> None:
    path.write_bytes(before := path.read_bytes() + b"torn")
    with pytest.raises(UsageError, match=says) as caught:
        Answers.open(path, ASKED, replace(SETTINGS, **changes), range(4))
    assert "Name another file" in (caught.value.hint or "") and path.read_bytes() == before


def test_other_prompts_and_places_are_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: it answers another prompt"):
        Answers.open(path, [ASKED[0], ASKED[2], ASKED[1]], SETTINGS, range(3))
    with pytest.raises(UsageError, match="line 1: made with temperature"):
        Answers.open(path, ASKED, SETTINGS, [1, 2, 3])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"messages": []}', '{"messages": 3, "retokenises": true}'])
def test_a_line_that_is_none_is_named(text: str, path: Path) -> None:
    path.write_bytes(before := path.read_bytes().split(b"\n")[0] + b"\n" + text.encode() + b"\n")
    with pytest.raises(UsageError, match=r"line 2: (not a line|made with)"):
        Answers.open(path, ASKED, SETTINGS, range(4))
    assert path.read_bytes() == before


def test_a_full_disk_loses_nothing_that_was_written(path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails in the middle of the line."""
    whole = path.read_bytes()
    answers = Answers.open(path, ASKED, SETTINGS, range(4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
    try:
        with pytest.raises(CacheError, match="cannot write") as caught:
            answers.add(line(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "goes on where it stopped" in (caught.value.hint or "") and answers.number == 3
    again = Answers.open(path, ASKED, SETTINGS, range(4))
    assert again.number == 3 and path.read_bytes() == whole


def test_a_file_that_cannot_be_written(path: Path) -> None:
    for bad in (path.parent, path / "below"):
        with pytest.raises(CacheError, match="cannot write"):
            Answers.open(bad, ASKED, SETTINGS, range(4))


# ---- back to tokens ------------------------------------------------------------------------------------------------


def test_answers_that_spell_their_tokens(tokenizer: Tokenizer) -> None:
    end = tokenizer.backend.token_to_id("<|im_end|>")

    def spells(tokens: list[int], reason: str) -> bool:
        said = {"role": "assistant", "content": tokenizer.decode(tokens)}
        return retokenises(tokenizer, [*ASKED[0], said], tokens, reason)

    plain = tokenizer.encode("an answer")
    assert spells([*plain, end], "stop") and spells(plain, "length") and spells([end], "stop")
    assert not spells([*plain, tokenizer.backend.token_to_id("<|endoftext|>")], "stop"), "the template ends otherwise"
    assert not spells([*plain, 1, *plain, end], "stop"), "decoding leaves special tokens out"
    apart = [*tokenizer.encode("x\n"), *tokenizer.encode("b")]
    assert not spells([*apart, end], "stop"), "encoding joins a line end and a letter"
    merged = tokenizer.encode("x\nb")
    assert len(merged) < len(apart) and spells([*merged, end], "stop")


def test_a_template_that_hides_answers(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ messages | length }}")
    assert not retokenises(tokenizer, [*ASKED[0], {"role": "assistant", "content": "x"}], [5], "stop")
