"""`fullpipe profile` writes into a file what this machine takes for the parts of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe import hub
from fullpipe.cli import console
from fullpipe.cli.lists import integers
from fullpipe.cli.options import Only
from fullpipe.errors import UsageError
from fullpipe.options import ModelOptions, PipelineOptions

if TYPE_CHECKING:
    from fullpipe.cluster.profile import Cost, Curve, Profile, Surface


def profile(
    model: Annotated[ModelOptions, Only("model", "dtype", "quantization")],
    draft: Annotated[str, typer.Option("--draft", "-d", help="Draft model to measure too: auto (the model's partner, "
                                       "if it has one), none, or a model.")] = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("profile.json"),
    rows: Annotated[str, typer.Option("--rows", help="Rows of a flight, rising.")] = "1,2,4,8,16,32,64",
    contexts: Annotated[str, typer.Option("--contexts", help="Tokens before the rows, rising.")] = "128,512,2048",
    repeats: Annotated[int, typer.Option("--repeats", help="Samples of each time; the median is taken.")] = 5,
    threads: Annotated[int, typer.Option("--threads", help="Compute threads, as of one stage.")] = 1,
    pipeline: Annotated[PipelineOptions, Only("device")] = PipelineOptions(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile instead of tables.")] = False,
) -> None:
    """Measure this machine: layers, head, embedding, draft calls and messages, by rows and context.

    Nothing else should be running. An interrupted run leaves an older file as it is.
    """
    row_counts, context_sizes = integers(rows, "--rows"), integers(contexts, "--contexts")
    if not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: there is no folder {out.parent}", hint="Name a file in one that exists.")
    guesser = _draft_model(model.model, draft)
    with console.TransferBar() as transfer:
        for name in filter(None, (model.model, guesser)):
            hub.resolve(name, progress=transfer)
    from fullpipe.cluster.measure import measure

    with console.StepBar("measuring") as bar:
        found = measure(model.model, guesser, rows=row_counts, contexts=context_sizes, repeats=repeats, threads=threads,
                        dtype=model.dtype, quantization=model.quantization, device=pipeline.device,
                        progress=lambda what, done, total: bar(done, total, what))
    found.save(out)
    if as_json:
        console.print_json(found.model_dump(mode="json"))
    else:
        _print(found)
    console.print_note(f"wrote {out}")


def _draft_model(model: str, draft: str) -> str | None:
    """The one model among the drafts that `draft` stands for; n-gram costs nothing worth measuring."""
    from fullpipe.assembly import draft_names
    from fullpipe.stations.drafts.names import module_folder

    names = [name for name in draft_names(model, draft) if name != "ngram"]
    if modules := [name for name in names if module_folder(name)]:
        raise UsageError(f"{modules[0]} is not measured by itself: a cluster counts a draft module as so many of the "
                         "target's layers, which the profile has", hint="Leave it out: --draft none.")
    if len(names) > 1:
        raise UsageError(f"a profile holds one draft model (got {', '.join(names)})", hint="Measure one at a time.")
    return names[0] if names else None


# ---- tables ----------------------------------------------------------------------------------------------


def _print(found: Profile) -> None:
    draft = f", draft {found.draft_model.name}" if found.draft_model else ""
    typer.echo(f"{found.target.name}{draft}, {found.dtype}, {_count(found.threads, 'thread')} of "
               f"{found.machine['cpu']}; milliseconds: median and median absolute deviation of "
               f"{_count(found.layers.costs[0][0].samples, 'sample')}\n")
    _print_surface("one layer", found.layers)
    _print_surface("a flight, beside its layers", found.flights)
    if found.drafts is not None:
        _print_surface("a draft call", found.drafts)
    _print_curve("ROWS", {"HEAD": found.heads, "EMBEDDING": found.lookups})
    _print_curve("BYTES", {"MESSAGE": found.messages})


def _print_surface(what: str, surface: Surface) -> None:
    typer.echo(f"{what}, by rows and context:")
    console.print_table(("ROWS", *(f"{context:,} TOKENS" for context in surface.contexts)),
                        [(str(rows), *map(_cell, line)) for rows, line in zip(surface.rows, surface.costs)])
    typer.echo()


def _print_curve(size: str, curves: dict[str, Curve]) -> None:
    sizes = next(iter(curves.values())).sizes
    console.print_table((size, *curves), [(f"{number:,}", *(_cell(curve.costs[k]) for curve in curves.values()))
                                          for k, number in enumerate(sizes)])
    typer.echo()


def _cell(cost: Cost) -> str:
    return f"{1e3 * cost.seconds:.3f} ± {1e3 * cost.spread:.3f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
