"""The receipt of the comparison of servers: all that was measured, a level of a server in each round on a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spd_study.journal import Journal

from fullpipe.errors import UsageError

NAME = "serving_vllm"
_DIGITS = 6  # of seconds: below a microsecond there is nothing to see


def make_receipt(journal: Journal) -> dict[str, Any]:
    """Of what there is. The command, commit and machine are those of the first run; `runs` has each.

    Raises UsageError for a journal without a level.
    """
    rows = journal.rows
    cells = [_rounded(row) for key, row in rows.items() if "load" in row]
    runs = [row for key, row in rows.items() if key.startswith("run/")]
    if not cells:
        raise UsageError(f"{journal.path} has no level yet", hint="Measure first; a server's log says why it failed.")
    about = {key: runs[0][key] for key in ("command", "commit", "dirty", "date", "versions", "machine")}
    told = ("contender", "round", "date", "commit", "dirty", "load_s", "server", "version_served", "environment")
    return {"benchmark": NAME, **about, "clock": "wall", "plan": _without_key(rows["plan"]),
            "runs": [{key: run[key] for key in told} for run in runs],
            "failed": [_without_key(row) for key, row in rows.items() if key.startswith("failed/")],
            "cells": sorted((_without_key(cell) for cell in cells),
                            key=lambda cell: (cell["level"], cell["contender"], cell["round"]))}


def write_receipt(receipt: dict[str, Any], path: Path) -> None:
    head = json.dumps({key: value for key, value in receipt.items() if key != "cells"}, indent=1, allow_nan=False)
    lines = ",\n".join(json.dumps(cell, ensure_ascii=False, allow_nan=False) for cell in receipt["cells"])
    path.write_text(head.removesuffix("\n}") + f',\n "cells": [\n{lines}\n]}}\n', encoding="utf-8")


def read_receipt(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _without_key(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "key"}


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, _DIGITS)
        case list():
            return [_rounded(one) for one in value]
        case dict():
            return {key: _rounded(one) for key, one in value.items()}
    return value
