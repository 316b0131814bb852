"""The chunks of a chat become an answer of the Responses API, in full or as events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

from pydantic import BaseModel

from fullpipe.server.answer import Choice, News
from fullpipe.server.problems import Problem
from fullpipe.server.protocol.answers import ChatChunk, ChatChunkChoice, Usage
from fullpipe.server.replies import Replies
from fullpipe.server.responses.answers import (
    Event,
    Failure,
    Incomplete,
    InputDetails,
    OutputDetails,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
)
from fullpipe.server.responses.output import Output
from fullpipe.server.responses.protocol import ResponsesRequest


def echo(body: ResponsesRequest, model: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer says of its request. sampling: what counts where the request leaves a field out."""
    reasoning, choice = body.reasoning, body.tool_choice or "auto"
    temperature = sampling.get("temperature", 1.0) if body.temperature is None else body.temperature
    return {
        "model": model, "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {}, "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "temperature": temperature, "top_p": sampling.get("top_p", 1.0) if body.top_p is None else body.top_p,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.told() for tool in body.tools or ()], "top_logprobs": body.top_logprobs or 0,
    }


class ResponseReplies:
    """Makes the answer of one request. id: the request's. told: what the answer says of it (`echo`). chat: makes the
    chunks."""

    end = ""  # the last event says that it is the last

    def __init__(self, id: str, told: Mapping[str, Any], chat: Replies) -> None:
        self._head = {**told, "id": f"resp_{id}", "created_at": int(time.time())}
        self._chat = chat
        self._output = Output(id)
        self._numbers = count()
        self._begun = False
        self._status: Literal["in_progress", "completed", "incomplete"] = "in_progress"

    def chunks(self, news: News, usage: Usage | None) -> Iterator[BaseModel]:
        """Events; of usage only the last one tells."""
        for event in self._events(news):
            yield self._numbered(event)

    def last(self, usage: Usage) -> BaseModel:
        whole = self._response(usage)
        kind: Any = f"response.{whole.status}"
        return self._numbered(ResponseEvent(type=kind, response=whole))

    def add(self, news: News) -> None:
        for _ in self._events(news):
            pass

    def full(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        return self._response(usage)

    def event(self, chunk: BaseModel) -> str:
        assert isinstance(chunk, Event)
        return f"event: {chunk.type}\ndata: {chunk.model_dump_json()}\n\n"

    def broken(self, problem: Problem) -> str:
        failed = self._response().model_copy(update={"status": "failed", "completed_at": None,
                                                     "incomplete_details": None,
                                                     "error": Failure(message=problem.error.message)})
        return self.event(self._numbered(ResponseEvent(type="response.failed", response=failed)))

    def _events(self, news: News) -> Iterator[Event]:
        if not self._begun:
            self._begun = True
            yield ResponseEvent(type="response.created", response=self._response())
            yield ResponseEvent(type="response.in_progress", response=self._response())
        for chunk in self._chat.chunks(news, None):
            assert isinstance(chunk, ChatChunk)
            for choice in chunk.choices:
                yield from _said(self._output, choice)
                if choice.finish_reason is not None:
                    self._status = "incomplete" if choice.finish_reason == "length" else "completed"
                    yield from self._output.finish(self._status)

    def _response(self, usage: Usage | None = None) -> ResponseObject:
        return ResponseObject(
            **self._head, status=self._status, output=list(self._output.items),
            completed_at=int(time.time()) if self._status == "completed" else None,
            incomplete_details=Incomplete() if self._status == "incomplete" else None,
            usage=None if usage is None else _usage(usage))

    def _numbered(self, event: Event) -> Event:
        event.sequence_number = next(self._numbers)
        return event


def _said(output: Output, choice: ChatChunkChoice) -> Iterator[Event]:
    """What a piece of a chat tells; log-probabilities of what is no text of a message are left out."""
    delta = choice.delta
    if delta.reasoning_content:
        yield from output.think(delta.reasoning_content)
    elif delta.tool_calls:
        for call in delta.tool_calls:
            yield from output.call(call.index, call.id or "", call.function.name or "", call.function.arguments or "")
    else:
        yield from output.say(delta.content or "", choice.logprobs.content if choice.logprobs else ())


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens_details=OutputDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
        speculation=usage.speculation)
