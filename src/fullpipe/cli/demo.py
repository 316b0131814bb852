"""`fullpipe demo` gives the same answer twice on stages with slow links between them, without and with speculation."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.options import Only, read_prompt
from fullpipe.errors import MissingExtra
from fullpipe.messages import Event
from fullpipe.options import MethodOptions, ModelOptions, Options, PipelineOptions
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.llm import LLM, Completion

PROMPT = "Write a Python function that merges two sorted lists into one sorted list."
_PICTURE = Path("fullpipe-demo.png")


def demo(
    model: Annotated[ModelOptions, Only("model", "draft", "dtype", "quantization")],
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="The prompt.")] = PROMPT,
    pipeline: Annotated[PipelineOptions, Only("stages", "link_ms", "threads")]
    = PipelineOptions(stages=4, link_ms=25.0),
    sampling: Annotated[SamplingParams, Only("max_tokens")] = SamplingParams(max_tokens=96),
    picture: Annotated[Path, typer.Option("--picture", metavar="FILE", help="Where the picture of both pipelines over "
                                          "time goes, .png or .svg.")] = _PICTURE,
) -> None:
    """Answer a prompt with plain pipeline parallelism and with fullpipe, on the wall clock, and compare."""
    asked = [{"role": "user", "content": read_prompt(prompt)}]
    drawable = _can_draw(picture)
    fetch_all(model)
    from fullpipe.llm import LLM

    console.print_note(f"{model.model} on {pipeline.stages} stage processes of this machine; every message between "
                       f"them is held for {pipeline.link_ms:g} ms, as a link between sites would.")
    events: list[Event] = []
    options = Options(model=replace(model, generation_config="none"), method=MethodOptions(method="fullpipe"),
                      pipeline=pipeline)
    with LLM.of(options, listeners=[events.append], progress=console.print_note) as llm:
        llm.use("pp")
        llm.generate(asked, SamplingParams(max_tokens=1))  # pays for what is made once
        console.print_note(f"\n{asked[0]['content']}")
        plain, its_events = _run(llm, "pp", "plain pipeline parallelism: a token goes through all stages before the "
                                 "next one sets off", asked, sampling, events)
        ours, our_events = _run(llm, "fullpipe", "fullpipe: the stages are filled with guesses of the same text",
                                asked, sampling, events)
    _compare(plain, ours, pipeline)
    if drawable:
        _draw(its_events, our_events, picture)
    _what_next()
    if ours.token_ids != plain.token_ids:
        raise typer.Exit(1)


def _run(llm: LLM, method: str, title: str, asked: list[dict[str, str]], params: SamplingParams,
         events: list[Event]) -> tuple[Completion, list[Event]]:
    """Stream an answer as it comes; the answer, and what happened from its first launch on."""
    console.print_note(f"\n--- {title}\n")
    llm.use(method)
    events.clear()
    completion = None
    for chunk in llm.stream(asked, params):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        completion = chunk.completion
    sys.stdout.write("\n")
    assert completion is not None
    console.print_note(f"\n{_speed(completion)}")
    return completion, list(events)


def _speed(one: Completion) -> str:
    timing, told = one.timing, one.speculation
    return (f"{one.usage['completion_tokens']} tokens, {1e3 * timing['tbt_s']:.0f} ms each after the first "
            f"({timing['wall_s']:.1f} s in all; of {told['hits'] + told['misses']} tokens {told['hits']} were in "
            "flight when they were needed)")


def _compare(plain: Completion, ours: Completion, pipeline: PipelineOptions) -> None:
    faster = plain.timing["tbt_s"] / ours.timing["tbt_s"] if ours.timing["tbt_s"] else 0.0
    typer.echo(f"\ntext identical: {_sameness(ours, plain)}\n"
               f"speedup: {faster:.2f}x on the wall clock, time between tokens")
    console.print_note(f"Lived through here: {pipeline.stages} processes and a draft on this one machine, with "
                       f"emulated links of {pipeline.link_ms:g} ms one way. No part of it was calculated.")


def _sameness(ours: Completion, plain: Completion) -> str:
    """Say whether the texts are the same, and where they part."""
    if ours.token_ids == plain.token_ids:
        return "yes"
    index = next((i for i, pair in enumerate(zip(ours.token_ids, plain.token_ids)) if pair[0] != pair[1]), None)
    where = ": one text ends earlier" if index is None else f", from token {index}"
    return f"NO{where} (see docs/exactness.md on near-ties, and run fullpipe verify)"


def _can_draw(picture: Path) -> bool:
    """Raises UsageError for a file that cannot be written, now rather than after minutes."""
    from fullpipe.cli.trace import check_output

    try:
        check_output(picture)
    except MissingExtra as error:
        console.print_note(f"no picture: {error.message} ({error.hint})")
        return False
    return True


def _draw(plain: list[Event], ours: list[Event], picture: Path) -> None:
    from fullpipe.trace.picture import write_comparison

    write_comparison(picture, [("pp", plain), ("fullpipe", ours)], clock="wall-clock time")
    typer.echo(f"picture of both pipelines over time: {picture}")


def _what_next() -> None:
    console.print_note(
        "\nWhat comes next:\n"
        "  fullpipe serve                            this model over the OpenAI API, for many at a time\n"
        "  fullpipe generate PROMPT --stages 4       your own prompt on stage processes; without --stages in one\n"
        "  fullpipe-lab simulate PROMPT --cluster F  the same on devices and links that you describe, in virtual time\n"
        "Several hosts: not yet; stages are processes of one machine today.")
