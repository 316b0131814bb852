"""`fullpipe-lab report`: tables and figures from a benchmark's receipt."""

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
    """Make report.md and figures/ from a receipt. Nothing is measured, and the receipt is not changed."""
    from fullpipe_lab.receipts import load_receipt
    from fullpipe_lab.report import write_report

    folder = receipt.with_name(f"{receipt.stem}-report") if out is None else out
    page, *others = write_report(load_receipt(receipt), folder)
    typer.echo(page)
    console.print_note("and " + ", ".join(str(path.relative_to(folder)) for path in others))
