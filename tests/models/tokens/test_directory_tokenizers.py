"""What transformers reads beside a directory's tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fullpipe.errors import DamagedModel
from fullpipe.models.tokens.loading import load_tokenizer

TEXT = "<s>ab<x>b</s> <y>a"
ENTRY = {"content": "<x>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def write(folder: Path, begins: bool, **files: dict[str, Any]) -> Path:
    vocabulary = {token: id for id, token in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({**vocabulary, "ab": 256}, [("a", "b")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if begins:
        around = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
        backend.post_processor = around
    backend.save(str(folder / "tokenizer.json"))
    for name, value in {"config": {"model_type": "llama"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("files", [
    {},
    {"tokenizer_config": NAMED},
    {"tokenizer_config": NAMED | {"add_bos_token": True, "add_eos_token": True}},
    {"tokenizer_config": NAMED | {"add_bos_token": False}},
    {"tokenizer_config": NAMED | {"add_prefix_space": True, "clean_up_tokenization_spaces": True}},
    {"tokenizer_config": NAMED | {"added_tokens_decoder": {"259": ENTRY}}},
    {"tokenizer_config": NAMED | {"added_tokens_decoder": {"259": ENTRY | {"special": False},
                                                           "260": {"content": "<y>"}}}},
    {"tokenizer_config": NAMED | {"added_tokens_decoder": {"257": ENTRY | {"content": "<s>", "lstrip": True}}}},
    {"tokenizer_config": NAMED | {"additional_special_tokens": ["<x>", "<y>"]}},
    {"tokenizer_config": NAMED | {"extra_special_tokens": {"x_token": "<x>"}}},
    {"tokenizer_config": NAMED | {"pad_token": "<x>"}},
    {"tokenizer_config": NAMED | {"split_special_tokens": True}},
    {"tokenizer_config": NAMED, "added_tokens": {"<x>": 259}},
    {"tokenizer_config": NAMED, "special_tokens_map": {"additional_special_tokens": ["<x>"]}},
    {"special_tokens_map": {"bos_token": {"content": "<s>"}, "eos_token": "<y>"}},
    {"tokenizer_config": NAMED | {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<x>"}},
], ids=repr)
def test_settings_have_the_effect_that_they_have_in_transformers(
    files: dict[str, dict[str, Any]], begins: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(write(tmp_path, begins, **files))
    ours = load_tokenizer(tmp_path)
    for text in (TEXT, "", "ab"):
        ids = theirs.encode(text)
        assert ours.encode(text, add_special=True) == ids
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    if theirs.eos_token is not None:
        assert ours.eos_ids == {theirs.eos_token_id}


def test_a_token_with_another_id_than_declared_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedModel, match="'<x>' with the id 300; in its tokenizer it would be 259"):
        load_tokenizer(write(tmp_path, False, tokenizer_config={"added_tokens_decoder": {"300": ENTRY}}))


def test_an_end_token_that_is_a_list_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedModel, match=r"eos_token of the tokenizer's settings is \['</s>'\]"):
        load_tokenizer(write(tmp_path, False, tokenizer_config={"eos_token": ["</s>"]}))


def test_end_ids_may_be_a_list(tmp_path: Path) -> None:
    folder = write(tmp_path, False, tokenizer_config=NAMED, generation_config={"eos_token_id": [257, 5]})
    assert load_tokenizer(folder).eos_ids == {257, 258, 5}


def test_a_chat_writes_its_own_bos(tmp_path: Path) -> None:
    settings = NAMED | {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = load_tokenizer(write(tmp_path, True, tokenizer_config=settings))
    assert tokenizer.chat("ab") == [257, 256]
    assert tokenizer.encode("<s>ab", add_special=True) == [257, 257, 256]  # as in transformers
