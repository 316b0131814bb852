"""`fullpipe verify` asks whether the methods say what the model alone says, here, with this model and dtype."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.options import Json, Without, as_prompt, one_of
from fullpipe.errors import UsageError
from fullpipe.methods import METHODS, WITH_DEPTH
from fullpipe.options import ChatOptions, MethodOptions, ModelOptions, Options, PipelineOptions
from fullpipe.prompts import FilePrompt, read_prompts
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.llm import LLM, Completion, Prompt

# By how much a picked logit may stand above its rival where two runs disagree and it still counts as a tie that
# rounding decided. A bfloat16 logit between 16 and 32 is itself rounded to the next eighth.
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.5, "stored": 1e-3, "int8": 1e-3, "int4": 1e-3}


if TYPE_CHECKING:
    Checked = str
else:
    Checked = one_of(*METHODS)


@dataclass(frozen=True, slots=True)
class Difference:
    """Is the first token at which a method left `pp`'s text.

    token, reference: what the method and `pp` said there; both -1 where one of the texts had ended.
    margins: how far each pick's logit stood above its rival's, noise included; None where there was no rival.
    """

    prompt: str
    method: str
    index: int
    token: int
    reference: int
    margin: float | None
    reference_margin: float | None
    near_tie: bool


def verify(
    prompts: Annotated[Path, typer.Option("--prompts", help="File of prompts: text lines, or JSON lines with turns "
                                          "or prompt.")],
    model: Annotated[ModelOptions, Without("generation_config")],
    shape: Annotated[MethodOptions, Without("method")],
    sampling: Annotated[SamplingParams, Without("accept_typical")],
    pipeline: PipelineOptions,
    chat: ChatOptions,
    method: Annotated[list[Checked] | None, typer.Option("--method", help="Check this method; may be repeated. "
                                                         "Default: all.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use the first so many prompts.")] = None,
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Logit margin below which a difference counts "
                                                    "as a near-tie.")] = None,
    as_json: Json = False,
) -> None:
    """Run the methods against pp and say "identical", or which tokens differ and how near the tie was.

    A --depth counts for the methods that have one. Exits with 1 when a difference is more than a near-tie.
    """
    questions = read_prompts(prompts, limit)
    asked: list[Prompt] = [as_prompt(question.text, chat, model) for question in questions]
    methods = [str(chosen) for chosen in method or METHODS if chosen != "pp"]
    if not methods:
        raise UsageError("nothing to compare with pp", hint="Name another method, or none for all of them.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"the tolerance must be 0 or more, and finite (got {tolerance:g})")
    # Begun with a method that has a depth, if one is given; the model keeps it for the others that do.
    first = methods[0] if shape.depth is None else next((name for name in methods if name in WITH_DEPTH), methods[0])
    fetch_all(model, methods[0])
    from fullpipe.llm import LLM

    real = replace(model, margins=True, generation_config="none")
    with LLM.of(Options(model=real, method=replace(shape, method=first), pipeline=pipeline),
                progress=console.print_note) as llm:
        near = NEAR_TIE[llm.dtype] if tolerance is None else tolerance
        report = _compare(llm, questions, asked, methods, sampling, near)
        report |= {"model": model.model, "draft": model.draft, "stages": llm.num_stages, "dtype": llm.dtype,
                   "near_tie_tolerance": near}
    _print(report, as_json)
    if any(not difference["near_tie"] for difference in report["differences"]):
        raise typer.Exit(1)


def _compare(llm: LLM, questions: list[FilePrompt], asked: list[Prompt], methods: list[str], params: SamplingParams,
             near: float) -> dict[str, Any]:
    texts: dict[str, list[Completion]] = {}
    for method in ("pp", *methods):
        llm.use(method)
        texts[method] = []
        for number, prompt in enumerate(asked, start=1):
            texts[method] += llm.generate([prompt], params)
            told = texts[method][-1].speculation
            console.print_note(f"{method}: prompt {number} of {len(asked)}, {told['steps_per_token']:.2f} steps "
                               f"per token")
    found = [difference for method in methods for question, one, reference in
             zip(questions, texts[method], texts["pp"])
             if (difference := first_difference(question.id, method, one, reference, near,
                                                params.temperature or 1.0))]
    return {"prompts": len(questions), "methods": methods,
            "tokens": sum(len(one.token_ids) for one in texts["pp"]),
            "identical": not found, "near_ties": sum(difference.near_tie for difference in found),
            "differences": [asdict(difference) for difference in found]}


def first_difference(prompt: str, method: str, one: Completion, reference: Completion, near: float,
                     temperature: float = 1.0) -> Difference | None:
    """Where `one` leaves `reference`; None when they are the same. Past that point both are right about
    different texts, so nothing is compared there."""
    for index, (token, wanted) in enumerate(zip(one.token_ids, reference.token_ids)):
        if token != wanted:
            # Margins are of scores that the temperature has divided; near-ties are of logits.
            margin, its_margin = (None if above is None else above * temperature
                                  for above in (one.margins[index], reference.margins[index]))
            near_tie = all(above is not None and above <= near for above in (margin, its_margin))
            return Difference(prompt, method, index, token, wanted, margin, its_margin, near_tie)
    if len(one.token_ids) != len(reference.token_ids):
        return Difference(prompt, method, min(len(one.token_ids), len(reference.token_ids)), -1, -1, None, None,
                          near_tie=False)
    return None


def _print(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(report)
        return
    what = (f"{report['prompts']} prompts, {report['tokens']} tokens, {report['dtype']}, methods "
            f"{', '.join(report['methods'])}")
    if report["identical"]:
        typer.echo(f"identical: {what}")
        return
    for one in report["differences"]:
        typer.echo(_line(one))
    bad = len(report["differences"]) - report["near_ties"]
    typer.echo(f"{bad} different, {report['near_ties']} near-ties (margin up to {report['near_tie_tolerance']}): "
               f"{what}")


def _line(one: dict[str, Any]) -> str:
    kind = "near-tie" if one["near_tie"] else "DIFFERENT"
    where = f"{kind}: prompt {one['prompt']}, {one['method']}, token {one['index']}: "
    if one["token"] == one["reference"]:
        return where + "one text ends there"
    return where + " against ".join(
        f"{token} ({'no rival' if margin is None else f'margin {margin:.4f}'})"
        for token, margin in ((one["token"], one["margin"]), (one["reference"], one["reference_margin"])))
