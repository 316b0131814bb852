"""What is run: every method on every cluster, draft and set, each at settings that are tried while they help."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fullpipe import hub
from fullpipe.errors import UsageError
from fullpipe_lab.clusters import Cluster
from fullpipe_lab.files import Journal
from fullpipe_lab.receipts import Sample
from fullpipe_lab.recording import Answer, Recording
from fullpipe_lab.studies.batching import first_of_each_set
from fullpipe_lab.sweep import CHAIN_DEPTHS, TREE_DEPTHS, TREE_ROWS, Plan, Setting, Unit, Worker, code_digest, fingerprint

OURS, PLAIN = "fullpipe", "pp"
OTHERS = ("chain", "pipedec", "static-tree")
DRAFTS = {"model": "model", "ngram": "ngram", "both": "model,ngram"}
PIPEDEC_WIDTHS = (1, 2, 3, 4, 8, 16, 32)
TREE_WIDTHS = (2, 4, 8, 16, 32)  # of one a layer is a chain
_PATIENCE = 2  # sizes in a row that were no better than the best before them: no larger one is tried


@dataclass(frozen=True, slots=True)
class Cell:
    """What is compared: one cluster, draft and set of prompts at one temperature. draft: a name of `DRAFTS`."""

    temperature: float
    cluster: str
    draft: str
    set: str

    def __str__(self) -> str:
        return f"T{self.temperature:g}/{self.cluster}/{self.draft}/{self.set}"


def climb(sizes: Sequence[int], seconds: Callable[[int], float]) -> float:
    """The least seconds over rising sizes, of which larger ones are left out once two in a row did not help."""
    best, worse = float("inf"), 0
    for size in sizes:
        found = seconds(size)
        best, worse = (found, 0) if found < best else (best, worse + 1)
        if worse == _PATIENCE:
            break
    return best


def try_settings(method: str, draft: str, seconds: Callable[[Setting], float]) -> None:
    """Ask for the seconds of every setting of a method that is worth trying. draft: as `Setting` has it."""
    match method:
        case "pp":
            seconds(Setting(PLAIN, "none"))
        case "chain":
            climb(CHAIN_DEPTHS, lambda depth: seconds(Setting(method, draft, None, depth)))
        case "pipedec":
            climb(PIPEDEC_WIDTHS, lambda width: seconds(Setting(method, draft, width)))
        case "static-tree":
            climb(TREE_DEPTHS, lambda depth: climb(
                [width for width in TREE_WIDTHS if width * depth <= TREE_ROWS],
                lambda width: seconds(Setting(method, draft, width, depth))))
        case "fullpipe":
            seconds(Setting(OURS, draft))
        case _:
            raise UsageError(f"this study does not compare {method!r}",
                             hint=f"It has: {', '.join((PLAIN, *OTHERS, OURS))}.")


class Measuring:
    """One recording, replayed on clusters.

    bench: the folder of recording-t*.jsonl and memo/. draft: the model whose answers the memos keep. clusters: TOML
    files or presets. limit: answers of each set. A row goes to the journal for each setting on a cell; its key names
    what decides it, but for the code, whose digest stands in the row.
    """

    def __init__(self, bench: Path, draft: str, clusters: Sequence[str], temperature: float, limit: int,
                 journal: Journal) -> None:
        recording = Recording.load(bench / f"recording-t{temperature:g}.jsonl")
        self._temperature, self._journal, self._code = temperature, journal, code_digest()[:16]
        self._clusters = {Path(one).stem: Cluster.load(one) for one in clusters}
        self._sets: dict[str, list[Answer]] = {}
        for answer in first_of_each_set(list(recording.answers.values()), limit):
            self._sets.setdefault(answer.task, []).append(answer)
        self._plan = Plan({name: (one.text, one.folder) for name, one in self._clusters.items()}, recording.head,
                          str(hub.resolve(draft)), str(bench / "memo"), 1)
        self._worker = Worker(self._plan)
        self._digests = {(cluster, name): self._digest(cluster, name) for cluster in self._clusters
                         for name in self._sets}

    def cells(self, drafts: Sequence[str]) -> Iterator[Cell]:
        for cluster in self._clusters:
            for draft in drafts:
                for name in self._sets:
                    yield Cell(self._temperature, cluster, draft, name)

    def run(self, cell: Cell, method: str) -> None:
        """Measure what the journal lacks, or has of another version of the code."""
        if method == PLAIN:
            cell = Cell(cell.temperature, cell.cluster, "none", cell.set)
        try_settings(method, DRAFTS.get(cell.draft, "none"), lambda setting: self._seconds(cell, setting))

    def _seconds(self, cell: Cell, setting: Setting) -> float:
        """Between the tokens of all prompts."""
        key = f"{cell}/{setting.method}/{size_of(setting)}/{self._digests[cell.cluster, cell.set]}"
        known = self._journal.rows.get(key)
        if known is None or known["version"] != self._code:
            begun = time.perf_counter()
            self._journal.add(key, self._row(cell, setting))
            known = self._journal.rows[key]
            print(f"{key.rpartition('/')[0]}: {between(known):.2f} s, {time.perf_counter() - begun:.1f} s here", flush=True)
        return between(known)

    def _row(self, cell: Cell, setting: Setting) -> dict[str, Any]:
        answers = self._sets[cell.set]
        runs = [_run(*self._worker.run(Unit(answer, ((cell.cluster, setting, "main"),)))) for answer in answers]
        return {"cell": asdict(cell), "method": setting.method, "size": size_of(setting),
                "prompts": [one.id for one in answers], "runs": runs, "version": self._code}

    def _digest(self, cluster: str, name: str) -> str:
        text, folder = self._plan.clusters[cluster]
        said = [asdict(self._plan.head), [(one.prompt, one.tokens) for one in self._sets[name]], self._plan.draft_model]
        return hashlib.sha256((fingerprint(text, Path(folder)) + json.dumps(said)).encode()).hexdigest()[:12]


def size_of(setting: Setting) -> str:
    """Depth and width in a word: "w8", "d4", "w8 d5", or "" where the method was given none."""
    return " ".join([f"w{setting.width}"] * (setting.width is not None) + [f"d{setting.depth}"] * (setting.depth is not None))


def _run(one: Sample) -> list[float]:
    """tokens, seconds between them, hits, misses, launched rows, draft calls, draft rows."""
    return [one.tokens, round(one.tbt_s * (one.tokens - 1), 6), one.hits, one.misses, one.launched_rows, one.draft_calls,
            one.draft_rows]


def between(row: dict[str, Any]) -> float:
    """Seconds between the tokens of a row's prompts."""
    return float(sum(run[1] for run in row["runs"]))
