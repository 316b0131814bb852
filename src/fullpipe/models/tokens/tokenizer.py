"""Text to token ids and back: one class for GGUF files and transformers directories.

Built on `tokenizers` and jinja2 alone; importing transformers for it would cost seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fullpipe.errors import DraftMismatch, PromptError, UsageError
from fullpipe.models.tokens.messages import Message, conversation
from fullpipe.models.tokens.stream import Decoding, TextStream
from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.request import is_text


@dataclass(frozen=True)
class Tokenizer:
    """Is made by `loading.load_tokenizer`.

    backend: the `tokenizers.Tokenizer`.
    eos_ids: every token after which the model has nothing more to say.
    template: None for a model without a chat template. named: the special tokens that have a name ("bos_token").

    Raises `UnsupportedModel` for a decoder that we do not know.
    """

    backend: Any
    eos_ids: frozenset[int] = frozenset()
    template: ChatTemplate | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    name: str = field(default="this model")

    def __post_init__(self) -> None:
        self._decoding  # noqa: B018 - a decoder that we do not know is refused here and not at the first token

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special`, also those that the model puts around plain text (BOS).

        Special tokens spelled out in the text ("<|im_end|>") become those tokens, as in transformers. Raises
        `PromptError` for half of a surrogate pair.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special).ids)
        except TypeError:
            if is_text(text):
                raise
            raise PromptError("the prompt is no text that UTF-8 can spell",
                              hint="It may have been read in another encoding: convert it to UTF-8.") from None

    def chat(self, prompt: str | Sequence[Message], system: str | None = None, *,
             add_generation_prompt: bool | None = None, continue_final_message: bool = False,
             chat_template_kwargs: Mapping[str, Any] | None = None,
             tools: Sequence[Mapping[str, Any]] | None = None, add_special: bool = False) -> list[int]:
        """Token ids of a conversation in the model's own format, up to where its answer begins.

        prompt: what the user says, or messages (`messages.Message`). system: the system message; None leaves it to the
        template, which may have one of its own. add_special: as of `encode`, beside what the template puts there. The
        others: as of `ChatTemplate.render`.

        Raises `UsageError` when the model has no template, or it refuses these messages.
        """
        if self.template is None:
            raise UsageError(
                f"{self.name} has no chat template",
                hint="Plain text needs none: a str in Python, /v1/completions on a server. On the command line that is "
                     "`use_chat_template=False`. Or give it one: `chat_template=FILE`.",
            )
        messages = conversation([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if system is not None:
            if messages and messages[0]["role"] == "system":
                raise UsageError("two system messages: one in the messages, one beside", hint="Drop one.")
            messages.insert(0, {"role": "system", "content": system})
        return self.encode(self.template.render(messages, add_generation_prompt, continue_final=continue_final_message,
                                                variables=chat_template_kwargs, tools=tools), add_special)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        """Decodes token by token what continues `prompt`: together with what is certain of the prompt's own text it is
        what `decode` says of both. A leading space, or a character whose first bytes the prompt has, depend on it."""
        return self._decoding.stream(prompt, skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for in the middle of a text: bytes that need not be whole characters. Of a special
        token they are its name's; an id without a token has none."""
        return self._decoding.bytes_of(token)

    def bytes_of_all(self, count: int) -> list[bytes]:
        """`token_bytes` of the first `count` tokens."""
        return self._decoding.bytes_of_all(self.tokens, count)

    def token_text(self, token: int) -> str:
        r"""The same for people to read: what is no whole character is spelled out, as in "\xe2\x80"."""
        return self.token_bytes(token).decode(errors="backslashreplace")

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens by their texts."""
        return {token.content: id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _decoding(self) -> Decoding:
        return Decoding(self.backend, self.name, frozenset(self.special))

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
        """SHA-256 over tokens, ids and byte-level merges, whatever file they came from. Equal: the same tokenizer.

        The merges of sentencepiece's kind follow from scores, and each converter lists them in an order of its own.
        """
        digest = hashlib.sha256()
        for id_, token in sorted(self.tokens.items()):
            digest.update(f"{id_}\t{token}\n".encode())
        merges = json.loads(self.backend.model.__getstate__()).get("merges", ()) if self._decoding.byte_level else ()
        for merge in merges:
            digest.update(f"{merge if isinstance(merge, str) else ' '.join(merge)}\n".encode())
        return digest.hexdigest()


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
