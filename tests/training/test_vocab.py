"""Draft vocabularies: the most frequent labels, what is always needed, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullpipe.errors import DraftMismatch, UsageError
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.training.data import Sample
from fullpipe.training.vocab import Vocab, build_vocab, count_labels, load_vocab, must_have, save_vocab

MakeTokenizer = Callable[..., Tokenizer]
ALWAYS = 3  # <|endoftext|>, <|im_start|> and <|im_end|> have the ids 0, 1 and 2


def sample(tokenizer: Tokenizer, prompt: str, answer: str) -> Sample:
    asked, said = tokenizer.encode(prompt), tokenizer.encode(answer)
    learn = np.array([False] * len(asked) + [True] * len(said))
    return Sample(np.array(asked + said, dtype=np.int32), learn, prompt)


@pytest.fixture
def samples(tokenizer: Tokenizer) -> list[Sample]:
    return [sample(tokenizer, "zzzzzzzz", "aaaabbbcc"), sample(tokenizer, "yyyyyyyy", "aad")]


def letters(vocab: Vocab, tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.tokens[id] for id in vocab.ids.tolist() if id not in must_have(tokenizer))


def test_only_labels_count(samples: list[Sample], tokenizer: Tokenizer) -> None:
    vocab = build_vocab(samples, ALWAYS + 2, tokenizer=tokenizer)
    assert letters(vocab, tokenizer) == "ab" and len(vocab) == 5
    assert vocab.total == 12 and vocab.mass == 9 / 12
    assert vocab.ids.dtype == np.int64 and (np.diff(vocab.ids) > 0).all()


def test_what_never_occurs_comes_last_by_id(samples: list[Sample], tokenizer: Tokenizer) -> None:
    vocab = build_vocab(samples, ALWAYS + 6, tokenizer=tokenizer)
    assert letters(vocab, tokenizer) == '!"abcd' and vocab.mass == 1.0
    whole = build_vocab(samples, tokenizer.vocab_size, tokenizer=tokenizer)
    assert whole.ids.tolist() == sorted(tokenizer.tokens)


def test_what_is_always_in_it(samples: list[Sample], tokenizer: Tokenizer, make_tokenizer: MakeTokenizer) -> None:
    assert must_have(tokenizer) == {0, 1, 2}
    assert must_have(make_tokenizer(None, ends=("<|endoftext|>",))) == {0}, "no template spells the others"
    own = build_vocab(samples, 2, tokenizer=tokenizer, always=[50])
    assert own.ids.tolist() == sorted([50, *tokenizer.encode("a")])


@pytest.mark.parametrize("size", [0, ALWAYS - 1, 100_000])
def test_a_size_that_cannot_be(size: int, samples: list[Sample], tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=f"a draft vocabulary of {size} tokens cannot be"):
        build_vocab(samples, size, tokenizer=tokenizer)


def test_without_labels_there_is_nothing_to_count(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no labels"):
        count_labels([sample(tokenizer, "only a prompt", "")], tokenizer)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab = build_vocab(samples, 8, tokenizer=tokenizer)
    path = tmp_path / "vocab.json"
    save_vocab(vocab, path, tokenizer=tokenizer, model="a model", files=[Path("x.jsonl")])
    again = load_vocab(path, tokenizer=tokenizer)
    assert again.ids.tolist() == vocab.ids.tolist() and (again.mass, again.total) == (vocab.mass, vocab.total)
    told = json.loads(path.read_text())
    assert told["model"] == "a model" and told["files"] == ["x.jsonl"] and told["draft_vocab_size"] == 8
    assert told["vocab_size"] == tokenizer.vocab_size and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab = build_vocab(samples, 8, tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"cannot write .*: No such file"):
        save_vocab(vocab, tmp_path / "no" / "vocab.json", tokenizer=tokenizer, model="a", files=[])


def write(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_a_file_of_the_reference(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its vocab_size leaves the added tokens out, so ids may exceed it."""
    path = write(tmp_path / "v.json", tokenizer_name="x", data_paths=["d"], mask_assistant=True, vocab_size=2,
                 draft_vocab_size=4, token_ids=[0, 2, 10, 11], total_positions_counted=200,
                 topk_selected_token_count_sum=196, topk_mass_ratio=0.98)
    vocab = load_vocab(path, tokenizer=tokenizer)
    assert vocab.ids.tolist() == [0, 2, 10, 11] and (vocab.mass, vocab.total) == (0.98, 200)


def test_ids_alone_are_enough(tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab = load_vocab(write(tmp_path / "v.json", token_ids=[11, 2, 10]), tokenizer=tokenizer)
    assert vocab.ids.tolist() == [2, 10, 11] and (vocab.mass, vocab.total) == (0.0, 0)


@pytest.mark.parametrize(("values", "kind", "says"), [
    ({}, UsageError, "no list `token_ids`"),
    ({"token_ids": []}, UsageError, "no list `token_ids`"),
    ({"token_ids": [2, True]}, UsageError, "no list `token_ids`"),
    ({"token_ids": [2, 3.0]}, UsageError, "no list `token_ids`"),
    ({"token_ids": [2, 3], "draft_vocab_size": 3}, UsageError, "says that it holds 3 tokens, but it holds 2"),
    ({"token_ids": [2, 9, 9]}, UsageError, "holds token 9 2 times"),
    ({"token_ids": [2, 999]}, DraftMismatch, "holds token 999, which this model does not have"),
    ({"token_ids": [-1, 2]}, DraftMismatch, "holds token -1"),
    ({"token_ids": [0, 3]}, DraftMismatch, r"lacks '<\|im_end\|>' \(token 2\), with which this model ends"),
    ({"token_ids": [2], "tokenizer_hash": "0", "model": "other"}, DraftMismatch, "was built for other"),
])
def test_files_that_do_not_fit(values: dict[str, Any], kind: type[UsageError], says: str, tokenizer: Tokenizer,
                               tmp_path: Path) -> None:
    path = write(tmp_path / "v.json", **values)
    with pytest.raises(kind, match=says) as caught:
        load_vocab(path, tokenizer=tokenizer)
    assert type(caught.value) is kind and str(path) in caught.value.message
    assert "fullpipe train vocab" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"token_ids": [1', "\udcff"])
def test_files_that_are_none(text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match="cannot read the draft vocabulary"):
        load_vocab(path, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="No such file"):
        load_vocab(tmp_path / "no.json", tokenizer=tokenizer)
