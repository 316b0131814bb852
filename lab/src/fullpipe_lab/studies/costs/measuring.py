"""What is run: every method on every cluster, draft and set, each with settings that are tried while they help."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fullpipe import hub
from fullpipe.errors import UsageError
from fullpipe_lab.calibration_table import WatchedCalibration, name_of
from fullpipe_lab.clusters import Cluster
from fullpipe_lab.files import Journal
from fullpipe_lab.receipts import Sample
from fullpipe_lab.recording import Answer, Recording
from fullpipe_lab.studies.batching import first_of_each_set
from fullpipe_lab.sweep import (
    CHAIN_DEPTHS,
    TREE_DEPTHS,
    TREE_ROWS,
    Plan,
    Setting,
    Unit,
    Worker,
    code_digest,
    fingerprint,
)

HIT_RATES = "hit-rates/"
"""Begins the keys of journal rows about expected and seen hit rates."""
OURS, PLAIN = "fullpipe", "pp"
OTHERS = ("chain", "pipedec", "static-tree")
ALL = (PLAIN, *OTHERS, OURS)
DRAFTS = {"model": "model", "ngram": "ngram", "both": "model,ngram"}
PIPEDEC_WIDTHS = (1, 2, 3, 4, 8, 16, 32)
TREE_WIDTHS = (2, 4, 8, 16)  # of one a layer it is a chain
PATIENCE = 2  # sizes in a row that were no better than the best before them: no larger one is tried


@dataclass(frozen=True, slots=True)
class Cell:
    """What is compared: one cluster, draft and set of prompts at one temperature.

    draft: a name of `DRAFTS`; "none" for `pp`.
    """

    temperature: float
    cluster: str
    draft: str
    set: str

    def __str__(self) -> str:
        return f"T{self.temperature:g}/{self.cluster}/{self.draft}/{self.set}"


# ---- what is tried -----------------------------------------------------------------------------------------


def climb(sizes: Sequence[int], seconds: Callable[[int], float]) -> float:
    """The least seconds over rising sizes, larger ones left out once `PATIENCE` in a row did not help."""
    best, worse = math.inf, 0
    for size in sizes:
        found = seconds(size)
        best, worse = (found, 0) if found < best else (best, worse + 1)
        if worse == PATIENCE:
            break
    return best


def try_settings(method: str, draft: str, seconds: Callable[[Setting], float]) -> None:
    """Ask for the seconds of every setting of a method that is worth trying. draft: as `Setting` has it.

    Raises UsageError for a method that the study does not compare.
    """
    match method:
        case "pp":
            seconds(Setting(method, "none"))
        case "chain":
            climb(CHAIN_DEPTHS, lambda depth: seconds(Setting(method, draft, None, depth)))
        case "pipedec":
            climb(PIPEDEC_WIDTHS, lambda width: seconds(Setting(method, draft, width)))
        case "static-tree":
            climb(TREE_DEPTHS, lambda depth: climb(
                [width for width in TREE_WIDTHS if width * depth <= TREE_ROWS],
                lambda width: seconds(Setting(method, draft, width, depth))))
        case "fullpipe":
            seconds(Setting(method, draft))
        case _:
            raise UsageError(f"this study does not compare {method!r}", hint=f"It has: {', '.join(ALL)}.")


def size_of(setting: Setting) -> str:
    """Width and depth as one word: "w8", "d4", "w8 d5"; "" where the method was given none."""
    return " ".join([f"w{setting.width}"] * (setting.width is not None)
                    + [f"d{setting.depth}"] * (setting.depth is not None))


# ---- measuring ---------------------------------------------------------------------------------------------


class Measuring:
    """One recording, replayed on clusters.

    bench: the folder of recording-t*.jsonl and memo/. draft: the model whose answers the memos keep; None: there is
    none, and only n-gram can be asked. clusters: TOML files or presets. limit: answers of each set. The journal gets a
    row for each setting on a cell, under a key that names what decides it but for the code; its digest is in the row.
    """

    def __init__(self, bench: Path, draft: str | None, clusters: Sequence[str], temperature: float, limit: int,
                 journal: Journal) -> None:
        recording = Recording.load(bench / f"recording-t{temperature:g}.jsonl")
        self._temperature, self._journal, self.version = temperature, journal, code_digest()[:16]
        self._sets: dict[str, list[Answer]] = {}
        for answer in first_of_each_set(list(recording.answers.values()), limit):
            self._sets.setdefault(answer.task, []).append(answer)
        found = {Path(one).name.removesuffix(".toml"): Cluster.load(one) for one in clusters}
        self._plan = Plan({name: (one.text, one.folder) for name, one in found.items()}, recording.head,
                          draft and str(hub.resolve(draft)), str(bench / "memo"), 1)
        self._worker = Worker(self._plan)
        self._inputs = {(cluster, name): self._digest(cluster, name) for cluster in found for name in self._sets}

    def cells(self, drafts: Sequence[str]) -> Iterator[Cell]:
        """Raises UsageError for a draft that is none of `DRAFTS`."""
        if unknown := [draft for draft in drafts if draft not in DRAFTS]:
            raise UsageError(f"no draft is called {unknown[0]!r} here", hint=f"Name some of {', '.join(DRAFTS)}.")
        for cluster in self._plan.clusters:
            for draft in drafts:
                for name in self._sets:
                    yield Cell(self._temperature, cluster, draft, name)

    def run(self, cell: Cell, method: str) -> None:
        """Measure what the journal lacks, or has of another version of the code."""
        if method == PLAIN:
            cell = Cell(cell.temperature, cell.cluster, "none", cell.set)
        try_settings(method, DRAFTS.get(cell.draft, "none"), lambda setting: self._seconds(cell, setting))

    def watch(self, cluster: str, draft: str) -> None:
        """Note how often guesses came true, of how many that were claimed and that were believed, over all answers one
        after another: a row for each kind of guess and tenth of probability."""
        watched = WatchedCalibration()
        for answer in (one for answers in self._sets.values() for one in answers):
            self._worker.watch(answer, cluster, Setting(OURS, DRAFTS[draft]), watched)
        for line in watched.table():
            self._journal.add(f"{HIT_RATES}T{self._temperature:g}/{cluster}/{draft}/{line.kind}/{line.decile}", {
                "T": f"{self._temperature:g}", "draft": draft, "cluster": cluster, "who": name_of(line.kind),
                "claimed": f"{line.decile / 10:.1f} to {line.decile / 10 + 0.1:.1f}", "guesses": line.number,
                "at its word": round(line.claimed / line.number, 3), "believed": round(line.believed / line.number, 3),
                "seen": round(line.seen / line.number, 3), "version": self.version})
        claimed, believed = watched.surprise()
        print(f"T{self._temperature:g}/{cluster}/{draft}: {claimed:.0f} nats of surprise at the draft's word, "
              f"{believed:.0f} as it was believed", flush=True)

    def _seconds(self, cell: Cell, setting: Setting) -> float:
        inputs = self._inputs[cell.cluster, cell.set]
        key = f"{cell}/{setting.method}/{size_of(setting)}/{inputs}"
        known = self._journal.rows.get(key)
        if known is None or known["version"] != self.version:
            begun = time.perf_counter()
            known = self._row(cell, setting, inputs)
            self._journal.add(key, known)
            print(f"{cell}/{setting.method}/{size_of(setting)}: {between(known):.2f} s, "
                  f"{time.perf_counter() - begun:.1f} s here", flush=True)
        return between(known)

    def _row(self, cell: Cell, setting: Setting, inputs: str) -> dict[str, Any]:
        answers = self._sets[cell.set]
        runs = [_run(*self._worker.run(Unit(answer, ((cell.cluster, setting, "main"),)))) for answer in answers]
        return {"cell": asdict(cell), "method": setting.method, "size": size_of(setting),
                "prompts": [one.id for one in answers], "runs": runs, "inputs": inputs, "version": self.version}

    def _digest(self, cluster: str, name: str) -> str:
        """Of the cluster, of the recorded answers of a set and of the draft's name."""
        text, folder = self._plan.clusters[cluster]
        said = [asdict(self._plan.head), [(one.prompt, one.tokens) for one in self._sets[name]], self._plan.draft_model]
        return hashlib.sha256((fingerprint(text, Path(folder)) + json.dumps(said)).encode()).hexdigest()[:12]


def _run(one: Sample) -> list[float]:
    """tokens, seconds from the first to the last, hits, misses, launched rows, draft calls, draft rows."""
    return [one.tokens, round(one.tbt_s * (one.tokens - 1), 6), one.hits, one.misses, one.launched_rows,
            one.draft_calls, one.draft_rows]


def between(row: Mapping[str, Any]) -> float:
    """Seconds between the tokens of a row's prompts, all together."""
    return float(sum(run[1] for run in row["runs"]))
