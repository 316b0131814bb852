"""These go over the wire: OpenAI's requests and answers as far as this server supports them.

The schema says exactly what is taken. A field of others' that would change the text is declared with the values that
ask for nothing (`null`, an empty list, a default), so that clients may send it; `REFUSED` says why no others are taken.
One that changes nothing in any text, and that no client means as a demand, is taken with any value: `IGNORED`. Values
are not coerced: "5" is no number. Unknown fields are refused, for an option that has no effect is worse than one that
fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_ENTRIES = 1024  # of a dictionary

# Fields of others that are not taken, and why. Their harmless values are in the models below.
REFUSED = {
    "tools": "this server calls no tools",
    "tool_choice": "this server calls no tools",
    "functions": "this server calls no functions",
    "function_call": "this server calls no functions",
    "response_format": "answers are plain text, {\"type\": \"text\"}",
    "structured_outputs": "answers are plain text",
    "guided_json": "answers are plain text",
    "guided_regex": "answers are plain text",
    "guided_choice": "answers are plain text",
    "guided_grammar": "answers are plain text",
    "modalities": "answers are plain text",
    "audio": "answers are plain text",
    "prediction": "the server makes its own predictions",
    "moderation": "nothing is moderated",
    "chat_template": "whoever starts the server chooses it",
    "documents": "put them into the messages, or into chat_template_kwargs if the template reads them",
    "enable_thinking": "say it in chat_template_kwargs",
    "thinking": "say it in chat_template_kwargs, by the name that the model's template has for it",
    "reasoning_effort": "say it in chat_template_kwargs, if the model's template reads it",
    "verbosity": "say in a message how long the answer should be",
    "web_search_options": "this server searches nothing",
    "min_tokens": "use logit_bias or ignore_eos against an early end",
    "timeout": "the server sets the time limit; close the connection to end a request sooner",
    "echo": "the prompt is not repeated",
    "suffix": "text is only continued, not filled in",
    "best_of": "all that is made is returned: best_of must be n",
    "use_beam_search": "the text is sampled, or greedy at temperature 0",
    "prompt_logprobs": "log-probabilities are of what is generated",
    "include_stop_str_in_output": "stop strings are never part of the text",
}

# Fields that change no text, by their path, and why they have no effect here. A server says so once in its log.
_NO_BOOKS = "it is for books that this server does not keep"
_OWN_CACHE = "the server shares what requests have in common by itself"
IGNORED = {
    "user": _NO_BOOKS,
    "metadata": _NO_BOOKS,
    "store": _NO_BOOKS,
    "safety_identifier": _NO_BOOKS,
    "service_tier": "there is one tier",
    "parallel_tool_calls": "this server calls no tools",
    "prompt_cache_key": _OWN_CACHE,
    "prompt_cache_options": _OWN_CACHE,
    "prompt_cache_retention": _OWN_CACHE,
    "stream_options.include_obfuscation": "chunks are not padded",
    "messages.type": "a message is a message",
    "messages.id": _NO_BOOKS,
    "messages.status": _NO_BOOKS,
    "messages.annotations": "they are no text",
    "messages.parsed": "the content says the same",
    "messages.provider_specific_fields": _NO_BOOKS,
    "messages.cache_control": _OWN_CACHE,
    "messages.tool_calls.index": "the order says the same",
    "messages.content.annotations": "they are no text",
    "messages.content.cache_control": _OWN_CACHE,
    "messages.content.prompt_cache_breakpoint": _OWN_CACHE,
}


class _Wire(BaseModel):
    """Checks what comes in. One fault is enough: a body of thousands would take seconds to describe, in the event loop.
    So lists fail at the first, dictionaries are measured first, and of unknown fields one is kept."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unknown = next((key for key in data if key not in cls.model_fields), None)
        return data if unknown is None else {key: data[key] for key in (*cls.model_fields, unknown) if key in data}

    def ignored(self, path: str = "") -> Iterator[str]:
        """Paths of what was sent and has no effect; of several messages with the same, each."""
        for name in self.model_fields_set:
            value, place = getattr(self, name), path + name
            if place in IGNORED and value is not None:
                yield place
            for one in value if isinstance(value, list) and value and isinstance(value[0], _Wire) else (value,):
                if isinstance(one, _Wire):
                    yield from one.ignored(f"{place}.")


def _measured(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_long", "must have at most {most} entries", {"most": MAX_ENTRIES})
    return value


def _boolean(value: Any) -> Any:
    """A literal of pydantic's takes 0 for False and 1 for True."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


_Off = Annotated[Literal[False], BeforeValidator(_boolean)]
Ignored = Annotated[Any, Field(description="taken with any value, and ignored")]
Nothing = Annotated[None, Field(description="not supported")]
NoneListed = Annotated[list[None], Field(max_length=0, fail_fast=True)]
_Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Tokens = Annotated[list[_Token], Field(min_length=1, fail_fast=True)]
_Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_ENTRIES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
    BeforeValidator(_measured),
]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class StreamOptions(_Wire):
    """Says what a stream tells besides.

    include_usage: one more chunk at the end with the usage. continuous_usage_stats: and the usage so far on every chunk
    (vLLM's).
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class TextFormat(_Wire):
    type: Literal["text"]


class Options(_Wire):
    """Holds what both kinds of request share. `null` is the default everywhere."""

    model: str
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
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    # not supported
    response_format: TextFormat | None = None
    structured_outputs: Nothing = None
    guided_json: Nothing = None
    guided_regex: Nothing = None
    guided_choice: Nothing = None
    guided_grammar: Nothing = None
    min_tokens: Annotated[int, Field(ge=0, le=0)] | None = None
    timeout: Nothing = None
    echo: _Off | None = None
    use_beam_search: _Off | None = None
    prompt_logprobs: Nothing = None
    include_stop_str_in_output: _Off | None = None

    def asked_tokens(self) -> tuple[str, int | None]:
        """How many new tokens the caller asks for at most, and under which field's name; None: no number."""
        return "max_tokens", self.max_tokens


class Part(_Wire):
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


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Field(fail_fast=True), Tag("parts")],
    Discriminator(_kind_of_content, custom_error_type="content_type",
                  custom_error_message="must be a string or a list of parts"),
]


class FunctionCall(_Wire):
    """arguments: JSON as a string, as models write it; an object is taken too."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(_Wire):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall
    index: Ignored = None


class Message(_Wire):
    """Is one turn, of a conversation that may have been held elsewhere: tools are not offered to the model, yet calls
    and results are told to it where its template has words for them. What goes together in a message is looked at where
    it is brought into the templates' form (`models.tokens.messages`)."""

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
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_ENTRIES), BeforeValidator(_measured)] | None \
        = None
    chat_template: Nothing = None
    documents: NoneListed | None = None
    enable_thinking: Nothing = None
    thinking: Nothing = None
    tools: NoneListed | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Ignored = None
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
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


# ---- answers ---------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length"]
"""Of what OpenAI's clients accept, what this server says (`replies.finish_reason`)."""


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    """Counts guesses. accepted_prediction_tokens: hits. rejected_prediction_tokens: rows computed for wrong guesses."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0
    audio_tokens: int = 0


class Speculation(BaseModel):
    """Tells, as Fullpipe's extension, how the speculation went, over all choices together (times: of the first token
    of all; and the mean between tokens, over the choices). Seconds and steps are of the pipeline's clock."""

    hits: int
    misses: int
    hit_rate: float
    mean_acceptance_length: float
    steps: float
    steps_per_token: float
    launched_rows: int
    wasted_rows: int
    ttft_s: float
    tbt_s: float


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    speculation: Speculation


class TokenLogprob(BaseModel):
    """Gives a token's log-probability.

    bytes: the token's own, which need not be whole characters; `token` then spells them out.
    """

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """Is a piece of a streamed chat. usage: absent where the request does not ask for any."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """Holds lists in parallel, one entry for each token.

    text_offset: characters that were certain before the token: of the choice's text, and in a stop string behind it.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def empty(cls) -> Self:
        return cls(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


class TextChoice(BaseModel):
    """finish_reason: null on chunks before a choice's last."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(BaseModel):
    """Is an answer in full, or the chunk of a stream; `usage` is then absent where the request does not ask for any."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fullpipe"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(BaseModel):
    version: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    state: str
    running: int
    waiting: int
    restarts: int
    last_failure: str
