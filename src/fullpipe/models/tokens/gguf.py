"""The tokenizer inside a GGUF file, with the meanings and defaults that llama.cpp gives to its keys.

It is rebuilt from the file's metadata at every load: 0.5 s for Qwen's 151,665 tokens, and a converted `tokenizer.json`
would save 0.3 s of that: not worth a second copy that can go stale.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models.gguf_header import read_header
from fullpipe.models.gguf_parts import gguf_parts
from fullpipe.models.tokens.pieces import Kind, Pieces, piece_tokenizer
from fullpipe.models.tokens.special import put_around
from fullpipe.models.tokens.splitting import SPLITTINGS
from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# What ends a turn or a text. GGUF metadata names one end token only, yet a chat model may end with another: Qwen says
# <|im_end|> after a turn and <|endoftext|> after a document. The list is llama.cpp's.
_END_TOKENS = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>", "<|return|>",
    "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})
# Where nothing more is to be filled in: padding, the next file, the next repository. A key of the file goes first.
_FILL_END_TOKENS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", *_FILL_END_TOKENS)

# Special tokens that templates may name, and what GGUF calls them.
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls",
          "mask": "mask"}

# Sentencepiece's own ids, where a file of its kinds names none.
_DEFAULT_IDS = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "t5": {"eos_token_id": 1, "unknown_token_id": 2},
}


def gguf_tokenizer(path: Path) -> Tokenizer:
    """Raises `UnsupportedModel` for a kind or an option that we do not know, `DamagedModel` for missing keys."""
    metadata = read_header(gguf_parts(path)[0], arrays=True).metadata
    vocabulary = _Vocabulary(path, metadata)
    backend = vocabulary.backend()
    source = _template_source(metadata)
    named = {f"{name}_token": text for name, key in _NAMED.items() if (text := vocabulary.text(key)) is not None}
    template = ChatTemplate(source, named) if source else None
    return Tokenizer(backend, vocabulary.ends, template, named, name=path.stem)


def _template_source(metadata: Mapping[str, Any]) -> str | None:
    """The chat template; of several that have names, the one called "default"."""
    return metadata.get("tokenizer.chat_template") or metadata.get("tokenizer.chat_template.default")


class _Vocabulary:
    """Reads the keys `tokenizer.ggml.*`."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._path = path
        self._values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        self._model = self._values.get("model")
        if self._model not in _MAKERS:
            raise UnsupportedModel(
                f"{path} has a tokenizer of kind {self._model!r}; known are {_listed(_MAKERS)}",
                hint=_USE_ANOTHER_FORMAT,
            )
        if suppressed := self._values.get("suppress_tokens"):
            raise UnsupportedModel(f"{path} forbids {len(suppressed)} tokens (tokenizer.ggml.suppress_tokens), which "
                                   "we cannot do", hint="Remove the key with llama.cpp's gguf_new_metadata.py.")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self._needed("tokens"))]
        self.kinds = self._column("token_type", Kind.NORMAL)
        if (repeated := Counter(self.tokens).most_common(1)) and repeated[0][1] > 1:
            raise DamagedModel(f"{path} has the token {repeated[0][0]!r} twice", hint=_FETCH_OR_CONVERT)

    def backend(self) -> Any:
        try:
            backend = _MAKERS[self._model](self)
        except Exception as error:  # the library raises nothing narrower
            if isinstance(error, UnsupportedModel | DamagedModel):
                raise
            raise DamagedModel(f"{self._path} has a tokenizer that does not fit together: {error}",
                               hint=_FETCH_OR_CONVERT) from error
        backend.add_tokens([
            tokenizers.AddedToken(token, special=i in self._special, normalized=False)
            for i, token in enumerate(self.tokens)
            if i in self._special or self.kinds[i] == Kind.USER_DEFINED
        ])
        put_around(backend, self._added("bos"), self._added("eos"))
        return backend

    def id(self, name: str) -> int | None:
        """The token that a key names; an id beyond the vocabulary is none."""
        default = _DEFAULT_IDS.get(self._model or "", {}).get(f"{name}_token_id")
        found = self._values.get(f"{name}_token_id", default)
        return found if found is not None and 0 <= found < len(self.tokens) else default

    def text(self, name: str) -> str | None:
        return None if (id := self.id(name)) is None else self.tokens[id]

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that keys name, or that are known by their text, unless merges make them: then they are words, as
        "</s>" is in Qwen's vocabulary."""
        made = {merge.replace(" ", "", 1) for merge in self._values.get("merges", ()) if "<" in merge or "[" in merge}
        known = set(_END_TOKENS).union(*(texts for key, texts in _FILL_END_TOKENS.items() if key not in self._values))
        by_text = {i for i, token in enumerate(self.tokens) if token in known and token not in made}
        by_key = {id for key in _END_KEYS if (id := self.id(key.removesuffix("_token_id"))) is not None}
        listed = {id for id in self._values.get("eos_token_ids", ()) if 0 <= id < len(self.tokens)}
        return frozenset(by_text | by_key | listed)

    @cached_property
    def _special(self) -> frozenset[int]:
        """Tokens that are no text. End tokens are among them whatever the file calls them."""
        return self.ends | {i for i, kind in enumerate(self.kinds) if kind in (Kind.CONTROL, Kind.UNKNOWN)}

    def _added(self, name: str) -> tuple[str, int] | None:
        """The token that plain text is to begin or end with, if the file asks for one or is of a kind that has one."""
        asked = self._values.get(f"add_{name}_token")
        wanted = name == self._usual if asked is None else asked
        if not wanted:
            return None
        id = self.id(name)
        if id is not None:
            return self.tokens[id], id
        if asked:
            raise DamagedModel(f"{self._path} sets tokenizer.ggml.add_{name}_token, yet no {name}_token_id",
                               hint=_FETCH_OR_CONVERT)
        return None

    @property
    def _usual(self) -> str | None:
        """Which token goes with plain text where the file says nothing."""
        if self._model == "gpt2":
            return "bos" if SPLITTINGS[self._values.get("pre", "default")].add_bos else None
        return "bos" if self._model == "llama" else "eos"

    def _needed(self, key: str) -> Sequence[Any]:
        if key not in self._values:
            raise DamagedModel(f"{self._path} has no tokenizer.ggml.{key}", hint=_FETCH_OR_CONVERT)
        return list(self._values[key])

    def _column(self, key: str, default: float) -> Sequence[Any]:
        """A value for each token."""
        values = self._values.get(key, [default] * len(self.tokens))
        if len(values) < len(self.tokens):
            raise DamagedModel(f"{self._path} has {len(self.tokens)} tokens, yet {len(values)} of tokenizer.ggml.{key}",
                               hint=_FETCH_OR_CONVERT)
        return list(values[: len(self.tokens)])

    def byte_level(self) -> Any:
        if "pre" not in self._values:
            _log.warning("%s does not say how it splits words (tokenizer.ggml.pre): taken is llama.cpp's default, "
                         "which may not be the model's", self._path)
        pre = self._values.get("pre", "default")
        if pre not in SPLITTINGS:
            raise UnsupportedModel(
                f"{self._path} has a tokenizer of kind 'gpt2' with the word splitting {pre!r}; known are "
                f"{_listed(SPLITTINGS)}", hint=_USE_ANOTHER_FORMAT,
            )
        merges = [_pair(merge) for merge in self._needed("merges")]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(
            vocab=self._pieces().vocabulary, merges=merges, ignore_merges=SPLITTINGS[pre].ignore_merges
        ))
        SPLITTINGS[pre].apply(backend)
        backend.decoder = tokenizers.decoders.ByteLevel()
        return backend

    def by_scores(self) -> Any:
        return piece_tokenizer(self._pieces())

    def _pieces(self) -> Pieces:
        """llama.cpp knows these options of t5 only; those of sentencepiece's BPE it takes for granted."""
        t5 = self._model == "t5"
        return Pieces(
            self.tokens, self._column("scores", 0.0), self.kinds, self.id("unknown"), unigram=t5,
            prefix="always" if self._values.get("add_space_prefix", not t5) else "never",
            squeeze=t5 and bool(self._values.get("remove_extra_whitespaces")),
            charsmap=bytes(byte & 0xFF for byte in self._values.get("precompiled_charsmap", ())) if t5 else b"",
        )


# How the kinds that `tokenizer.ggml.model` names are built.
_MAKERS: dict[str | None, Callable[[_Vocabulary], Any]] = {
    "gpt2": _Vocabulary.byte_level, "llama": _Vocabulary.by_scores, "t5": _Vocabulary.by_scores,
}

_USE_ANOTHER_FORMAT = "Use the model's safetensors directory: its tokenizer.json says how it splits words."
_FETCH_OR_CONVERT = "Fetch the file again, or convert it anew."


def _pair(merge: str) -> tuple[str, str]:
    """A merge's two tokens; the first may itself be a space."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _listed(names: Iterable[str | None]) -> str:
    return ", ".join(repr(name) for name in names)
