"""The comparison: every method on the same recorded prompts and clusters, first to tune, then to measure.

A unit of work is one prompt at one temperature: its worker process loads what the draft is known to say of it,
runs whatever is asked for, and keeps what it learned. Every sample goes to a journal as soon as there is one,
so an interrupted benchmark goes on where it stopped.
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
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fullpipe.bench.receipt import Candidate, Sample, Tuning, write_whole
from fullpipe.bench.recording import Answer, Head, make_folder, on_disk
from fullpipe.bench.settings import Setting
from fullpipe.errors import PipelineError, UsageError
from fullpipe.pipeline.worker import die_with_parent
from fullpipe.planning.cluster import Cluster, DraftCosts
from fullpipe.request import SamplingParams

Progress = Callable[[int, int, str], None]
"""Called with what is done, how much there is, and a word on it."""

_DECIDING = ("engine.py", "track.py", "stats.py", "tree/*.py", "policies/*.py", "sources/*.py", "kvcache/*.py",
             "pipeline/inprocess.py", "pipeline/links.py", "planning/cluster.py", "bench/replay.py", "bench/memo.py")
Phase = Literal["tuning", "main"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What does not change during a benchmark.

    clusters: by name, the text of the file and the folder it was in. draft_model: path of the draft's weights, or
    None for sources without a model. memos: folder for what the draft said. workers: processes, of one thread each.
    """

    clusters: dict[str, tuple[str, str]]
    head: Head
    draft_model: str | None
    memos: str
    workers: int

    @property
    def params(self) -> SamplingParams:
        head = self.head
        return SamplingParams(max_tokens=head.max_new_tokens, temperature=head.temperature, seed=head.seed)


@dataclass(frozen=True, slots=True)
class Unit:
    """One prompt, and what is to be run on it: (cluster, setting, phase)."""

    answer: Answer
    work: tuple[tuple[str, Setting, Phase], ...]


class Journal:
    """Samples in a file, a line each, on the disk as soon as they are known. A file beside it says what they were
    measured on: the clusters' descriptions and the draft's weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: list[Sample] = []
        make_folder(path.parent)
        if path.exists():
            self._read()

    def bind(self, plan: Plan) -> None:
        """Go on with this code, this draft and these clusters. Raises UsageError where the samples are of others, or
        where it is not known of what."""
        path = self.path.with_suffix(".made-on.json")
        again = "Delete that file to measure again, or name another folder with --out."
        if self.samples and not path.exists():
            raise UsageError(f"{self.path} holds samples, but {path.name} beside it is gone, which says of what",
                             hint=again)
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if self.samples else {}
        mine = {f"cluster {name}": _fingerprint(text, Path(folder)) for name, (text, folder) in plan.clusters.items()}
        mine["version of the code"] = code_digest()
        if plan.draft_model is not None:
            mine["draft"] = plan.draft_model
        for name, value in mine.items():
            if known.setdefault(name, value) != value:
                raise UsageError(f"{self.path} holds samples of another {name}", hint=again)
        write_whole(path, json.dumps(known, indent=1) + "\n")

    def _read(self) -> None:
        written = self.path.read_bytes()
        kept = written[: written.rfind(b"\n") + 1]
        if kept != written:  # the end of a run that was killed
            self.path.write_bytes(kept)
        whole = kept.decode("utf-8", errors="replace")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.samples.append(Sample.model_validate_json(line))
            except ValidationError as error:
                raise UsageError(f"{self.path}, line {number}: not a sample of this version "
                                 f"({error.errors()[0]['msg']})",
                                 hint="Delete the file to begin anew, or name another folder with --out.") from None

    def add(self, samples: Iterable[Sample]) -> None:
        fresh = list(samples)
        with on_disk(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(sample.model_dump_json() + "\n" for sample in fresh)
        self.samples += fresh

    def done(self) -> set[tuple[Any, ...]]:
        return {_key(sample) for sample in self.samples}


def _fingerprint(text: str, folder: Path) -> str:
    """Of a cluster's description and the profiles that it names."""
    digest = hashlib.sha256(text.encode())
    for device in tomllib.loads(text)["devices"]:
        if "profile" in device:
            digest.update((folder / device["profile"]).read_bytes())
    return digest.hexdigest()


def code_digest() -> str:
    """Of the modules that decide what a sample says."""
    package = Path(__file__).parents[1]
    files = [path for part in _DECIDING for path in sorted(package.glob(part))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _key(sample: Sample) -> tuple[Any, ...]:
    return (sample.prompt, sample.temperature, sample.cluster, sample.method, sample.draft, sample.width or 0,
            sample.depth or 0, sample.floor or 0.0, sample.phase)


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


# ---- in the worker processes -------------------------------------------------------------------------------

_worker: Any = None


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
        self._slice: Any = None

    def run(self, unit: Unit) -> list[Sample]:
        memo, path = self._memo(unit)
        samples = [self._sample(unit.answer, memo, *work) for work in unit.work]
        if memo is not None and memo.computed_rows:
            memo.save(path)
        return samples

    def _memo(self, unit: Unit) -> tuple[Any, Path]:
        plan, answer = self._plan, unit.answer
        if plan.draft_model is None or all(setting.draft in ("none", "ngram") for _, setting, _ in unit.work):
            return None, Path()
        from fullpipe.bench.memo import Memo

        what = json.dumps([plan.draft_model, asdict(plan.head), answer.prompt, answer.tokens])
        path = Path(plan.memos) / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.npz"
        memo = Memo(self._model(), answer.prompt, answer.tokens, plan.params, plan.head.vocab)
        if path.exists():
            memo.load(path)
        return memo, path

    def _model(self) -> Any:
        if self._slice is None:
            import torch

            from fullpipe.models.decoder import DecoderSlice
            from fullpipe.models.weights import open_model
            from fullpipe.stations.target import DTYPES

            torch.set_num_threads(1)
            assert self._plan.draft_model is not None
            files = open_model(Path(self._plan.draft_model))
            self._slice = DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True,
                                       dtype=DTYPES[self._plan.head.dtype])
        return self._slice

    def _sample(self, answer: Answer, memo: Any, name: str, setting: Setting, phase: Phase) -> Sample:
        from fullpipe.bench.replay import replay

        cluster = self._clusters[name]
        run = replay(answer, self._plan.params, _source(setting.draft, memo), setting.policy(), cluster,
                     costs=DraftCosts(cluster, setting.draft.split(",")))
        stats, meter = run.stats, run.meter
        seconds = max(stats.decode_seconds, 1e-12)
        stations = [f"stage {k}" for k in range(cluster.num_stages)]
        return Sample(
            cluster=name, stages=cluster.num_stages, temperature=self._plan.head.temperature, method=setting.method,
            width=setting.width, depth=setting.depth, draft=setting.draft, floor=setting.floor, prompt=answer.id,
            task=answer.task, repeat=0, phase=phase, tokens=stats.num_emitted, finish=answer.finish, same_text=None,
            near_ties=None,
            ttft_s=stats.ttft_s, tbt_s=stats.tbt_s, decode_s=stats.decode_seconds, steps=stats.steps,
            steps_per_token=stats.steps_per_token, hits=stats.hits, misses=stats.misses, restarts=stats.misses,
            launched_rows=stats.launched_rows, wasted_rows=stats.wasted_rows, draft_calls=stats.draft_calls,
            draft_rows=stats.draft_rows, fill=stats.fill(cluster.num_stages),
            bubbles=[_share(1 - meter.busy[station] / seconds) for station in stations],
            draft_busy=_share(meter.busy["draft"] / seconds),
            link_bytes=[_sent(cluster, meter.flights[station], meter.rows[station]) for station in stations[:-1]],
            hits_by_depth=meter.hits, asked_by_depth=meter.asked, engine_s=run.engine_s, wall_s=run.wall_s)


def _sent(cluster: Cluster, flights: int, rows: int) -> float:
    """Bytes of so many flights with so many rows in all."""
    empty = cluster.message_bytes(0)
    return float(flights * empty + rows * (cluster.message_bytes(1) - empty))


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _source(draft: str, memo: Any) -> Any:
    """The sources of a setting; "model" stands for the real draft, whose answers are kept."""
    from fullpipe.assembly import MIXED_MIN_N
    from fullpipe.stations.drafts.mix import Mix
    from fullpipe.stations.drafts.ngram import NgramDraft

    match draft:
        case "none":
            return None
        case "ngram":
            return NgramDraft()
    from fullpipe.bench.memo import MemoSource

    source = MemoSource(memo)
    return source if draft == "model" else Mix([source, NgramDraft(min_n=MIXED_MIN_N)])


# ---- choosing ----------------------------------------------------------------------------------------------


def choose(samples: Sequence[Sample], clusters: Iterable[str], temperature: float,
           settings: dict[str, list[Setting]]) -> tuple[dict[str, list[Setting]], list[Tuning]]:
    """Each method's best setting on each cluster: the least time between tokens over all tuning prompts together."""
    spent: dict[tuple[Any, ...], float] = defaultdict(float)  # seconds between tokens
    tokens: dict[tuple[Any, ...], int] = defaultdict(int)
    prompts: set[str] = set()
    for one in samples:
        if one.phase == "tuning" and one.temperature == temperature:
            key = (one.cluster, one.method, one.draft, one.width or 0, one.depth or 0, one.floor or 0.0)
            spent[key] += one.tbt_s * (one.tokens - 1)
            tokens[key] += one.tokens - 1
            prompts.add(one.prompt)
    best: dict[str, list[Setting]] = {}
    tunings = []
    for cluster in clusters:
        best[cluster] = []
        for method in dict.fromkeys(setting.method for setting in settings[cluster]):
            tried = [setting for setting in settings[cluster] if setting.method == method]
            times = [spent[cluster, *setting.key] / max(tokens[cluster, *setting.key], 1) for setting in tried]
            index = min(range(len(tried)), key=lambda i: times[i])
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
