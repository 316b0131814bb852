"""The comparison: every method on the same recorded prompts and clusters, first to tune, then to measure.

A unit of work is one prompt at one temperature: its worker process loads what the draft is known to say of it, runs
whatever is asked for, and keeps what it learned. Every sample goes to a journal as soon as there is one, so an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

import fullpipe
from fullpipe.assembly import MIXED_MIN_N
from fullpipe.costs import Machine
from fullpipe.errors import PipelineError, UsageError
from fullpipe.files import write_whole
from fullpipe.methods import METHODS, Method, make_method
from fullpipe.pipeline.worker import die_with_parent
from fullpipe.sequences.calibration import Calibration
from fullpipe.stations.base import DraftLike
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.ngram import NgramDraft
from fullpipe_lab.clusters import Cluster, DraftCosts, machine_of
from fullpipe_lab.files import Lines, make_folder
from fullpipe_lab.receipts import Candidate, Sample, Tuning
from fullpipe_lab.recording import Answer, Head
from fullpipe_lab.replay import Run, replay

if TYPE_CHECKING:
    from fullpipe_lab.memo import Memos

Progress = Callable[[int, int, str], None]
"""Called with what is done, how much there is, and a word on it."""

Phase = Literal["tuning", "main"]
_Key = tuple[Any, ...]

CHAIN_DEPTHS = (2, 3, 4, 6, 8, 12, 16)
TREE_DEPTHS = (3, 5, 8, 12)
WIDTHS = (4, 8, 16, 32, 64)
TREE_ROWS = 128  # trees of more nodes are not tried: SpecInfer, Sequoia and EAGLE-2 verify 16 to 128
_DECIDING = ("costs.py", "live_costs.py", "messages.py", "sequences/*.py", "methods/*.py", "engine/*.py",
             "stations/drafts/*.py", "pipeline/inprocess.py", "pipeline/links.py")
_DECIDING_HERE = ("replay.py", "crowd.py", "memo.py", "clusters/*.py")


# ---- what is tried -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """A method and how it is set; None: as it comes. draft: "none", or proposers with commas between ("model",
    "ngram")."""

    method: str
    draft: str
    width: int | None = None
    depth: int | None = None
    floor: float | None = None

    def make(self, machine: Machine | None = None) -> Method:
        return make_method(self.method, width=self.width, depth=self.depth, floor=self.floor, machine=machine)

    @property
    def key(self) -> tuple[str, str, int, int, float]:
        return self.method, self.draft, self.width or 0, self.depth or 0, self.floor or 0.0

    def __str__(self) -> str:
        parts = [self.method]
        parts += [f"width {self.width}"] if self.width is not None else []
        parts += [f"depth {self.depth}"] if self.depth is not None else []
        return ", ".join(parts) + (f", {self.draft}" if self.draft != "none" else "")


def candidates(method: str, drafts: Sequence[str], widths: Sequence[int],
               depths: Sequence[int] | None) -> list[Setting]:
    """All settings of a method worth trying. depths: None for the method's own range.

    Raises UsageError for an unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", hint=f"Methods are: {', '.join(METHODS)}.")
    match method:
        case "pp":
            return [Setting("pp", "none")]
        case "chain":
            return [Setting(method, draft, None, depth)
                    for draft, depth in product(drafts, depths or CHAIN_DEPTHS)]
        case "static-tree":
            return [Setting(method, draft, width, depth)
                    for draft, width, depth in product(drafts, widths, depths or TREE_DEPTHS)
                    if width * depth <= TREE_ROWS]
        case "spd" | "ppsd":
            return [Setting(method, draft, width) for draft, width in product(drafts, dict.fromkeys((1, *widths)))]
    return [Setting(method, draft, width) for draft, width in product(drafts, widths)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What does not change during a benchmark.

    clusters: by name, the text of the file and the folder it was in. draft_model: path of the draft's weights, or None
    for proposers without a model. memos: folder for what the draft said. workers: processes, of one thread each.
    """

    clusters: dict[str, tuple[str, str]]
    head: Head
    draft_model: str | None
    memos: str
    workers: int


@dataclass(frozen=True, slots=True)
class Unit:
    """One prompt, and what is to be run on it: (cluster, setting, phase)."""

    answer: Answer
    work: tuple[tuple[str, Setting, Phase], ...]


# ---- what has been measured --------------------------------------------------------------------------------


class Journal:
    """Samples in a file, a line each, on the disk as soon as they are known. A file beside it says what they were
    measured on: the clusters' descriptions, the draft's weights and the code.

    Raises UsageError naming the line that is no sample.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._lines = Lines(path)
        self.path = path
        self.samples = [self._sample(number, row) for number, row in enumerate(self._lines.rows, 1)]

    def bind(self, plan: Plan) -> None:
        """Go on with this code, this draft and these clusters. Raises UsageError where the samples are of others, or
        where it is not known of what."""
        path = self.path.with_suffix(".made-on.json")
        again = "Delete that file to measure again, or name another folder with --out."
        if self.samples and not path.exists():
            raise UsageError(f"{self.path} holds samples, but {path.name} beside it is gone, which says of what",
                             hint=again)
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if self.samples else {}
        mine = {f"cluster {name}": fingerprint(text, Path(folder)) for name, (text, folder) in plan.clusters.items()}
        mine["version of the code"] = code_digest()
        if plan.draft_model is not None:
            mine["draft"] = plan.draft_model
        for name, value in mine.items():
            if known.setdefault(name, value) != value:
                raise UsageError(f"{self.path} holds samples of another {name}", hint=again)
        write_whole(path, json.dumps(known, indent=1) + "\n")

    def add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._lines.add(sample.model_dump(mode="json"))
            self.samples.append(sample)

    def done(self) -> set[_Key]:
        return {_key(sample) for sample in self.samples}

    def _sample(self, number: int, row: dict[str, Any]) -> Sample:
        try:
            return Sample.model_validate(row)
        except ValidationError as error:
            raise UsageError(f"{self.path}, line {number}: not a sample of this version ({error.errors()[0]['msg']})",
                             hint="Delete the file to begin anew, or name another folder with --out.") from None


def fingerprint(text: str, folder: Path) -> str:
    """Of a cluster's description and the profiles that it names."""
    digest = hashlib.sha256(text.encode())
    for device in tomllib.loads(text)["devices"]:
        if "profile" in device:
            digest.update((folder / device["profile"]).read_bytes())
    return digest.hexdigest()


def code_digest() -> str:
    """Of the modules that decide what a sample says."""
    places = ((Path(fullpipe.__file__).parent, _DECIDING), (Path(__file__).parent, _DECIDING_HERE))
    files = [path for folder, parts in places for part in parts for path in sorted(folder.glob(part))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _key(sample: Sample) -> _Key:
    return (sample.prompt, sample.temperature, sample.cluster, sample.method, sample.draft, sample.width or 0,
            sample.depth or 0, sample.floor or 0.0, sample.phase)


# ---- running it --------------------------------------------------------------------------------------------


def run_units(plan: Plan, answers: Sequence[Answer], settings: dict[str, list[Setting]], phase: Phase,
              journal: Journal, progress: Progress) -> None:
    """Run each cluster's settings on all answers, but for what the journal has already."""
    done = journal.done()
    units = []
    for answer in answers:
        work = tuple((cluster, setting, phase) for cluster, wanted in settings.items() for setting in wanted
                     if (answer.id, plan.head.temperature, cluster, *setting.key, phase) not in done)
        if work:
            units.append(Unit(answer, work))
    total = sum(len(unit.work) for unit in units)
    finished = 0
    for unit, samples in _results(plan, units):
        journal.add(samples)
        finished += len(unit.work)
        progress(finished, total, unit.answer.id)


def _results(plan: Plan, units: list[Unit]) -> Iterable[tuple[Unit, list[Sample]]]:
    if not units:
        return
    with ProcessPoolExecutor(min(plan.workers, len(units)), get_context("spawn"), initializer=_begin,
                             initargs=(plan, os.getpid())) as pool:
        waiting: dict[Future[list[Sample]], Unit] = {pool.submit(_run, unit): unit for unit in units}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise PipelineError("a process of the benchmark was ended from outside (perhaps memory ran out)",
                                hint="Run the same command again, with fewer --workers: it goes on where it stopped."
                                ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():  # they would finish their units first, which may take minutes
                child.terminate()
            raise


_worker: Any = None  # of this process


def _begin(plan: Plan, parent: int) -> None:
    global _worker
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    os.environ["OMP_NUM_THREADS"] = "1"
    _worker = Worker(plan)


def _run(unit: Unit) -> list[Sample]:
    samples: list[Sample] = _worker.run(unit)
    return samples


class Worker:
    """Runs units in this process."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._clusters = {name: Cluster.parse(text, name, Path(folder))
                          for name, (text, folder) in plan.clusters.items()}
        self._memos: Memos | None = None

    def run(self, unit: Unit) -> list[Sample]:
        samples = [self._sample(unit.answer, *work) for work in unit.work]
        self._keep(unit.answer)
        return samples

    def watch(self, answer: Answer, name: str, setting: Setting, calibration: Calibration) -> None:
        """Replay an answer on cluster `name`; the calibration learns what becomes of the guesses."""
        self._replay(answer, name, setting, calibration)
        self._keep(answer)

    def _keep(self, answer: Answer) -> None:
        if self._memos is not None:
            self._memos.save(answer)

    def _draft(self, setting: Setting, answer: Answer) -> DraftLike | None:
        """The setting's proposers; "model" stands for the real draft, whose answers are kept."""
        match setting.draft:
            case "none":
                return None
            case "ngram":
                return NgramDraft()
        from fullpipe_lab.memo import MemoDraft, Memos

        if self._memos is None:
            assert self._plan.draft_model is not None
            self._memos = Memos(Path(self._plan.memos), self._plan.draft_model, self._plan.head)
        model = MemoDraft(self._memos.of(answer))
        return model if setting.draft == "model" else Mix([model, NgramDraft(min_n=MIXED_MIN_N)])

    def _sample(self, answer: Answer, name: str, setting: Setting, phase: Phase) -> Sample:
        cluster, run = self._clusters[name], self._replay(answer, name, setting)
        return Sample(cluster=name, temperature=self._plan.head.temperature, phase=phase, repeat=0, same_text=None,
                      near_ties=None, prompt=answer.id, task=answer.task, finish=answer.finish, method=setting.method,
                      width=setting.width, depth=setting.depth, draft=setting.draft, floor=setting.floor,
                      **_figures(run, cluster))

    def _replay(self, answer: Answer, name: str, setting: Setting, calibration: Calibration | None = None) -> Run:
        cluster, drafts = self._clusters[name], setting.draft.split(",")
        return replay(answer, self._plan.head.params, self._draft(setting, answer),
                      setting.make(machine_of(cluster, drafts)), cluster, costs=DraftCosts(cluster, drafts),
                      calibration=calibration)


def _figures(run: Run, cluster: Cluster) -> dict[str, Any]:
    stats, meter, stages = run.stats, run.meter, cluster.num_stages
    seconds, names = max(stats.decode_seconds, 1e-12), [f"stage {k}" for k in range(stages)]
    return {
        "stages": stages, "tokens": stats.num_emitted, "ttft_s": stats.ttft_s, "tbt_s": stats.tbt_s,
        "decode_s": stats.decode_seconds, "steps": stats.steps, "steps_per_token": stats.steps_per_token,
        "hits": stats.hits, "misses": stats.misses, "restarts": stats.misses, "launched_rows": stats.launched_rows,
        "wasted_rows": stats.wasted_rows, "draft_calls": stats.draft_calls, "draft_rows": stats.draft_rows,
        "fill": stats.fill(stages), "bubbles": [_share(1 - meter.busy[station] / seconds) for station in names],
        "draft_busy": _share(meter.busy["draft"] / seconds),
        "link_bytes": [_sent(cluster, meter.flights[station], meter.rows[station]) for station in names[:-1]],
        "hits_by_depth": meter.hits, "asked_by_depth": meter.asked, "engine_s": run.engine_s, "wall_s": run.wall_s}


def _sent(cluster: Cluster, flights: int, rows: int) -> float:
    """Bytes of so many flights with so many rows in all."""
    empty = cluster.message_bytes(0)
    return float(flights * empty + rows * (cluster.message_bytes(1) - empty))


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


# ---- choosing ----------------------------------------------------------------------------------------------


def choose(samples: Sequence[Sample], clusters: Iterable[str], temperature: float,
           settings: dict[str, list[Setting]]) -> tuple[dict[str, list[Setting]], list[Tuning]]:
    """Each method's best setting on each cluster: the least time between tokens over all tuning prompts together."""
    spent: dict[_Key, float] = defaultdict(float)  # seconds between tokens
    gaps: dict[_Key, int] = defaultdict(int)
    prompts: set[str] = set()
    for one in samples:
        if one.phase == "tuning" and one.temperature == temperature:
            key = (one.cluster, one.method, one.draft, one.width or 0, one.depth or 0, one.floor or 0.0)
            spent[key] += one.tbt_s * (one.tokens - 1)
            gaps[key] += one.tokens - 1
            prompts.add(one.prompt)
    best: dict[str, list[Setting]] = {}
    tunings = []
    for cluster in clusters:
        best[cluster] = []
        for method in dict.fromkeys(setting.method for setting in settings[cluster]):
            tried = [setting for setting in settings[cluster] if setting.method == method]
            times = [spent[cluster, *one.key] / max(gaps[cluster, *one.key], 1) for one in tried]
            index = min(range(len(tried)), key=times.__getitem__)
            best[cluster].append(tried[index])
            tunings.append(Tuning(cluster=cluster, temperature=temperature, method=method, best=index,
                                  prompts=len(prompts), candidates=[
                                      Candidate(width=one.width, depth=one.depth, draft=one.draft, floor=one.floor,
                                                tbt_s=seconds) for one, seconds in zip(tried, times)]))
    return best, tunings


def matching(samples: Iterable[Sample], temperature: float, best: dict[str, list[Setting]],
             ids: Sequence[str]) -> list[Sample]:
    """Of everything in a journal the measurements of these settings on these prompts."""
    wanted = {(id, temperature, cluster, *setting.key, "main")
              for cluster, settings in best.items() for setting in settings for id in ids}
    return [one for one in samples if _key(one) in wanted]


def edges(tunings: Iterable[Tuning]) -> list[str]:
    """Says where the best setting is the largest that was tried, so that a larger one might be better still."""
    notes = []
    for one in tunings:
        best = one.candidates[one.best]
        for what in ("width", "depth"):
            tried = [value for each in one.candidates if (value := getattr(each, what)) is not None]
            if len(set(tried)) > 1 and getattr(best, what) == max(tried):
                notes.append(f"{one.method} on {one.cluster}, temperature {one.temperature:g}: the best {what} is the "
                             f"largest that was tried ({max(tried)}).")
    return notes
