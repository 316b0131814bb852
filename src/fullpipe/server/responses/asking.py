"""A request of the Responses API becomes a chat, and what is wrong with the chat is blamed on the request's fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from fullpipe.server.problems import Problem, problem_of
from fullpipe.server.protocol.requests import ChatRequest
from fullpipe.server.responses.protocol import (
    AllowedTools,
    Content,
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    ResponsesRequest,
)

_AS_IN_A_CHAT = ("model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                 "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos",
                 "skip_special_tokens", "include_stop_str_in_output", "structured_outputs", "priority", "stream",
                 "parallel_tool_calls")
_IN_A_MESSAGE = re.compile(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\](?:\.function)?)?(.*)")
# What a chat calls what stands elsewhere in a request; the first that fits.
_ELSEWHERE = (
    (re.compile(r"tools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"response_format(\.json_schema)?\b"), "text.format"),
    (re.compile(r"max_(completion_)?tokens"), "max_output_tokens"),
    (re.compile(r"messages"), "input"),
)


class AsChat(ChatRequest):
    """Is what was asked, in the words of a chat."""

    def asked_tokens(self) -> tuple[str, int | None]:
        return "max_output_tokens", self.max_completion_tokens


@dataclass(slots=True)
class Turns:
    """Holds a request's input as the messages of a chat: items that are one turn of the model are one message.

    places: of the messages, where they stand in the request. calls: the same of tool calls, by message and number.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    calls: dict[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, body: ResponsesRequest) -> Turns:
        turns = cls()
        if body.instructions:
            turns._add("instructions", role="system", content=body.instructions)
        if isinstance(body.input, str):
            turns._add("input", role="user", content=body.input)
        else:
            for index, item in enumerate(body.input):
                turns._take(f"input[{index}]", item)
        return turns

    def blamed(self, problem: Problem) -> Problem:
        """The same, of the request."""
        old, told = problem.error.param, problem.error.message
        new = None if old is None else self._place(old)
        if old is not None and new is not None:
            begins = told.startswith(f"{old}:")
            told = f"{new}{told.removeprefix(old)}" if begins else told.replace(repr(old), repr(new))
        return Problem(problem.status_code, told, param=new, code=problem.error.code, headers=problem.headers)

    def _place(self, param: str) -> str:
        if found := _IN_A_MESSAGE.fullmatch(param):
            message, call, rest = int(found[1]), found[2], found[3]
            if (message, int(call or 0)) in self.calls and (call or rest.startswith(".tool_calls")):
                return self.calls[message, int(call or 0)] + rest.removeprefix(".tool_calls")
            place = self.places[message] if message < len(self.places) else "input"
            return place + rest if place.endswith("]") else place
        for pattern, name in _ELSEWHERE:
            if pattern.match(param):
                return pattern.sub(name, param, count=1)
        return param

    # ---- items -------------------------------------------------------------------------------------------

    def _take(self, place: str, item: InputItem) -> None:
        match item:
            case MessageItem(role="assistant"):
                self._say(place, item)
            case MessageItem():
                self._add(place, role=item.role, content=_plain(item.content))
            case ReasoningItem():
                if item.text:
                    self._add(place, role="assistant", reasoning_content=item.text)
            case FunctionCallItem():
                self._call(place, item)
            case FunctionOutputItem():
                self._add(f"{place}.output", role="tool", tool_call_id=item.call_id, content=_plain(item.output))

    def _add(self, place: str, **message: Any) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _say(self, place: str, item: MessageItem) -> None:
        """What the model said belongs to what it thought before."""
        last = self._last_answer
        if last is None or "content" in last or "tool_calls" in last:
            self._add(place, role="assistant", content=_plain(item.content))
        else:
            last["content"], self.places[-1] = _plain(item.content), place

    def _call(self, place: str, item: FunctionCallItem) -> None:
        """And its calls to what it thought and said."""
        if self._last_answer is None:
            self._add(place, role="assistant")
        calls = self.messages[-1].setdefault("tool_calls", [])
        self.calls[len(self.messages) - 1, len(calls)] = place
        calls.append({"id": item.call_id, "type": "function",
                      "function": {"name": item.name, "arguments": item.arguments}})

    @property
    def _last_answer(self) -> dict[str, Any] | None:
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last["role"] == "assistant" else None


def as_chat(body: ResponsesRequest, turns: Turns, reads: Callable[[str], bool]) -> AsChat:
    """The request as a chat. reads: whether the model's template reads a variable. Raises `Problem` in a chat's words,
    which `Turns.blamed` puts into the request's."""
    said: dict[str, Any] = {name: getattr(body, name) for name in _AS_IN_A_CHAT}
    said |= {"messages": turns.messages, "max_completion_tokens": body.max_output_tokens,
             "chat_template_kwargs": _variables(body, reads), "continue_final_message": body.is_continued or None,
             "response_format": _format(body), **dict(_tools(body)),
             "stream_options": {"include_usage": True} if body.stream else None}
    if body.wants_logprobs:
        said |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    try:
        return AsChat.model_validate({name: value for name, value in said.items() if value is not None})
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise problem_of(RequestValidationError(faults, body=said)) from None


def _plain(content: Content) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [part.plain() for part in content]


def _variables(body: ResponsesRequest, reads: Callable[[str], bool]) -> dict[str, Any] | None:
    effort = body.reasoning.effort if body.reasoning else None
    if effort is None:
        return body.chat_template_kwargs
    if not reads("reasoning_effort"):
        raise Problem(400, "'reasoning.effort' is not supported: the model's chat template does not read it; what it "
                           "reads can be said in chat_template_kwargs", param="reasoning.effort",
                      code="unsupported_parameter")
    return {**(body.chat_template_kwargs or {}), "reasoning_effort": effort}


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text else None
    if form is None or form.get("type") != "json_schema":
        return form
    if "json_schema" in form and "schema" not in form:
        raise Problem(400, "text.format: what stands in json_schema in a chat stands beside type here, as in "
                           '{"type": "json_schema", "name": "answer", "schema": {...}}', param="text.format")
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _tools(body: ResponsesRequest) -> Iterator[tuple[str, Any]]:
    """Which tools, and whether they must be used. Without any, what only says that they may be used says nothing."""
    tools, choice = body.tools or [], body.tool_choice
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        if unknown := sorted(allowed - {tool.name for tool in tools}):
            raise Problem(400, f"tool_choice.tools: there is no tool {unknown[0][:80]!r}", param="tool_choice.tools")
        tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
    if tools:
        yield "tools", [tool.plain() for tool in tools]
    if isinstance(choice, NamedFunction):
        yield "tool_choice", {"type": "function", "function": {"name": choice.name}}
    elif tools or choice == "required":
        yield "tool_choice", choice
