"""Tiny models that the command line can load: weights, and a tokenizer in which every token is a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from command import CONTEXT, Models
from transformers import PreTrainedModel

import tiny

END = "<|im_end|>"
TEMPLATE = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}assistant:"


def write_tokenizer(folder: Path, characters: str) -> None:
    """A byte-level BPE without merges over `characters`, and a chat template."""
    symbols = [END, *characters.replace(" ", "Ġ")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def save(model: PreTrainedModel, folder: Path, characters: str) -> Path:
    tiny.save(model, folder)
    write_tokenizer(folder, characters)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """They never end by themselves: no end token is named."""
    root = tmp_path_factory.mktemp("models")
    letters = "".join(map(chr, range(32, 127)))
    model = tiny.tiny_model("llama", seed=1, max_position_embeddings=CONTEXT, eos_token_id=None)
    assert model.config.vocab_size == 1 + len(letters)
    target = save(model, root / "target", letters)
    stranger = save(model, root / "stranger", letters[::-1])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return Models(target, save(model, root / "draft", letters), stranger)
