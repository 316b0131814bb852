"""Records what llama.cpp makes of the awkward texts: run it where `xllamacpp` is installed (see the path of its library
below), with `tests` and `src` in PYTHONPATH.

    python tests/models/tokens/record_llamacpp.py .../site-packages/xllamacpp/xllamacpp.abi3.so
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from awkward import RECORD, TEXTS, cases, digest, write_vocabulary


class _ModelParams(ctypes.Structure):
    """llama_model_params of September 2026, with room behind it; the first flag is vocab_only."""

    _fields_ = (("pointers", ctypes.c_void_p * 2), ("numbers", ctypes.c_int32 * 5), ("more", ctypes.c_void_p * 4),
                ("flags", ctypes.c_uint8 * 64))


def main(library: str) -> None:
    llama = ctypes.CDLL(library)
    llama.llama_model_default_params.restype = _ModelParams
    llama.llama_model_load_from_file.restype = llama.llama_model_get_vocab.restype = ctypes.c_void_p
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.flags[0] = True
    groups: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in cases().items():
            path = write_vocabulary(Path(folder) / "vocabulary.gguf", keys)
            model = llama.llama_model_load_from_file(str(path).encode(), params)
            assert model, name
            vocab = ctypes.c_void_p(llama.llama_model_get_vocab(ctypes.c_void_p(model)))
            groups["".join(digest(_encode(llama, vocab, text)) for text in TEXTS)].append(name)
    ids = {" ".join(names): digests for digests, names in groups.items()}
    RECORD.write_text(json.dumps({"texts": TEXTS, "ids": ids}, indent=0))


def _encode(llama: ctypes.CDLL, vocab: ctypes.c_void_p, text: str) -> list[int]:
    """With BOS and EOS as the file wants them, and special tokens read where the text spells them out."""
    raw = text.encode()
    room = (ctypes.c_int32 * (len(raw) + 16))()
    count = llama.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
    return list(room[:count])


if __name__ == "__main__":
    main(sys.argv[1])
