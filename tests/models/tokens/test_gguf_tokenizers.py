"""GGUF's tokenizers encode as llama.cpp's do, and its keys have the effect and the defaults that they have there."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from awkward import TEXTS, cases, digest, recorded, write_vocabulary

from fullpipe.errors import DamagedModel, ModelError, UnsupportedModel
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.splitting import SPLITTINGS
from fullpipe.models.tokens.tokenizer import Tokenizer

known, expected = cache(cases), cache(recorded)


@pytest.mark.parametrize("name", list(cases()))
def test_it_encodes_as_llama_cpp_does(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "m.gguf", known()[name]))
    composes = name.startswith("gpt2/") and SPLITTINGS[name.removeprefix("gpt2/")].nfc
    differing = {
        text: tokenizer.encode(text, add_special=True)
        for text, wanted in zip(TEXTS, expected()[name], strict=True)
        if not (composes and text != unicodedata.normalize("NFC", text))
        and digest(tokenizer.encode(text, add_special=True)) != wanted
    }
    assert differing == {}


def test_every_splitting_is_recorded() -> None:
    assert set(expected()) == set(known())
