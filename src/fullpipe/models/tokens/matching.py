"""Matchers follow a text token by token and say what its structure lets come next. They are llguidance's. No torch.

`Guide` makes matchers for one tokenizer, at the stations. What a front door asks before is in `checking.py`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache
from typing import Any, Protocol

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.request import Structured

NO_END = "Use a model whose files name one (eos_token_id)."

_LIMITS: dict[str, Any] = {"verbose_errors": False}  # the others are llguidance's own
_NO_TEXT = b"\xff"  # begins no text in UTF-8; llguidance marks special tokens with it
_LEAD = "\x02"  # before a text, so that a tokenizer that puts a space before texts puts it elsewhere


class Spelled(Protocol):
    """What must be known of a tokenizer."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...


class Guide:
    """Makes matchers for the texts of one tokenizer.

    vocab: number of real tokens; None: as many as the tokenizer has. ends: end tokens; they may follow where a
    structure is complete, and there alone. Raises MissingExtra without llguidance.

    size: number of tokens.
    """

    def __init__(self, tokenizer: Spelled, vocab: int | None, ends: Collection[int]) -> None:
        self.size = _size(tokenizer) if vocab is None else vocab
        self.ends = frozenset(token for token in ends if token < self.size)
        if not self.ends:
            raise UsageError("a structured text needs an end token", param="structured", hint=NO_END)
        # In two steps: each keeps the interpreter's lock, and so a station's sign of life, for as long as it takes.
        bare = library().LLTokenizer(_Vocabulary(tokenizer, self.size, self.ends), slices=[])
        self._tokens = bare.with_slices(bare.general_slices())

    def matcher(self, structured: Structured) -> Any:
        """A matcher at the beginning of a text. One that cannot be made says so (`is_error`).

        It is made anew: copies of one would have their lexer in common, and its limits, so one text would end where
        another has used them up.
        """
        return matcher(self._tokens, grammar(structured))


class _Vocabulary:
    """Is a tokenizer as llguidance reads it: the bytes of every token, and how a forced text is cut into tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Spelled, vocab: int, ends: Collection[int]) -> None:
        special = {*tokenizer.special.values(), *ends}
        self.tokens = _all_bytes(tokenizer, vocab)
        self.eos_token_id = min(ends)
        self.special_token_ids = sorted(token for token in special if token < vocab)
        self._encode, self._special = tokenizer.encode, special

    def __call__(self, text: str | bytes) -> list[int]:
        """As the model's own tokenizer has it in the middle of a text, or else the longest tokens that fit. The tokens'
        bytes are those of the text."""
        wanted = text if isinstance(text, bytes) else text.encode()
        for lead in ("", _LEAD):
            tokens = self._encode(lead + wanted.decode(errors="replace"))
            while tokens and self._size_of(tokens) > len(wanted):
                tokens = tokens[1:]
            if b"".join(self.tokens[token] for token in tokens) == wanted and self._special.isdisjoint(tokens):
                return tokens
        return self._longest(wanted)

    def _size_of(self, tokens: list[int]) -> int:
        return sum(len(self.tokens[token]) for token in tokens)

    def _longest(self, wanted: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(wanted):
            size = next((size for size in range(min(self._reach, len(wanted) - at), 0, -1)
                         if wanted[at : at + size] in self._by_bytes), 0)
            if not size:
                break
            tokens.append(self._by_bytes[wanted[at : at + size]])
            at += size
        return tokens

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {spelled: token for token, spelled in reversed([*enumerate(self.tokens)])
                if spelled and token not in self._special}

    @cached_property
    def _reach(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def _all_bytes(tokenizer: Spelled, vocab: int) -> list[bytes]:
    """What each token is in a text; nothing where it can be in none."""
    quick = getattr(tokenizer, "bytes_of_all", None)
    spelled = quick(vocab) if quick else [tokenizer.token_bytes(token) for token in range(vocab)]
    return [b"" if one.startswith(_NO_TEXT) else one for one in spelled]


def _size(tokenizer: Spelled) -> int:
    tokens: Mapping[int, str] = tokenizer.tokens  # type: ignore[attr-defined]
    return max(tokens) + 1


# ---- structures ------------------------------------------------------------------------------------------------------


def matcher(tokens: Any, grammar: str) -> Any:
    found = library()
    return found.LLMatcher(tokens, grammar, log_level=0, limits=found.LLParserLimits(**_LIMITS))


@lru_cache(maxsize=32)
def grammar(structured: Structured) -> str:
    """A structure in llguidance's words. Raises ValueError for what is none."""
    words, text = library(), structured.text
    match structured.kind:
        case "json" | "json_object":
            schema = '{"type": "object"}' if structured.kind == "json_object" else text
            if not isinstance(_json(schema), dict):
                raise ValueError("it is not a JSON object")
            return str(words.LLMatcher.grammar_from_json_schema(schema))
        case "choice":
            choices = _json(text)
            if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
                raise ValueError("it is not a JSON list of texts, one at least")
        case "regex":
            return str(words.LLMatcher.grammar_from_regex(text))
    return str(words.grammar_from(structured.kind, text))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def library() -> Any:
    """llguidance. Raises MissingExtra."""
    try:
        import llguidance
    except ImportError:
        raise MissingExtra("structured texts need llguidance", hint="pip install 'fullpipe[structured]'") from None
    return llguidance
