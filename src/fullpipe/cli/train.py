"""`fullpipe train` makes what a draft module needs, and trains it. A verb is a function; `_VERBS` is their list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe import hub
from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.options import Only
from fullpipe.cli.train_module import exit_head, spd
from fullpipe.cli.verb import verb
from fullpipe.options import EngineOptions, MethodOptions, ModelOptions, Options, PipelineOptions
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.models.tokens.tokenizer import Tokenizer

Data = Annotated[list[Path], typer.Option("--data", metavar="FILE", help="Training text: plain text, JSON lines or "
                                          "parquet with messages, conversations or text, or a folder of such; may be "
                                          "repeated.")]
Prompts = Annotated[Path, typer.Option("--data", metavar="FILE", help="Prompts: JSON lines with messages, prompt or "
                                       "text, or text with a prompt a line.")]
Size = Annotated[int, typer.Option("--size", min=1, help="Tokens in the draft vocabulary.")]
Temperatures = Annotated[list[float] | None, typer.Option("--temperature", help="0 is greedy (the default); if "
                                                          "repeated, the prompts take turns.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Prompts at most.")]

_WHOLE = 1 << 40  # no text is cut: where it is makes no difference to what is counted


def vocab(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the vocabulary goes (JSON).")],
    model: Annotated[ModelOptions, Only("model")],
    size: Size = 8192,
) -> None:
    """Build a draft vocabulary: the tokens that the training text says most."""
    from fullpipe.training.data import Report, read_samples
    from fullpipe.training.vocab import count_labels, pick, save_vocab

    tokenizer = tokenizer_of(model.model)
    report = Report()
    samples = read_samples(data, tokenizer, max_length=_WHOLE, min_length=1, report=report)
    console.print_note(report.summary())
    counts = count_labels(samples, tokenizer)
    chosen = pick(counts, size, tokenizer=tokenizer)
    save_vocab(chosen, out, tokenizer=tokenizer, model=model.model, files=data)
    beside = [pick(counts, other, tokenizer=tokenizer) for other in (size // 2, 2 * size)
              if 64 <= other <= tokenizer.vocab_size]
    rows = [[f"{len(one):,}", f"{one.mass:.2%}", str(out) if one is chosen else "for comparison"]
            for one in sorted([chosen, *beside], key=len)]
    console.print_table(["tokens", f"share of {chosen.total:,} labels", ""], rows)


def distill(
    data: Prompts,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The answers, JSON lines; gone on with if it "
                                      "is there.")],
    model: Annotated[ModelOptions, Only("model", "dtype")],
    pipeline: Annotated[PipelineOptions, Only("stages", "threads")],
    sampling: Annotated[SamplingParams, Only("max_tokens", "seed")] = SamplingParams(max_tokens=256),
    engine: Annotated[EngineOptions, Only("max_num_seqs")] = EngineOptions(max_num_seqs=32),
    temperature: Temperatures = None,
    limit: Limit = None,
) -> None:
    """Let the model answer prompts: training text in its own words."""
    from fullpipe.models.dtypes import pick_dtype
    from fullpipe.training.distill import Distiller, Settings, read_conversations

    settings = Settings(model.model, pick_dtype(model.dtype), sampling.max_tokens, tuple(temperature or (0.0,)),
                        sampling.seed)
    asked = read_conversations(data, limit)
    fetch_all(model, "pp")
    from fullpipe.llm import LLM

    with console.StepBar("distilling") as bar:
        distiller = Distiller(out, asked, settings, bar)
        options = Options(model=replace(model, draft="none", dtype=settings.dtype), method=MethodOptions(method="pp"),
                          pipeline=pipeline, engine=engine)
        with LLM.of(options, listeners=[distiller.listener], progress=console.print_note) as llm:
            done = distiller.run(llm)
    typer.echo(f"{out}: {done.answers} answers, {done.fresh} of them new ({done.fresh_tokens} tokens)")
    if done.altered:
        console.print_note(f"{done.altered} do not tokenise back to what was generated (\"retokenises\": false)")
    if done.too_long:
        console.print_note(f"{done.too_long} prompts are longer than the context and were left out")


def tokenizer_of(model: str) -> Tokenizer:
    """Fetched with a progress bar if it is not here; the weights are not read."""
    from fullpipe.models.tokens.loading import load_tokenizer

    with console.TransferBar() as bar:
        return load_tokenizer(hub.resolve(model, progress=bar))


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train draft modules, and what they need.")

# Further verbs register here: a line each, {"name": function}.
_VERBS: dict[str, Callable[..., None]] = {"spd": spd, "exit": exit_head, "vocab": vocab, "distill": distill}

for _name, _function in _VERBS.items():
    app.command(_name)(verb(_function))
