"""GGUF's tokenizers encode as llama.cpp's do, and its keys have the effect and the defaults that they have there."""

from __future__ import annotations

import json
import logging
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from awkward import TEXTS, cases, digest, recorded, write_vocabulary
from fullpipe.errors import DamagedModel, ModelError, UnsupportedModel
from fullpipe.models.tokens.gguf import gguf_tokenizer
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.splitting import SPLITTINGS
from fullpipe.models.tokens.tokenizer import Tokenizer

known, expected = cache(cases), cache(recorded)
ALPHABET = ["a", "b", "c", "Ġ", "Ċ", "<", "/", "s", ">"]


@pytest.mark.parametrize("name", list(cases()))
def test_it_encodes_as_llama_cpp_does(name: str, tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(write_vocabulary(tmp_path / "m.gguf", known()[name]))
    composes = name.startswith("gpt2/") and SPLITTINGS[name.removeprefix("gpt2/")].nfc
    differing = {
        text: tokenizer.encode(text, add_special=True)
        for text, wanted in zip(TEXTS, expected()[name], strict=True)
        if not (composes and text != unicodedata.normalize("NFC", text))
        and digest(tokenizer.encode(text, add_special=True)) != wanted
    }
    assert differing == {}


def test_every_case_is_recorded() -> None:
    assert set(expected()) == set(known())


@pytest.mark.parametrize("name", ["llama/plain", "llama/no-prefix", "llama/constant", "t5/plain"])
def test_what_was_encoded_is_decoded(name: str, tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(write_vocabulary(tmp_path / "m.gguf", known()[name]))
    unknown = tokenizer.backend.token_to_id("<unk>")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if unknown not in ids and not any(special in text for special in ("<s>", "</s>")) and "▁" not in text:
            assert tokenizer.decode(ids) == text


def test_a_directory_of_the_same_vocabulary_has_the_same_fingerprint(tmp_path: Path) -> None:
    """Converters list sentencepiece's merges in orders of their own, and scores give them."""
    ours = gguf_tokenizer(write_vocabulary(tmp_path / "m.gguf", known()["llama/plain"]))
    written = json.loads(ours.backend.to_str())
    written["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint


def test_vocabularies_with_ties_can_be_told_apart(tmp_path: Path) -> None:
    """The fingerprint reads no part of a tokenizer that cannot be written down."""
    one, other = (gguf_tokenizer(write_vocabulary(tmp_path / f"{i}.gguf", known()[name]))
                  for i, name in enumerate(("llama/constant", "llama/user-defined")))
    assert one.fingerprint != other.fingerprint


# Keys.


def words(folder: Path, more: list[str] | None = None, metadata: dict[str, Any] | None = None, **keys: Any
          ) -> Tokenizer:
    """A small byte-level tokenizer; `more` are control tokens."""
    tokens = [*ALPHABET, *(more or [])]
    kinds = [1] * len(ALPHABET) + [3] * len(more or [])
    values = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": kinds, "merges": ["a b"], **keys}
    tokens += [] if "ab" in tokens else ["ab"]
    kinds += [1] * (len(tokens) - len(kinds))
    path = write_vocabulary(folder / "m.gguf", {k: v for k, v in values.items() if v is not None}, metadata)
    return gguf_tokenizer(path)


MARKS = ["<B>", "<E>"]  # tokens 9 and 10
NAMED = {"bos_token_id": 9, "eos_token_id": 10}


@pytest.mark.parametrize(("keys", "wanted"), [
    ({}, "ab"),
    ({"add_bos_token": True}, "<B> ab"),
    ({"add_bos_token": True, "add_eos_token": True}, "<B> ab <E>"),
    ({"add_eos_token": True}, "ab <E>"),
    ({"pre": "llama-bpe"}, "<B> ab"),
    ({"pre": "llama3"}, "<B> ab"),
    ({"pre": "tekken"}, "<B> ab"),
    ({"pre": "tekken", "add_bos_token": False}, "ab"),
    ({"pre": "tekken", "bos_token_id": None}, "ab"),
    ({"pre": "tekken", "bos_token_id": 4294967295}, "ab"),
    ({"add_sep_token": True, "seperator_token_id": 10}, "ab"),
])
def test_what_goes_around_plain_text(keys: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    tokenizer = words(tmp_path, MARKS, **NAMED | keys)
    assert [tokenizer.tokens[id] for id in tokenizer.encode("ab", add_special=True)] == wanted.split()
    assert tokenizer.encode("ab") == tokenizer.encode("ab", add_special=True)[wanted.split().index("ab") :][:1]


def test_a_prompt_that_begins_with_bos_gets_another_and_a_chat_does_not(tmp_path: Path) -> None:
    """So it is in llama.cpp and transformers: who writes the token into plain text is taken at his word."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    tokenizer = words(tmp_path, MARKS, {"tokenizer.chat_template": template}, **NAMED | {"add_bos_token": True})
    assert tokenizer.encode("<B>a", add_special=True) == [9, 9, 0]
    assert tokenizer.chat("a") == [9, 0, 10]


def test_a_bos_that_is_asked_for_and_not_named_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedModel, match="add_bos_token, yet no bos_token_id"):
        words(tmp_path, add_bos_token=True)


@pytest.mark.parametrize(("more", "keys", "wanted"), [
    (["<B>", "<E>"], NAMED, ["<E>"]),
    (["<B>", "<E>", "<T>", "<M>"], NAMED | {"eot_token_id": 11, "eom_token_id": 12}, ["<E>", "<M>", "<T>"]),
    (["<|im_end|>", "<|endoftext|>", "<|im_start|>"], {}, ["<|endoftext|>", "<|im_end|>"]),
    (["<|eot_id|>", "<end_of_turn>", "[EOS]", "<eos>"], {}, ["<end_of_turn>", "<eos>", "<|eot_id|>", "[EOS]"]),
    (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {}, ["<|file_sep|>", "<|fim_pad|>", "<|repo_name|>"]),
    (["<|fim_pad|>", "<P>"], {"fim_pad_token_id": 10}, ["<P>"]),
    (["<B>", "<E>"], {"eos_token_ids": [9, 10]}, ["<B>", "<E>"]),
    (["<|im_end|>"], {"token_type": [1] * 11}, ["<|im_end|>"]),
    (["<|im_end|>"], {"token_type": None}, ["<|im_end|>"]),
    (["<E>"], {"eos_token_id": 4000}, []),
])
def test_what_ends_a_text(more: list[str], keys: dict[str, Any], wanted: list[str], tmp_path: Path) -> None:
    tokenizer = words(tmp_path, more, **keys)
    assert sorted(tokenizer.tokens[id] for id in tokenizer.eos_ids) == sorted(wanted)
    for token in wanted:  # they are no text, whatever their type says
        assert tokenizer.decode(tokenizer.encode(f"a{token}a")) == "aa"


def test_a_word_that_is_called_like_an_end_token_is_a_word(tmp_path: Path) -> None:
    """Qwen's vocabulary makes "</s>" of merges: it is what strikes text through in HTML."""
    tokens = [*ALPHABET, "</", "s>", "</s>"]
    tokenizer = words(tmp_path, tokens=tokens, token_type=[1] * len(tokens), merges=["< /", "s >", "</ s>"])
    assert tokenizer.eos_ids == frozenset()
    assert tokenizer.decode(tokenizer.encode("a</s>a")) == "a</s>a"


@pytest.mark.parametrize(("metadata", "wanted"), [
    ({"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"}, "A"),
    ({"tokenizer.chat_templates": ["default", "rag"], "tokenizer.chat_template.default": "C",
      "tokenizer.chat_template.rag": "D"}, "C"),
])
def test_the_chat_template_is_the_default_one(metadata: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    template = words(tmp_path, metadata=metadata).template
    assert template is not None and template.source == wanted


def test_a_file_that_names_no_splitting_gets_the_default_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = words(tmp_path, pre=None)
    assert "does not say how it splits words" in caplog.text
    assert tokenizer.encode("ab") == words(tmp_path, pre="default").encode("ab")


@pytest.mark.parametrize(("keys", "error", "said"), [
    *[({"model": model}, UnsupportedModel, f"kind '{model}'; known are 'gpt2', 'llama', 't5'")
      for model in ("bert", "rwkv", "plamo2", "no_vocab", "gemma4")],
    ({"model": None}, UnsupportedModel, "kind None"),
    ({"pre": "kimi-k2"}, UnsupportedModel, "word splitting 'kimi-k2'; known are 'gpt-2'"),
    ({"suppress_tokens": [1, 2]}, UnsupportedModel, "forbids 2 tokens"),
    ({"tokens": None}, DamagedModel, r"no tokenizer\.ggml\.tokens"),
    ({"merges": None}, DamagedModel, r"no tokenizer\.ggml\.merges"),
    ({"merges": ["a z"]}, DamagedModel, "does not fit together: .*z"),
    ({"token_type": [1]}, DamagedModel, r"10 tokens, yet 1 of tokenizer\.ggml\.token_type"),
    ({"tokens": ["a", "b", "ab", "a"], "token_type": [1] * 4}, DamagedModel, "'a' twice"),
    ({"model": "llama", "scores": [0.5]}, DamagedModel, r"10 tokens, yet 1 of tokenizer\.ggml\.scores"),
])
def test_what_is_refused_is_named(keys: dict[str, Any], error: type[ModelError], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said) as caught:
        words(tmp_path, **keys)
    assert caught.value.hint


def test_nameless_tokens_are_no_text(tmp_path: Path) -> None:
    tokens = [*ALPHABET, "", "</"]
    tokenizer = words(tmp_path, tokens=tokens, token_type=[1] * 12, merges=["< /"])
    assert tokenizer.tokens[9] == "[EMPTY_9]"
    assert tokenizer.encode("a") == [0]
