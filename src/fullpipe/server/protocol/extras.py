"""Fields stand here that both kinds of request have beside OpenAI's usual ones, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fullpipe.server.protocol.wire import Wire, boolean

MOST_LOGPROBS = 20  # vLLM's; OpenAI's completions stop at 5

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Word = Annotated[str, Field(min_length=1, max_length=1024)]


class Extras(Wire):
    """Says which tokens the prompt is and which may follow, and what is told of both beside the text.

    echo: the answer begins with the prompt; of a chat with its last message, where that is the assistant's.
    add_special_tokens: put around the prompt what the model puts around plain text; by default not around a chat, whose
    template does. truncate_prompt_tokens: keep so many tokens of the prompt, the last; -1: as many as fit.
    return_tokens_as_token_ids: log-probabilities call a token "token_id:123".
    """

    min_tokens: _Count | None = None
    bad_words: Annotated[list[_Word], Field(max_length=128, fail_fast=True)] | None = None
    allowed_token_ids: Annotated[list[Token], Field(min_length=1, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # not supported
    detokenize: Annotated[Literal[True], BeforeValidator(boolean)] | None = None

    def scored(self) -> int | None:
        """With how many others the prompt's tokens are to be told; None: they are not."""
        return self.prompt_logprobs

    def kept(self, tokens: list[int], most: int) -> list[int]:
        """Of a prompt's tokens those that count. most: that fit."""
        keep = most if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        return tokens if keep is None else tokens[max(len(tokens) - keep, 0) :]
