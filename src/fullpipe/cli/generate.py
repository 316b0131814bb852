"""`fullpipe generate` answers one prompt."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe.cli import console, options, stopping
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.hosts import print_hosts
from fullpipe.cli.structured import StructureOptions
from fullpipe.cli.trace import Traces
from fullpipe.options import ChatOptions, MethodOptions, ModelOptions, Options, PipelineOptions
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.llm import LLM, Completion, Prompt

_FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")
_OF_CHANCE = ("top_k", "top_p", "min_p")


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")],
    model: ModelOptions,
    method: MethodOptions,
    sampling: Annotated[dict[str, Any], options.Said(SamplingParams, "the model's", _FROM_MODEL)],
    structure: StructureOptions,
    pipeline: PipelineOptions,
    chat: ChatOptions,
    events: Annotated[Path | None, typer.Option("--events", help="Record the events here, a JSON line each.")] = None,
    trace: Annotated[list[Path] | None, typer.Option("--trace", metavar="FILE", help="Write the run to FILE, by its "
                                                     "ending: .json (Chrome trace), .png or .svg (picture), .html "
                                                     "(page), .jsonl (events). May be repeated.")] = None,
    as_json: options.Json = False,
) -> None:
    """Answer a prompt; the text streams to standard output as it is committed."""
    asked = options.as_prompt(options.read_prompt(prompt), chat, model)
    if held := structure.structured():
        sampling["structured"] = held
    SamplingParams(**sampling)  # what cannot be is told before minutes go into loading
    traces = Traces(trace or (), events, clock="wall-clock time")
    with contextlib.ExitStack() as stack:
        stack.enter_context(traces)  # they are written when all has been told
        fetch_all(model, method.method)
        from fullpipe.llm import LLM

        llm = stack.enter_context(LLM.of(Options(model=model, method=method, pipeline=pipeline),
                                         listeners=[traces] if traces.wanted else [], progress=console.print_note,
                                         tell=print_hosts))
        where = "1 stage" if llm.num_stages == 1 else f"{llm.num_stages} stages"
        traces.tokenizer, traces.title = llm.tokenizer, f"{llm.method} on {where}, {model.model}"
        params = llm.get_default_sampling_params(**sampling)
        for line in (*llm.generation.told(), *_without_effect(sampling, params)):
            console.print_note(line)
        _answer(llm, asked, params, as_json)


def _without_effect(said: dict[str, Any], params: SamplingParams) -> list[str]:
    """Warn of what was asked for and changes nothing, as transformers does."""
    idle = [f"--{name.replace('_', '-')}" for name in _OF_CHANCE if said.get(name)]
    if params.temperature or not idle:
        return []
    change = "changes" if len(idle) == 1 else "change"
    return [f"warning: at temperature 0 the likeliest token is taken, and {' and '.join(idle)} {change} nothing"]


class _Page:
    """Knows how much of the answer stands on standard output."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, text: str) -> None:
        """Text and its count together, or Ctrl-C could come between them and a piece be lost or said twice."""
        stopping.undivided(lambda: self._add(text))
        sys.stdout.flush()  # this may wait for its reader, and may be left with Ctrl-C: what is to be flushed stays

    def _add(self, text: str) -> None:
        sys.stdout.write(text)
        self.written += len(text)


def _answer(llm: LLM, prompt: Prompt, params: SamplingParams, as_json: bool) -> None:
    """Stream it. Whatever ends it, what was emitted has been printed."""
    chunks, page = llm.stream(prompt, params), _Page()
    try:
        for chunk in chunks:
            if not as_json:
                page.write(chunk.text)
            if chunk.completion is not None:
                _conclude(chunk.completion, page, as_json)
                if told := _cut_short(chunk.completion, params.max_tokens, llm.max_model_len):
                    console.print_note(told)
    except KeyboardInterrupt as interrupt:
        # The stream knows of it, and has ended, unless it came while we were printing. Then it ends now.
        last = chunks.throw(interrupt).completion
        assert last is not None, "a stream ends with what became of it"
        _conclude(last, page, as_json)
        raise


def _cut_short(completion: Completion, max_tokens: int, context: int) -> str | None:
    """Say that the context had no room for all the tokens that were asked for."""
    if completion.finish_reason != "length" or completion.usage["completion_tokens"] >= max_tokens:
        return None
    return (f"the context of {context} tokens is full: there was no room for {max_tokens} new ones "
            "(--max-model-len, --kv-pool-mib)")


def _conclude(completion: Completion, page: _Page, as_json: bool) -> None:
    if as_json:
        console.print_json(completion.to_dict())
        sys.stdout.flush()
    else:
        page.write(completion.text[page.written:] + "\n")
        console.print_note(summary(completion))


def summary(completion: Completion) -> str:
    """One line on how it went."""
    told, timing = completion.speculation, completion.timing
    lossy = "" if told["accept"] == "exact" else f" ({told['altered_tokens']} altered, {told['accept']})"
    where = "1 stage" if told["stages"] == 1 else f"{told['stages']} stages"
    return (f"[{completion.usage['completion_tokens']} tokens{lossy}, {completion.finish_reason}; {told['method']} on "
            f"{where}: {told['steps_per_token']:.2f} steps per token, hit rate {told['hit_rate']:.0%}, "
            f"fill {told['fill']:.0%}; {1e3 * timing['tbt_s']:.1f} ms between tokens; {timing['wall_s']:.1f} s]")
