"""Requests of the Responses API as clients send them.

What a chat has under the same name is looked at there: a request becomes a chat (`asking`), whose bounds count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from fullpipe.server.protocol.requests import BY_KIND, Ignored, NoneListed, Nothing
from fullpipe.server.protocol.wire import MAX_ENTRIES, Wire, boolean, measured
from fullpipe.server.responses.tables import IGNORED
from fullpipe.server.wording import SHOWN

LOGPROBS = "message.output_text.logprobs"

Status = Literal["in_progress", "completed", "incomplete"]
_Off = Annotated[Literal[False], BeforeValidator(boolean)]
_Object = Annotated[dict[str, Any], Field(max_length=MAX_ENTRIES), BeforeValidator(measured)]


class _Sent(Wire):
    """Is a part of a request, of which this API's own table says what has no effect."""

    no_effect: ClassVar[Mapping[str, str]] = IGNORED


# ---- input -----------------------------------------------------------------------------------------------------------


class Part(_Sent):
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None
    prompt_cache_breakpoint: Ignored = None

    def plain(self) -> dict[str, Any]:
        """As a chat has it."""
        return self.model_dump(include={"type", "text", "refusal"}, exclude_none=True)


Content = Annotated[Annotated[str, Tag("text")] | Annotated[list[Part], Field(fail_fast=True), Tag("parts")], BY_KIND]


class MessageItem(_Sent):
    """Is what somebody says. status: of an answer at the very end that is not complete, and is gone on with."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    status: Status | None = None
    id: Ignored = None
    phase: Ignored = None

    def ignored(self, path: str = "") -> Iterator[str]:
        return (one for one in super().ignored(path) if one != f"{path}status")


class FunctionCallItem(_Sent):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: Nothing = None
    id: Ignored = None
    status: Ignored = None
    caller: Ignored = None
    parsed_arguments: Ignored = None


class FunctionOutputItem(_Sent):
    type: Literal["function_call_output"]
    call_id: str
    output: Content
    name: str | None = None
    namespace: Nothing = None
    id: Ignored = None
    status: Ignored = None
    caller: Ignored = None


class ReasoningText(_Sent):
    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(_Sent):
    """Is what a model thought. Its content counts, and where it has none its summary."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    encrypted_content: Nothing = None
    id: Ignored = None
    status: Ignored = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary or ())


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _kind_of_item(value: Any) -> str | None:
    """What has a role is a message, whether it says so or not."""
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    return ("message" if "role" in value else None) if kind is None else str(kind)


def _known_item(value: Any) -> Any:
    kind = _kind_of_item(value)
    if kind is None:
        raise PydanticCustomError("item_type", "must be an object with a role or a type")
    if kind not in _ITEMS:
        raise PydanticCustomError("item_type", "items of type {kind} are not supported; known are {known}",
                                  {"kind": repr(kind[:SHOWN]), "known": ", ".join(_ITEMS)})
    return value


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")] | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")] | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind_of_item), BeforeValidator(_known_item),
]


def _kind_of_input(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "items" if isinstance(value, list) else None


Input = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), Tag("items")],
    Discriminator(_kind_of_input, custom_error_type="input_type",
                  custom_error_message="must be a string or a list of items"),
]


# ---- tools, and how to answer ----------------------------------------------------------------------------------------


class FunctionTool(_Sent):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: _Object | None = None
    strict: bool | None = None
    allowed_callers: Ignored = None
    defer_loading: Ignored = None
    output_schema: Ignored = None

    def told(self) -> dict[str, Any]:
        """As the answer repeats it."""
        return self.model_dump(include={"type", "name", "description", "parameters", "strict"})

    def plain(self) -> dict[str, Any]:
        """As a chat has it."""
        return {"type": "function", "function": self.model_dump(
            include={"name", "description", "parameters", "strict"}, exclude_none=True)}


def _function(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError("tool_type", "tools of type {kind} are not supported; only functions are",
                                  {"kind": repr(kind[:SHOWN])})
    if isinstance(value, dict) and "function" in value and "name" not in value:
        raise PydanticCustomError("tool_form", "what stands under \"function\" in a chat stands beside \"type\" "
                                  "here, as in {form}",
                                  {"form": '{"type": "function", "name": "f", "parameters": {...}}'})
    return value


class NamedFunction(_Sent):
    type: Literal["function"]
    name: str


class AllowedTools(_Sent):
    """Narrows the tools down to some of them."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, fail_fast=True)]


def _kind_of_choice(value: Any) -> str | None:
    if isinstance(value, dict):
        return {"function": "one function", "allowed_tools": "some functions"}.get(str(value.get("type")))
    return "mode" if isinstance(value, str) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[NamedFunction, Tag("one function")]
    | Annotated[AllowedTools, Tag("some functions")],
    Discriminator(_kind_of_choice, custom_error_type="tool_choice_type",
                  custom_error_message="must be none, auto, required, a function, or allowed_tools"),
]


class TextConfig(_Sent):
    """format: as a chat's `response_format`, but that what is in its `json_schema` stands in it at once."""

    format: _Object | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(_Sent):
    """effort: for the chat template, if it reads such a thing."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class StreamOptions(_Sent):
    include_obfuscation: Ignored = None


_Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results",
                    "web_search_call.results", "web_search_call.action.sources", "message.input_image.image_url",
                    "computer_call_output.output.image_url", "code_interpreter_call.outputs"]


class ResponsesRequest(_Sent):
    """Asks for one answer. `null` is the default everywhere."""

    model: str | None = None
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Annotated[FunctionTool, BeforeValidator(_function)]], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[_Included], Field(max_length=32, fail_fast=True)] | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16),
        BeforeValidator(measured)] | None = None
    # as a chat has them
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(measured)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: _Object | None = None
    priority: int | None = None
    chat_template_kwargs: _Object | None = None
    # without effect
    store: bool | None = None
    user: Ignored = None
    safety_identifier: Ignored = None
    client_metadata: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    # not supported
    background: _Off | None = None
    truncation: Literal["disabled"] | None = None
    context_management: NoneListed | None = None
    previous_response_id: Nothing = None
    previous_response: Nothing = None
    previous_input_messages: Nothing = None
    conversation: Nothing = None
    prompt: Nothing = None
    max_tool_calls: Nothing = None
    moderation: Nothing = None
    cache_salt: Nothing = None
    enable_response_messages: _Off | None = None
    vllm_xargs: Nothing = None
    mm_processor_kwargs: Nothing = None
    request_id: Nothing = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def is_continued(self) -> bool:
        """Whether it ends with an answer that is not complete, and is to be gone on with, as with vLLM."""
        last = self.input[-1] if isinstance(self.input, list) else None
        return isinstance(last, MessageItem) and last.role == "assistant" \
            and last.status in ("in_progress", "incomplete")

    def ignored(self, path: str = "") -> Iterator[str]:
        """As of every part; who does not want to have it stored asks for nothing, and log-probabilities are told."""
        asks = {"store": bool(self.store), "include": any(one != LOGPROBS for one in self.include or ())}
        return (one for one in super().ignored(path) if asks.get(one, True))
