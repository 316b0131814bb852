"""Requests as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from fullpipe.server.protocol.extras import MOST_LOGPROBS, Extras
from fullpipe.server.protocol.extras import Token as _Token
from fullpipe.server.protocol.forms import Format, Object, Pattern, StructuredOutputs, Texts, ToolChoice, Tools
from fullpipe.server.protocol.others import Others
from fullpipe.server.protocol.tables import IGNORED
from fullpipe.server.protocol.wire import MAX_ENTRIES, Wire, boolean, measured

MAX_STOPS = 16
MOST_PRIORITY = 10  # and the least is as far below 0
MAX_CHOICES = 128

_Off = Annotated[Literal[False], BeforeValidator(boolean)]
Ignored = Annotated[Any, Field(description="taken with any value, and ignored")]
Nothing = Annotated[None, Field(description="not supported")]
NoneListed = Annotated[list[None], Field(max_length=0, fail_fast=True)]
_Tokens = Annotated[list[_Token], Field(min_length=1, fail_fast=True)]
_Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_ENTRIES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
    BeforeValidator(measured),
]


def _ranked(priority: int) -> int:
    if abs(priority) > MOST_PRIORITY:
        raise PydanticCustomError("priority", "must be from {least}, served first, to {most}",
                                  {"least": -MOST_PRIORITY, "most": MOST_PRIORITY})
    return priority


_Priority = Annotated[int, AfterValidator(_ranked),
                      Field(json_schema_extra={"minimum": -MOST_PRIORITY, "maximum": MOST_PRIORITY})]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class StreamOptions(Wire):
    """Says what a stream tells besides.

    include_usage: one more chunk at the end with the usage. continuous_usage_stats: and the usage so far on every chunk
    (vLLM's).
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class Options(Extras, Others):
    """Holds what both kinds of request share. `null` is the default everywhere."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: _Bias | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=128, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: _Priority | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | Object | None = None
    guided_regex: Pattern | None = None
    guided_choice: Texts | None = None
    guided_grammar: Pattern | None = None
    # not supported
    timeout: Nothing = None
    use_beam_search: _Off | None = None
    guided_whitespace_pattern: Nothing = None
    guided_decoding_backend: Nothing = None

    def asked_tokens(self) -> tuple[str, int | None]:
        """How many new tokens the caller asks for at most, and under which field's name; None: no number."""
        return "max_tokens", self.max_tokens

    def texts(self) -> int:
        """How many are made of each prompt."""
        return self.n or 1


class Part(Wire):
    """Is a piece of a text. "input_text" and "output_text" are what the Responses API calls it, "refusal" what a model
    of OpenAI's says in place of an answer."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: Ignored = None
    cache_control: Ignored = None
    prompt_cache_breakpoint: Ignored = None


def _kind_of_content(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "parts" if isinstance(value, list) else None


BY_KIND = Discriminator(_kind_of_content, custom_error_type="content_type",
                        custom_error_message="must be a string or a list of parts")
Content = Annotated[Annotated[str, Tag("text")] | Annotated[list[Part], Field(fail_fast=True), Tag("parts")], BY_KIND]


class FunctionCall(Wire):
    """arguments: JSON as a string, as models write it; an object is taken too."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Wire):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall
    index: Ignored = None


class Message(Wire):
    """Is one turn, of a conversation that may have been held elsewhere: calls and results are told to the model where
    its template has words for them, whether tools are offered or not. What goes together in a message is looked at
    where it is brought into the templates' form (`models.tokens.messages`)."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    audio: Nothing = None
    type: Ignored = None
    id: Ignored = None
    status: Ignored = None
    annotations: Ignored = None
    parsed: Ignored = None
    provider_specific_fields: Ignored = None
    cache_control: Ignored = None

    def plain(self) -> dict[str, Any]:
        """Without what is ignored."""
        return self.model_dump(exclude_none=True, exclude=_IGNORED_IN_MESSAGES)


_IGNORED_IN_MESSAGES = {name for name in Message.model_fields if f"messages.{name}" in IGNORED}


class ChatRequest(Options):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_ENTRIES), BeforeValidator(measured)] | None \
        = None
    chat_template: Nothing = None
    documents: NoneListed | None = None
    enable_thinking: Nothing = None
    thinking: Nothing = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    functions: NoneListed | None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    audio: Nothing = None
    prediction: Nothing = None
    moderation: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None

    def asked_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().asked_tokens()


def _kind_of_prompt(value: Any) -> str | None:
    """By the first element: a wrong one further back is an error of that branch, not of all four."""
    if isinstance(value, list):
        return {str: "texts", int: "tokens", list: "token lists"}.get(type(value[0])) if value else None
    return "text" if isinstance(value, str) else None


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], Field(min_length=1, fail_fast=True), Tag("token lists")],
    Discriminator(_kind_of_prompt, custom_error_type="prompt_type",
                  custom_error_message="must be a string, a list of strings, of token ids, or of lists of token ids"),
]


class CompletionRequest(Options):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # 0: with echo
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: Literal[""] | None = None

    def scored(self) -> int | None:
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((number for number in wanted if number is not None), default=None)

    def texts(self) -> int:
        return self.best_of or super().texts()

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
