"""Do all methods say what the model alone says? `fullpipe verify` on a pair of models, kept as a receipt.

    python -m fullpipe_lab.studies.verify_pair [--model qwen2.5-coder-1.5b] [--draft qwen2.5-coder-0.5b,ngram]
        [--stages 2] [--temperatures 0,1] [--prompts FILE ...] [--limit 2] [--tokens 64] [--out lab-out/verify]
        [--quick] [--write]

Prompts are the first of each file, or of each category of those that come with Fullpipe. A run for each temperature,
with stage processes and the draft's, and weights as `auto` has them. A run that is done is in --out/journal.jsonl: the
same command goes on where it was, with the same code. Ends with 1 where a text differs by more than a near-tie.
`--write` keeps the receipt in lab/receipts/verify_pair.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fullpipe.cli.console import print_table
from fullpipe.cli.lists import decimals
from fullpipe.cluster.provenance import commit_of
from fullpipe.errors import StationFailed
from fullpipe.files import write_whole
from fullpipe.prompts import choose
from fullpipe_lab.ending import run
from fullpipe_lab.files import Journal
from fullpipe_lab.receipts import HERE, STUDIES, save_receipt, study_receipt

_DIFFERENT = 1  # what the command ends with where texts differ: its report is whole


def command(asked: argparse.Namespace, prompts: Path, heat: float) -> list[str]:
    words = {"--prompts": prompts, "--model": asked.model, "--draft": asked.draft,
             "--stages": asked.stages, "--temperature": f"{heat:g}", "--max-tokens": asked.tokens, "--seed": asked.seed}
    return [sys.executable, "-m", "fullpipe", "verify", "--json",
            *(str(word) for pair in words.items() for word in pair)]


def verify(words: Sequence[str]) -> dict[str, Any]:
    """The report of one run. Raises StationFailed where there is none."""
    begun = time.monotonic()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, _DIFFERENT) or not done.stdout.strip():
        raise StationFailed("fullpipe verify", f"ended with code {done.returncode}", hint=" ".join(words))
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"seconds": round(time.monotonic() - begun, 1)}


def row_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a run. different: texts that differ by more than a near-tie, by method."""
    bad = [one for one in report["differences"] if not one["near_tie"]]
    return {"temperature": report["temperature"], "dtype": report["dtype"], "stages": report["stages"],
            "prompts": report["prompts"], "tokens": report["tokens"], "methods": report["methods"],
            "identical": report["identical"], "near_ties": report["near_ties"],
            "different": {method: count for method in report["methods"]
                          if (count := sum(one["method"] == method for one in bad))}}


def main() -> None:
    asked = _arguments()
    journal = Journal(asked.out / "journal.jsonl")
    chosen = choose(asked.prompts, asked.limit)
    journal.bind({"commit": commit_of(HERE)[0], "model": asked.model, "draft": asked.draft, "stages": asked.stages,
                  "prompts": [one.id for one in chosen], "tokens": asked.tokens, "seed": asked.seed})
    file = asked.out / "prompts.jsonl"
    write_whole(file, "".join(
        json.dumps({"question_id": one.id, "category": one.category, "turns": one.turns}) + "\n" for one in chosen))
    reports = []
    for heat in decimals(asked.temperatures, "--temperatures"):
        if (key := f"T{heat:g}") not in journal:
            journal.add(key, {"temperature": heat, **verify(command(asked, file, heat))})
        reports.append(journal.rows[key])
    rows = [row_of(report) for report in reports]
    print_table(["T", "dtype", "stages", "prompts", "tokens", "methods", "identical", "near-ties", "different"],
                [[f"{row['temperature']:g}", row["dtype"], str(row["stages"]), str(row["prompts"]), str(row["tokens"]),
                  " ".join(row["methods"]), "yes" if row["identical"] else "NO", str(row["near_ties"]),
                  ", ".join(f"{name} {count}" for name, count in row["different"].items())] for row in rows])
    if asked.write:
        settings = {name: getattr(asked, name) for name in ("model", "draft", "tokens", "seed")} | {"runs": rows}
        save_receipt(study_receipt("verify_pair", settings, reports), STUDIES / "verify_pair.json")
    if any(row["different"] for row in rows):
        sys.exit("texts differ")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b,ngram")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSON lines; default: the bundled ones")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each file, or category, at most")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("lab-out/verify"))
    parser.add_argument("--quick", action="store_true", help="SmolLM2 with n-gram, a prompt a category, 16 tokens")
    parser.add_argument("--write", action="store_true", help="keep the receipt in lab/receipts")
    asked = parser.parse_args()
    if asked.quick:
        asked.model, asked.draft, asked.limit, asked.tokens = "smollm2-135m", "ngram", 1, 16
    return asked


if __name__ == "__main__":
    run(main)
