"""Fields of others stand here that are not taken, and those that are taken and change nothing."""

from __future__ import annotations

# Fields of others that are not taken, and why. Their harmless values are in the models below.
REFUSED = {
    "functions": "say it in tools, which OpenAI has put in its place",
    "function_call": "say it in tool_choice, which OpenAI has put in its place",
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
    "timeout": "the server sets the time limit; close the connection to end a request sooner",
    "suffix": "text is only continued, not filled in",
    "use_beam_search": "the text is sampled, or greedy at temperature 0",
    "detokenize": "answers are text; return_token_ids tells the tokens besides",
}

# Fields that change no text, by their path, and why they have no effect here. A server says so once in its log.
_NO_BOOKS = "it is for billing and monitoring, which this server does not do"
_OWN_CACHE = "the server shares what requests have in common by itself"
IGNORED = {
    "user": _NO_BOOKS,
    "metadata": _NO_BOOKS,
    "store": _NO_BOOKS,
    "safety_identifier": _NO_BOOKS,
    "service_tier": "there is one tier",
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

# Those of vLLM's that `protocol.others` declares.
REFUSED |= {
    "length_penalty": "it is for beam search, which there is none of",
    "spaces_between_special_tokens": "special tokens stand in the text as they are said",
    "routed_experts_prompt_start": "nothing is told of experts",
    "lora_name": "an adapter is merged into the model when the server starts, and is for all requests",
    "watermarking": "texts are not marked",
    "truncation_side": "of a prompt that is cut the end stays",
    "logprob_token_ids": "log-probabilities are those of the likeliest tokens",
    "media_io_kwargs": "there is only text",
    "mm_processor_kwargs": "there is only text",
    "prompt_embeds": "a prompt is text, or token ids",
    "request_id": "send it as the header x-request-id",
    "return_prompt_text": "the prompt is not told",
    "cache_salt": "requests that begin alike share what is computed, or none do: whoever starts the server says so",
    "kv_transfer_params": "caches are not handed from server to server",
    "ec_transfer_params": "caches are not handed from server to server",
    "vllm_xargs": "there are no extensions of vLLM's here",
    "repetition_detection": "use repetition_penalty or frequency_penalty",
    "thinking_token_budget": "max_tokens bounds thoughts and answer together",
}
# What else a structure may be asked with; `structured_outputs` stands in every kind of request.
_ONE_BACKEND = "there is one backend, and nothing to fall back on"
_ANY_BLANKS = "between the parts of JSON the model sets white space as it likes; ask in the prompt for compact JSON"
REFUSED_OF_STRUCTURES = {
    "structured_outputs.disable_any_whitespace": _ANY_BLANKS,
    "structured_outputs.whitespace_pattern": _ANY_BLANKS,
    "structured_outputs.structural_tag": "use grammar, or tools, whose calls keep to a schema where they are demanded",
    "structured_outputs.disable_fallback": _ONE_BACKEND,
    "structured_outputs.disable_additional_properties": "say additionalProperties: false in the schema",
}
REFUSED |= REFUSED_OF_STRUCTURES | {
    "guided_whitespace_pattern": _ANY_BLANKS,
    "guided_decoding_backend": _ONE_BACKEND,
    "response_format.structural_tag": REFUSED_OF_STRUCTURES["structured_outputs.structural_tag"],
}
IGNORED |= {
    "session_id": _NO_BOOKS,
    "stream_interval": "text is sent when it is there",
    "return_token_offsets": "only vLLM's render endpoints tell offsets",
    "return_mm_kwargs": "there is only text",
}
