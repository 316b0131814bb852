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
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fullpipe.bench.receipt import Candidate, Sample, Tuning
from fullpipe.bench.recording import Answer, Head
from fullpipe.bench.settings import Setting
from fullpipe.errors import PipelineError, UsageError
from fullpipe.pipeline.worker import die_with_parent
from fullpipe.planning.cluster import Cluster
from fullpipe.request import SamplingParams

Progress = Callable[[int, int, str], None]
"""Called with what is done, how much there is, and a word on it."""

Phase = Literal["tuning", "main"]
_NGRAM_CALL_S, _NGRAM_ROW_S = 5e-5, 4e-5


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
    """Samples in a file, a line each, on the disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: list[Sample] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the end of a run that was killed
            self.path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.samples.append(Sample.model_validate_json(line))
            except ValidationError as error:
                raise UsageError(f"{self.path}, line {number}: not a sample of this version "
                                 f"({error.errors()[0]['msg']})",
                                 hint="Delete the file to begin anew, or name another folder with --out.") from None

    def add(self, samples: Iterable[Sample]) -> None:
        fresh = list(samples)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(sample.model_dump_json() + "\n" for sample in fresh)
        self.samples += fresh

    def done(self) -> set[tuple[Any, ...]]:
        return {_key(sample) for sample in self.samples}


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

            from fullpipe.model.decoder import DecoderSlice
            from fullpipe.model.stage import DTYPES
            from fullpipe.model.weights import open_model

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
                     costs=DraftCosts(cluster, setting.draft))
        stats, meter = run.stats, run.meter
        seconds = max(stats.decode_seconds, 1e-12)
        stations = [f"stage {k}" for k in range(cluster.num_stages)]
        return Sample(
            cluster=name, stages=cluster.num_stages, temperature=self._plan.head.temperature, method=setting.method,
            width=setting.width, depth=setting.depth, draft=setting.draft, floor=setting.floor, prompt=answer.id,
            task=answer.task, repeat=0, phase=phase, tokens=stats.num_emitted, finish=answer.finish, same_text=True,
            near_ties=0,
            ttft_s=stats.ttft_s, tbt_s=stats.tbt_s, decode_s=stats.decode_seconds, steps=stats.steps,
            steps_per_token=stats.steps_per_token, hits=stats.hits, misses=stats.misses, restarts=stats.misses,
            launched_rows=stats.launched_rows, wasted_rows=stats.wasted_rows, draft_calls=stats.draft_calls,
            draft_rows=stats.draft_rows, fill=stats.fill(cluster.num_stages),
            bubbles=[_share(1 - meter.busy[station] / seconds) for station in stations],
            draft_busy=_share(meter.busy["draft"] / seconds),
            link_bytes=[float(cluster.message_bytes(meter.rows[station])) for station in stations[:-1]],
            hits_by_depth=meter.hits, asked_by_depth=meter.asked, engine_s=run.engine_s, wall_s=run.wall_s)


class DraftCosts:
    """A cluster's costs, where its draft model is asked only if the setting has it. n-gram runs on a processor: a
    call takes 0.05 ms and 0.04 ms a row (medians on the machine of docs/log.md, 864 calls of 16 rows). A cluster
    whose draft has a cost curve means that curve, whoever guesses."""

    def __init__(self, cluster: Cluster, draft: str) -> None:
        self._cluster = cluster
        names = draft.split(",")
        self._model = "model" in names or cluster.draft_is_curve
        self._ngram = "ngram" in names and not cluster.draft_is_curve

    def __call__(self, station: str, rows: int, measured: float, context: int) -> float:
        if station != "draft" or not rows:
            return self._cluster(station, rows, measured, context)
        ngram = _NGRAM_CALL_S + rows * _NGRAM_ROW_S if self._ngram else 0.0
        return ngram + (self._cluster(station, rows, measured, context) if self._model else 0.0)


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _source(draft: str, memo: Any) -> Any:
    """The sources of a setting; "model" stands for the real draft, whose answers are kept."""
    from fullpipe.assembly import MIXED_MIN_N
    from fullpipe.sources.mix import Mix
    from fullpipe.sources.ngram import NgramSource

    match draft:
        case "none":
            return None
        case "ngram":
            return NgramSource()
    from fullpipe.bench.memo import MemoSource

    source = MemoSource(memo)
    return source if draft == "model" else Mix([source, NgramSource(min_n=MIXED_MIN_N)])


# ---- choosing ----------------------------------------------------------------------------------------------


def choose(samples: Sequence[Sample], clusters: Iterable[str], temperature: float,
           settings: dict[str, list[Setting]]) -> tuple[dict[str, list[Setting]], list[Tuning]]:
    """Each method's best setting on each cluster: the least decode time over all tuning prompts together."""
    spent: dict[tuple[Any, ...], float] = defaultdict(float)
    tokens: dict[tuple[Any, ...], int] = defaultdict(int)
    prompts: set[str] = set()
    for one in samples:
        if one.phase == "tuning" and one.temperature == temperature:
            key = (one.cluster, one.method, one.draft, one.width or 0, one.depth or 0, one.floor or 0.0)
            spent[key] += one.decode_s
            tokens[key] += one.tokens
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
