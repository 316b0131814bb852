"""The table of `docs/serving.md` says what becomes of every field of vLLM's requests: `python -m fullpipe_lab.fields`.

    python -m fullpipe_lab.fields            # print it
    python -m fullpipe_lab.fields --write    # put it into the document

vLLM's fields are written down here, as its main branch has them in November 2026 (protocol.py of each folder in
vllm/entrypoints/openai); what becomes of them is read off the server's own models and tables.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from pydantic import BaseModel

from fullpipe.errors import UsageError
from fullpipe.files import write_whole
from fullpipe.server.protocol import tables
from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest

Fate = Literal["yes", "ignored", "refused", ""]
"""What becomes of a field; "": neither vLLM nor this server has it there."""

DOCUMENT = Path(__file__).parents[3] / "docs" / "serving.md"
BEGIN, END = "<!-- fields: begin (python -m fullpipe_lab.fields --write) -->", "<!-- fields: end -->"
_RESPONSES = "fullpipe.server.responses"

_SAMPLING = """use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words"""
_MORE = """structured_outputs structured_outputs.disable_any_whitespace structured_outputs.whitespace_pattern
    structured_outputs.structural_tag structured_outputs.disable_fallback
    structured_outputs.disable_additional_properties priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval"""
_CHAT = f"""messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
    presence_penalty response_format response_format.structural_tag seed stop stream stream_options temperature
    top_p tools tool_choice reasoning_effort include_reasoning parallel_tool_calls user {_SAMPLING} echo
    add_generation_prompt continue_final_message add_special_tokens documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs return_prompt_text {_MORE}"""
_COMPLETIONS = f"""model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
    stream stream_options suffix temperature top_p user {_SAMPLING} prompt_embeds add_special_tokens response_format
    response_format.structural_tag {_MORE}"""
_OF_RESPONSES = """background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
    parallel_tool_calls previous_response_id prompt reasoning service_tier store stream temperature text tool_choice
    tools top_logprobs top_p top_k truncation user skip_special_tokens include_stop_str_in_output prompt_cache_key
    request_id mm_processor_kwargs priority cache_salt enable_response_messages previous_input_messages
    previous_response structured_outputs structured_outputs.disable_any_whitespace
    structured_outputs.whitespace_pattern structured_outputs.structural_tag structured_outputs.disable_fallback
    structured_outputs.disable_additional_properties repetition_penalty seed stop ignore_eos vllm_xargs"""
VLLM = {"chat": tuple(_CHAT.split()), "completions": tuple(_COMPLETIONS.split()),
        "responses": tuple(_OF_RESPONSES.split())}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Is what one kind of request may hold. model: None where this server has no such endpoint. refused, ignored: why,
    by field."""

    vllm: tuple[str, ...]
    model: type[BaseModel] | None
    refused: Mapping[str, str]
    ignored: Mapping[str, str]

    @property
    def fields(self) -> list[str]:
        """vLLM's in its order, then this server's others."""
        own = self.model.model_fields if self.model else {}
        return list(dict.fromkeys([*self.vllm, *own]))

    def fate(self, field: str) -> tuple[Fate, str]:
        """What becomes of a field, and why."""
        if field not in self.fields or self.model is None:
            return "", ""
        if field in self.ignored:
            return "ignored", self.ignored[field]
        if field in self.refused:
            return "refused", self.refused[field]
        return ("yes", "") if field in self.model.model_fields else ("refused", "this server does not know it")


def endpoints() -> dict[str, Endpoint]:
    """The kinds of request that are compared, by name."""
    return {"chat": Endpoint(VLLM["chat"], ChatRequest, tables.REFUSED, tables.IGNORED),
            "completions": Endpoint(VLLM["completions"], CompletionRequest, tables.REFUSED, tables.IGNORED),
            "responses": _responses()}


def _responses() -> Endpoint:
    """That of the Responses API, whose tables stand beside its request."""
    found, own = _module(f"{_RESPONSES}.protocol"), _module(f"{_RESPONSES}.tables")
    model = next((one for one in vars(found).values() if isinstance(one, type) and issubclass(one, BaseModel)
                  and {"input", "instructions", "model"} <= one.model_fields.keys()), None) if found else None
    return Endpoint(VLLM["responses"], model, getattr(own, "REFUSED", tables.REFUSED),
                    getattr(own, "IGNORED", tables.IGNORED))


def _module(name: str) -> ModuleType | None:
    """A module, if it is there."""
    parent = name.rpartition(".")[0]
    there = importlib.util.find_spec(parent) is not None and importlib.util.find_spec(name) is not None
    return importlib.import_module(name) if there else None


def table() -> str:
    """In Markdown, a row for each field."""
    kinds = endpoints()
    rows = [("field", *kinds, "why")]
    for field in dict.fromkeys(field for one in kinds.values() for field in one.fields):
        fates = [one.fate(field) for one in kinds.values()]
        if any(fate for fate, _ in fates):
            rows.append((f"`{field}`", *(fate for fate, _ in fates),
                         "; ".join(dict.fromkeys(why for _, why in fates if why))))
    head, *body = rows
    return "\n".join([_line(head), _line(["---"] * len(head)), *map(_line, body)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_table(text: str) -> str:
    """The document with the table as it is now. Raises UsageError where it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"the document has no place for the table: it stands between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fullpipe_lab.fields", description=(
        "What becomes of every field of vLLM's requests, as a table."))
    parser.add_argument("--write", action="store_true", help=f"put it into {DOCUMENT.name}")
    if parser.parse_args(arguments).write:
        write_whole(DOCUMENT, with_table(DOCUMENT.read_text(encoding="utf-8")))
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
