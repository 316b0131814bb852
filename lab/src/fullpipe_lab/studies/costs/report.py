"""The receipt of the journals, and of the receipt alone the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fullpipe.files import write_whole
from fullpipe_lab.files import Journal
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt
from fullpipe_lab.report import render
from fullpipe_lab.studies import batching
from fullpipe_lab.studies.costs import tables
from fullpipe_lab.studies.costs.comparing import Results, best_of
from fullpipe_lab.studies.costs.measuring import HIT_RATES, OTHERS, PATIENCE, PIPEDEC_WIDTHS
from fullpipe_lab.studies.costs.targets import targets
from fullpipe_lab.sweep import CHAIN_DEPTHS

REPORT = STUDIES.parent / "reports" / "costs"
_WORST = 12


def write_receipt(journals: Sequence[Journal], about: Mapping[str, Any], many: Sequence[Mapping[str, Any]],
                  out: Path) -> None:
    """about: what the recordings are. many: receipts of `studies.batching`."""
    rows = [row for journal in journals for row in journal.rows.values()]
    hits = [{name: value for name, value in row.items() if name != "key"} for row in rows
            if row["key"].startswith(HIT_RATES)]
    samples = best_of(row for row in rows if "cell" in row)
    versions = {one["version"] for one in samples}
    runs = sorted((row for row in rows if row["key"].startswith("run/") and row["version"] in versions),
                  key=lambda run: str(run["date"]))
    found = {**about, "prompts": _prompts(rows), "runs": runs, "hit_rates": hits,
             "many": [line for one in many for line in many_rows(one)]}
    measured = {name: value for name, value in runs[-1].items() if name not in ("key", "version")}
    save_receipt(study_receipt("costs", found, samples) | measured, out / "receipt.json")


def write_report(out: Path) -> None:
    """report.md beside receipt.json."""
    value = json.loads((out / "receipt.json").read_text(encoding="utf-8"))
    results, about = Results(value["samples"]), value["results"]
    hits = [{name: cell for name, cell in row.items() if name != "version"} for row in about["hit_rates"]]
    asked = [list(asdict(one).values()) for one in targets(results, about["many"])]
    write_whole(out / "report.md", render(
        "costs.md.j2", value=value, about=about, results=results, tables=tables, targets=asked, worst=_WORST,
        hits=hits, others=OTHERS, patience=PATIENCE, edges=[("chain", CHAIN_DEPTHS[-1], f"d{CHAIN_DEPTHS[-1]}"),
                                  ("pipedec", PIPEDEC_WIDTHS[-1], f"w{PIPEDEC_WIDTHS[-1]}")]))


def many_rows(receipt: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a receipt of `studies.batching`: tokens a second of `fullpipe` and of the better `pp`, by requests at once."""
    found, preset = batching.Results(receipt["samples"]), receipt["samples"][0]["preset"]
    lines = []
    for amount in found.amounts("closed"):
        ours = found.at("closed", amount, batching.OURS)
        plain = [one.throughput for name in (batching.PLAIN, "pp-bunched") if (one := found.at("closed", amount, name))]
        if ours and plain:
            lines.append({"cluster": preset, "at once": int(amount), "fullpipe": round(ours.throughput, 2),
                          "pp": round(max(plain), 2), "ratio": round(ours.throughput / max(plain), 3)})
    return lines


def _prompts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Ids by set, in the order of the samples' runs."""
    return {row["cell"]["set"]: row["prompts"] for row in rows if "cell" in row}
