"""Records what llama.cpp and sentencepiece make of the awkward texts. Run it where `xllamacpp` and `sentencepiece` are
installed, with `tests` and `src` in PYTHONPATH:

    python tests/models/tokens/record_llamacpp.py .../site-packages/xllamacpp/xllamacpp.abi3.so
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from awkward import RECORD, TEXTS, cases, digest, piece_cases, write_vocabulary

Encode = Callable[[str], list[int]]


class _ModelParams(ctypes.Structure):
    """llama_model_params of September 2026, with room behind it; the first flag is vocab_only."""

    _fields_ = (("pointers", ctypes.c_void_p * 2), ("numbers", ctypes.c_int32 * 5), ("more", ctypes.c_void_p * 4),
                ("flags", ctypes.c_uint8 * 64))


def by_llama_cpp(library: str) -> Iterator[tuple[str, Encode]]:
    """With BOS and EOS as the file wants them, and special tokens read where the text spells them out."""
    llama = ctypes.CDLL(library)
    llama.llama_model_default_params.restype = _ModelParams
    llama.llama_model_load_from_file.restype = llama.llama_model_get_vocab.restype = ctypes.c_void_p
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.flags[0] = True

    def encode(text: str) -> list[int]:
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 16))()
        count = llama.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
        return list(room[:count])

    for name, keys in cases().items():
        with tempfile.TemporaryDirectory() as folder:
            path = write_vocabulary(Path(folder) / "vocabulary.gguf", keys)
            model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert model, name
        vocab = ctypes.c_void_p(llama.llama_model_get_vocab(ctypes.c_void_p(model)))
        yield name, encode


def by_sentencepiece() -> Iterator[tuple[str, Encode]]:
    """Sentencepiece knows no special tokens in a text."""
    module = import_module("sentencepiece")
    for name, content in piece_cases().items():
        yield name, module.SentencePieceProcessor(model_proto=content).encode


def grouped(encoders: Iterator[tuple[str, Encode]]) -> dict[str, str]:
    """Digests by the names of the cases that have them."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, encode in encoders:
        groups["".join(digest(encode(text)) for text in TEXTS)].append(name)
    return {" ".join(names): digests for digests, names in groups.items()}


if __name__ == "__main__":
    record = {"texts": TEXTS, "ids": grouped(by_llama_cpp(sys.argv[1])), "sentencepiece": grouped(by_sentencepiece())}
    RECORD.write_text(json.dumps(record, indent=0) + "\n")
