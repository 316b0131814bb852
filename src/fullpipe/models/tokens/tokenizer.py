"""Text to token ids and back: one class for GGUF files and transformers directories.

Built on `tokenizers` and jinja2 alone; importing transformers for it would cost seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fullpipe.errors import DraftMismatch, UsageError
from fullpipe.models.tokens.template import ChatTemplate

_REPLACEMENT = "�"  # what incomplete or invalid UTF-8 decodes to
_MAX_CHARACTER_TOKENS = 4  # a character has at most 4 bytes, so its beginning is at most so many tokens back

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
    """Is made by `loading.load_tokenizer`.

    backend: the `tokenizers.Tokenizer`.
    eos_ids: every token after which the model has nothing more to say.
    template: None for a model without a chat template.
    """

    backend: Any
    eos_ids: frozenset[int] = frozenset()
    template: ChatTemplate | None = None
    name: str = field(default="this model")

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
                hint="It continues plain text: a str in Python, /v1/completions on a server. On the command line that "
                     "is `chat_template=False`.",
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
        hint="Choose a draft of the same model family, or `draft=ngram`, which fits every model.",
    )
