"""`fullpipe verify`: do the methods say what the model alone says, here, with this model and dtype?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe.cli import console, options
from fullpipe.cli.generate import fetch_all
from fullpipe.errors import UsageError
from fullpipe.prompts import FilePrompt, read_prompts
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.llm import LLM, Completion

# By how much a picked logit may stand above its rival where two runs disagree and it still counts as a tie that
# rounding decided. A bfloat16 logit between 16 and 32 is itself rounded to the next eighth.
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.5}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token at which a method left `pp`'s text. margins: how far each pick's logit stood above its
    rival's, noise included."""

    prompt: str
    method: str
    index: int
    token: int
    reference: int
    margin: float
    reference_margin: float
    near_tie: bool


def verify(
    prompts: Annotated[Path, typer.Option("--prompts", help="File of prompts: text lines, or JSON lines with turns "
                                          "or prompt.")],
    model: options.Model = options.DEFAULT_MODEL,
    draft: options.Draft = "auto",
    stages: options.Stages = 8,
    method: Annotated[list[options.Method] | None, typer.Option("--method", help="Check this method; may be repeated. "
                                                                "Default: all.")] = None,
    width: options.Width = 8,
    depth: options.Depth = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use the first so many prompts.")] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    pipeline: options.PipelineOption = options.PipelineKind.inprocess,
    threads: options.Threads = None,
    timeout: options.Timeout = 60.0,
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Logit margin below which a difference counts "
                                                    "as a near-tie.")] = None,
    system: options.System = None,
    no_chat_template: options.NoChatTemplate = False,
    as_json: options.Json = False,
) -> None:
    """Run the methods against pp and say "identical", or which tokens differ and how near the tie was.

    Exits with 1 when a difference is more than a near-tie.
    """
    questions = read_prompts(prompts, limit)
    methods = [chosen.value for chosen in method or list(options.Method) if chosen is not options.Method.pp]
    if not methods:
        raise UsageError("nothing to compare with pp", hint="Name another method, or none for all of them.")
    params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                            repetition_penalty=repetition_penalty, seed=seed)
    fetch_all(model, draft, methods[0])
    from fullpipe.assembly import pick_dtype
    from fullpipe.llm import LLM

    real_dtype = pick_dtype(dtype.value)
    near = NEAR_TIE[real_dtype] if tolerance is None else tolerance
    with LLM(model, draft=draft, stages=stages, method=methods[0], width=width, depth=depth, dtype=real_dtype,
             pipeline=pipeline.value, costs="unit", threads=threads, timeout=timeout,
             margins=True, progress=console.print_note) as llm:
        report = _compare(llm, questions, methods, params, width, depth, near, (system, no_chat_template))
    report |= {"model": model, "draft": draft, "stages": stages, "dtype": real_dtype, "near_tie_tolerance": near}
    _print(report, as_json)
    if any(not difference["near_tie"] for difference in report["differences"]):
        raise typer.Exit(1)


def _compare(llm: LLM, questions: list[FilePrompt], methods: list[str], params: SamplingParams, width: int,
             depth: int | None, near: float, asking: tuple[str | None, bool]) -> dict[str, Any]:
    asked = [options.as_prompt(question.text, *asking) for question in questions]
    texts: dict[str, list[Completion]] = {}
    for method in ("pp", *methods):
        llm.use(method, width=width, depth=depth)
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
            margins = one.margins[index] * temperature, reference.margins[index] * temperature
            return Difference(prompt, method, index, token, wanted, *margins, near_tie=max(margins) <= near)
    if len(one.token_ids) != len(reference.token_ids):
        return Difference(prompt, method, min(len(one.token_ids), len(reference.token_ids)), -1, -1,
                          float("inf"), float("inf"), near_tie=False)
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
        kind = "near-tie" if one["near_tie"] else "DIFFERENT"
        typer.echo(f"{kind}: prompt {one['prompt']}, {one['method']}, token {one['index']}: {one['token']} (margin "
                   f"{one['margin']:.4f}) against {one['reference']} (margin {one['reference_margin']:.4f})")
    bad = len(report["differences"]) - report["near_ties"]
    typer.echo(f"{bad} different, {report['near_ties']} near-ties (margin up to {report['near_tie_tolerance']}): "
               f"{what}")
