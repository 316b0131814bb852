"""Training text: what is learnt is what the model would generate; what cannot be read is named with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.errors import FullpipeError, MissingExtra, UsageError
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.training.data import (
    Report,
    Sample,
    encode_chat,
    end_of_answer,
    fingerprint,
    read_entries,
    read_samples,
    split,
)

USER = {"role": "user", "content": "what?"}
SAID = {"role": "assistant", "content": "because of it"}
CHAT = [{"role": "system", "content": "be brief"}, USER, SAID]
MakeTokenizer = Callable[..., Tokenizer]


def spell(tokenizer: Tokenizer, tokens: Any) -> str:
    return str(tokenizer.backend.decode(list(map(int, tokens)), skip_special_tokens=False))


def learnt(tokenizer: Tokenizer, sample: Sample) -> str:
    return spell(tokenizer, sample.tokens[sample.learn])


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# ---- conversations -------------------------------------------------------------------------------------------------


def test_the_answer_and_its_end_are_learnt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (sample,) = read_samples([lines(tmp_path / "a.jsonl", {"messages": CHAT})], tokenizer, max_length=200)
    assert learnt(tokenizer, sample) == "because of it<|im_end|>"
    assert sample.tokens.tolist()[: -int(sample.learn.sum())] == tokenizer.chat(CHAT[:-1])
    assert sample.tokens.dtype == np.int32 and sample.learn.dtype == np.bool_ and len(sample) == len(sample.learn)


def test_no_token_reaches_from_the_prompt_into_the_answer(tokenizer: Tokenizer) -> None:
    """The whole text has the line end before the answer and its "b" in one token, which generation cannot produce."""
    assert tokenizer.template is not None
    ((tokens, learn),) = encode_chat(tokenizer, CHAT)
    as_one = tokenizer.encode(tokenizer.template.render(CHAT, generation_prompt=False))
    merged = tokenizer.backend.token_to_id("Ċb")
    assert as_one.count(merged) == 2 and tokens.count(merged) == 1, "the other one is in the system message"
    assert tokens[learn.index(True)] == tokenizer.backend.token_to_id("b")


def test_every_answer_of_a_conversation_is_learnt_where_it_was_given(tokenizer: Tokenizer) -> None:
    turns = [USER, {"role": "assistant", "content": "so"}, USER, {"role": "assistant", "content": "thus"}, USER]
    ((tokens, learn),) = encode_chat(tokenizer, turns)
    assert spell(tokenizer, [t for t, one in zip(tokens, learn) if one]) == "so<|im_end|>thus<|im_end|>"
    assert learn[-1], "what comes after the last answer is of no use"
    assert tokens[: -len("thus") - 1] == tokenizer.chat(turns[:3])


def test_answers_that_read_otherwise_later_stand_twice(tokenizer: Tokenizer) -> None:
    """The "b" of the first answer is a token as it is generated, and part of one when the second turn is encoded."""
    turns = [USER, SAID, USER, {"role": "assistant", "content": "thus"}]
    first, (tokens, learn) = encode_chat(tokenizer, turns)
    assert [first] == encode_chat(tokenizer, turns[:2])
    assert tokens[: learn.index(True)] == tokenizer.chat(turns[:3])
    assert spell(tokenizer, tokens[learn.index(True) :]) == "thus<|im_end|>"


def test_an_answer_that_was_cut_off_has_no_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": CHAT, "finish_reason": "length"},
                 {"messages": CHAT, "finish_reason": "stop"})
    cut, whole = read_samples([path], tokenizer, max_length=200)
    assert learnt(tokenizer, cut) == "because of it" and learnt(tokenizer, whole) == "because of it<|im_end|>"


def test_an_end_token_spelled_in_an_answer_does_not_end_it(tokenizer: Tokenizer) -> None:
    turns = [USER, {"role": "assistant", "content": "say <|im_end|> twice"}]
    ((tokens, learn),) = encode_chat(tokenizer, turns)
    assert spell(tokenizer, [t for t, one in zip(tokens, learn) if one]) == "say <|im_end|> twice<|im_end|>"


def test_other_names_for_roles(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shared = {"conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": "what?"},
                                {"from": "gpt", "value": "because of it"}]}
    ours, theirs = read_samples([lines(tmp_path / "a.jsonl", {"messages": CHAT}, shared)], tokenizer, max_length=200)
    assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.document == theirs.document


def test_an_answer_before_any_question_is_context(tokenizer: Tokenizer) -> None:
    ((tokens, learn),) = encode_chat(tokenizer, [{"role": "assistant", "content": "hello"}, USER, SAID])
    assert "hello" in spell(tokenizer, tokens)
    assert spell(tokenizer, [t for t, one in zip(tokens, learn) if one]) == "because of it<|im_end|>"


FORGETFUL = (  # earlier answers are shown without their thoughts, as Qwen3's are
    "{% for m in messages %}<|im_start|>{{ m.role }}|"
    "{{ m.content if m.role == 'user' or loop.last else m.content.split('~')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant|{% endif %}")


def test_a_template_that_forgets_makes_a_sequence_of_each_answer(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(FORGETFUL)
    turns = [USER, {"role": "assistant", "content": "hm~yes"}, USER, {"role": "assistant", "content": "so~no"}]
    found = encode_chat(tokenizer, turns)
    assert [spell(tokenizer, [t for t, one in zip(*pair) if one]) for pair in found] == [
        "hm~yes<|im_end|>", "so~no<|im_end|>"]
    for index, (tokens, learn) in zip((1, 3), found):
        assert tokens[: learn.index(True)] == tokenizer.chat(turns[:index]), "as the model sees it when it answers"


def test_a_prompt_that_opens_what_the_turn_does_not_show(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(FORGETFUL.replace("assistant|", "assistant|(think)"))
    ((tokens, learn),) = encode_chat(tokenizer, [USER, SAID])
    assert tokens[: learn.index(True)] == tokenizer.chat([USER])
    assert spell(tokenizer, tokens[learn.index(True) :]) == "because of it<|im_end|>"


def test_a_template_without_end_tokens(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    ((tokens, learn),) = encode_chat(tokenizer, [USER, SAID])
    assert spell(tokenizer, [t for t, one in zip(tokens, learn) if one]) == "because of it; "
    assert end_of_answer(tokenizer) == tokenizer.eos_ids


def test_the_end_of_an_answer(tokenizer: Tokenizer, make_tokenizer: MakeTokenizer) -> None:
    assert {tokenizer.tokens[id] for id in end_of_answer(tokenizer)} == {"<|im_end|>"}
    assert end_of_answer(make_tokenizer(None)) == tokenizer.eos_ids


# ---- plain text ----------------------------------------------------------------------------------------------------


def test_plain_text_is_learnt_but_for_its_first_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo and three".encode())
    (sample,) = read_samples([tmp_path / "a.txt"], tokenizer, max_length=100)
    assert spell(tokenizer, sample.tokens) == "one\ntwo and three"
    assert sample.learn.tolist() == [False] + [True] * (len(sample) - 1)


def test_a_long_file_is_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text := "x y z " * 10 + "end")
    pieces = read_samples([tmp_path / "a.txt"], tokenizer, max_length=20, min_length=4, overflow="discard")
    assert [len(piece) for piece in pieces] == [20, 20, 20], "the last 3 are too short"
    assert "".join(spell(tokenizer, piece.tokens) for piece in pieces) == text[:60]
    assert not any(piece.learn[0] for piece in pieces) and len({piece.document for piece in pieces}) == 1


def test_long_entries_are_cut_or_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"text": "a short one"}, {"text": "x" * 45})
    pieces = read_samples([path], tokenizer, max_length=30)
    assert [piece.document for piece in pieces].count(pieces[-1].document) == 2
    assert all(piece.learn.any() for piece in pieces), "a piece of a prompt has nothing to learn"
    report = Report()
    (left,) = read_samples([path], tokenizer, max_length=30, overflow="discard", report=report)
    assert spell(tokenizer, left.tokens) == "a short one"
    assert report.summary() == "1 documents used; skipped: 2 (longer than 30 tokens)"


# ---- files ---------------------------------------------------------------------------------------------------------


def test_folders_are_read_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("b/z.md", "b/a.py", "a.rst", "c.jsonl", "picture.png", "no.json", ".git/x.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": f"this is {name}"}))
    (tmp_path / "latin.txt").write_bytes("das hei\xdft ja wohl nicht".encode("latin-1"))
    report = Report()
    found = read_samples([tmp_path / "b" / "z.md", tmp_path], tokenizer, max_length=100, report=report)
    assert [spell(tokenizer, one.tokens).split()[-1].rstrip('"}') for one in found] == [
        "b/z.md", "a.rst", "b/a.py", "c.jsonl"]
    assert report.used == 4 and dict(report.skipped) == {"not UTF-8": 1}


@pytest.mark.parametrize("text", [
    json.dumps([{"text": "the first entry"}, {"text": "the second one"}], indent=1), '{\n"text": "the first entry"\n}',
    '{"text": "the first entry"}\n\n{"text": "the second one"}'])
def test_json_files_hold_a_list_an_object_or_lines(text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    found = [spell(tokenizer, one.tokens) for one in read_samples([tmp_path / "a.json"], tokenizer, max_length=100)]
    assert found == ["the first entry", "the second one"][: text.count("text")]


@pytest.mark.parametrize(("line", "says"), [
    (b'{"text": "cut', "line 2: not JSON"), (b"[1]", "line 2: not a JSON object"), (b"\xff\xfe", "line 2: not JSON"),
    (b"[" * 100_000, "line 2: not JSON"),
    (b'{"prompt": "x"}', "line 2: neither messages nor conversations nor text"),
    (b'{"text": "half \\ud83d"}', "line 2: neither messages"),
    (b'{"messages": []}', "line 2: not a conversation"), (b'{"messages": ["a"]}', "line 2: not a conversation"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}',
     "line 2, turn 2: the role 'bot' is none of system, user"),
    (b'{"messages": [{"role": "user", "content": null}]}', "line 2, turn 1: its content is not a text"),
])
def test_a_line_that_cannot_be_read_is_named(line: bytes, says: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a line that can be read"}\n' + line + b"\n")
    with pytest.raises(UsageError) as caught:
        read_samples([path], tokenizer, max_length=100)
    assert caught.value.message.startswith(f"{path}, {says}") and caught.value.hint


def test_a_torn_last_line_is_told_from_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b')
    with pytest.raises(UsageError, match="line 2: not JSON") as caught:
        list(read_entries(tmp_path / "a.jsonl"))
    assert "cut off" in (caught.value.hint or "")


@pytest.mark.parametrize("data", [b"\xff\xfe\xfa", b"zero\0byte"])
def test_a_named_file_that_is_no_text(data: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.txt is not text"):
        read_samples([tmp_path / "a.txt"], tokenizer, max_length=100)


def test_a_file_that_is_not_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json"):
        with pytest.raises(UsageError, match=f"cannot read .*{name}: No such file"):
            read_samples([tmp_path / name], tokenizer, max_length=100)


def test_parquet_is_read_or_names_what_it_needs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(MissingExtra, match=r"needs pyarrow\npip install 'fullpipe\[parquet\]'"):
            read_samples([path], tokenizer, max_length=100)
        return
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT], "id": [1, 2]}), path)
    first, second = read_samples([path], tokenizer, max_length=200)
    assert learnt(tokenizer, first) == "because of it<|im_end|>" == learnt(tokenizer, second)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="cannot read"):
        read_samples([path], tokenizer, max_length=100)


# ---- nothing to learn ----------------------------------------------------------------------------------------------


def test_nothing_to_learn_says_why(tokenizer: Tokenizer, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [USER]}, {"messages": [SAID]}, {"text": "short"}, {"text": ""})
    with pytest.raises(UsageError, match=r"0 documents used; skipped: 3 \(nothing to learn in it\), 1 \(shorter than"):
        read_samples([path], tokenizer, max_length=100)
    lines(path, {"messages": CHAT})
    with pytest.raises(UsageError, match=r"1 \(this model has no chat template\)"):
        read_samples([path], make_tokenizer(None), max_length=100)
    refusing = make_tokenizer("{{ raise_exception('no system message please') }}")
    with pytest.raises(UsageError, match="no system message please"):
        read_samples([path], refusing, max_length=100)
    with pytest.raises(UsageError, match="does not show the answer"):
        read_samples([path], make_tokenizer("{{ messages | length }}"), max_length=100)
    with pytest.raises(UsageError, match="nothing to learn in no files"):
        read_samples([], tokenizer, max_length=100)


@pytest.mark.parametrize(("least", "most"), [(0, 10), (11, 10), (1, 1)])
def test_lengths_that_cannot_be(least: int, most: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none"):
        read_samples([tmp_path], tokenizer, max_length=most, min_length=least)


# ---- fingerprint and split -----------------------------------------------------------------------------------------


def test_a_fingerprint_tells_files_and_settings_apart(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    files, plain = [tmp_path / "a.txt", tmp_path / "b.txt"], make_tokenizer()
    first = fingerprint(files, plain, max_length=100)
    assert first == fingerprint([tmp_path], make_tokenizer(), max_length=100)
    assert len({first, fingerprint(files[::-1], plain, max_length=100), fingerprint(files, plain, max_length=101),
                fingerprint(files, plain, max_length=100, overflow="discard"),
                fingerprint(files[:1], plain, max_length=100),
                fingerprint(files, make_tokenizer(FORGETFUL), max_length=100),
                fingerprint(files, make_tokenizer(ends=("<|im_end|>",)), max_length=100)}) == 7
    files[0].write_text("One")
    assert fingerprint(files, plain, max_length=100) != first


def sample(document: int, text: int) -> Sample:
    return Sample(np.array([document, text], dtype=np.int32), np.array([False, True]), f"document {document}")


@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), st.floats(0.01, 0.9), st.integers(0, 5))
def test_documents_are_held_out_whole(sizes: list[int], share: float, seed: int) -> None:
    samples = [sample(document, text) for document, size in enumerate(sizes) for text in range(size)]
    try:
        train, held = split(samples, share, seed)
    except FullpipeError:
        assert share > 0.5, "half of the documents can always be spared"
        return
    assert held and len(train) + len(held) == len(samples)
    assert not {one.document for one in train} & {one.document for one in held}
    assert len(held) <= max(share * len(samples) + 1, min(sizes))
    again = split(samples[::-1], share, seed)
    if len(held) > 1:
        assert sum(map(id, again[1])) == sum(map(id, held)), "not a matter of their order"


def test_another_seed_holds_others_out() -> None:
    samples = [sample(document, 0) for document in range(40)]
    assert len({tuple(one.document for one in split(samples, 0.1, seed)[1]) for seed in range(5)}) == 5


def test_no_text_is_in_both() -> None:
    licence = np.array([7, 7, 7], dtype=np.int32)
    samples = [one for document in range(20)
               for one in (sample(document, 0), Sample(licence, np.array([False, True, True]), f"document {document}"))]
    train, held = split(samples, 0.2, 0)
    assert len(held) == 4 and not any(one.tokens is licence for one in held)
    assert not {one.tokens.tobytes() for one in train} & {one.tokens.tobytes() for one in held}


def test_answers_to_one_question_stay_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": f"answer {number}"} for number in range(2)]
    path = lines(tmp_path / "a.jsonl", *({"messages": [USER, one]} for one in said),
                 {"messages": [{"role": "user", "content": "who?"}, SAID]})
    names = [one.document for one in read_samples([path], tokenizer, max_length=100)]
    assert names[0] == names[1] != names[2]


def test_one_document_gives_its_end() -> None:
    samples = [sample(0, text) for text in range(10)]
    train, held = split(samples, 0.2, 0)
    assert train == samples[:8] and held == samples[8:]
    assert split(samples, 0.0, 0) == (samples, [])


@pytest.mark.parametrize(("number", "share"), [(1, 0.1), (0, 0.1), (10, 0.99), (10, 1.0), (10, -0.1)])
def test_what_cannot_be_held_out(number: int, share: float) -> None:
    with pytest.raises(UsageError, match=r"too few to hold some out|0 or more and below 1"):
        split([sample(0, text) for text in range(number)], share, 0)
