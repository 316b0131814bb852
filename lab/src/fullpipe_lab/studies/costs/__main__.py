"""Does `fullpipe` as it comes lose to another method anywhere? Virtual time, recorded answers.

    python -m fullpipe_lab.studies.costs measure --bench DIR --clusters FILE_OR_PRESET ... [--only fullpipe]
    python -m fullpipe_lab.studies.costs watch --bench DIR --clusters FILE_OR_PRESET ...
    python -m fullpipe_lab.studies.costs compare --bench DIR [--others FILE]
    python -m fullpipe_lab.studies.costs report --bench DIR [--many batching-receipt.json ...] [--out DIR]

`measure` replays the answers of a bench folder (recording-t*.jsonl, of `fullpipe-lab record`) with every method: the
others at each setting that may be their best on a cluster and set, `fullpipe` without options. What the draft says is
computed once, and kept in DIR/memo. Every row goes to DIR/journal-t*.jsonl: a run that is killed goes on where it was,
and rows of another version of the code are measured again, of the methods that --only names. `watch` adds how often
guesses of `fullpipe` come true, by what was claimed. `compare` prints `fullpipe` against the best other method, cell
by cell, and what is reached of what is asked for. `report` makes receipt.json of the journals, and of that alone
report.md, in lab/reports/costs.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from fullpipe.cli.console import print_table
from fullpipe.cli.lists import decimals
from fullpipe.cluster.provenance import provenance
from fullpipe.errors import UsageError
from fullpipe.files import write_whole
from fullpipe_lab.files import Journal, make_folder
from fullpipe_lab.receipts import HERE
from fullpipe_lab.recording import Recording
from fullpipe_lab.studies.costs.comparing import Results, best_of, others
from fullpipe_lab.studies.costs.measuring import ALL, DRAFTS, Measuring
from fullpipe_lab.studies.costs.report import REPORT, write_receipt, write_report
from fullpipe_lab.studies.costs.tables import ratio_lines
from fullpipe_lab.studies.costs.targets import targets


def measure(asked: argparse.Namespace) -> None:
    for heat in decimals(asked.temperatures, "--temperatures"):
        journal, about = _journal(asked.bench, heat), provenance(HERE)
        measuring = Measuring(asked.bench, asked.draft, asked.clusters, heat, asked.limit, journal)
        journal.add(f"run/{about['date']}", about | {"version": measuring.version})
        for cell in measuring.cells(asked.drafts.split(",")):
            for method in asked.only.split(","):
                measuring.run(cell, method)


def watch(asked: argparse.Namespace) -> None:
    for heat in decimals(asked.temperatures, "--temperatures"):
        measuring = Measuring(asked.bench, asked.draft, asked.clusters, heat, asked.limit, _journal(asked.bench, heat))
        for cluster in asked.clusters:
            for draft in asked.drafts.split(","):
                measuring.watch(Path(cluster).name.removesuffix(".toml"), draft)


def compare(asked: argparse.Namespace) -> None:
    rows = [row for heat in decimals(asked.temperatures, "--temperatures")
            for row in _journal(asked.bench, heat).rows.values() if "cell" in row]
    results = Results(best_of(rows))
    if asked.others is not None:
        write_whole(asked.others, json.dumps(others(results), indent=1) + "\n")
    if not results.compared:
        raise UsageError("no cell has all methods yet", hint="Run `measure` first, with every method.")
    print_table(["T", "cluster", "draft", *results.sets, "all"], ratio_lines(results))
    print_table(["what", "asked for", "found", "reached", "where"],
                [[one.what, one.wanted, one.found, "yes" if one.reached else "NO", one.where]
                 for one in targets(results)])


def report(asked: argparse.Namespace) -> None:
    make_folder(asked.out)
    heats = decimals(asked.temperatures, "--temperatures")
    journals = [_journal(asked.bench, heat) for heat in heats]
    if any(journal.rows for journal in journals):
        head = Recording.load(asked.bench / f"recording-t{heats[0]:g}.jsonl").head
        about = {"target": head.model, "draft": asked.draft, "dtype": head.dtype, "tokens": head.max_new_tokens}
        write_receipt(journals, about, [json.loads(path.read_text(encoding="utf-8")) for path in asked.many], asked.out)
    write_report(asked.out)


def _journal(bench: Path, heat: float) -> Journal:
    return Journal(bench / f"journal-t{heat:g}.jsonl")


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "watch", "compare", "report"))
    parser.add_argument("--bench", type=Path, default=Path("bench-out"), help="recording-t*.jsonl, memo/, journals")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--clusters", nargs="+", default=["gpus-8", "gpus-14", "edge-5", "home-6"])
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="the model whose answers the memos keep")
    parser.add_argument("--drafts", default=",".join(DRAFTS), help="who guesses")
    parser.add_argument("--limit", type=int, default=5, help="answers of each set that are replayed")
    parser.add_argument("--only", default=",".join(ALL), help="methods to measure")
    parser.add_argument("--others", type=Path, help="write what the other methods reach here, as JSON")
    parser.add_argument("--many", type=Path, nargs="*", default=[], help="receipts of studies.batching")
    parser.add_argument("--out", type=Path, default=REPORT)
    asked = parser.parse_args()
    {"measure": measure, "watch": watch, "compare": compare, "report": report}[asked.what](asked)


if __name__ == "__main__":
    main()
