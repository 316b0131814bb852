"""A tokenizer in which a letter is a token, and a line end with the letter after it too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers

from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NEWLINE = "Ċ"  # as byte-level tokenizers spell a line end
LETTERS = [*map(chr, range(33, 127)), "Ġ", NEWLINE]

MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    def make(template: str | None = CHATML, ends: tuple[str, ...] = ("<|endoftext|>", "<|im_end|>")) -> Tokenizer:
        merged = [NEWLINE + letter for letter in "abcdefgh"]
        symbols = [*SPECIAL, *LETTERS, *merged]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(
            vocab={symbol: id for id, symbol in enumerate(symbols)}, merges=[(one[0], one[1]) for one in merged]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL)
        eos_ids = frozenset(map(backend.token_to_id, ends))
        return Tokenizer(backend, eos_ids, ChatTemplate(template) if template else None)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer()
