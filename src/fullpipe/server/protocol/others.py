"""Fields of vLLM's stand here that ask for what this server has not. `null` is taken, and so is a default that asks for
nothing; `tables` says why nothing else is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fullpipe.server.protocol.wire import Wire, boolean

_Nothing = Annotated[None, Field(description="not supported")]
_Ignored = Annotated[Any, Field(description="taken with any value, and ignored")]
_On = Annotated[Literal[True], BeforeValidator(boolean)]
_One = Annotated[float, Field(ge=1, le=1)]
_Zero = Annotated[int, Field(ge=0, le=0)]


class Others(Wire):
    length_penalty: _One | None = None
    spaces_between_special_tokens: _On | None = None
    routed_experts_prompt_start: _Zero | None = None
    lora_name: _Nothing = None
    watermarking: _Nothing = None
    truncation_side: _Nothing = None
    logprob_token_ids: _Nothing = None
    media_io_kwargs: _Nothing = None
    mm_processor_kwargs: _Nothing = None
    prompt_embeds: _Nothing = None
    request_id: _Nothing = None
    return_prompt_text: _Nothing = None
    cache_salt: _Nothing = None
    kv_transfer_params: _Nothing = None
    ec_transfer_params: _Nothing = None
    vllm_xargs: _Nothing = None
    repetition_detection: _Nothing = None
    thinking_token_budget: _Nothing = None
    session_id: _Ignored = None
    stream_interval: _Ignored = None
    return_token_offsets: _Ignored = None
    return_mm_kwargs: _Ignored = None
