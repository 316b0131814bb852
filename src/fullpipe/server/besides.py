"""Beside an answer's text a request may want the prompt before it, the tokens' ids, log-probabilities of the prompt, or
the best of several texts. Each is a way of making answers around another (`replies.Replies`); who wants none gets that
other one itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel

from fullpipe.messages import Scored
from fullpipe.models.tokens.messages import conversation, text_of
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.server.answer import Choice, News
from fullpipe.server.problems import Problem
from fullpipe.server.protocol.answers import PromptLogprob, PromptLogprobs, Usage
from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest, Options
from fullpipe.server.replies import Replies, Spelling, finish_reason, spell

Say = Callable[[Choice], tuple[str, list[int]]]
"""What comes before a choice's text, and of each of the prompt's tokens how many characters of it come before that."""


def for_chat(body: ChatRequest, replies: Replies, tokenizer: Tokenizer) -> Replies:
    """Makes what the request wants besides. Raises `Problem` for what cannot be told."""
    _check(body, bool(body.logprobs))
    if body.echo:
        before = _last_message(body)
        replies = Echoed(replies, lambda choice: (before(), []))
    return _with_more(body, replies, tokenizer, at_top=True)


def for_text(body: CompletionRequest, replies: Replies, tokenizer: Tokenizer) -> Replies:
    """The same for a completion."""
    _check(body, body.logprobs is not None)
    _check_number(body)
    if body.echo:
        whole = body.truncate_prompt_tokens is None
        texts = [prompt if isinstance(prompt, str) and whole else None for prompt in body.prompts()]
        replies = Echoed(replies, lambda choice: spelled_prompt(choice.tokens, texts[choice.prompt], tokenizer,
                                                                ends=choice.silent), body.logprobs)
    replies = _with_more(body, replies, tokenizer, at_top=False)
    return Best(replies, body.n or 1) if body.texts() > (body.n or 1) else replies


def _with_more(body: Options, replies: Replies, tokenizer: Tokenizer, *, at_top: bool) -> Replies:
    if not body.return_token_ids and body.prompt_logprobs is None:
        return replies
    return More(replies, tokenizer, at_top=at_top, ids=bool(body.return_token_ids), scores=body.prompt_logprobs)


def spelling(body: Options, tokenizer: Tokenizer) -> Spelling:
    """Says what log-probabilities call tokens."""
    return _Numbers() if body.return_tokens_as_token_ids else tokenizer


class _Numbers:
    """Calls tokens by their ids, as vLLM does."""

    def token_bytes(self, token: int) -> bytes:
        return f"token_id:{token}".encode()


# ---- what cannot be --------------------------------------------------------------------------------------------------


def _check(body: Options, logprobs: bool) -> None:
    if body.prompt_logprobs is not None and body.stream:
        raise Problem(400, "prompt_logprobs cannot be streamed: stream must be false", param="prompt_logprobs")
    if body.return_tokens_as_token_ids and not logprobs:
        raise Problem(400, "return_tokens_as_token_ids needs logprobs", param="return_tokens_as_token_ids")


def _check_number(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise Problem(400, f"best_of must be at least n ({body.best_of} < {body.n})", param="best_of")
    if body.texts() > (body.n or 1) and body.stream:
        raise Problem(400, "best_of above n cannot be streamed: the best is known when all have ended", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise Problem(400, "max_tokens must be 1 or more where echo does not ask for the prompt", param="max_tokens")


def kept(body: Options, tokens: list[int], context: int) -> list[int]:
    """Of a prompt's tokens those that the request keeps. Raises `Problem` for a number that cannot be."""
    keep = body.truncate_prompt_tokens
    if keep is not None and (keep == 0 or keep > context):
        raise Problem(400, f"truncate_prompt_tokens must be -1, or from 1 to {context}, what the context holds (got "
                           f"{keep})", param="truncate_prompt_tokens")
    asked = body.asked_tokens()[1] or 1
    return body.kept(tokens, max(context - asked, 1))


def check_least(body: Options, most: Sequence[int]) -> None:
    """Raises `Problem` where fewer tokens may be made than must be. most: for each prompt."""
    if (body.min_tokens or 0) > min(most):
        raise Problem(400, f"min_tokens is too large: {body.min_tokens}. At most {min(most)} tokens are made",
                      param="min_tokens")


# ---- ways of making answers ------------------------------------------------------------------------------------------


class _Around:
    """Makes answers as another does."""

    def __init__(self, replies: Replies) -> None:
        self._replies, self.end = replies, replies.end

    def event(self, chunk: BaseModel) -> str:
        return self._replies.event(chunk)

    def broken(self, problem: Problem) -> str:
        return self._replies.broken(problem)

    def chunks(self, news: News, usage: Usage | None) -> Iterator[BaseModel]:
        return self._replies.chunks(news, usage)

    def last(self, usage: Usage) -> BaseModel:
        return self._replies.last(usage)

    def add(self, news: News) -> None:
        self._replies.add(news)

    def full(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        return self._replies.full(choices, usage)


class Echoed(_Around):
    """Puts something before every text. logprobs: how many likeliest tokens are told beside each of the prompt's; None:
    nothing is told of those."""

    def __init__(self, replies: Replies, say: Say, logprobs: int | None = None) -> None:
        super().__init__(replies)
        self._say, self._logprobs = say, logprobs
        self._shifts: dict[int, int] = {}  # characters, by choice

    def chunks(self, news: News, usage: Usage | None) -> Iterator[BaseModel]:
        return super().chunks(self._led(news), usage)

    def add(self, news: News) -> None:
        super().add(self._led(news))

    def _led(self, news: News) -> News:
        if (index := news.choice.index) in self._shifts:
            news.offsets = [self._shifts[index] + offset for offset in news.offsets]
            return news
        text, offsets = self._say(news.choice)
        self._shifts[index] = len(text)
        news.text = text + news.text
        news.offsets = [len(text) + offset for offset in news.offsets]
        if self._logprobs is not None:
            news.offsets = offsets + news.offsets
            news.logprobs = [*self._told(news), *news.logprobs]
        return news

    def _told(self, news: News) -> Iterator[list[tuple[int, float]]]:
        assert self._logprobs is not None
        tokens = news.choice.tokens
        for token, score in zip(tokens, news.scores or [None] * len(tokens)):
            yield [(token, math.nan)] if score is None else score.told[: 1 + self._logprobs]


class More(_Around):
    """Tells ids of tokens, and log-probabilities of prompts.

    at_top: what is of the prompt stands beside the choices, else in each. ids: they are told. scores: how many of the
    likeliest tokens are told beside each of the prompt's; None: nothing is told of those.
    """

    def __init__(self, replies: Replies, tokenizer: Spelling, *, at_top: bool, ids: bool, scores: int | None) -> None:
        super().__init__(replies)
        self._tokenizer, self._at_top, self._ids, self._scores = tokenizer, at_top, ids, scores
        self._begun: set[int] = set()  # choices
        self._made: defaultdict[int, list[int]] = defaultdict(list)  # ids of tokens by choice, those told excepted
        self._told: dict[int, PromptLogprobs] = {}  # by prompt

    def chunks(self, news: News, usage: Usage | None) -> Iterator[BaseModel]:
        chunks: list[Any] = list(super().chunks(news, usage))
        index = news.choice.index
        self._made[index] += news.token_ids
        if chunks and self._ids:
            ends = finish_reason(news.choice) is not None
            chunks[-2 if ends and len(chunks) > 1 else -1].choices[0].token_ids = self._made.pop(index)
            if index not in self._begun:
                self._begun.add(index)
                self._holder(chunks[0], chunks[0].choices[0]).prompt_token_ids = list(news.choice.tokens)
        return iter(chunks)

    def add(self, news: News) -> None:
        self._made[news.choice.index] += news.token_ids
        if news.scores and self._scores is not None:
            self._told.setdefault(news.choice.prompt, [self._shown(score) for score in news.scores])
        super().add(news)

    def full(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        answer: Any = super().full(choices, usage)
        for told, choice in zip(answer.choices, choices, strict=True):
            holder = self._holder(answer, told)
            if self._ids:
                told.token_ids = self._made[choice.index]
                holder.prompt_token_ids = list(choice.tokens)
            if self._scores is not None:
                holder.prompt_logprobs = self._told.get(choice.prompt)
        return answer  # type: ignore[no-any-return]

    def _holder(self, answer: Any, choice: Any) -> Any:
        return answer if self._at_top else choice

    def _shown(self, score: Scored | None) -> dict[int, PromptLogprob] | None:
        if score is None or self._scores is None:
            return None
        (own, value), *others = score.told[: 1 + self._scores]
        shown = {own: self._one(own, value, score.rank)}
        for rank, (token, value) in enumerate(others, 1):
            shown.setdefault(token, self._one(token, value, rank))
        return shown

    def _one(self, token: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob=logprob, rank=rank, decoded_token=spell(self._tokenizer.token_bytes(token)))


class Best(_Around):
    """Of the texts of each prompt answers with the n whose tokens have the highest mean log-probability."""

    def __init__(self, replies: Replies, n: int) -> None:
        super().__init__(replies)
        self._n = n
        self._logprobs: defaultdict[int, list[float]] = defaultdict(list)

    def add(self, news: News) -> None:
        self._logprobs[news.choice.index] += [picked for (_, picked), *_ in news.logprobs]
        super().add(news)

    def full(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        best = [choice for _, some in groupby(choices, key=lambda choice: choice.prompt)
                for choice in sorted(some, key=self._mean, reverse=True)[: self._n]]
        answer: Any = super().full(best, usage)
        for index, choice in enumerate(answer.choices):
            choice.index = index
        return answer  # type: ignore[no-any-return]

    def _mean(self, choice: Choice) -> float:
        said = self._logprobs[choice.index]
        return math.fsum(said) / len(said) if said else -math.inf


# ---- what comes before a text ----------------------------------------------------------------------------------------


def spelled_prompt(tokens: Sequence[int], text: str | None, tokenizer: Tokenizer, *,
                   ends: bool = True) -> tuple[str, list[int]]:
    """The text of a prompt, and how many of its characters are certain before each token.

    text: what the tokens were made of; None: tokens were given. ends: nothing follows that could complete a character.
    What is put around a text (BOS) is no part of it, and special tokens that it spells out are.
    """
    said, offsets = "", [0] * len(tokens)
    for skip_special in (False, True):
        said, offsets = _read(tokens, tokenizer, skip_special, ends or text is not None)
        if text is None or said == text:
            return said, offsets
    return text or "", [min(offset, len(text or "")) for offset in offsets]  # the tokenizer writes it another way


def _read(tokens: Sequence[int], tokenizer: Tokenizer, skip_special: bool, ends: bool) -> tuple[str, list[int]]:
    stream, pieces, offsets, length = tokenizer.stream(skip_special_tokens=skip_special), list[str](), list[int](), 0
    for token in tokens:
        offsets.append(length)
        pieces.append(stream.push(token))
        length += len(pieces[-1])
    return "".join([*pieces, stream.finish() if ends else ""]), offsets


def _last_message(body: ChatRequest) -> Callable[[], str]:
    """What the conversation ends with, where that is said by who answers, as vLLM has it."""
    answers = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt

    def text() -> str:
        last = conversation([message.plain() for message in body.messages])[-1]
        return text_of(last) if last["role"] == "assistant" or not answers else ""

    return text
