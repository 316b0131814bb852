"""`fullpipe-lab peers` and `agreement`: on the wall clock, beside other programs and beside our own clock."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.errors import UsageError
from fullpipe.options import ModelOptions
from fullpipe.prompts import choose
from fullpipe_lab.cli import options

if TYPE_CHECKING:
    from fullpipe_lab.peers import PeerResult

_PEERS, _UNFINISHED, _AGREEMENT = "peers.json", "peers-unfinished.json", "agreement.json"
_JOURNAL = "peers-journal.jsonl"


def peers(
    model: options.Model,
    sampling: options.Length,
    prompts: options.Prompts = None,
    limit: options.Limit = None,
    threads: options.Threads = None,
    repeats: options.Repeats = 3,
    out: options.Out = Path("bench-out"),
    which: options.Peers = None,
) -> None:
    """Run Fullpipe and other programs side by side, on the wall clock (python -m fullpipe_lab.peers sets them up).

    A second table sets ours beside the better of llama.cpp's modes, prompt by prompt. What an earlier run left stays
    where it is until this one is whole. A run that is cut off goes on with the same command.
    """
    from fullpipe.assembly import draft_names
    from fullpipe.cluster.provenance import commit_of
    from fullpipe.stations.drafts.names import module_folder
    from fullpipe_lab.files import Journal
    from fullpipe_lab.peers import PeerModels, better_mode, peer_table, run_peers
    from fullpipe_lab.receipts import HERE
    from fullpipe_lab.report import render

    guesser = next((name for name in draft_names(model.model, model.draft) if name != "ngram"), None)
    if guesser and module_folder(guesser):
        raise UsageError(f"{guesser} is a draft module, which no other program runs",
                         hint="Name a draft model that all of them can use, or ngram.")
    fetch_all(replace(model, draft=guesser or "none"))
    chosen, model = choose(prompts, limit), replace(model, dtype=_dtype(model))
    settings = {"max_tokens": sampling.max_tokens, "prompts": len(chosen), "repeats": repeats, "threads": threads}
    journal = Journal(out / _JOURNAL)
    journal.bind(settings | {"model": model.model, "draft": model.draft, "dtype": model.dtype,
                             "asked": [prompt.id for prompt in chosen], "commit": commit_of(HERE)[0]})
    unfinished = out / (_UNFINISHED if (out / _PEERS).exists() else _PEERS)

    def keep(results: list[PeerResult]) -> None:
        _keep(unfinished, model, settings, peers=peer_table(results), better_mode=better_mode(results),
              answers=[row for result in results for row in result.answers()])

    results = run_peers(chosen, sampling, PeerModels(model.model, guesser), which, progress=console.print_note,
                        keep=keep, dtype=model.dtype, threads=threads, repeats=repeats, journal=journal)
    print(render("peers.md.j2", rows=peer_table(results), better=better_mode(results)), end="")
    journal.path.unlink()
    if unfinished.name != _PEERS:
        os.replace(unfinished, out / _PEERS)
        console.print_note(f"it replaces {out / _PEERS}")


def agreement(
    model: options.Model,
    sampling: options.Length,
    prompts: options.Prompts = None,
    limit: options.Limit = None,
    repeats: options.Repeats = 3,
    out: options.Out = Path("bench-out"),
) -> None:
    """Run two stages by the virtual and by the wall clock, and compare."""
    from fullpipe_lab.agreement import agreement as compare

    fetch_all(model)
    chosen, model = choose(prompts, limit), replace(model, dtype=_dtype(model))
    with console.StepBar("agreement of the clocks") as bar:
        rows = compare(model.model, model.draft, chosen, tokens=sampling.max_tokens, repeats=repeats,
                       dtype=model.dtype, progress=bar)
    console.print_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    settings = {"max_tokens": sampling.max_tokens, "prompts": len(chosen), "repeats": repeats}
    _keep(out / _AGREEMENT, model, settings, agreement=rows)


def _dtype(model: ModelOptions) -> str:
    """In what the product would compute; the model is opened only where that matters."""
    from fullpipe.hub import resolve
    from fullpipe.models.dtypes import pick_dtype
    from fullpipe.models.weights import open_model

    return pick_dtype(model.dtype, files=open_model(resolve(model.model)) if model.dtype == "auto" else None)


def kept(out: Path, model: str) -> dict[str, list[dict[str, Any]]]:
    """Rows on the same model that earlier runs in the same folder left, each with the date and commit of its run.

    What cannot be read, or is of another model, is left out with a note: it must not cost the benchmark its report.
    """
    return {"peers": _rows(out / _PEERS, "peers", model), "agreement": _rows(out / _AGREEMENT, "agreement", model)}


def _rows(path: Path, kind: str, model: str) -> list[dict[str, Any]]:
    from fullpipe_lab.receipts import load_receipt

    if not path.exists():
        return []
    try:
        receipt = load_receipt(path)
    except UsageError as error:
        console.print_note(f"left out of the report: {error.message}")
        return []
    if receipt.model.target != model:
        console.print_note(f"left out of the report: {path} is of {receipt.model.target}, not of {model}")
        return []
    commit = receipt.commit[:12] + (" with changes" if receipt.dirty else "")
    return [row | {"date": receipt.date, "commit": commit} for row in getattr(receipt, kind)]


def _keep(path: Path, model: ModelOptions, settings: dict[str, Any], **rows: Any) -> None:
    from fullpipe_lab.files import make_folder
    from fullpipe_lab.receipts import save_receipt, wall_receipt

    make_folder(path.parent)
    save_receipt(wall_receipt(model.model, model.draft, model.dtype, settings, **rows), path)
    console.print_note(f"wrote {path}")
