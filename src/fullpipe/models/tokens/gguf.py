"""The tokenizer inside a GGUF file.

It is rebuilt from the file's metadata at every load: 0.5 s for Qwen's 151,665 tokens, and a converted `tokenizer.json`
would save 0.3 s of that: not worth a second copy that can go stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from fullpipe.errors import UnsupportedModel
from fullpipe.models.gguf_header import read_header
from fullpipe.models.recognise import damaged
from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer

# What ends a turn or a text in the vocabularies in use. GGUF metadata names one end token only, yet a chat
# model may end with another: Qwen says <|im_end|> after a turn and <|endoftext|> after a document.
_END_TOKENS = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>",
})

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut into words before BPE: what GGUF's `tokenizer.ggml.pre` stands for.

    pattern: of one word; None: GPT-2's. single_digits: every digit is a word. nfc: text is brought into
    Unicode's composed form first. ignore_merges: a word that is a token is taken as it is.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False


_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "qwen2": _Splitting(pattern=_LETTERS + r"\p{N}" + _REST, nfc=True),
    "llama-bpe": _Splitting(pattern=_LETTERS + r"\p{N}{1,3}" + _REST, ignore_merges=True),
}

# GGUF's `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def gguf_tokenizer(path: Path) -> Tokenizer:
    metadata = read_header(path, arrays=True).metadata
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    backend = _byte_level_bpe(path, values)
    tokens: list[str] = values["tokens"]
    named = {values[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in values}
    ends = {i for i, kind in enumerate(values["token_type"]) if kind == _CONTROL and tokens[i] in _END_TOKENS}
    bos, eos = (tokens[values[key]] if key in values else None for key in ("bos_token_id", "eos_token_id"))
    source = metadata.get("tokenizer.chat_template")
    template = ChatTemplate(source, bos, eos) if source else None
    return Tokenizer(backend, frozenset(named | ends), template, name=path.stem)


def _byte_level_bpe(path: Path, values: Mapping[str, Any]) -> Any:
    kind, pre = values.get("model"), values.get("pre")
    if kind != "gpt2" or pre not in _SPLITTINGS:
        raise UnsupportedModel(
            f"{path} has a tokenizer of kind {kind!r} with the word splitting {pre!r}; known is 'gpt2' with "
            f"{', '.join(repr(known) for known in _SPLITTINGS)}",
            hint="Use the model's safetensors directory: its tokenizer.json says how it splits words.",
        )
    missing = [key for key in ("tokens", "merges", "token_type") if key not in values]
    if missing:
        raise damaged(path, f"{path} has no tokenizer.ggml.{missing[0]}")
    backend = tokenizers.Tokenizer(_bpe_model(values, _SPLITTINGS[pre].ignore_merges))
    _set_splitting(backend, _SPLITTINGS[pre])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens([
        tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(values["tokens"], values["token_type"], strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ])
    if values.get("add_bos_token") and "bos_token_id" in values:
        bos = values["tokens"][values["bos_token_id"]]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, values["bos_token_id"])]
        )
    return backend


def _bpe_model(values: Mapping[str, Any], ignore_merges: bool) -> Any:
    # Unused tokens only pad the vocabulary; the names they were given ("[PAD151665]") must not match text.
    vocabulary = {
        token: i
        for i, (token, kind) in enumerate(zip(values["tokens"], values["token_type"], strict=True))
        if kind != _UNUSED
    }
    merges = [tuple(merge.split(" ", 1)) for merge in values["merges"]]
    return tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)


def _set_splitting(backend: Any, splitting: _Splitting) -> None:
    pre = tokenizers.pre_tokenizers
    steps: list[Any] = []
    if splitting.single_digits:
        steps.append(pre.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre.Split(tokenizers.Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    backend.pre_tokenizer = pre.Sequence(steps)
    if splitting.nfc:
        backend.normalizer = tokenizers.normalizers.NFC()
