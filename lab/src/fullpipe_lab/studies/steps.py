"""Steps per token of one request, the single-request table: pipedec and fullpipe by width, on stages of unit steps.

    python -m fullpipe_lab.studies.steps --bench DIR [--draft NAME] [--limit 5] [--stages 8] [--widths 4,8] [--write]

DIR holds recording-t0.jsonl of the target (`fullpipe-lab record`); what the draft says of it is computed once and kept
in DIR/memo. Every stage step and every draft call takes one step; `pp` takes as many steps per token as there are
stages. `--write` keeps the receipt in lab/receipts/steps_per_token.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullpipe import hub
from fullpipe.cli.console import print_table
from fullpipe.methods import make_method, options_of
from fullpipe_lab.clusters import Cluster, DraftCosts, unit_cluster
from fullpipe_lab.memo import MemoDraft, Memos
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt
from fullpipe_lab.recording import Answer, Recording
from fullpipe_lab.replay import replay
from fullpipe_lab.studies.batching import first_of_each_set

METHODS = ("pipedec", "fullpipe")


def sample(answer: Answer, recording: Recording, memos: Memos, method: str, width: int,
           cluster: Cluster) -> dict[str, Any]:
    """One prompt with one method."""
    made = make_method(method, **options_of(method, width=width))
    run = replay(answer, recording.head.params, MemoDraft(memos.of(answer)), made, cluster,
                 costs=DraftCosts(cluster, ["model"]))
    stats = run.stats
    return {"set": answer.task, "id": answer.id, "method": method, "width": width, "tokens": stats.num_emitted,
            "steps": round(stats.steps, 6), "hits": stats.hits, "misses": stats.misses,
            "launched_rows": stats.launched_rows, "draft_calls": stats.draft_calls, "draft_rows": stats.draft_rows}


def table(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By set, method and width: ratios of totals over prompts."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for one in samples:
        groups.setdefault((one["set"], one["method"], one["width"]), []).append(one)
    rows = []
    for (name, method, width), found in sorted(groups.items()):
        tokens, steps, hits, misses = (sum(one[what] for one in found)
                                       for what in ("tokens", "steps", "hits", "misses"))
        rows.append({"set": name, "method": method, "width": width, "steps_per_token": round(steps / tokens, 4),
                     "hit_rate": round(hits / (hits + misses), 4)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path("bench-out"))
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--limit", type=int, default=5, help="answers of each set")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--widths", default="4,8")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    recording = Recording.load(asked.bench / "recording-t0.jsonl")
    draft, cluster = str(hub.resolve(asked.draft)), unit_cluster(asked.stages)
    memos, samples = Memos(asked.bench / "memo", draft, recording.head), []
    for answer in first_of_each_set(list(recording.answers.values()), asked.limit):
        samples += [sample(answer, recording, memos, method, int(width), cluster)
                    for method in METHODS for width in asked.widths.split(",")]
        memos.save(answer)
    rows = table(samples)
    print_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    results = {"target": recording.head.model, "draft": Path(draft).stem, "dtype": recording.head.dtype,
               "stages": asked.stages, "table": rows}
    if asked.write:
        save_receipt(study_receipt("steps_per_token", results, samples), STUDIES / "steps_per_token.json")


if __name__ == "__main__":
    main()
