"""Answers as clients read them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length", "tool_calls"]
"""Of what OpenAI's clients accept, what this server says (`replies.finish_reason`)."""


def asked() -> Any:
    """A field that is there where a request asks for it, and absent elsewhere."""
    return Field(default=None, exclude_if=lambda value: value is None)


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


class PromptLogprob(BaseModel):
    """rank: 1 where no token was likelier."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""Of each token of a prompt, by token id; null: of the first."""


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """arguments: JSON, as far as the model has written it so."""

    name: str
    arguments: str


class AnswerCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """Is what the model said. content: null where that is nothing beside calls or thoughts. reasoning,
    reasoning_content: one thing; clients know it by the one name or the other."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = asked()


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | None = asked()
    prompt_logprobs: PromptLogprobs | None = asked()


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str | None = None


class CallDelta(BaseModel):
    """Is a call's beginning, with its id and name, or a piece of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = asked()


class ChatChunk(BaseModel):
    """Is a piece of a streamed chat. usage: absent where the request does not ask for any."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = asked()


class TextLogprobs(BaseModel):
    """Holds lists in parallel, one entry for each token.

    text_offset: characters that were certain before the token: of the choice's text, and in a stop string behind it.
    Of a prompt's first token nothing is known but its name.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
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
    token_ids: list[int] | None = asked()
    prompt_token_ids: list[int] | None = asked()
    prompt_logprobs: PromptLogprobs | None = asked()


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
