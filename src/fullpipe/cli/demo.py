"""`fullpipe demo`: the main job on the default pair, against plain pipeline parallelism."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe.cli import console, options
from fullpipe.cli.generate import fetch_all
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.llm import LLM, Completion

PROMPT = "Write a Python function that merges two sorted lists into one sorted list. Then show how to call it."


def demo(
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="The prompt.")] = PROMPT,
    model: options.Model = options.DEFAULT_MODEL,
    draft: options.Draft = "auto",
    stages: options.Stages = 8,
    width: options.Width = None,
    max_new_tokens: options.MaxNewTokens = 96,
    dtype: options.DtypeOption = options.Dtype.auto,
    link_ms: options.LinkMs = 0.5,
    threads: options.Threads = None,
) -> None:
    """Answer a prompt with fullpipe and with pp, and compare."""
    fetch_all(model, draft, "fullpipe")
    from fullpipe.llm import LLM

    messages = [{"role": "user", "content": options.read_prompt(prompt)}]
    params = SamplingParams(max_tokens=max_new_tokens)
    with LLM(model, draft=draft, stages=stages, width=width, dtype=dtype.value, link_ms=link_ms, threads=threads,
             progress=console.print_note) as llm:
        console.print_note(f"\n{messages[0]['content']}\n")
        ours = _show(llm, messages, params)
        console.print_note("\nThe same with plain pipeline parallelism ...")
        llm.use("pp")
        (plain,) = llm.generate([messages], params)
    _table(ours, plain, link_ms)


def _show(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> Completion:
    """Stream the text."""
    completion = None
    for chunk in llm.stream(messages, params):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        completion = chunk.completion
    sys.stdout.write("\n")
    assert completion is not None
    return completion


def _table(ours: Completion, plain: Completion, link_ms: float) -> None:
    console.print_note("")
    stages = ours.speculation["stages"]
    rows = [[one.speculation["method"], f"{one.speculation['steps_per_token']:.2f}",
             f"{one.speculation['hit_rate']:.1%}", f"{one.speculation['fill']:.0%}",
             f"{1e3 * one.timing['tbt_s']:.1f} ms", f"{one.timing['wall_s']:.1f} s"] for one in (plain, ours)]
    console.print_table(["method", "steps/token", "hit rate", "fill", "TBT (virtual time)", "wall clock here"], rows)
    faster = plain.timing["tbt_s"] / ours.timing["tbt_s"] if ours.timing["tbt_s"] else 0.0
    typer.echo(f"\nspeedup in virtual time: {faster:.2f}x    text identical: {_verdict(ours, plain)}")
    console.print_note(
        f"\nVirtual time: the cluster described is {stages} devices with one stage each and one more for the draft,"
        f"\nevery one as fast as this machine (costs measured here, step by step), with links of {link_ms} ms. This"
        f"\nmachine computes all of them in turn, which is the wall clock. A step is one service of stage 0; pp needs"
        f"\n{stages} a token.")


def _verdict(ours: Completion, plain: Completion) -> str:
    if ours.token_ids == plain.token_ids:
        return "yes"
    index = next((i for i, pair in enumerate(zip(ours.token_ids, plain.token_ids)) if pair[0] != pair[1]), "the end")
    return f"NO, from token {index} (see docs/exactness.md on near-ties, and run fullpipe verify)"
