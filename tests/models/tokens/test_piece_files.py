"""A directory with sentencepiece's `tokenizer.model` alone."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awkward import TEXTS, cases, digest, piece_cases, recorded
from fullpipe.errors import DamagedModel, ModelError, UnsupportedModel
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.piece_file import read_pieces
from fullpipe.models.tokens.pieces import Kind, Pieces, piece_tokenizer
from fullpipe.models.tokens.tokenizer import Tokenizer
from piece_files import piece_file

# Names of tokens that are no text, which sentencepiece never finds in one, and its sign for a space, which it squeezes.
LEFT_OUT = ("<0x41>", "<s>", "</s>", "<unk>", "▁")

known, expected = cache(piece_cases), cache(lambda: recorded("sentencepiece"))


@pytest.mark.parametrize("name", list(piece_cases()))
def test_it_encodes_as_sentencepiece_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(known()[name])
    backend = piece_tokenizer(read_pieces(tmp_path / "tokenizer.model").pieces)
    differing = {text: backend.encode(text).tokens for text, wanted in zip(TEXTS, expected()[name], strict=True)
                 if not any(left in text for left in LEFT_OUT) and digest(backend.encode(text).ids) != wanted}
    assert differing == {}
    assert set(expected()) == set(known())


def folder_with(folder: Path, content: bytes, **files: dict[str, Any]) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(content)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return load_tokenizer(folder)


SMALL = {"tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "<x>"],
         "scores": [0, 0, 0, -9, -9, -9, -1, -2, 0],
         "token_type": [2, 3, 3, 1, 1, 1, 1, 1, 3]}


@pytest.mark.parametrize(("settings", "text", "wanted"), [
    ({}, "ab", "<s> ▁a b"),
    ({"add_bos_token": False}, "ab", "▁a b"),
    ({"add_eos_token": True}, "ab", "<s> ▁a b </s>"),
    ({"add_prefix_space": False}, "ab", "<s> ab"),
    ({}, "a<x>a", "<s> ▁a <x> ▁a"),
    ({"legacy": False}, "a<x>a", "<s> ▁a <x> a"),
    ({}, " a", "<s> ▁ ▁a"),
    ({"bos_token": "<x>"}, "a", "<x> ▁a"),
    ({"bos_token": {"content": "<x>"}}, "a", "<x> ▁a"),
    ({"added_tokens_decoder": {"9": {"content": "<y>", "special": False}}}, "a<y>", "<s> ▁a <y>"),
    ({"split_special_tokens": True}, "ab</s>", "<s> ▁a b <unk>"),
])
def test_settings_of_the_folder(settings: dict[str, Any], text: str, wanted: str, tmp_path: Path) -> None:
    tokenizer = folder_with(tmp_path, piece_file(SMALL), tokenizer_config=settings)
    assert [tokenizer.tokens[id] for id in tokenizer.encode(text, add_special=True)] == wanted.split()


def test_it_ends_with_the_file_s_own_token(tmp_path: Path) -> None:
    tokenizer = folder_with(tmp_path, piece_file(SMALL), config={})
    assert tokenizer.eos_ids == {2}
    assert tokenizer.decode([1, 6, 5, 2]) == "ab"


@pytest.mark.parametrize(("content", "error", "said"), [
    (b"IQ== 0\nIg== 1\n", UnsupportedModel, "no sentencepiece file"),
    (piece_file(SMALL)[:40], DamagedModel, "not a whole sentencepiece file"),
    (piece_file(SMALL, field_3=4), UnsupportedModel, "by words or characters"),
    (piece_file(SMALL, field_24=1), UnsupportedModel, "with spaces after words"),
])
def test_what_is_refused_is_named(content: bytes, error: type[ModelError], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said) as caught:
        folder_with(tmp_path, content)
    assert caught.value.hint


# Merging by scores.


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """The rule itself: of neighbours that together are a token, the best go first, and of equal ones the leftmost."""
    symbols = list(text)
    while True:
        joined = ["".join(pair) for pair in pairwise(symbols)]
        found = [(-scores[both], at) for at, both in enumerate(joined) if both in scores]
        if not found:
            return symbols
        at = min(found)[1]
        symbols[at : at + 2] = [joined[at]]


TOKENS = st.lists(st.text("ab", min_size=2, max_size=5), min_size=1, max_size=12, unique=True)


@given(TOKENS, st.lists(st.integers(0, 3), min_size=12, max_size=12), st.text("ab", max_size=16))
def test_ties_go_to_the_leftmost(tokens: list[str], scores: list[int], text: str) -> None:
    scored = {token: float(score) for token, score in zip(tokens, scores, strict=False)} | {"a": -9.0, "b": -9.0}
    pieces = Pieces(list(scored), list(scored.values()), [Kind.NORMAL] * len(scored), None, prefix="never")
    assert piece_tokenizer(pieces).encode(text).tokens == merged(text, scored)


@given(TOKENS, st.randoms(use_true_random=False), st.text("ab", max_size=16))
def test_without_ties_the_order_of_merges_says_it_all(tokens: list[str], dice: Any, text: str) -> None:
    scored = {token: float(-score) for score, token in enumerate(["a", "b", *dice.sample(tokens, len(tokens))])}
    pieces = Pieces(list(scored), list(scored.values()), [Kind.NORMAL] * len(scored), None, prefix="never")
    assert piece_tokenizer(pieces).encode(text).tokens == merged(text, scored)


def test_a_large_vocabulary_has_no_ties(tmp_path: Path) -> None:
    """The merger in Python is for those that have."""
    (tmp_path / "tokenizer.model").write_bytes(piece_file(cases()["llama/plain"]))
    assert piece_tokenizer(read_pieces(tmp_path / "tokenizer.model").pieces).pre_tokenizer is None
