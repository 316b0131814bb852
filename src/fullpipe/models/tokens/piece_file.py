"""Sentencepiece's file, `tokenizer.model`: a protobuf of which a handful of fields matter.

Read here, because the package that reads it brings a second implementation of protobuf along, for forty lines.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models.recognise import strange_file
from fullpipe.models.tokens.pieces import Kind, Pieces

_Fields = dict[int, list[Any]]

# Numbers of fields in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX, _UNKNOWN, _BEGIN, _END = 3, 24, 40, 41, 42
_CHARSMAP, _ADD_PREFIX, _SQUEEZE, _ESCAPE = 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True, slots=True)
class PieceFile:
    """begin, end: ids of the tokens that a text may be put between; None: the vocabulary has none."""

    pieces: Pieces
    begin: int | None
    end: int | None


def read_pieces(path: Path) -> PieceFile:
    """Raises `UnsupportedModel` for a file of another kind or algorithm, `DamagedModel` for a broken one."""
    data = path.read_bytes()
    if strange := strange_file(path):
        raise DamagedModel(f"{path} is {strange.what}", hint=strange.hint)
    if not data.startswith(b"\n"):  # the first field, as sentencepiece writes it
        raise UnsupportedModel(
            f"{path} is no sentencepiece file (tiktoken's vocabularies have that name too)",
            hint="Write a tokenizer.json: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    try:
        return _file(_fields(data), path)
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise DamagedModel(f"{path} is not a whole sentencepiece file ({error})", hint="Fetch it again.") from error


def _file(model: _Fields, path: Path) -> PieceFile:
    trainer, normalizer = (_fields(b"".join(model.get(number, ()))) for number in (_TRAINER, _NORMALIZER))
    kind = _number(trainer, _MODEL_TYPE, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE) or _number(trainer, _SPACE_AS_SUFFIX, 0) or not _number(normalizer, _ESCAPE, 1):
        raise UnsupportedModel(
            f"{path} splits text in a way that we do not know (by words or characters, with spaces after words, or "
            "with spaces as they are)", hint="Use a model with a BPE or Unigram vocabulary, or with a tokenizer.json.",
        )
    entries = [_fields(entry) for entry in model[_PIECES]]
    pieces = Pieces(
        tokens=[entry[_TEXT][0].decode() for entry in entries],
        scores=[_float(entry) for entry in entries],
        kinds=[_number(entry, _KIND, Kind.NORMAL) for entry in entries],
        unknown=_number(trainer, _UNKNOWN, 0),
        unigram=kind == _UNIGRAM,
        prefix="always" if _number(normalizer, _ADD_PREFIX, 1) else "never",
        squeeze=bool(_number(normalizer, _SQUEEZE, 1)),
        charsmap=normalizer.get(_CHARSMAP, [b""])[-1],
        inner=True,
    )
    begin, end = (_id(_number(trainer, *field), len(entries)) for field in ((_BEGIN, 1), (_END, 2)))
    return PieceFile(pieces, begin, end)


def _id(number: int, count: int) -> int | None:
    """The file writes -1, as an unsigned number, for none."""
    return number if number < count else None


def _number(fields: Mapping[int, list[Any]], field: int, default: int) -> int:
    return int(fields.get(field, [default])[-1])


def _float(entry: _Fields) -> float:
    return float(struct.unpack("<f", entry[_SCORE][-1])[0]) if _SCORE in entry else 0.0


def _fields(data: bytes) -> _Fields:
    """A message's values by the number of their field: whole numbers, or bytes of anything else."""
    fields: _Fields = {}
    for field, value in _values(data):
        fields.setdefault(field, []).append(value)
    return fields


def _values(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, form = key >> 3, key & 7
        if form == 0:
            number, at = _varint(data, at)
            yield field, number
            continue
        length, at = (8, at) if form == 1 else (4, at) if form == 5 else _varint(data, at)
        if form not in (1, 2, 5) or at + length > len(data):
            raise ValueError(f"field {field} ends after the file, or is of the unknown form {form}")
        yield field, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number, at, shift = number | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return number, at
