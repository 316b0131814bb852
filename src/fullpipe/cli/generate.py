"""`fullpipe generate`: answer one prompt."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe import hub
from fullpipe.cli import console, options
from fullpipe.cli.trace import Traces, clock_of
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.engine.loop import Listener
    from fullpipe.llm import LLM, Chunk, Completion, Prompt


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")],
    model: options.Model = options.DEFAULT_MODEL,
    draft: options.Draft = "auto",
    stages: options.Stages = 8,
    method: options.MethodOption = options.Method.fullpipe,
    width: options.Width = None,
    depth: options.Depth = None,
    refresh: options.Refresh = None,
    accept: options.Accept = "exact",
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    pipeline: options.PipelineOption = options.PipelineKind.inprocess,
    clock: options.ClockOption = options.Clock.virtual,
    costs: options.CostsOption = options.Costs.measured,
    link_ms: options.LinkMs = 0.0,
    link_mbit: options.LinkMbit = None,
    cluster: options.ClusterOption = None,
    threads: options.Threads = None,
    timeout: options.Timeout = 60.0,
    start_timeout: options.StartTimeout = 300.0,
    system: options.System = None,
    no_chat_template: options.NoChatTemplate = False,
    events: Annotated[Path | None, typer.Option("--events", help="Record the events here, a JSON line each.")] = None,
    trace: Annotated[list[Path] | None, typer.Option("--trace", metavar="FILE", help="Write the run to FILE, by its "
                                                     "ending: .json (Chrome trace), .png or .svg (picture), .html "
                                                     "(page), .jsonl (events). May be repeated.")] = None,
    as_json: options.Json = False,
) -> None:
    """Answer a prompt; the text streams to standard output as it is committed."""
    text = options.read_prompt(prompt)
    params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                            repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
                            accept_typical=options.parse_accept(accept))
    asked = options.as_prompt(text, system, no_chat_template)
    if cluster is not None:
        from fullpipe.planning.cluster import Cluster

        stages = Cluster.load(cluster).num_stages
    traces = Traces(trace or (), events, title=f"{method.value} on {stages} stages, {model}",
                    clock=clock_of(pipeline, clock))
    listeners: list[Listener] = [traces] if traces.wanted else []
    with contextlib.ExitStack() as stack:
        fetch_all(model, draft, method.value)
        from fullpipe.llm import LLM

        llm = stack.enter_context(LLM(
            model, draft=draft, stages=stages, method=method.value, width=width, depth=depth, refresh=refresh,
            dtype=dtype.value, pipeline=pipeline.value, clock=clock.value, costs=costs.value, link_ms=link_ms,
            link_mbit=link_mbit, cluster=cluster, threads=threads, timeout=timeout, start_timeout=start_timeout,
            listeners=listeners, progress=console.print_note))
        traces.tokenizer = llm.tokenizer
        stack.enter_context(traces)
        _answer(llm, asked, params, as_json)


def fetch_all(model: str, draft: str, method: str) -> None:
    """Fetch what is missing, with a progress bar, before anything is loaded."""
    from fullpipe.assembly import draft_names
    from fullpipe.stations.drafts.names import module_folder

    names = [model]
    if method != "pp" or draft != "auto":
        names += [name for name in draft_names(model, draft) if name != "ngram" and not module_folder(name)]
    with console.TransferBar() as bar:
        for name in names:
            hub.resolve(name, progress=bar)


def _answer(llm: LLM, prompt: Prompt, params: SamplingParams, as_json: bool) -> None:
    """Stream it. Whatever ends it, what was emitted has been printed."""
    chunks = llm.stream(prompt, params)
    try:
        for chunk in chunks:
            _print(chunk, as_json)
    except KeyboardInterrupt as interrupt:
        # The stream knows of it, and has ended, unless it came while we were printing. Then it ends now.
        _print(chunks.throw(interrupt), as_json)
        raise


def _print(chunk: Chunk, as_json: bool) -> None:
    if not as_json:
        sys.stdout.write(chunk.text + ("\n" if chunk.completion else ""))
        sys.stdout.flush()
    if chunk.completion is not None:
        _conclude(chunk.completion, as_json)


def _conclude(completion: Completion, as_json: bool) -> None:
    if as_json:
        console.print_json(completion.to_dict())
        sys.stdout.flush()
    else:
        console.print_note(summary(completion))


def summary(completion: Completion) -> str:
    """One line on how it went."""
    told, timing = completion.speculation, completion.timing
    lossy = "" if told["accept"] == "exact" else f" ({told['altered_tokens']} altered, {told['accept']})"
    return (f"[{completion.usage['completion_tokens']} tokens{lossy}, {completion.finish_reason}; {told['method']} on "
            f"{told['stages']} stages: {told['steps_per_token']:.2f} steps per token, hit rate "
            f"{told['hit_rate']:.0%}, fill {told['fill']:.0%}; TBT {1e3 * timing['tbt_s']:.1f} ms in "
            f"{timing['clock']} time; {timing['wall_s']:.1f} s here]")
