"""Writes sentencepiece's files, `tokenizer.model`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any


def piece_file(keys: Mapping[str, Any], *, unigram: bool = False, squeeze: bool = False, prefix: bool = True,
               **trainer: int) -> bytes:
    """A file with the tokens, scores and types of these GGUF keys. trainer: fields by "field_NUMBER"."""
    entries = zip(keys["tokens"], keys["scores"], keys["token_type"], strict=True)
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind))
        for token, score, kind in entries
    )
    numbered = {int(name.removeprefix("field_")): number for name, number in trainer.items()}
    spec = {3: 1 if unigram else 2, 35: 1} | numbered
    normalizer = _field(1, b"identity") + _field(3, int(prefix)) + _field(4, int(squeeze)) + _field(5, 1)
    return pieces + _field(2, b"".join(_field(field, number) for field, number in spec.items())) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
