"""`fullpipe bench --peers` and `--agreement`: on the wall clock, beside other programs and beside our own clock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullpipe.cli import console
from fullpipe.cli.generate import fetch_all
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.bench.receipt import Receipt
    from fullpipe.prompts import FilePrompt

PEERS, AGREEMENT = "peers.json", "agreement.json"


def run_peers(model: str, draft: str, prompts: list[FilePrompt], max_new_tokens: int, dtype: str,
              threads: int | None, out: Path) -> None:
    """Ask every peer; print and keep the table."""
    from fullpipe.assembly import draft_names, pick_dtype
    from fullpipe.bench.peers import PeerModels, markdown, peer_table
    from fullpipe.bench.peers import run_peers as ask

    guesser = next((name for name in draft_names(model, draft) if name != "ngram"), None)
    fetch_all(model, guesser or "none", "fullpipe" if guesser else "pp")
    dtype = pick_dtype(dtype)
    rows = peer_table(ask(prompts, SamplingParams(max_tokens=max_new_tokens), PeerModels(model, guesser),
                          progress=console.print_note, dtype=dtype, threads=threads))
    print(markdown(rows), end="")
    _keep(out / PEERS, model, draft, dtype, {"max_new_tokens": max_new_tokens, "prompts": len(prompts)}, peers=rows)


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


def kept(out: Path) -> dict[str, Any]:
    """Rows that earlier runs in the same folder left, for one report of all."""
    from fullpipe.bench.receipt import load_receipt

    rows: dict[str, Any] = {"peers": [], "agreement": []}
    for name, kind in ((PEERS, "peers"), (AGREEMENT, "agreement")):
        if (out / name).exists():
            rows[kind] = getattr(load_receipt(out / name), kind)
    return rows


def _keep(path: Path, model: str, draft: str, dtype: str, settings: dict[str, Any], **rows: Any) -> None:
    from fullpipe.bench.provenance import wall_receipt
    from fullpipe.bench.receipt import save_receipt

    path.parent.mkdir(parents=True, exist_ok=True)
    receipt: Receipt = wall_receipt(model, draft, dtype, settings, **rows)
    save_receipt(receipt, path)
    console.print_note(f"wrote {path}")
