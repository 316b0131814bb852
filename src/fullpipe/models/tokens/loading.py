"""A model's tokenizer, whatever kind of file it lies in."""

from __future__ import annotations

from pathlib import Path

from fullpipe.models.tokens.directory import directory_tokenizer
from fullpipe.models.tokens.gguf import gguf_tokenizer
from fullpipe.models.tokens.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file or of a directory as transformers writes it.

    Raises `UnsupportedModel` for a kind of tokenizer that we do not know, `DamagedModel` when its files are missing or
    broken.
    """
    return directory_tokenizer(path) if path.is_dir() else gguf_tokenizer(path)
