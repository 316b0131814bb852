"""Tiny models whose tokens spell any text, for tests of what a text must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

import tiny
from fullpipe.request import Structured

MERGES = (("{", '"'), ('"', ":"), ('"', "}"), ('"', ","), ("a", "b"), ("ab", "c"), ("c", "d"), ("1", "2"),
          ("Ġ", "a"), ("Ġ", '"'), ("t", "r"), ("tr", "u"), ("tru", "e"), ("e", "}"))
SPECIAL = ("<|end|>", "<|begin|>", "<|stop|>")
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["kind", "n", "on"],
          "properties": {"kind": {"enum": ["ab", "abcd", "é"]}, "n": {"type": "integer", "minimum": 0, "maximum": 129},
                         "on": {"type": "boolean"}}}
JSON = Structured("json", json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}}))
STRUCTURES = {"json": JSON, "regex": Structured("regex", "(ab|c){3,9}x[0-9]{2}é"),
              "choice": Structured("choice", '["abcd", "abc", "true", "été"]'),
              "grammar": Structured("grammar", 'start: "(" (start | "a" | "12")* ")"')}


def byte_level() -> Any:
    """A byte-level BPE: every byte is a token, and some are merged."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([*alphabet, *(left + right for left, right in MERGES)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(MERGES)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def save(folder: Path, *, noise: float = 0.0) -> Path:
    """A model of five layers with such a tokenizer, which ends texts with "<|end|>"; its head has rows of padding.
    noise: how far its weights are disturbed, as those of a draft that is mostly right."""
    backend = byte_level()
    size = backend.get_vocab_size(with_added_tokens=True)
    end = backend.token_to_id("<|end|>")
    model = tiny.tiny_model("qwen2", seed=1, vocab_size=-(-size // 8) * 8 + 8, eos_token_id=end, bos_token_id=end + 1)
    if noise:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    tiny.save(model, folder)
    backend.save(str(folder / "tokenizer.json"))
    return folder
