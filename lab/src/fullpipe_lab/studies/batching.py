"""Many requests at once in virtual time: fullpipe against what else could be done with the same pipeline.

    python -m fullpipe_lab.studies.batching measure --bench DIR [--draft NAME] [--limit 5] [--methods fullpipe,pp,...]
        [--cluster FILE_OR_PRESET --journal FILE --out DIR]
    python -m fullpipe_lab.studies.batching report [--journal FILE --out DIR]

`measure` replays the answers of a bench folder (recording-t0.jsonl and memo/ of `fullpipe-lab bench --out DIR`); what
the draft is not known to say of them it computes, and keeps. Each cell goes to the journal: a run that is killed goes
on where it was, and cells of another version of the code are measured again. A journal is of one cluster. `report`
makes receipt.json of the journal, and of that alone report.md and batching.svg, in lab/reports/batching.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from fullpipe import hub
from fullpipe.cluster.provenance import provenance
from fullpipe.engine import Engine
from fullpipe.errors import UsageError
from fullpipe.files import write_whole
from fullpipe.methods import make_method
from fullpipe.options import EngineOptions
from fullpipe_lab import figures
from fullpipe_lab.clusters import Cluster, DraftCosts, machine_of
from fullpipe_lab.crowd import CrowdDraft, CrowdRun, MakeEngine, Schedule, Spread, closed, play, poisson
from fullpipe_lab.files import Journal, make_folder
from fullpipe_lab.memo import MemoDraft, Memos
from fullpipe_lab.receipts import HERE, STUDIES, save_receipt, study_receipt
from fullpipe_lab.recording import Answer, Recording
from fullpipe_lab.report import render
from fullpipe_lab.studies.rivals import Balanced, Equal, Separate
from fullpipe_lab.sweep import code_digest

REPORT = STUDIES.parent / "reports" / "batching"
OURS, PLAIN, ALONE = "fullpipe", "pp", "one-after-another"
METHODS = {
    OURS: "the rows that are worth most over all requests",
    "equal": "fullpipe, each request the same share of the rows that are free",
    "separate": "fullpipe, each request its full width whatever the others do",
    ALONE: "fullpipe, one request at a time, the others wait",
    PLAIN: "no guessing; as many requests in each flight as keep all stages equally busy",
    "pp-bunched": "no guessing; every request that has a token to send is in the next flight",
}
AT_ONCE = (1, 2, 4, 8, 16, 32)
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
DRAFTS = ("model",)
WIDTH = 32  # the best that was found for one request on gpus-8 (lab/reports/gpus)
MOST_AT_ONCE = 64  # requests that are admitted of those that have come
SPARE_SLOTS = 1088  # of a request, for speculation: no tree is cut short for want of cache
ARRIVED = 60  # requests of an open loop
WANTED = {("gpus-8", 1): 5.0, ("gpus-8", 4): 2.5, ("gpus-8", 8): 1.5}
"""By cluster and requests at once, how many times the throughput of pp is asked for; elsewhere it is never below 1."""
_FREE = 1.02  # a flight that takes so much longer than one of a single row: rows up to there are called free
_ORDER_SEED = 5
_SLACK = 1.005  # a TBT this much longer is not called longer: flights are whole


# ---- cells -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """load: `amount` requests at once ("closed"), or so many a second that come when they come ("poisson")."""

    method: str
    load: Literal["closed", "poisson"]
    amount: float
    temperature: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        return f"T{self.temperature:g}/{self.load}-{self.amount:g}/seed{self.seed}/{self.method}"

    def requests(self, prompts: int) -> int:
        """Every prompt equally often, and at least three times as many requests as there are places."""
        least = ARRIVED if self.load == "poisson" else 3 * int(self.amount)
        return prompts * -(-least // prompts)

    def schedule(self, prompts: int) -> Schedule:
        count = self.requests(prompts)
        return closed(count, int(self.amount)) if self.load == "closed" else poisson(count, self.amount, self.seed)


def all_cells(methods: Sequence[str], at_once: Sequence[int], rates: Sequence[float], temperature: float = 0.0,
              seed: int = 0) -> list[Cell]:
    """Load by load, so that what is compared is measured by the same code."""
    loads = [("closed", float(count)) for count in at_once] + [("poisson", rate) for rate in rates]
    return [Cell(method, load, amount, temperature, seed)  # type: ignore[arg-type]
            for load, amount in loads for method in methods]


def make_engine(method: str, cluster: Cluster) -> MakeEngine:
    """The engine of a cell's method."""
    machine = machine_of(cluster, DRAFTS)
    assert machine.stage is not None
    free = max(1, machine.stage.most_rows(_FREE * machine.stage(1), 256))
    places = EngineOptions(max_num_seqs=1 if method == ALONE else MOST_AT_ONCE, spare_slots=SPARE_SLOTS)
    makers: dict[str, Callable[[], Any]] = {
        OURS: lambda: make_method("fullpipe", machine=machine_of(cluster, DRAFTS)),
        "equal": lambda: Equal(free, width=WIDTH), "separate": lambda: Separate(width=WIDTH),
        PLAIN: lambda: Balanced(cluster.num_stages), "pp-bunched": lambda: make_method("pp")}
    make = makers.get(method, lambda: make_method("fullpipe", width=WIDTH))
    return lambda pipeline, listeners: Engine(pipeline, make(), options=places, listeners=listeners)


def version() -> str:
    """Of the code that decides what a cell measures."""
    return code_digest()[:16]


# ---- measuring ---------------------------------------------------------------------------------------------


class Measuring:
    """Cells on one recording."""

    def __init__(self, bench: Path, draft: str, cluster: str, temperature: float, limit: int) -> None:
        recording = Recording.load(bench / f"recording-t{temperature:g}.jsonl")
        self._head, self._draft = recording.head, str(hub.resolve(draft))
        self._preset, self.cluster = Path(cluster).name.removesuffix(".toml"), Cluster.load(cluster)
        self.answers = first_of_each_set(list(recording.answers.values()), limit)
        self._memos = Memos(bench / "memo", self._draft, recording.head)

    def run(self, cells: list[Cell], journal: Journal) -> None:
        """Raises UsageError for a journal of another cluster."""
        check_cluster(journal, self._preset)
        code = version()
        for cell in cells:
            known = journal.rows.get(cell.key)
            if known is not None and known["version"] == code and known["prompts"] == [one.id for one in self.answers]:
                continue
            begun = time.perf_counter()
            row = self.measure(cell)
            for answer in self.answers:
                self._memos.save(answer)
            journal.add(cell.key, row | {"version": code})
            print(f"{cell.key}: {row['tokens'] / row['span_s']:.2f} tokens/s, {time.perf_counter() - begun:.0f} s here",
                  flush=True)

    def measure(self, cell: Cell) -> dict[str, Any]:
        answers, plain = order(self.answers, cell.requests(len(self.answers))), cell.method.startswith("pp")
        draft = None if plain else CrowdDraft(lambda index: MemoDraft(self._memos.of(answers[index])))
        run = play(answers, cell.schedule(len(self.answers)), self._head.params, draft, self.cluster,
                   make_engine(cell.method, self.cluster), costs=DraftCosts(self.cluster, DRAFTS))
        return {"cell": asdict(cell), "preset": self._preset, "cluster": self.cluster.name,
                "stages": self.cluster.num_stages, "note": self.cluster.file.cluster.note.strip(),
                "target": self._head.model, "draft": Path(self._draft).stem, "dtype": self._head.dtype,
                "prompts": [one.id for one in self.answers], **row_of(run)}


def check_cluster(journal: Journal, name: str) -> None:
    """Raises UsageError where the journal has cells of another cluster."""
    if others := {row["preset"] for row in journal.rows.values() if "preset" in row} - {name}:
        raise UsageError(f"{journal.path} holds cells of {', '.join(sorted(others))}, not of {name}",
                         hint="Name another file with --journal, and another folder with --out.")


def first_of_each_set(answers: Sequence[Answer], limit: int) -> list[Answer]:
    counts: Counter[str] = Counter()
    found = []
    for answer in answers:
        counts[answer.task] += 1
        if counts[answer.task] <= limit:
            found.append(answer)
    return found


def order(answers: Sequence[Answer], count: int) -> list[Answer]:
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


# ---- the report --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell of the receipt, and what is said of it. ttft, tbt: seconds, over requests."""

    method: str
    load: str
    amount: float
    row: Mapping[str, Any]
    ttft: Spread
    tbt: Spread

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Measured:
        cell, requests = row["cell"], row["requests"]
        ttft = [first - arrived for _, arrived, first, *_ in requests]
        tbt = [(last - first) / (tokens - 1) for _, _, first, last, tokens, *_ in requests if tokens > 1]
        return cls(cell["method"], cell["load"], cell["amount"], row, Spread.of(ttft), Spread.of(tbt))

    @property
    def throughput(self) -> float:
        return float(self.row["tokens"] / self.row["span_s"])

    @property
    def work(self) -> str:
        """Rows of a flight at the last stage, shares of time that stages and draft work, hit rate, rows wasted."""
        span, stations, requests = self.row["span_s"], self.row["stations"], self.row["requests"]
        busy = [seconds for name, (seconds, *_) in stations.items() if name.startswith("stage")]
        _, rows, calls = stations[f"stage {self.row['stages'] - 1}"]
        hits, misses, launched = (sum(one[place] for one in requests) for place in (5, 6, 7))
        return (f"{rows / calls:.1f} / {sum(busy) / len(busy) / span:.0%} / "
                f"{stations.get('draft', (0.0,))[0] / span:.0%} / {hits / max(hits + misses, 1):.2f} / "
                f"{launched / self.row['tokens'] - 1:.1f}")


class Results:
    """Cells by load."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.cells = [Measured.of(row) for row in rows]
        self.methods = [name for name in METHODS if any(one.method == name for one in self.cells)]

    def amounts(self, load: str) -> list[float]:
        return sorted({one.amount for one in self.cells if one.load == load})

    def at(self, load: str, amount: float, method: str) -> Measured | None:
        wanted = load, amount, method
        return next((one for one in self.cells if (one.load, one.amount, one.method) == wanted), None)

    def table(self, load: str, cell: Callable[[Measured], str]) -> list[list[str]]:
        return [[f"{amount:g}", *(cell(one) if (one := self.at(load, amount, method)) else "-"
                                  for method in self.methods)] for amount in self.amounts(load)]

    def ratios(self) -> list[list[str]]:
        """fullpipe against the better of the two plain pipelines, and what was asked for."""
        lines = []
        for amount in self.amounts("closed"):
            ours = self.at("closed", amount, OURS)
            plain = [one for name in (PLAIN, "pp-bunched") if (one := self.at("closed", amount, name))]
            if ours is None or not plain:
                continue
            wanted = WANTED.get((ours.row["preset"], int(amount)), 1.0)
            gain = ours.throughput / max(one.throughput for one in plain)
            shares = [getattr(ours.tbt, name) / min(getattr(one.tbt, name) for one in plain)
                      for name in ("median", "p90", "p99")]
            lines.append([f"{amount:g}", f"{gain:.2f}x", f"{wanted:g}x", "yes" if gain >= wanted else "**no**",
                          " / ".join(f"{share:.2f}" for share in shares),
                          "**no**" if max(shares) > _SLACK else "yes",
                          *(f"{ours.throughput / other.throughput:.2f}x"
                            if (other := self.at("closed", amount, name)) else "-"
                            for name in (ALONE, "equal", "separate"))])
        return lines

    def figure(self) -> str:
        """Loads above each other, metrics side by side."""
        picks: dict[str, Callable[[Measured], tuple[float, float]]] = {
            "tokens/s, virtual time": lambda one: (one.throughput, one.throughput),
            "TBT in ms: median, up to p99": lambda one: (1e3 * one.tbt.median, 1e3 * one.tbt.p99),
            "TTFT in s: median, up to p99": lambda one: (one.ttft.median, one.ttft.p99)}
        labels = {"closed": "requests at once", "poisson": "requests a second (Poisson)"}
        return figures.panels([[figures.Panel(title, label, self._lines(load, pick)) for title, pick in picks.items()]
                               for load, label in labels.items() if self.amounts(load)])

    def _lines(self, load: str, pick: Callable[[Measured], tuple[float, float]]) -> dict[str, Any]:
        return {method: points for method in self.methods
                if (points := [(amount, *pick(one)) for amount in self.amounts(load)
                               if (one := self.at(load, amount, method))])}


def write_report(journal: Journal, out: Path) -> None:
    """receipt.json anew if the journal has cells, then report.md and batching.svg."""
    rows = [row for row in journal.rows.values() if "cell" in row]
    if rows:
        runs = [row for key, row in journal.rows.items() if key.startswith("run/")]
        measured = {name: value for name, value in runs[-1].items() if name != "key"}
        save_receipt(study_receipt("batching", {"runs": runs}, rows) | measured, out / "receipt.json")
    value = json.loads((out / "receipt.json").read_text())
    results, first = Results(value["samples"]), value["samples"][0]
    engine = [1e3 * one.row["engine_s"] / one.row["tokens"] for one in results.cells if one.method == OURS]
    write_whole(out / "report.md", render(
        "batching.md.j2", value=value, first=first, results=results, engine=engine, most=MOST_AT_ONCE,
        methods={name: METHODS[name] for name in results.methods},
        versions=len({row["version"] for row in value["samples"]}),
        metrics={"Throughput, tokens a second": lambda one: f"{one.throughput:.1f}",
                 "TBT in ms: median / p90 / p99": lambda one: _spread(one.tbt, 1e3, ".1f"),
                 "TTFT in s: median / p90 / p99": lambda one: _spread(one.ttft, 1, ".2f"),
                 "The longest wait for a token in ms: p99 of gaps / longest": lambda one: " / ".join(
                     f"{1e3 * gap:.0f}" for gap in one.row["gaps"][2:]),
                 "What the stations did: rows a flight / stages busy / draft busy / hit rate / rows wasted by token":
                     lambda one: one.work}))
    write_whole(out / "batching.svg", results.figure())


def _spread(spread: Spread, scale: float, form: str) -> str:
    return " / ".join(f"{scale * value:{form}}" for value in (spread.median, spread.p90, spread.p99))


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
    make_folder(asked.out)
    journal = Journal(asked.journal)
    if asked.what == "measure":
        about = provenance(HERE)
        journal.add(f"run/{about['date']}", about)
        cells = all_cells(asked.methods.split(","), [int(one) for one in asked.at_once.split(",") if one],
                          [float(one) for one in asked.rates.split(",") if one], asked.temperature, asked.seed)
        Measuring(asked.bench, asked.draft, asked.cluster, asked.temperature, asked.limit).run(cells, journal)
    write_report(journal, asked.out)


if __name__ == "__main__":
    main()
