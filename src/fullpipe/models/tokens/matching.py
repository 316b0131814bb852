"""Matchers follow a text token by token and say what its structure lets come next. They are llguidance's. No torch.

`check_structure` is for a front door: it says what is wrong with a structure before anybody computes. `Guide` makes
matchers for one tokenizer, at the stations.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache
from typing import Any, Protocol

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.request import Structured

MOST_TEXT = 1 << 20
"""Bytes that a structure may have."""

_KEPT = 32  # structures of which a station keeps what was made of them
_TOLD = 300  # characters of what llguidance says
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
            raise UsageError("a structured text needs an end token", param="structured", hint=_NO_END)
        self._tokens = _library().LLTokenizer(_Vocabulary(tokenizer, self.size, self.ends))
        self._made: OrderedDict[Structured, Any] = OrderedDict()
        self._lock = threading.Lock()  # several pipelines of one process may run in threads of their own

    def matcher(self, structured: Structured) -> Any:
        """A matcher at the beginning of a text. One that cannot be made says so (`is_error`), and lets a text end."""
        with self._lock:
            made = self._made.pop(structured, None)
            if made is None or made.is_error():
                made = _matcher(self._tokens, _grammar(structured))
            self._made[structured] = made
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return made.deep_copy()


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


_NO_END = "Use a model whose files name one (eos_token_id)."


def check_structure(structured: Structured, tokenizer: Spelled) -> None:
    """Raise UsageError for a structure that no text could be held to, MissingExtra without llguidance.

    From any thread. It may take a second for a large one, and is quick for one that was checked before.
    """
    if not tokenizer.eos_ids:
        raise UsageError("this model has no end token, so a structured text would never end", param="structured",
                         hint=_NO_END)
    if len(structured.text.encode()) > MOST_TEXT:
        raise UsageError(f"the structure has {len(structured.text.encode()):,} bytes, {MOST_TEXT:,} at most are taken",
                         hint="Make it smaller.", param="structured")
    fault = _fault(structured)
    if fault is None and _names_tokens(structured):
        fault = _told(_own_guide(tokenizer).matcher(structured))
    if fault is not None:
        raise UsageError(f"the {_NAMES[structured.kind]} cannot be followed: {fault}", param="structured",
                         hint="What is understood: https://github.com/guidance-ai/llguidance/tree/main/docs")


_NAMES = {"json": "JSON schema", "json_object": "structure", "regex": "regular expression", "choice": "choice",
          "grammar": "grammar"}


@lru_cache(maxsize=64)
def _fault(structured: Structured) -> str | None:
    """What is wrong with a structure, whatever the tokenizer; None: nothing, or that cannot be said without it."""
    library = _library()
    try:
        grammar = _grammar(structured)
    except ValueError as error:
        return _short(str(error))
    if _names_tokens(structured):
        return None
    matcher = _matcher(library.LLTokenizer("byte"), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _told(matcher)


@lru_cache(maxsize=64)
def _names_tokens(structured: Structured) -> bool:
    """Whether it is a grammar that is sound but for tokens of the model that it names."""
    if structured.kind != "grammar" or "<" not in structured.text:
        return False
    failed, told = _library().LLMatcher.validate_grammar_with_warnings(_grammar(structured))
    return not failed and any("no tokenizer" in line for line in told)


def _told(matcher: Any) -> str | None:
    return _short(matcher.get_error()) if matcher.is_error() else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TOLD else f"{text[:_TOLD]}..."


_guides: OrderedDict[int, tuple[Spelled, Guide]] = OrderedDict()


def _own_guide(tokenizer: Spelled) -> Guide:
    """One for the tokenizer of a front door, of which a process has one or two."""
    if id(tokenizer) not in _guides:
        _guides[id(tokenizer)] = tokenizer, Guide(tokenizer, None, tokenizer.eos_ids)
        if len(_guides) > 2:
            _guides.popitem(last=False)
    return _guides[id(tokenizer)][1]


def _matcher(tokens: Any, grammar: str) -> Any:
    library = _library()
    return library.LLMatcher(tokens, grammar, log_level=0, limits=library.LLParserLimits(verbose_errors=False))


def _grammar(structured: Structured) -> str:
    """A structure in llguidance's words. Raises ValueError for what is none."""
    library, text = _library(), structured.text
    match structured.kind:
        case "json" | "json_object":
            schema = '{"type": "object"}' if structured.kind == "json_object" else text
            if not isinstance(_json(schema), dict):
                raise ValueError("it is not a JSON object")
            return str(library.LLMatcher.grammar_from_json_schema(schema))
        case "choice":
            choices = _json(text)
            if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
                raise ValueError("it is not a JSON list of texts, one at least")
        case "regex":
            return str(library.LLMatcher.grammar_from_regex(text))
    return str(library.grammar_from(structured.kind, text))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtra("structured texts need llguidance", hint="pip install 'fullpipe[structured]'") from None
    return llguidance
