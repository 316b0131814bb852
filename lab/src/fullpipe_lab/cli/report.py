"""`fullpipe report`: tables, figures and a page from a benchmark's receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullpipe.cli import console


def report(
    receipt: Annotated[Path, typer.Argument(metavar="RECEIPT", help="The .json file that a benchmark wrote.")],
    out: Annotated[Path | None, typer.Option(
        "--out", help="Write into this folder.", show_default="RECEIPT's name with -report, beside it")] = None,
) -> None:
    """Make report.html (one page that opens without a network), report.md and figures/ from a receipt.

    Nothing is measured, and the receipt is not changed.
    """
    from fullpipe.bench.receipt import load_receipt
    from fullpipe.bench.report import write_report

    found = load_receipt(receipt)
    folder = receipt.with_name(f"{receipt.stem}-report") if out is None else out
    page, *others = write_report(found, folder)
    typer.echo(page)
    console.print_note("and " + ", ".join(str(path.relative_to(folder)) for path in others))
