"""The header of a GGUF file: its metadata, and where each tensor lies. No torch.

The `gguf` package reads it too, but keeps an array object for every element: 7 s for the 300,000 strings of a
Qwen vocabulary, in every process, where this takes 0.1 s, and 10 ms when the vocabulary is skipped.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullpipe.errors import UnsupportedModel
from fullpipe.models.recognise import damaged

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """shape: rows first, as torch has it. kind: the file's number of the tensor's type. offset: bytes from the
    start of the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: numbers, bools, strings, and lists of these; without those of the tokenizer if they were skipped."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]


def read_header(path: Path, *, arrays: bool) -> Header:
    """Read the header, with or without the arrays of the tokenizer: they are long, and all others are short.

    Raises `DamagedModel` when the file is not GGUF or ends too early, `UnsupportedModel` for a version of the
    format other than 2 and 3, little-endian.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path, arrays).header()
    except (struct.error, ValueError, KeyError) as error:  # ValueError: an empty file, or no UTF-8
        raise damaged(path, f"the header of {path} is not that of a whole GGUF file ({error})") from error


class _Cursor:
    """Reads values one after the other from the start of the file."""

    def __init__(self, data: mmap.mmap, path: Path, arrays: bool) -> None:
        self._data, self._path, self._arrays, self._at = data, path, arrays, 0

    def header(self) -> Header:
        magic, version = self._unpack("4sI")
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        if version not in _VERSIONS:
            raise UnsupportedModel(
                f"{self._path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read",
                hint="Convert it with a current llama.cpp.",
            )
        num_tensors, num_keys = self._unpack("QQ")
        pairs = dict(self._pair() for _ in range(num_keys))
        tensors = dict(self._tensor() for _ in range(num_tensors))
        alignment = int(pairs.get("general.alignment", _DEFAULT_ALIGNMENT))
        base = -(-self._at // alignment) * alignment
        return Header({key: value for key, value in pairs.items() if value is not None},
                      {name: TensorPlace(t.shape, t.kind, base + t.offset) for name, t in tensors.items()})

    def _pair(self) -> tuple[str, Any]:
        """A key and its value; None for an array that is skipped."""
        key, kind = self._string(), self._one("I")
        if kind == _ARRAY and key.startswith("tokenizer.") and not self._arrays:
            self._skip_array()
            return key, None
        return key, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        return self._array() if kind == _ARRAY else self._one(_SCALARS[kind])

    def _array(self) -> list[Any]:
        element, count = self._unpack("IQ")
        if element in _SCALARS:
            return list(self._unpack(f"{count}{_SCALARS[element]}"))
        return self._strings(count) if element == _STRING else [self._value(element) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """So many strings in a row: a vocabulary, of which there may be 300,000."""
        length_at, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
        texts = []
        for _ in range(count):
            begins = at + 8
            at = begins + length_at(data, at)[0]
            texts.append(data[begins:at].decode("utf-8"))
        if at > len(data):
            raise ValueError("a string ends behind the file")
        self._at = at
        return texts

    def _skip_array(self) -> None:
        element, count = self._unpack("IQ")
        if element in _SCALARS:
            self._at += count * struct.calcsize(_SCALARS[element])
            return
        if element != _STRING:
            raise ValueError(f"an array of type {element}")
        length_at, at = struct.Struct("<Q").unpack_from, self._at
        for _ in range(count):
            at += 8 + length_at(self._data, at)[0]
        self._at = at

    def _tensor(self) -> tuple[str, TensorPlace]:
        name = self._string()
        dims = self._unpack(f"{self._one('I')}Q")
        return name, TensorPlace(tuple(reversed(dims)), self._one("I"), self._one("Q"))

    def _string(self) -> str:
        text: bytes = self._one(f"{self._one('Q')}s")
        return text.decode("utf-8")

    def _one(self, form: str) -> Any:
        return self._unpack(form)[0]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values
