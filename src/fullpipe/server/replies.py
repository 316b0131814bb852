"""The engine's tokens become OpenAI's objects here: answers in full, chunks of a stream, log-probabilities, usage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from pydantic import BaseModel

from fullpipe.engine import RequestStats
from fullpipe.server.answer import Choice, News
from fullpipe.server.forms import Form
from fullpipe.server.lines import Lines
from fullpipe.server.problems import Problem
from fullpipe.server.protocol.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChosenLogprob,
    CompletionDetails,
    Delta,
    FinishReason,
    PromptDetails,
    Speculation,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    Usage,
)
from fullpipe.server.voices import Voice, deltas

VERSION = version("fullpipe")
FINGERPRINT = f"fullpipe-{VERSION}"
_LEAST = -9999.0  # what OpenAI says in place of minus infinity, for which JSON has no word

Told = Sequence[Sequence[tuple[int, float]]]


class Spelling(Protocol):
    """Says what tokens are called."""

    def token_bytes(self, token: int) -> bytes: ...


class Replies(Protocol):
    """Makes answers of one kind. `chunks` of all news of a choice, or `add` of all of them and then `full`.

    end: what stands behind the last chunk of a stream."""

    end: str

    def event(self, chunk: BaseModel) -> str:
        """A chunk as it goes over the wire."""
        ...

    def broken(self, problem: Problem) -> str:
        """What ends a stream in place of the rest, as it goes over the wire."""
        ...

    def chunks(self, news: News, usage: Usage | None) -> Iterator[BaseModel]:
        """usage: put on every chunk, if given."""
        ...

    def last(self, usage: Usage) -> BaseModel:
        """The chunk with the usage alone."""
        ...

    def add(self, news: News) -> None: ...

    def full(self, choices: Sequence[Choice], usage: Usage) -> BaseModel: ...


class ChatReplies(Lines):
    """Makes the answers of chats. logprobs: whether the request asks for them. form: of the answers."""

    def __init__(self, id: str, created: int, model: str, tokenizer: Spelling, logprobs: bool,
                 form: Form | None = None) -> None:
        self._head: dict[str, Any] = {"id": f"chatcmpl-{id}", "created": created, "model": model,
                                      "system_fingerprint": FINGERPRINT}
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._form = form or Form()
        self._voices: dict[int, Voice] = {}
        self._told: dict[int, list[ChosenLogprob]] = {}

    def chunks(self, news: News, usage: Usage | None) -> Iterator[BaseModel]:
        """Log-probabilities stand on the first chunk of the news whose tokens they are of."""
        index = news.choice.index
        if index not in self._voices:
            yield self._chunk(index, Delta(role="assistant", content=""), usage)
        voice = self._voice(index)
        told = ChatLogprobs(content=self._chosen(news.logprobs)) if self._logprobs else None
        said = [*deltas(voice.hear(news))]
        for delta in said or ([Delta(content="")] if told and told.content else []):
            yield self._chunk(index, delta, usage, logprobs=told)
            told = None
        if (reason := finish_reason(news.choice)) is not None:
            yield self._chunk(index, Delta(), usage, finish_reason=voice.ending(reason))

    def last(self, usage: Usage) -> BaseModel:
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage)

    def add(self, news: News) -> None:
        self._voice(news.choice.index).hear(news)
        self._told.setdefault(news.choice.index, []).extend(self._chosen(news.logprobs))

    def full(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        return ChatCompletion(**self._head, usage=usage, choices=[
            ChatChoice(index=choice.index, message=self._voices[choice.index].message(),
                       logprobs=ChatLogprobs(content=self._told[choice.index]) if self._logprobs else None,
                       finish_reason=self._voices[choice.index].ending(_finished(choice)))
            for choice in choices
        ])

    def _voice(self, index: int) -> Voice:
        if index not in self._voices:
            self._voices[index] = Voice(self._form)
        return self._voices[index]

    def _chunk(self, index: int, delta: Delta, usage: Usage | None, *, logprobs: ChatLogprobs | None = None,
               finish_reason: FinishReason | None = None) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        more: dict[str, Any] = {"usage": usage} if usage is not None else {}  # what is not set is not in the event
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[choice], **more)

    def _chosen(self, told: Told) -> list[ChosenLogprob]:
        if not self._logprobs:
            return []
        return [ChosenLogprob(**self._one(*picked), top_logprobs=[TokenLogprob(**self._one(*one)) for one in others])
                for picked, *others in told]

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(token)
        return {"token": spell(spelled), "logprob": max(logprob, _LEAST), "bytes": list(spelled)}


class TextReplies(Lines):
    """Makes the answers of text completions. logprobs: whether the request asks for them."""

    def __init__(self, id: str, created: int, model: str, tokenizer: Spelling, logprobs: bool) -> None:
        self._head: dict[str, Any] = {"id": f"cmpl-{id}", "object": "text_completion", "created": created,
                                      "model": model, "system_fingerprint": FINGERPRINT}
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._texts: dict[int, list[str]] = {}
        self._told: dict[int, TextLogprobs] = {}

    def chunks(self, news: News, usage: Usage | None) -> Iterator[BaseModel]:
        told = self._lists(news) if self._logprobs and news.logprobs else None
        more: dict[str, Any] = {"usage": usage} if usage is not None else {}
        reason = finish_reason(news.choice)
        if news.text or told or reason is not None:
            choice = TextChoice(index=news.choice.index, text=news.text, logprobs=told, finish_reason=reason)
            yield TextCompletion(**self._head, choices=[choice], **more)

    def last(self, usage: Usage) -> BaseModel:
        return TextCompletion(**self._head, choices=[], usage=usage)

    def add(self, news: News) -> None:
        self._texts.setdefault(news.choice.index, []).append(news.text)
        if self._logprobs:
            own, new = self._told.setdefault(news.choice.index, TextLogprobs.empty()), self._lists(news)
            own.tokens += new.tokens
            own.token_logprobs += new.token_logprobs
            own.top_logprobs += new.top_logprobs
            own.text_offset += new.text_offset

    def full(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        return TextCompletion(**self._head, usage=usage, choices=[
            TextChoice(index=choice.index, text="".join(self._texts[choice.index]),
                       logprobs=self._told[choice.index] if self._logprobs else None, finish_reason=_finished(choice))
            for choice in choices
        ])

    def _lists(self, news: News) -> TextLogprobs:
        """`top_logprobs` have the picked token too, as OpenAI's: they may be one more than was asked for."""
        lists = TextLogprobs.empty()
        lists.text_offset += news.offsets
        for picked, *others in news.logprobs:
            lists.tokens.append(self._spell(picked[0]))
            if math.isnan(picked[1]):  # nothing is known of it
                lists.token_logprobs.append(None)
                lists.top_logprobs.append(None)
                continue
            lists.token_logprobs.append(max(picked[1], _LEAST))
            lists.top_logprobs.append({self._spell(token): max(value, _LEAST) for token, value in (*others, picked)})
        return lists

    def _spell(self, token: int) -> str:
        return spell(self._tokenizer.token_bytes(token))


# How an answer may end. A request that ran out of time has what fitted, as one that ran out of tokens. Other ends
# ("error", "abort") are no answer: they are an error of the request (`problems.failure`).
_ENDS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "deadline": "length"}


def finish_reason(choice: Choice) -> FinishReason | None:
    """What is told of the end; None while it runs, and where an error is told in its place."""
    return _ENDS.get(choice.reason or "")


def _finished(choice: Choice) -> FinishReason:
    reason = finish_reason(choice)
    assert reason is not None, f"an answer that ended with {choice.reason}"
    return reason


def spell(token: bytes) -> str:
    r"""The text of a token; "bytes:\xe2\x80" if it is not whole characters, as OpenAI writes it, so that no two such
    tokens look the same."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def usage_of(choices: Sequence[Choice]) -> Usage:
    """Over all choices so far. A prompt counts once, however many choices answer it."""
    first = {choice.prompt: choice.ticket for choice in reversed(choices)}
    prompt = sum(ticket.num_prompt for ticket in first.values())
    completion = sum(choice.num_tokens for choice in choices)
    speculation = _speculation([choice.ticket.stats for choice in choices])
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(ticket.cached_tokens for ticket in first.values())),
        completion_tokens_details=CompletionDetails(
            accepted_prediction_tokens=speculation.hits, rejected_prediction_tokens=speculation.wasted_rows,
            reasoning_tokens=sum(choice.reasoning_tokens for choice in choices)),
        speculation=speculation,
    )


def _speculation(each: Sequence[RequestStats]) -> Speculation:
    hits, misses = sum(stats.hits for stats in each), sum(stats.misses for stats in each)
    steps, emitted = sum(stats.steps for stats in each), sum(stats.num_emitted for stats in each)
    return Speculation(
        hits=hits, misses=misses, hit_rate=hits / (hits + misses) if hits + misses else 0.0,
        mean_acceptance_length=1 + hits / max(misses, 1) if emitted else 0.0,
        steps=steps, steps_per_token=steps / emitted if emitted else 0.0,
        launched_rows=sum(stats.launched_rows for stats in each),
        wasted_rows=sum(stats.wasted_rows for stats in each),
        ttft_s=min(stats.ttft_s for stats in each), tbt_s=sum(stats.tbt_s for stats in each) / len(each),
    )
