"""What a user asks for: prompt, sampling parameters, seed. No torch, no tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from fullpipe.errors import PromptError, UsageError

StructuredKind = Literal["json", "json_object", "regex", "choice", "grammar"]


def _option(default: Any, help: str) -> Any:
    """A field that the command line offers."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Structured:
    """What the text must be.

    kind, text: "json", a JSON schema; "json_object" (any object), ""; "regex", a regular expression; "choice", a JSON
    list of texts of which one is said; "grammar", a context-free grammar in Lark's notation or in GBNF.
    """

    kind: StructuredKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(StructuredKind):
            raise UsageError(f"a text cannot be structured by {self.kind!r}", param="structured",
                             hint=f"Known are {', '.join(get_args(StructuredKind))}.")
        if not is_text(self.text):
            raise UsageError("a structure must be text that UTF-8 can spell", param="structured")
        if bool(self.text) == (self.kind == "json_object"):
            what = "has no text: it takes any object" if self.text else "needs a text: what it must be"
            raise UsageError(f"the structure {self.kind} {what}", param="structured")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is picked; names and meanings as vLLM has them.

    Three defaults differ: temperature 0 (greedy), max_tokens 128, and seed 0: the same question gets the
    same answer. Give each request a seed of its own for different samples. At temperature 0 top_k, top_p, min_p
    and seed change nothing, as in vLLM.

    Processors act on the target's logits: masks first (structured, allowed_token_ids, bad_words, min_tokens), and then
    in the order of transformers: bias, repetition penalty, frequency and presence penalty, temperature, top-k, top-p,
    min-p. Then the token is `argmax(logits + gumbel(seed, position))`, or the plain argmax at temperature 0.

    Where masks and bias together would leave no token, the structure alone decides, and without one the logits as
    they are: so a text whose structure is complete ends, whatever min_tokens says.

    temperature: 0 (the default here: greedy) or more.
    top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    top_p, min_p: nucleus and minimum-probability filters; 1 and 0 keep all.
    repetition_penalty: over prompt and output, as in transformers; 1 is none.
    presence_penalty, frequency_penalty: over the output only, as in vLLM; 0 is none.
    logit_bias: token id -> number added to its logit.
    seed: the text is a function of model, prompt, parameters and seed.
    max_tokens: stop after so many new tokens; where the context holds fewer, the text ends with it, for the same reason
        ("length"). The server refuses such a request, as vLLM's does.
    stop: strings that end the text; they are not part of it. The text of a special token also ends it at that token.
    stop_token_ids: tokens that end the text, beside the model's own end tokens.
    skip_special_tokens: leave special tokens out of the text. A token that ends it is no part of it in any case.
    ignore_eos: do not stop at the model's end tokens.
    min_tokens: before there are so many tokens, none is picked that ends the text, and stop strings are not looked for.
    bad_words: texts that are not said: of the tokens of each, with a space before it and without, the last does not
        follow the others. They may still be spelled with other tokens, as in vLLM.
    allowed_token_ids: the only tokens that may be picked; None: all. Without an end token the text ends at max_tokens.
    structured: what the text must be. When it is that, it ends.
    bad_word_ids: what bad_words are in tokens, which `fitted` fills in.
    logprobs: report with every token its log-probability and those of so many likeliest ones, 0 to 20; None: nothing.
        Natural logarithms of the softmax of the target's raw logits, before any processor (vLLM's `raw_logprobs`).
    prompt_logprobs: report the same of every token of the prompt but the first, which nothing stands before. The prompt
        is then computed anew, whatever others have computed of it.
    include_stop_str_in_output: the stop string, or the token, that ends the text is part of it.
    accept_typical: 0 is exact. Above it the text is no longer the target's: where the token that it picks was not
        guessed, one that was may stand in its place if its probability, processors applied and noise not, is above
        min(e, sqrt(e) exp(-H)), e this number and H the entropy in nats (Medusa's typical acceptance, arXiv
        2401.10774, section 2.3.2). The smaller, the more passes. At temperature 0 probabilities are those of
        temperature 1.
    """

    temperature: float = _option(0.0, "0 is greedy.")
    top_k: int = _option(0, "Sample from the k likeliest tokens; 0: all.")
    top_p: float = _option(1.0, "Sample from the likeliest tokens of this total probability.")
    min_p: float = _option(0.0, "Drop tokens below this share of the likeliest one.")
    repetition_penalty: float = _option(1.0, "Above 1 avoids repeating; 1: none.")
    presence_penalty: float = _option(0.0, "Above 0 avoids tokens that the answer has; 0: none.")
    frequency_penalty: float = _option(0.0, "The same, by how often it has them.")
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = _option(0, "The text is a function of model, prompt, parameters and seed.")
    max_tokens: int = _option(128, "End after so many new tokens.")
    stop: tuple[str, ...] = _option((), "End the text at this string; may be repeated.")
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = _option(False, "Go on past the model's end tokens.")
    skip_special_tokens: bool = _option(True, "Leave special tokens out of the text.")
    min_tokens: int = _option(0, "Do not end before so many new tokens.")
    bad_words: tuple[str, ...] = _option((), "Do not say this; may be repeated.")
    allowed_token_ids: tuple[int, ...] | None = None
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    structured: Structured | None = None
    accept_typical: float = _option(0.0, "0: the model's own text. Above 0 (1 at most): LOSSY, a guessed token may "
                                    "stand where the model would have said another; the smaller, the more.")

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        words = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ())
        object.__setattr__(self, "bad_words", words)
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(self.allowed_token_ids)))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        for ok, what in (
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature must be 0 or more"),
            (self.top_k >= -1, "top_k must be -1, 0 (both: off) or more"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]"),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]"),
            (self.repetition_penalty > 0, "repetition_penalty must be above 0"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must be in [-2, 2]"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must be in [-2, 2]"),
            (0 <= self.seed < 2**64, "seed must be in [0, 2**64)"),
            (self.max_tokens >= 1, "max_tokens must be 1 or more"),
            (0 <= self.min_tokens <= self.max_tokens, f"min_tokens must be in [0, max_tokens], here {self.max_tokens}"),
            (all(word.strip() for word in self.bad_words), "bad_words must not be empty"),
            (all(map(is_text, self.bad_words)), "bad_words must be text that UTF-8 can spell"),
            (self.allowed_token_ids != (), "allowed_token_ids must name at least one token"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs must be in [0, 20], or None"),
            (self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
             "prompt_logprobs must be in [0, 20], or None"),
            (0 <= self.accept_typical <= 1, "accept_typical must be in [0, 1]"),
            (all(self.stop), "stop strings must not be empty"),
            (all(map(is_text, self.stop)), "stop strings must be text that UTF-8 can spell"),
            (all(bias < math.inf for bias in self.logit_bias.values()), "logit_bias must be numbers below infinity"),
        ):
            if not ok:
                raise UsageError(f"{what} (got {self._shown(what.split()[0])})")
        if self.structured and self.ignore_eos:
            raise UsageError("a structured text ends with an end token, which ignore_eos would pass over",
                             hint="Leave out one of the two.", param="ignore_eos")

    def _shown(self, name: str) -> object:
        return getattr(self, name, self.stop)

    @property
    def accept(self) -> str:
        """"exact" or "typical:EPS", for people to read."""
        return f"typical:{self.accept_typical:g}" if self.accept_typical else "exact"

    @property
    def plain_greedy(self) -> bool:
        """True when the pick is the argmax of the raw logits: no processor, no noise."""
        return self.temperature == 0 and not self.needs_history and not self.logit_bias and not self.restricted

    @property
    def needs_history(self) -> bool:
        """True when penalties depend on which tokens stand on the path."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def restricted(self) -> bool:
        """True when there are tokens that may not be picked, whatever their logits are."""
        return bool(self.structured or self.min_tokens or self.bad_word_ids) or self.allowed_token_ids is not None


def is_text(text: str) -> bool:
    """Not so where half of a surrogate pair is in it: no model says one."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


_MOST = 3.4028234663852886e38  # the largest float32; logits are float32, and a bias beyond it is infinite


def fitted(prompt: Sequence[int], params: SamplingParams, *, vocab: int, max_model_len: int,
           special: Mapping[str, int], encode: Callable[[str], Sequence[int]] | None = None) -> SamplingParams:
    """The parameters, with `max_tokens` cut to what the context still holds, tokens to stop at for stop strings
    that are their texts, and bad words in tokens.

    vocab: number of real tokens. special: the special ones, by their texts. encode: makes tokens of text, no special
    ones around them; without it nothing becomes of bad words. Raises PromptError for a prompt that fills
    the context, and UsageError for tokens that do not exist, for stop strings that can never match, and for a
    logit_bias from which the last stage could pick nothing: there it would end the pipeline.
    """
    room = max_model_len - len(prompt)
    if room < 1:
        raise PromptError(f"the prompt has {len(prompt)} tokens, the context holds {max_model_len}",
                          hint="Shorten the prompt, or use a model with a longer context, or more cache memory where "
                               "that is what bounds it (`kv_pool_mib`).")
    bias = params.logit_bias
    if bad := [token for token in (*prompt, *bias) if not 0 <= token < vocab]:
        raise UsageError(f"token {bad[0]} is not in the vocabulary of {vocab} tokens")
    if bad := [token for token in params.stop_token_ids if not 0 <= token < vocab]:
        raise UsageError(f"the model never says token {bad[0]}: its vocabulary has {vocab} tokens",
                         hint="Leave it out of stop_token_ids, or use the model's own id.", param="stop_token_ids")
    if bad := [token for token, value in bias.items() if value > _MOST]:
        raise UsageError(f"the logit_bias of token {bad[0]} is too large (got {bias[bad[0]]:g})",
                         hint="Logits are 32-bit floats: stay below 3.4e38.")
    if len(bias) >= vocab and all(value < -_MOST for value in bias.values()):
        raise UsageError(f"logit_bias forbids every one of the {vocab} tokens, so there is nothing to pick",
                         hint="Leave at least one token without -inf.")
    _check_allowed(params, vocab)
    return replace(params, max_tokens=min(params.max_tokens, room), min_tokens=min(params.min_tokens, room),
                   stop_token_ids=(*params.stop_token_ids, *_special_stops(params, special)),
                   bad_word_ids=tuple(_bad_word_ids(params, encode)) if encode else params.bad_word_ids)


def _check_allowed(params: SamplingParams, vocab: int) -> None:
    allowed, bias = params.allowed_token_ids, params.logit_bias
    if allowed is None:
        return
    if bad := [token for token in allowed if not 0 <= token < vocab]:
        raise UsageError(f"token {bad[0]} is not in the vocabulary of {vocab} tokens", param="allowed_token_ids",
                         hint="Leave it out of allowed_token_ids.")
    if all(bias.get(token, 0.0) < -_MOST for token in allowed):
        raise UsageError("logit_bias forbids all of allowed_token_ids, so there is nothing to pick",
                         hint="Leave at least one of them without -inf.", param="allowed_token_ids")


def _bad_word_ids(params: SamplingParams, encode: Callable[[str], Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """The tokens of each bad word, and of the same with a space before it where that is another word and not one token
    more: as vLLM has it."""
    for word in params.bad_words:
        plain, spaced = (tuple(encode(space + word.lstrip())) for space in ("", " "))
        if plain:
            yield plain
        if plain and spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            yield spaced


def _special_stops(params: SamplingParams, special: Mapping[str, int]) -> list[int]:
    """Special tokens that stop strings mean. The text leaves those tokens out, so in it no such string is found."""
    if not params.skip_special_tokens:
        return []
    for stop in params.stop:
        if stop not in special and (within := next((text for text in special if text in stop), None)) is not None:
            raise UsageError(
                f"the stop string {stop!r} can never match: the text leaves out the special token {within!r}",
                hint=f"Stop at the token itself: `stop={within!r}` (in Python and over HTTP also stop_token_ids="
                     f"[{special[within]}]). Or keep such tokens in the text: `skip_special_tokens=False`.",
                param="stop")
    return [special[stop] for stop in params.stop if stop in special]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way through the engine.

    id: unique within the engine.
    prompt: token ids, at least one.
    params: how to pick; `params.max_tokens` bounds the answer.
    eos: token ids that end the text (empty when `params.ignore_eos`).
    priority: lower goes first among those that wait (vLLM's meaning); waiting raises it, so that none waits for ever.
    deadline: seconds of the pipeline's clock at which it ends whatever it has, with the reason "deadline".
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    eos: frozenset[int] = frozenset()
    priority: int = 0
    deadline: float = math.inf

    @property
    def told_ends(self) -> list[int]:
        """The end tokens, where what may follow depends on which they are; else none."""
        return sorted(self.eos) if self.params.min_tokens or self.params.structured else []

    def __post_init__(self) -> None:
        if not self.prompt:
            raise PromptError("the prompt is empty", hint="Give at least one token of text.")
