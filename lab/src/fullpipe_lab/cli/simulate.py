"""`fullpipe-lab simulate`: answer one prompt as if on a cluster."""

from __future__ import annotations

import contextlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.options import Json, Without, as_prompt, read_prompt
from fullpipe.cli.trace import Traces
from fullpipe.errors import UsageError
from fullpipe.options import ChatOptions, MethodOptions, ModelOptions, Options, PipelineOptions
from fullpipe.request import SamplingParams
from fullpipe_lab.cli import options

if TYPE_CHECKING:
    from fullpipe_lab.asking import Said, Simulated


class Costs(StrEnum):
    measured = "measured"
    unit = "unit"


def simulate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")],
    model: Annotated[ModelOptions, Without("max_model_len", "generation_config", "lora")],
    method: MethodOptions,
    sampling: Annotated[SamplingParams, Without("stop", "accept_typical", "skip_special_tokens", "min_tokens",
                                                 "bad_words")],
    chat: ChatOptions,
    cluster: Annotated[str | None, typer.Option("--cluster", metavar="FILE", help="As if on the cluster that a TOML "
                                                "file, or a preset, describes.")] = None,
    stages: Annotated[int, typer.Option("--stages", min=1, help="Without a cluster: so many stages, on links that take "
                                        "nothing.")] = 8,
    costs: Annotated[Costs, typer.Option("--costs", help="Without a cluster, what a stage step and a draft call take: "
                                         "what they take here, as if each had a machine like this one to itself, or "
                                         "one unit (1 s) each.")] = Costs.measured,
    threads: options.Threads = None,
    events: Annotated[Path | None, typer.Option("--events", help="Record the events here, a JSON line each.")] = None,
    trace: Annotated[list[Path] | None, typer.Option("--trace", metavar="FILE", help="Write the run to FILE, by its "
                                                     "ending: .json (Chrome trace), .png or .svg (picture), .html "
                                                     "(page), .jsonl (events). May be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt as if on imagined devices: every stage really computes, here and one after another, and a
    virtual clock says what it would have taken there."""
    from fullpipe_lab.clusters import Cluster

    asked = as_prompt(read_prompt(prompt), chat, model)
    if cluster is not None and costs is not Costs.measured:
        raise UsageError("a cluster has its own costs", hint="Leave out --costs, or --cluster.")
    on = Cluster.load(cluster) if cluster is not None else stages
    traces = Traces(trace or (), events, clock="virtual time",
                    title=f"{model.model} on {on.name if isinstance(on, Cluster) else f'{stages} stages'}, simulated")
    fetch_all(model, method.method)
    from fullpipe_lab.asking import Simulated

    with contextlib.ExitStack() as stack:
        wanted = Options(model=model, method=method, pipeline=PipelineOptions(stages=stages, threads=threads))
        run = stack.enter_context(Simulated(wanted, on, costs=costs.value, progress=console.print_note,
                                            listeners=[traces] if traces.wanted else ()))
        traces.tokenizer = run.prepared.tokenizer
        stack.enter_context(traces)
        said, text = _answer(run, asked, sampling, as_json)
        if as_json:
            console.print_json(figures(run, said, text))
        else:
            console.print_note(summary(run, said))


def _answer(run: Simulated, asked: str | list[dict[str, str]], params: SamplingParams,
            as_json: bool) -> tuple[Said, str]:
    """Stream it. Whatever ends it, what was emitted has been printed."""
    tokenizer, shown, text = run.prepared.tokenizer, 0, ""
    tokens = tokenizer.encode(asked, add_special=True) if isinstance(asked, str) else run.encode(asked)
    words = tokenizer.stream(tokens)
    for said in run.stream(tokens, params):
        fresh = "".join(map(words.push, said.tokens[shown:]))
        text, shown = text + fresh, len(said.tokens)
        if not as_json:
            sys.stdout.write(fresh)
            sys.stdout.flush()
    rest = words.finish()
    if not as_json:
        sys.stdout.write(rest + "\n")
        sys.stdout.flush()
    return said, text + rest


def figures(run: Simulated, said: Said, text: str) -> dict[str, Any]:
    """What `--json` prints."""
    stats = said.stats
    return {
        "text": text, "token_ids": said.tokens, "finish_reason": said.finish,
        "method": run.method.name, "stages": run.num_stages,
        "speculation": {"steps": round(stats.steps, 3), "steps_per_token": round(stats.steps_per_token, 4),
                        "hits": stats.hits, "misses": stats.misses, "hit_rate": round(stats.hit_rate, 4),
                        "mean_acceptance_length": round(stats.mean_acceptance_length, 4),
                        "launched_rows": stats.launched_rows, "wasted_rows": stats.wasted_rows,
                        "fill": round(stats.fill(run.num_stages), 4), "draft_calls": stats.draft_calls,
                        "draft_rows": stats.draft_rows},
        "timing": {"clock": "virtual", "ttft_s": stats.ttft_s, "tbt_s": stats.tbt_s, "wall_s": said.wall_s}}


def summary(run: Simulated, said: Said) -> str:
    """One line on how it went."""
    stats = said.stats
    return (f"[{len(said.tokens)} tokens, {said.finish}; {run.method.name} on {run.num_stages} stages, simulated: "
            f"{stats.steps_per_token:.2f} steps per token, hit rate {stats.hit_rate:.0%}, "
            f"fill {stats.fill(run.num_stages):.0%}; TBT {1e3 * stats.tbt_s:.1f} ms in virtual time; "
            f"{said.wall_s:.1f} s here]")
