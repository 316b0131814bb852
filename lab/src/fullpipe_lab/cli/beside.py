"""`fullpipe bench --peers` and `--agreement`: on the wall clock, beside other programs and beside our own clock."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullpipe.cli import console
from fullpipe.cli.generate import fetch_all
from fullpipe.errors import UsageError
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.bench.peers import PeerResult
    from fullpipe.bench.receipt import Receipt
    from fullpipe.prompts import FilePrompt

PEERS, UNFINISHED, AGREEMENT = "peers.json", "peers-unfinished.json", "agreement.json"


def run_peers(model: str, draft: str, prompts: list[FilePrompt], max_new_tokens: int, dtype: str,
              threads: int | None, out: Path, repeats: int) -> None:
    """Ask every peer; keep the table after each, print it at the end.

    A table that an earlier run left stays where it is until this one is whole.
    """
    from fullpipe.assembly import draft_names, pick_dtype
    from fullpipe.bench.peers import PeerModels, markdown, peer_table
    from fullpipe.bench.peers import run_peers as ask
    from fullpipe.stations.drafts.names import module_folder

    guesser = next((name for name in draft_names(model, draft) if name != "ngram"), None)
    if guesser and module_folder(guesser):
        raise UsageError(f"{guesser} is a draft module, which no other program runs",
                         hint="Name a draft model that all of them can use, or ngram.")
    fetch_all(model, guesser or "none", "fullpipe" if guesser else "pp")
    dtype = pick_dtype(dtype)
    settings = {"max_new_tokens": max_new_tokens, "prompts": len(prompts), "repeats": repeats, "threads": threads}
    unfinished = out / (UNFINISHED if (out / PEERS).exists() else PEERS)

    def keep(results: list[PeerResult]) -> None:
        _keep(unfinished, model, draft, dtype, settings, peers=peer_table(results))

    rows = peer_table(ask(prompts, SamplingParams(max_tokens=max_new_tokens), PeerModels(model, guesser),
                          progress=console.print_note, keep=keep, dtype=dtype, threads=threads, repeats=repeats))
    print(markdown(rows), end="")
    if unfinished.name != PEERS:
        os.replace(unfinished, out / PEERS)
        console.print_note(f"it replaces {out / PEERS}")


def run_agreement(model: str, draft: str, prompts: list[FilePrompt], max_new_tokens: int, repeats: int, dtype: str,
                  out: Path) -> None:
    """Run two stages by both clocks; print and keep the table."""
    from fullpipe.assembly import pick_dtype
    from fullpipe.bench.agreement import agreement

    fetch_all(model, draft, "fullpipe")
    dtype = pick_dtype(dtype)
    with console.StepBar("agreement of the clocks") as bar:
        rows = agreement(model, draft, prompts, tokens=max_new_tokens, repeats=repeats, dtype=dtype, progress=bar)
    console.print_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    _keep(out / AGREEMENT, model, draft, dtype, {"max_new_tokens": max_new_tokens, "prompts": len(prompts),
                                                 "repeats": repeats}, agreement=rows)


def kept(out: Path, model: str) -> dict[str, list[dict[str, Any]]]:
    """Rows on the same model that earlier runs in the same folder left, each with the date and commit of its run.

    What cannot be read, or is of another model, is left out with a note: it must not cost the benchmark its report.
    """
    return {"peers": _rows(out / PEERS, "peers", model), "agreement": _rows(out / AGREEMENT, "agreement", model)}


def _rows(path: Path, kind: str, model: str) -> list[dict[str, Any]]:
    from fullpipe.bench.receipt import load_receipt

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


def _keep(path: Path, model: str, draft: str, dtype: str, settings: dict[str, Any], **rows: Any) -> None:
    from fullpipe.bench.provenance import wall_receipt
    from fullpipe.bench.receipt import save_receipt

    path.parent.mkdir(parents=True, exist_ok=True)
    receipt: Receipt = wall_receipt(model, draft, dtype, settings, **rows)
    save_receipt(receipt, path)
    console.print_note(f"wrote {path}")
