"""Many requests at once in virtual time: dynamic batching against what else could be done with the same pipeline.

    python bench/batching/run.py measure --bench DIR [--draft PATH] [--limit 5] [--methods dynamic,pp,...]
    python bench/batching/run.py report

`measure` replays the answers of a bench folder (recording-t0.jsonl and memo/ of `fullpipe bench --out DIR`) whose
draft memos are there; what a memo lacks the real draft computes, and the memo keeps it. Each cell goes to the journal:
a run that is killed goes on where it was, and cells of another version of the code are measured again.
`report` makes receipt.json of the journal, and of that alone report.md and batching.svg, in bench/reports/batching.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batching.cells import AT_ONCE, METHODS, RATES, Cell, all_cells, make_engine, needs_draft, version
from batching.report import write_report
from spd_study.journal import Journal

from fullpipe.bench.crowd import CrowdRun, CrowdSource, Spread, play
from fullpipe.bench.memo import Memo, MemoSource, memo_path
from fullpipe.bench.provenance import provenance
from fullpipe.bench.recording import Answer, Recording
from fullpipe.planning.cluster import Cluster, DraftCosts
from fullpipe.request import SamplingParams

REPORT = Path(__file__).resolve().parents[1] / "reports" / "batching"
_ORDER_SEED = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "report"))
    parser.add_argument("--bench", type=Path, default=Path("bench-out"), help="recording-t*.jsonl and memo/ are here")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="the draft whose answers the memos keep")
    parser.add_argument("--cluster", default="gpus-8")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=5, help="answers of each set that are replayed")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--at-once", default=",".join(map(str, AT_ONCE)))
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--journal", type=Path, default=Path("batching-journal.jsonl"))
    parser.add_argument("--out", type=Path, default=REPORT)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.journal.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(asked.journal)
    if asked.what == "measure":
        about = provenance()
        journal.add(f"run/{about['date']}", about)
        cells = all_cells(asked.methods.split(","), [int(one) for one in asked.at_once.split(",") if one],
                          [float(one) for one in asked.rates.split(",") if one], asked.temperature, asked.seed)
        Measuring(asked.bench, asked.draft, asked.cluster, asked.temperature, asked.limit).run(cells, journal)
    write_report(journal, asked.out)


class Measuring:
    """Cells on one recording. Memos are read when they are needed, and written when they have learned something."""

    def __init__(self, bench: Path, draft: str, cluster: str, temperature: float, limit: int) -> None:
        from fullpipe import hub

        self._recording = Recording.load(bench / f"recording-t{temperature:g}.jsonl")
        self._draft, self._memo_folder = str(hub.resolve(draft)), bench / "memo"
        self._preset, self.cluster = cluster, Cluster.load(cluster)
        self.answers = first_of_each_set([answer for answer in self._recording.answers.values()
                                          if self._path(answer).exists()], limit)
        if not self.answers:
            raise SystemExit(f"there is no memo of {draft} in {self._memo_folder}: make some with `fullpipe bench`")
        head = self._recording.head
        self._params = SamplingParams(max_tokens=head.max_new_tokens, temperature=head.temperature, seed=head.seed)
        self._memos: dict[str, Memo] = {}
        self._saved: dict[str, int] = {}  # rows computed when a memo was last written

    def run(self, cells: list[Cell], journal: Journal) -> None:
        code = version()
        for cell in cells:
            known = journal.rows.get(cell.key)
            if known is not None and known["version"] == code and known["prompts"] == [one.id for one in self.answers]:
                continue
            begun = time.perf_counter()
            row = self.measure(cell)
            self._save()
            journal.add(cell.key, row | {"version": code})
            print(f"{cell.key}: {row['tokens'] / row['span_s']:.2f} tokens/s, {time.perf_counter() - begun:.0f} s here",
                  flush=True)

    def measure(self, cell: Cell) -> dict[str, Any]:
        answers = order(self.answers, cell.requests(len(self.answers)))
        source = CrowdSource(lambda index: MemoSource(self._memo(answers[index]))) if needs_draft(cell.method) else None
        run = play(answers, cell.schedule(len(self.answers)), self._params, source, self.cluster,
                   make_engine(cell.method, self.cluster), costs=DraftCosts(self.cluster, ["model"]))
        head = self._recording.head
        return {"cell": cell.to_dict(), "preset": self._preset, "cluster": self.cluster.name,
                "stages": self.cluster.num_stages, "note": self.cluster.file.cluster.note.strip(),
                "target": head.model, "draft": Path(self._draft).stem, "dtype": head.dtype,
                "prompts": [one.id for one in self.answers], **row_of(run)}

    def _memo(self, answer: Answer) -> Memo:
        if answer.id not in self._memos:
            memo = Memo(_model(self._draft, self._recording.head.dtype), answer.prompt, answer.tokens, self._params,
                        self._recording.head.vocab)
            if self._path(answer).exists():
                memo.load(self._path(answer))
            self._memos[answer.id] = memo
        return self._memos[answer.id]

    def _save(self) -> None:
        for answer in self.answers:
            memo = self._memos.get(answer.id)
            if memo is not None and memo.computed_rows > self._saved.get(answer.id, 0):
                memo.save(self._path(answer))
                self._saved[answer.id] = memo.computed_rows

    def _path(self, answer: Answer) -> Path:
        return memo_path(self._memo_folder, self._draft, self._recording.head, answer)


def first_of_each_set(answers: list[Answer], limit: int) -> list[Answer]:
    counts: Counter[str] = Counter()
    found = []
    for answer in answers:
        counts[answer.task] += 1
        if counts[answer.task] <= limit:
            found.append(answer)
    return found


def order(answers: list[Answer], count: int) -> list[Answer]:
    """All of them in one order after all of them in another, the same orders for every method."""
    shuffle = Random(_ORDER_SEED)
    return [one for _ in range(count // len(answers)) for one in shuffle.sample(answers, len(answers))]


def row_of(run: CrowdRun) -> dict[str, Any]:
    """What the journal keeps of a run; times of single tokens only as the spread of the gaps between them."""
    gaps = [gap for one in run.requests for gap in one.gaps]
    spread = Spread.of(gaps)
    return {
        "tokens": run.tokens, "span_s": round(run.span_s, 6), "engine_s": round(run.engine_s, 3),
        "gaps": [round(value, 6) for value in (spread.median, spread.p90, spread.p99, max(gaps))],
        "stations": {name: [round(run.stations.busy[name], 6), run.stations.rows[name], run.stations.calls[name]]
                     for name in sorted(run.stations.busy)},
        "requests": [[one.id, round(one.arrived, 6), round(one.times[0], 6), round(one.times[-1], 6), len(one.times),
                      one.hits, one.misses, one.launched_rows, one.draft_rows] for one in run.requests]}


@cache
def _model(path: str, dtype: str) -> Any:
    import torch

    from fullpipe.models.decoder import DecoderSlice
    from fullpipe.models.weights import open_model
    from fullpipe.stations.target import DTYPES

    torch.set_num_threads(1)
    files = open_model(Path(path))
    return DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=DTYPES[dtype])


if __name__ == "__main__":
    main()
