"""Texts on which tokenizers differ, vocabularies that show it, and what llama.cpp makes of them.

`models/tokens/llamacpp.json` holds the texts, and for each case a digest of every text's ids, as
`models/tokens/record_llamacpp.py` wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import tokenizers

from fullpipe.models.tokens.splitting import SPLITTINGS
from piece_files import piece_file

RECORD = Path(__file__).parent / "models" / "tokens" / "llamacpp.json"
TEXTS: list[str] = json.loads(RECORD.read_text())["texts"]
_DIGITS = 4  # of a digest
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def recorded(by: str = "ids") -> dict[str, list[str]]:
    """By the name of a case: a digest of each text's ids. by: "sentencepiece" for what that made of them."""
    groups: dict[str, str] = json.loads(RECORD.read_text())[by]
    return {name: [all[at : at + _DIGITS] for at in range(0, len(all), _DIGITS)]
            for names, all in groups.items() for name in names.split()}


def digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:_DIGITS]


def cases() -> dict[str, dict[str, Any]]:
    """Keys of GGUF files (`tokenizer.ggml.*`) by the name of a case: of every word splitting, and of sentencepiece's
    vocabularies with scores that differ, that are alike, and some of each."""
    words, pieces = _byte_level(), _piece_level()
    count = len(pieces["tokens"])
    extra = {"tokens": [*pieces["tokens"], "<tool>", "\n  x", "  x", "[PAD1]"],
             "scores": [*pieces["scores"], *[-1e3] * 4],
             "token_type": [*pieces["token_type"], *[_USER_DEFINED] * 3, _UNUSED]}
    names, bytes_end = pieces["tokens"], 3 + 256  # t5 has no bytes
    t5 = {"model": "t5", "tokens": [*names[:3], *names[bytes_end:]], "eos_token_id": 2, "unknown_token_id": 0,
          "scores": [0.0] * 3 + [-5 - (i / 7) ** 0.5 for i in range(len(names) - bytes_end)],
          "token_type": [*pieces["token_type"][:3], *pieces["token_type"][bytes_end:]]}
    return {f"gpt2/{name}": words | {"pre": name} for name in SPLITTINGS} | {
        "llama/plain": pieces,
        "llama/no-prefix": pieces | {"add_space_prefix": False},
        "llama/no-bos": pieces | {"add_bos_token": False, "add_eos_token": True},
        "llama/constant": pieces | {"scores": [-1000.0] * count},
        "llama/some-alike": pieces | {"scores": [float(round(score / 7)) for score in pieces["scores"]]},
        "llama/backwards": pieces | {"scores": [-score for score in pieces["scores"]]},
        "llama/user-defined": pieces | extra,
        "t5/plain": t5,
        "t5/squeezed": t5 | {"add_space_prefix": True, "remove_extra_whitespaces": True},
    }


def piece_cases() -> dict[str, bytes]:
    """Sentencepiece's files, with the vocabularies of the cases of that kind."""
    known = cases()
    inner = known["llama/plain"] | {
        key: [*known["llama/plain"][key], *more]
        for key, more in (("tokens", ["<tool>", "▁▁x▁"]), ("scores", [0.0, 0.0]), ("token_type", [_USER_DEFINED] * 2))}
    return {
        "bpe": piece_file(known["llama/plain"]),
        "bpe/no-prefix": piece_file(known["llama/plain"], prefix=False),
        "bpe/squeezed": piece_file(known["llama/plain"], squeeze=True),
        "bpe/constant": piece_file(known["llama/constant"]),
        "bpe/user-defined": piece_file(inner),
        "unigram": piece_file(known["t5/plain"], unigram=True, field_35=0),
        "unigram/squeezed": piece_file(known["t5/plain"], unigram=True, squeeze=True, field_35=0),
    }


def write_vocabulary(path: Path, keys: dict[str, Any], metadata: dict[str, Any] | None = None) -> Path:
    """A GGUF file with this tokenizer (and further keys under their whole names), and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_block_count, writer.add_context_length, writer.add_embedding_length,
                writer.add_feed_forward_length, writer.add_head_count):
        add(4)
    writer.add_layer_norm_rms_eps(1e-5)
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | (metadata or {})
    for key, value in named.items():
        adders[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _byte_level() -> dict[str, Any]:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens, merges = _merged(sorted(byte_level.alphabet()), byte_level)
    return {"model": "gpt2", "tokens": [*tokens, "<|begin|>", "<|stop|>"],
            "merges": [" ".join(pair) for pair in merges],
            "token_type": [*[_NORMAL] * len(tokens), _CONTROL, _CONTROL],
            "bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1}


def _piece_level() -> dict[str, Any]:
    """Some characters have a token of their own and the others are bytes."""
    nul = "\0"  # where a C string ends
    characters = sorted({character for text in TEXTS[::2] for character in text.replace(" ", "▁")} - {nul})
    tokens, _ = _merged(characters, tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False))
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {"model": "llama", "tokens": [*first, *tokens],
            "scores": [*[0.0] * len(first), *(-float(i) for i in range(len(tokens)))],
            "token_type": [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * len(tokens)]}


def _merged(alphabet: Sequence[str], pre_tokenizer: Any, rounds: int = 4) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges that know no words: whatever stands side by side in the texts is merged, so that the ids of a
    text tell where it was cut."""
    tokens = {token: id for id, token in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for _ in range(rounds):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(tokens, merges))
        backend.pre_tokenizer = pre_tokenizer
        pairs = dict.fromkeys(pair for text in TEXTS for pair in pairwise(backend.encode(text).tokens))
        new = list(_new(pairs, tokens))
        tokens |= {"".join(pair): len(tokens) + place for place, pair in enumerate(new)}
        merges += new
    return list(tokens), merges


def _new(pairs: Sequence[tuple[str, str]] | dict[tuple[str, str], None], known: dict[str, int]
         ) -> Iterator[tuple[str, str]]:
    """One pair for each new token. What is called like a special token would be text to us, as merges make it, and
    special to llama.cpp."""
    made = set(known)
    for pair in pairs:
        token = "".join(pair)
        if token not in made and not (token.startswith("<") and token.endswith(">")):
            made.add(token)
            yield pair
