"""Fields of the Responses API stand here that are not taken, and those that are taken and change nothing."""

from __future__ import annotations

from fullpipe.server.protocol.tables import REFUSED_OF_STRUCTURES

_STORES_NOTHING = "this server stores nothing; send the whole conversation as input"

REFUSED = REFUSED_OF_STRUCTURES | {
    "previous_response_id": _STORES_NOTHING,
    "previous_response": "send what it has as items of the input",
    "previous_input_messages": "send them as items of the input",
    "conversation": _STORES_NOTHING,
    "background": "this server stores nothing that could be asked for later; use stream",
    "prompt": "this server has no stored prompts; send their text",
    "context_management": "the conversation is taken as it is; shorten it before it is sent",
    "truncation": "a conversation that is too long is refused, not cut",
    "max_tool_calls": "it is for built-in tools, and this server has none",
    "moderation": "nothing is moderated",
    "cache_salt": "the cache is not kept apart by callers",
    "enable_response_messages": "the answer is told in items alone",
    "vllm_xargs": "there are no extensions that could read them",
    "mm_processor_kwargs": "only text is taken",
    "request_id": "send the header x-request-id",
}
"""Fields that are not taken, and why. Their harmless values are in the models of `protocol`."""

_STRUCTURES = "say it in structured_outputs, under json, regex, choice or grammar"
ELSEWHERE = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens"), "it is called max_output_tokens here"),
    **dict.fromkeys(("messages", "prompt"), "it is called input here"), "system": "it is called instructions here",
    "response_format": "say it in text.format, where what stands in json_schema stands beside type",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _STRUCTURES),
    "functions": "it is called tools here", "function_call": "it is called tool_choice here",
    "reasoning_effort": "say it in reasoning.effort",
    "logprobs": "set top_logprobs, or have message.output_text.logprobs in include",
    "n": "a response is one text", "echo": "texts are asked at /v1/completions",
    "min_tokens": "it is taken at /v1/chat/completions", "bad_words": "it is taken at /v1/chat/completions",
}
"""What to use in place of fields that other kinds of request have."""

_NO_BOOKS = "it is for billing and monitoring, which this server does not do"
_OWN_CACHE = "the server shares what requests have in common by itself"
_NO_TEXT = "it is no text"
IGNORED = {
    "store": "this server stores nothing",
    "user": _NO_BOOKS,
    "safety_identifier": _NO_BOOKS,
    "client_metadata": _NO_BOOKS,
    "service_tier": "there is one tier",
    "prompt_cache_key": _OWN_CACHE,
    "prompt_cache_options": _OWN_CACHE,
    "prompt_cache_retention": _OWN_CACHE,
    "include": "beside message.output_text.logprobs nothing can be included; reasoning is told as it is",
    "stream_options.include_obfuscation": "events are not padded",
    "reasoning.summary": "reasoning is told as it is, not summed up",
    "reasoning.generate_summary": "reasoning is told as it is, not summed up",
    "tools.allowed_callers": "functions are the caller's, who may do with calls what he likes",
    "tools.defer_loading": "the model is told of all tools at once",
    "tools.output_schema": "the model is told what a function takes, not what it gives",
    "input.id": _NO_BOOKS,
    "input.status": "an item is taken as it is",
    "input.phase": "the model has no such thing",
    "input.caller": _NO_BOOKS,
    "input.parsed_arguments": "the arguments say the same",
    "input.content.annotations": _NO_TEXT,
    "input.content.logprobs": _NO_TEXT,
    "input.content.parsed": "the text says the same",
    "input.content.prompt_cache_breakpoint": _OWN_CACHE,
    "input.output.annotations": _NO_TEXT,
    "input.output.logprobs": _NO_TEXT,
    "input.output.parsed": "the text says the same",
    "input.output.prompt_cache_breakpoint": _OWN_CACHE,
}
"""Fields that change no text, by their path, and why they have no effect here."""
