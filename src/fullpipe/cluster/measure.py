"""The times of a profile are taken here, with real layers of the real model, on this machine.

All cells (rows by context) are measured in turn, and that several times over: a noisy moment then hits all cells
alike, and the median passes it by. The first round warms up and does not count.

The layers in use weigh more together than a processor's caches hold, as those of a stage do beside its head, so every
one of them is read from memory. What a flight costs once per stage is told apart from its layers by timing some layers
and one layer: with `many = flight + n layer` and `one = flight + layer`, `layer = (many - one) / (n - 1)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fullpipe.cluster.hops import measure_hops
from fullpipe.cluster.profile import Cost, Curve, Profile, Shape, Surface
from fullpipe.cluster.provenance import commit_of, machine, versions
from fullpipe.errors import UsageError
from fullpipe.hub import resolve
from fullpipe.messages import ArenaId, Flight, Opening, Part
from fullpipe.models.dtypes import DTYPES, pick_dtype, sizes_in
from fullpipe.models.files import ModelFiles
from fullpipe.models.gpu.devices import device_name, find_device
from fullpipe.models.slice import Slice, load_slice
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from fullpipe.options import EngineOptions
from fullpipe.request import SamplingParams
from fullpipe.stations.sampling import pick, rank
from fullpipe.stations.target import SliceRunner

Progress = Callable[[str, int, int], None]
"""Told what is measured, how many samples there are of it, and how many there will be."""

Sample = Callable[[], float]
"""Does a piece of work once; the seconds that it took."""

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 2048)
MESSAGE_BYTES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)

_COLD_BYTES = 256 << 20  # of layers: beyond the last cache of most processors (32 MB on the development machine)
_FANOUT = EngineOptions().fanout
_HOP_REPEATS = 40  # a hop takes microseconds, and varies more than arithmetic does
_FREE = Curve(sizes=(1,), costs=(Cost(seconds=0.0, spread=0.0, samples=1),))


_Cell = TypeVar("_Cell")
Derive = Callable[[tuple[float, ...]], tuple[float, ...]]


def measure(model: str, draft: str | None = None, *, rows: Sequence[int] = ROWS, contexts: Sequence[int] = CONTEXTS,
            repeats: int = 5, threads: int = 1, dtype: str = "auto", quantization: str | None = None,
            device: str = "cpu", quick: bool = False,
            progress: Progress = lambda what, done, total: None) -> Profile:
    """This machine's profile for a target, and for a draft model if one is named.

    model, draft: names as `fullpipe.hub.resolve` takes them. rows: of a flight. contexts: tokens that stand before
    them. repeats: samples of a cell. threads: of the process that computes, as of a stage's. device: it computes on.
    quick: of a few samples the least counts, and messages between two processes of this machine count as free.

    Raises UsageError for sizes that are below 1, do not rise, or are beyond a model's context; and what opening a
    model and loading it raise.
    """
    device = find_device(device)
    _check(rows, contexts, repeats, threads)
    target = open_model(resolve(model))
    dtype = pick_dtype(dtype, device, target, quantization)
    guesser = open_model(resolve(draft)) if draft is not None else None
    for name, files in ((model, target), (draft, guesser)):
        if files is not None and files.config.max_positions < contexts[-1] + max(rows):
            raise UsageError(f"{name} takes {files.config.max_positions} tokens; {max(rows)} rows after "
                             f"{contexts[-1]} are more", hint="Choose smaller `contexts`.")
    cells = _Cells(rows, contexts, repeats, progress, least=quick)
    with _threads(threads), torch.inference_mode():
        layers, flights = _layers(target, dtype, cells, device)
        heads, lookups = _ends(target, dtype, cells, device)
        drafts = None if guesser is None else _drafts(guesser, dtype, cells, device)
    shapes = [None if files is None else _shape(name or "", files, dtype)
              for name, files in ((model, target), (draft, guesser))]
    assert shapes[0] is not None
    commit, dirty = commit_of(Path(__file__).parents[1])
    return Profile(target=shapes[0], draft_model=shapes[1], dtype=dtype,  # type: ignore[arg-type]
                   threads=threads, machine={**machine(), **versions(), **device_name(device)}, commit=commit,
                   dirty=dirty, date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), layers=layers, flights=flights,
                   heads=heads, lookups=lookups, drafts=drafts, messages=_FREE if quick else _messages(progress))


def _check(rows: Sequence[int], contexts: Sequence[int], repeats: int, threads: int) -> None:
    for name, sizes in (("rows", rows), ("contexts", contexts)):
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise UsageError(f"{name} must be 1 or more and rise (got {','.join(map(str, sizes)) or 'none'})",
                             hint=f"For example `{name}={','.join(map(str, ROWS if name == 'rows' else CONTEXTS))}`.")
    for name, number in (("repeats", repeats), ("threads", threads)):
        if number < 1:
            raise UsageError(f"{name} must be 1 or more (got {number})")


def _shape(name: str, files: ModelFiles, dtype: str) -> Shape:
    sizes = sizes_in(files, dtype)
    return Shape(name=name, num_layers=files.config.num_layers, layer_bytes=sizes.layer_bytes,
                 head_bytes=sizes.head_bytes, embedding_bytes=sizes.embedding_bytes, kv_bytes=sizes.kv_bytes,
                 row_bytes=sizes.row_bytes)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- the grid --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cells:
    """Works in turn through the sizes to measure, as often as it is told. least: the least of the samples counts, not
    the median: what disturbs a machine only ever adds, and a few samples have no median worth the name."""

    rows: Sequence[int]
    contexts: Sequence[int]
    repeats: int
    progress: Progress
    least: bool = False

    def surface(self, what: str, sample: Callable[[int, int], tuple[float, ...]],
                derive: Derive = lambda times: times) -> list[Surface]:
        """sample(rows, context): some times, in seconds. derive: what is to be known of them; a surface for each."""
        grid = [(rows, context) for rows in self.rows for context in self.contexts]
        costs = {cell: self._costs(times, derive)
                 for cell, times in self._rounds(what, grid, lambda cell: sample(*cell)).items()}
        return [Surface(rows=tuple(self.rows), contexts=tuple(self.contexts),
                        costs=tuple(tuple(costs[rows, context][k] for context in self.contexts) for rows in self.rows))
                for k in range(len(costs[grid[0]]))]

    def curves(self, what: str, sample: Callable[[int], tuple[float, ...]]) -> list[Curve]:
        """The same by rows alone."""
        costs = {rows: self._costs(times) for rows, times in self._rounds(what, self.rows, sample).items()}
        return [Curve(sizes=tuple(self.rows), costs=tuple(costs[rows][k] for rows in self.rows))
                for k in range(len(costs[self.rows[0]]))]

    def _costs(self, samples: list[tuple[float, ...]], derive: Derive = lambda times: times) -> list[Cost]:
        """The median of what follows from each sample, or what follows from the least of each time."""
        costs = [Cost.of(times) for times in zip(*map(derive, samples))]
        if not self.least:
            return costs
        return [cost.model_copy(update={"seconds": max(seconds, 0.0)})
                for cost, seconds in zip(costs, derive(tuple(map(min, zip(*samples)))))]

    def _rounds(self, what: str, cells: Sequence[_Cell],
                sample: Callable[[_Cell], tuple[float, ...]]) -> dict[_Cell, list[tuple[float, ...]]]:
        found: dict[_Cell, list[tuple[float, ...]]] = {cell: [] for cell in cells}
        total = (self.repeats + 1) * len(cells)
        for turn in range(self.repeats + 1):
            for number, cell in enumerate(cells, 1):
                times = sample(cell)
                if turn:
                    found[cell].append(times)
                self.progress(what, turn * len(cells) + number, total)
        return found


# ---- what is measured ------------------------------------------------------------------------------------


class _Standing(SliceRunner):
    """Runs requests that begin with their context in place. Noise stands in the cache: what a step takes does not
    depend on the numbers there. most: rows of its largest flight, and its longest context."""

    def __init__(self, slice: Slice, most: tuple[int, int]) -> None:
        super().__init__(slice)
        slice.pretend(sum(most))

    def flight(self, rows: int, context: int) -> Flight:
        """A flight of a request that begins anew: `rows` guesses of the token that follows the context."""
        arena = ArenaId(context)
        self.open([Opening(arena, context, SamplingParams(), list(range(context)))])
        slots = list(range(context, context + rows))
        return Flight(0, [Part(arena, [], list(range(rows)), [0] * rows, [context] * rows, slots,
                               [[slot] for slot in slots], [True] * rows)], fanout=_FANOUT)


def _timed(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def _layers(files: ModelFiles, dtype: str, cells: _Cells, device: str = "cpu") -> list[Surface]:
    """One layer, and what a flight costs beside its layers."""
    kind, config = DTYPES.get(dtype, torch.float32), files.config
    number = min(config.num_layers, max(2, -(-_COLD_BYTES // sizes_in(files, dtype).layer_bytes)))
    many, one = (_Standing(load_slice(files, 0, count, has_embedding=False, has_head=False, dtype=dtype, device=device),
                           (max(cells.rows), max(cells.contexts))) for count in (number, 1))

    def sample(rows: int, context: int) -> tuple[float, float]:
        hidden = torch.randn(rows, config.hidden, generator=torch.Generator().manual_seed(rows)).to(kind)
        long = _timed(many.forward, many.flight(rows, context), hidden)
        return long, _timed(one.forward, one.flight(rows, context), hidden)

    def apart(times: tuple[float, ...]) -> tuple[float, float]:
        long, short = times
        if number == 1:
            return long, 0.0
        layer = (long - short) / (number - 1)
        return layer, short - layer

    return cells.surface("layers", sample, apart)


def _ends(files: ModelFiles, dtype: str, cells: _Cells, device: str = "cpu") -> list[Curve]:
    """Head with the pick, and embedding."""
    ends = load_slice(files, 0, 0, has_embedding=True, has_head=True, dtype=dtype, device=device)
    runner = _Standing(ends, (max(cells.rows), max(cells.contexts)))

    def head(flight: Flight, hidden: Tensor) -> None:
        wanted = list(runner.wanted(flight))
        pick(runner.logits(hidden, wanted), [row.context() for row in wanted])

    def sample(rows: int) -> tuple[float, float]:
        tokens = torch.randint(files.config.vocab_size, (rows,), generator=torch.Generator().manual_seed(rows))
        flight = runner.flight(rows, cells.contexts[0])
        step = Step.of_text(tokens, np.arange(rows, dtype=np.int32))
        return _timed(head, flight, ends.forward(step)), _timed(ends.forward, step)

    return cells.curves("head", sample)


def _drafts(files: ModelFiles, dtype: str, cells: _Cells, device: str = "cpu") -> Surface:
    """A draft call as `stations/drafts/model.py:DraftModel.run` makes it."""
    whole = load_slice(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=dtype,
                       device=device)
    runner = _Standing(whole, (max(cells.rows), max(cells.contexts)))

    def call(job: Flight) -> None:
        hidden = runner.forward(job, None)
        wanted = list(runner.wanted(job))
        rank(runner.logits(hidden, wanted), [row.context() for row in wanted], job.fanout)

    return cells.surface("draft", lambda rows, context: (_timed(call, runner.flight(rows, context)),))[0]


def _messages(progress: Progress) -> Curve:
    total = _HOP_REPEATS * len(MESSAGE_BYTES)
    found = measure_hops(MESSAGE_BYTES, _HOP_REPEATS, lambda done: progress("messages", done, total))
    return Curve(sizes=MESSAGE_BYTES, costs=tuple(Cost.of(found[size]) for size in MESSAGE_BYTES))
