"""`fullpipe train`: what a draft module needs, and its training. A verb is a function; `_VERBS` is their list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe import hub
from fullpipe.cli import console, options
from fullpipe.cli.train_module import exit_head, spd
from fullpipe.cli.verb import verb

if TYPE_CHECKING:
    from fullpipe.models.tokenizer import Tokenizer

Data = Annotated[list[Path], typer.Option("--data", metavar="FILE", help="Training text: plain text, JSON lines or "
                                          "parquet with messages, conversations or text, or a folder of such; may be "
                                          "repeated.")]
Prompts = Annotated[Path, typer.Option("--data", metavar="FILE", help="Prompts: JSON lines with messages, prompt or "
                                       "text, or text with a prompt a line.")]
Size = Annotated[int, typer.Option("--size", min=1, help="Tokens in the draft vocabulary.")]
Temperatures = Annotated[list[float] | None, typer.Option("--temperature", help="0 is greedy (the default); if "
                                                          "repeated, the prompts take turns.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Prompts at most.")]
MaxNumSeqs = Annotated[int, typer.Option("--max-num-seqs", min=1, help="Prompts that are answered at a time.")]

_WHOLE = 1 << 40  # no text is cut: where it is makes no difference to what is counted


def vocab(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the vocabulary goes (JSON).")],
    model: options.Model = options.DEFAULT_MODEL,
    size: Size = 8192,
) -> None:
    """Build a draft vocabulary: the tokens that the training text says most."""
    from fullpipe.training.data import Report, read_samples
    from fullpipe.training.vocab import count_labels, pick, save_vocab

    tokenizer = load_tokenizer(model)
    report = Report()
    samples = read_samples(data, tokenizer, max_length=_WHOLE, min_length=1, report=report)
    console.print_note(report.summary())
    counts = count_labels(samples, tokenizer)
    chosen = pick(counts, size, tokenizer=tokenizer)
    save_vocab(chosen, out, tokenizer=tokenizer, model=model, files=data)
    beside = [pick(counts, other, tokenizer=tokenizer) for other in (size // 2, 2 * size)
              if 64 <= other <= tokenizer.vocab_size]
    rows = [[f"{len(one):,}", f"{one.mass:.2%}", str(out) if one is chosen else "for comparison"]
            for one in sorted([chosen, *beside], key=len)]
    console.print_table(["tokens", f"share of {chosen.total:,} labels", ""], rows)


def distill(
    data: Prompts,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The answers, JSON lines; gone on with if it "
                                      "is there.")],
    model: options.Model = options.DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Temperatures = None,
    seed: options.Seed = 0,
    max_num_seqs: MaxNumSeqs = 32,
    stages: options.Stages = 1,
    limit: Limit = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
) -> None:
    """Let the model answer prompts: training text in its own words."""
    from fullpipe.assembly import pick_dtype
    from fullpipe.cli.generate import fetch_all
    from fullpipe.training.distill import Distiller, Settings, read_conversations

    settings = Settings(model, pick_dtype(dtype.value), max_tokens, tuple(temperature or (0.0,)), seed)
    asked = read_conversations(data, limit)
    fetch_all(model, "none", "pp")
    from fullpipe.llm import LLM

    with console.StepBar("distilling") as bar:
        distiller = Distiller(out, asked, settings, bar)
        with LLM(model, draft="none", stages=stages, method="pp", dtype=settings.dtype, clock="wall", threads=threads,
                 max_num_seqs=max_num_seqs, listeners=[distiller.listener], progress=console.print_note) as llm:
            done = distiller.run(llm)
    typer.echo(f"{out}: {done.answers} answers, {done.fresh} of them new ({done.fresh_tokens} tokens)")
    if done.altered:
        console.print_note(f"{done.altered} do not tokenise back to what was generated (\"retokenises\": false)")
    if done.too_long:
        console.print_note(f"{done.too_long} prompts are longer than the context and were left out")


def load_tokenizer(model: str) -> Tokenizer:
    """Fetched with a progress bar if it is not here; the weights are not read."""
    from fullpipe.models.tokenizer import Tokenizer

    with console.TransferBar() as bar:
        return Tokenizer.load(hub.resolve(model, progress=bar))


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train draft modules, and what they need.")

# Further verbs register here: a line each, {"name": function}.
_VERBS: dict[str, Callable[..., None]] = {"spd": spd, "exit": exit_head, "vocab": vocab, "distill": distill}

for _name, _function in _VERBS.items():
    app.command(_name)(verb(_function))
