"""What rows and levels of a flight are worth, in closed form, and where methods really sit: the picture of
docs/speculation-costs.md. Virtual time, recorded answers.

    python -m fullpipe_lab.studies.speculation_map measure --bench DIR --clusters FILE_OR_PRESET ... [--limit 1]
    python -m fullpipe_lab.studies.speculation_map draw

`measure` counts how often the draft is right on all recorded answers (recording-t0.jsonl and memo/ of a bench folder),
replays some of them with each method, and keeps lab/receipts/speculation_map.json: with the clusters' curves in it, so
that `draw` needs nothing else to make docs/speculation-costs.svg. It prints what the closed form says beside what the
replays took.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullpipe import hub
from fullpipe.cli.console import print_table
from fullpipe.costs import CostCurve, Machine
from fullpipe.events import Launched
from fullpipe.files import write_whole
from fullpipe.messages import Event
from fullpipe_lab import figures
from fullpipe_lab.clusters import Cluster, DraftCosts, machine_of
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt
from fullpipe_lab.recording import Answer, Recording
from fullpipe_lab.replay import replay
from fullpipe_lab.studies.batching import first_of_each_set
from fullpipe_lab.sweep import Setting

if TYPE_CHECKING:
    from fullpipe_lab.memo import Memos

RECEIPT = STUDIES / "speculation_map.json"
PICTURE = STUDIES.parents[1] / "docs" / "speculation-costs.svg"
SETTINGS = (Setting("pp", "none"), *(Setting("chain", "model", depth=depth) for depth in (2, 4, 8, 12)),
            *(Setting("pipedec", "model", width=width) for width in (1, 2, 4, 16, 32)), Setting("fullpipe", "model"))
MOST_ROWS, MOST_LEVELS = 128, 16
_OTHERS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 15.0)  # where the profile is kept
_STEPS = 60  # of the picture, each way


# ---- how often the draft is right --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Profile:
    """How often a draft's guesses are right.

    first: share of tokens that were its best guess. caught: what further guesses add: for some numbers of them, per
    token, the share of tokens that are among those which the draft holds likeliest, wherever they stand. tokens: so
    many were looked at.
    """

    first: float
    caught: Sequence[tuple[float, float]]
    tokens: int

    def right(self, others: float) -> float:
        """How likely a token is guessed, with so many guesses a token beside the best one."""
        at = bisect_left([number for number, _ in self.caught], others)
        if at == len(self.caught):
            return min(self.first + self.caught[-1][1], 1.0)
        (low, below), (high, above) = self.caught[max(at - 1, 0)], self.caught[at]
        share = (others - low) / (high - low) if high > low else 0.0
        return min(self.first + below + share * (above - below), 1.0)


def profile_of(said: Iterable[tuple[Sequence[int], Sequence[float], int]]) -> Profile:
    """said: for each token the draft's guesses, best first, their log-probabilities, and what was right."""
    first, others, tokens = 0, list[tuple[float, bool]](), 0
    for guesses, logprobs, right in said:
        tokens += 1
        first += guesses[0] == right
        others += [(logprob, guess == right) for guess, logprob in zip(guesses[1:], logprobs[1:])]
    others.sort(key=lambda one: -one[0])
    numbers = sorted({min(number, len(others) / tokens) for number in _OTHERS})
    caught = [(number, sum(hit for _, hit in others[: round(number * tokens)]) / tokens) for number in numbers]
    return Profile(first / tokens, caught, tokens)


# ---- the closed form ---------------------------------------------------------------------------------------


def tokens_per_second(machine: Machine, profile: Profile, rows: float, levels: float) -> float:
    """Expected, where every flight has so many rows, on so many levels of the tree (docs/speculation-costs.md)."""
    assert machine.gap is not None and machine.draft is not None
    stage, wide = machine.gap(rows), rows / levels
    call = machine.draft(wide) + machine.draft_link_s
    period = levels * call + stage if machine.shared else max(levels * call, stage)
    traversal = sum(curve(rows) for curve in machine.stages) + machine.link_s
    # A branch beside the likeliest chain takes a row on each level until its fate is known, a traversal later.
    right = profile.right((wide - 1) * period / levels / traversal)
    miss = traversal + (levels - 1) * call + stage * stage / (2 * period)
    return 1 / (right * period / levels + (1 - right) * miss)


def best_point(machine: Machine, profile: Profile) -> tuple[float, int, int]:
    """Tokens a second, rows and levels of the best that never changes."""
    return max((tokens_per_second(machine, profile, rows, levels), rows, levels)
               for levels in range(1, MOST_LEVELS + 1) for rows in range(levels, MOST_ROWS + 1))


# ---- what methods do ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Flights:
    """Listens for rows of flights, and for levels: the longest chain in a flight."""

    flights: int = 0
    rows: int = 0
    levels: int = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Launched) and event.nodes:
            self.flights += 1
            self.rows += len(event.nodes)
            depths: dict[int, int] = {}
            for node, parent in zip(event.nodes, event.parents):
                depths[node] = depths.get(parent, 0) + 1
            self.levels += max(depths.values())


@dataclass(frozen=True, slots=True)
class Sample:
    """What one method did on all prompts together. seconds: between their first and last tokens."""

    cluster: str
    method: str
    width: int | None
    depth: int | None
    tokens: int = 0
    seconds: float = 0.0
    flights: int = 0
    rows: int = 0
    levels: int = 0
    prompts: list[str] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return (self.tokens - len(self.prompts)) / self.seconds

    @property
    def flight(self) -> tuple[float, float]:
        """Its mean rows and levels."""
        return self.rows / self.flights, self.levels / self.flights


def run(name: str, cluster: Cluster, setting: Setting, answers: Sequence[Answer], recording: Recording,
        memos: Memos) -> Sample:
    from fullpipe_lab.memo import MemoDraft

    seen, tokens, seconds, drafts = _Flights(), 0, 0.0, setting.draft.split(",")
    for answer in answers:
        draft = None if setting.draft == "none" else MemoDraft(memos.of(answer))
        stats = replay(answer, recording.head.params, draft, setting.make(machine_of(cluster, drafts)), cluster,
                       costs=DraftCosts(cluster, drafts), listeners=[seen]).stats
        tokens += stats.num_emitted
        seconds += stats.tbt_s * (stats.num_emitted - 1)
        memos.save(answer)
    return Sample(name, setting.method, setting.width, setting.depth, tokens, round(seconds, 6), seen.flights,
                  seen.rows, seen.levels, [one.id for one in answers])


def measure(bench: Path, draft: str, clusters: Sequence[str], limit: int) -> dict[str, Any]:
    from fullpipe_lab.memo import Memos

    recording = Recording.load(bench / "recording-t0.jsonl")
    answers = list(recording.answers.values())
    memos = Memos(bench / "memo", str(hub.resolve(draft)), recording.head)
    profile = profile_of((*said, token) for answer in answers
                         for memo in [memos.of(answer)]
                         for said, token in zip(memo.answers(memo.true[:-1]), answer.tokens))
    found = {Path(one).name.removesuffix(".toml"): Cluster.load(one) for one in clusters}
    samples = []
    for name, cluster in found.items():
        for setting in SETTINGS:
            sample = run(name, cluster, setting, first_of_each_set(answers, limit), recording, memos)
            print(f"{name}: {setting}: {sample.speed:.2f} tokens a second", flush=True)
            samples.append(asdict(sample))
    results = {"target": recording.head.model, "draft": draft, "dtype": recording.head.dtype,
               "profile": asdict(profile), "clusters": [_told(name, one) for name, one in found.items()]}
    return study_receipt("speculation_map", results, samples)


# ---- the picture -------------------------------------------------------------------------------------------


def _told(name: str, cluster: Cluster) -> dict[str, Any]:
    """What the closed form needs of a cluster, and its name for people."""
    machine = machine_of(cluster, ["model"])
    assert machine.draft is not None
    return {"name": name, "title": cluster.name, "stages": [one.points for one in machine.stages],
            "draft": machine.draft.points, "link_s": machine.link_s, "shared": machine.shared,
            "draft_link_s": machine.draft_link_s}


def _machine(told: Mapping[str, Any]) -> Machine:
    curves = [CostCurve({int(rows): seconds for rows, seconds in one.items()}) for one in
              (*told["stages"], told["draft"])]
    return Machine(len(told["stages"]), stages=curves[:-1], draft=curves[-1], link_s=told["link_s"],
                   shared=told["shared"], draft_link_s=told["draft_link_s"])


class Kept:
    """What a receipt holds."""

    def __init__(self, receipt: Mapping[str, Any]) -> None:
        about = receipt["results"]["profile"]
        self.profile = Profile(about["first"], [(one[0], one[1]) for one in about["caught"]], about["tokens"])
        self.titles = {one["name"]: one["title"] for one in receipt["results"]["clusters"]}
        self.machines = {one["name"]: _machine(one) for one in receipt["results"]["clusters"]}
        self.samples = [Sample(**one) for one in receipt["samples"]]

    def of(self, cluster: str) -> list[Sample]:
        return [one for one in self.samples if one.cluster == cluster]

    def table(self) -> list[list[str]]:
        """Methods that keep the pipeline full: what the closed form says of their mean flight, and what they did."""
        return [[one.cluster, f"{one.method}{_size(one)}", f"{row:.2f}", f"{level:.2f}",
                 f"{tokens_per_second(self.machines[one.cluster], self.profile, row, level):.1f}", f"{one.speed:.1f}"]
                for one in self.samples if one.method in ("pipedec", "fullpipe") for row, level in [one.flight]]

    def picture(self) -> str:
        """SVG: a map for each cluster."""
        return figures.maps([_map(self.titles[name], machine, self.profile, self.of(name))
                             for name, machine in self.machines.items()],
                            "rows of a flight", "levels of a flight", "expected tokens a second")


def _map(title: str, machine: Machine, profile: Profile, samples: Sequence[Sample]) -> figures.Map:
    steps = [step / _STEPS for step in range(_STEPS + 1)]
    levels = [1 + (MOST_LEVELS - 1) * step for step in steps]
    rows = [[level * (MOST_ROWS / level) ** step for step in steps] for level in levels]
    values = [[tokens_per_second(machine, profile, row, level) for row in line] for line, level in zip(rows, levels)]
    plain = next(one.speed for one in samples if one.method == "pp")
    best = {name: max((one for one in samples if one.method == name), key=lambda one: one.speed)
            for name in ("chain", "pipedec", "fullpipe")}
    speed, row, level = best_point(machine, profile)
    marks = [figures.Mark(f"best that never changes: {speed:.0f}", row, level, "x")]
    marks += [figures.Mark(f"{name}{_size(one)}: {one.speed:.0f}", *one.flight, "o" if name != "chain" else "D")
              for name, one in best.items()]
    return figures.Map(f"{title}\npp: {plain:.1f} tokens a second", rows, levels, values, marks)


def _size(sample: Sample) -> str:
    if sample.depth is not None:
        return f", depth {sample.depth}"
    return f", width {sample.width}" if sample.width is not None else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("--bench", type=Path, default=Path("bench-out"), help="recording-t0.jsonl and memo/")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="the model whose answers the memos keep")
    parser.add_argument("--clusters", nargs="+", default=["gpus-8"])
    parser.add_argument("--limit", type=int, default=1, help="answers of each set that are replayed")
    parser.add_argument("--receipt", type=Path, default=RECEIPT)
    parser.add_argument("--out", type=Path, default=PICTURE)
    asked = parser.parse_args()
    if asked.what == "measure":
        save_receipt(measure(asked.bench, asked.draft, asked.clusters, asked.limit), asked.receipt)
    else:
        kept = Kept(json.loads(asked.receipt.read_text(encoding="utf-8")))
        print_table(["cluster", "method", "rows", "levels", "closed form", "replayed"], kept.table())
        write_whole(asked.out, kept.picture())


if __name__ == "__main__":
    main()
