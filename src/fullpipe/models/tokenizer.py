"""Text to token ids and back: one class for GGUF files and transformers directories.

Built on `tokenizers` and jinja2 alone; importing transformers for it would cost seconds. A byte-level BPE
tokenizer inside a GGUF file is rebuilt from its metadata at every load: 0.5 s for Qwen's 151,665 tokens, and
a converted `tokenizer.json` would save 0.3 s of that: not worth a second copy that can go stale.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from fullpipe.errors import DamagedModel, DraftMismatch, UnsupportedModel, UsageError
from fullpipe.models.chat_template import ChatTemplate
from fullpipe.models.gguf_header import read_header

_REPLACEMENT = "�"  # what incomplete or invalid UTF-8 decodes to
_MAX_CHARACTER_TOKENS = 4  # a character has at most 4 bytes, so its beginning is at most so many tokens back

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

# GPT-2's alphabet, by which byte-level tokens are written: a printable Latin-1 character is its own byte, the others
# follow from U+0100 on in their order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # how sentencepiece writes a byte that is no character of its own

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """Use `Tokenizer.load`.

    backend: the `tokenizers.Tokenizer`.
    eos_ids: every token after which the model has nothing more to say.
    template: None for a model without a chat template.
    """

    backend: Any
    eos_ids: frozenset[int] = frozenset()
    template: ChatTemplate | None = None
    name: str = field(default="this model")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of a GGUF file or of a directory as transformers writes it.

        Raises `UnsupportedModel` for a kind of tokenizer that we do not know, `DamagedModel` when its files
        are missing or broken.
        """
        return _from_directory(path) if path.is_dir() else _from_gguf(path)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special`, also those that the model puts around plain text (BOS).

        Special tokens spelled out in the text ("<|im_end|>") become those tokens, as in transformers.
        """
        return list(self.backend.encode(text, add_special_tokens=add_special).ids)

    def chat(self, prompt: str | Sequence[Message], system: str | None = None) -> list[int]:
        """Token ids of a conversation in the model's own format, up to where its answer begins.

        prompt: what the user says, or messages with "role" and "content". system: the system message; None
        leaves it to the template, which may have one of its own.

        Raises `UsageError` when the model has no template, or it refuses these messages.
        """
        if self.template is None:
            raise UsageError(
                f"{self.name} has no chat template",
                hint="Use --no-chat-template (use_chat_template=False) to let it continue the plain text.",
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            if messages and messages[0].get("role") == "system":
                raise UsageError("two system messages: one in the messages, one beside", hint="Drop one.")
            messages.insert(0, {"role": "system", "content": system})
        return self.encode(self.template.render(messages))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """Decodes token by token."""
        return TextStream(self)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for: bytes that need not be whole characters. Of a special token they are its name's;
        an id without a token has none."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        text = self.backend.id_to_token(token) or ""
        if self._byte_level:
            return bytes(_BYTES[character] for character in text)
        if _BYTE_TOKEN.fullmatch(text):
            return bytes.fromhex(text[3:-1])
        return str(text).replace("▁", " ").encode()

    @cached_property
    def _added(self) -> dict[int, str]:
        """Tokens beside the vocabulary, special ones among them: their text is written as it is."""
        return {id_: token.content for id_, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def _byte_level(self) -> bool:
        """Whether a token's characters stand for bytes, as in GPT-2; else they are text, as in sentencepiece."""
        decoder = self.backend.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Every real token by id. The rows that models pad their vocabularies with are not in it."""
        return {id_: token for token, id_ in self.backend.get_vocab(with_added_tokens=True).items()}

    @property
    def vocab_size(self) -> int:
        """Number of real tokens; a model's head may have more rows."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tokens, ids and merges, whatever file they came from. Equal: the same tokenizer."""
        digest = hashlib.sha256()
        for id_, token in sorted(self.tokens.items()):
            digest.update(f"{id_}\t{token}\n".encode())
        for merge in json.loads(self.backend.to_str())["model"].get("merges", ()):
            digest.update(f"{merge if isinstance(merge, str) else ' '.join(merge)}\n".encode())
        return digest.hexdigest()


class TextStream:
    """Turns tokens into text as they come. The pieces together are what `decode` says of all tokens.

    Decoders look at neighbours (a leading space, the bytes of one character), so a window of recent tokens is
    decoded each time and what it says beyond the text already given is new. Only the last character of the
    window can still change, and only if it is U+FFFD: it may be the first bytes of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text

    def push(self, token: int) -> str:
        """The text that is certain after `token`; may be empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = text.removesuffix(_REPLACEMENT)
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        self._shorten(text)
        return new

    def finish(self) -> str:
        """What was held back. The stream is empty afterwards."""
        rest = self._tokenizer.decode(self._window)[self._given :]
        self._window, self._given = [], 0
        return rest

    def _shorten(self, text: str) -> None:
        """Drops the beginning of the window where the rest decodes the same without it."""
        if len(self._window) < 2 * _MAX_CHARACTER_TOKENS:
            return
        open_ended = text.endswith(_REPLACEMENT)
        shorter = self._window[-_MAX_CHARACTER_TOKENS if open_ended else -1 :]
        said = self._tokenizer.decode(shorter)
        if said:  # a window of special tokens only would make the next token look like the text's first
            self._window = shorter
            self._given = len(said) - open_ended


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises `DraftMismatch` unless every token id means the same to both.

    Padding does not count. Merges do not either: the draft is only ever given ids.
    """
    if target.tokens == draft.tokens:
        return
    ids = sorted(set(target.tokens) | set(draft.tokens))
    first = next(i for i in ids if target.tokens.get(i) != draft.tokens.get(i))
    theirs, ours = (repr(t.tokens[first]) if first in t.tokens else "nothing" for t in (draft, target))
    raise DraftMismatch(
        f"the draft {draft.name} has another vocabulary than {target.name}: {draft.vocab_size} tokens "
        f"against {target.vocab_size}; the first difference is token {first}, {theirs} against {ours}",
        hint="Choose a draft of the same model family, or `--draft ngram`, which fits every model.",
    )


def _from_gguf(path: Path) -> Tokenizer:
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
        raise DamagedModel(
            f"{path} has no tokenizer.ggml.{missing[0]}", hint="Fetch the file again, or convert it anew."
        )
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


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModel(
            f"{path} has no tokenizer.json",
            hint="Write one: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise DamagedModel(f"{file} cannot be read: {error}", hint="Fetch the model again.") from error
    # What was set for training batches; a prompt must come out whole and unpadded.
    backend.no_truncation()
    backend.no_padding()
    settings = _read_json(path / "tokenizer_config.json")
    source = _template_source(path, settings)
    eos_token = _token_text(settings.get("eos_token"))
    template = ChatTemplate(source, _token_text(settings.get("bos_token")), eos_token) if source else None
    return Tokenizer(backend, _end_ids(path, backend, eos_token), template, name=path.name)


def _end_ids(path: Path, backend: Any, eos_token: str | None) -> frozenset[int]:
    """The end tokens that any of the directory's three files names."""
    ends = {backend.token_to_id(eos_token)} if eos_token else set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path / name).get("eos_token_id")
        ends.update(value if isinstance(value, list) else [value])
    return frozenset(ends - {None})


def _template_source(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template's text: a file of its own, or in the settings, alone or as the list's "default"."""
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _token_text(token: Any) -> str | None:
    """A token as settings files have it: a string, or an object around it."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty when there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise DamagedModel(f"{path} is not JSON: {error}", hint="Fetch the model again.") from error
