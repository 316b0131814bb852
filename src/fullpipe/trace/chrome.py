"""Events become a Chrome trace, to open in https://ui.perfetto.dev or chrome://tracing. No torch.

The format is Google's "Trace Event Format", its JSON object form. Every station is a thread of one process, every
stay of a flight a complete event ("X"), a node's way through the stations a flow ("s", "t", "f"), and what the
commit rule did instants ("i") on the engine's own thread. Times are microseconds since the trace began.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fullpipe.messages import Event
from fullpipe.trace.files import replacing
from fullpipe.trace.history import DRAFT, History, Stay, history

_PROCESS = 1
_ENGINE = 1  # thread; the stations follow
Record = dict[str, Any]


def chrome_trace(events: Iterable[Event]) -> Record:
    """The trace as an object for `json.dumps`; nothing in it is infinite or NaN.

    Raises `UsageError` when the events show no work.
    """
    told = history(events)
    threads = {"engine": _ENGINE} | {station: _ENGINE + 1 + k for k, station in enumerate(told.stays)}
    scale = _Scale(told, threads)
    return {
        "traceEvents": [*_names(threads), *_slices(told, scale), *_flows(told, scale), *_marks(told, scale)],
        "displayTimeUnit": "ms",
        "otherData": {"writer": "fullpipe", "began_at_s": told.start},
    }


def write_chrome_trace(events: Iterable[Event], path: str | Path) -> None:
    """Write it to `path`, replacing what was there. Raises `UsageError` as `chrome_trace`, or if it cannot."""
    text = json.dumps(chrome_trace(events), allow_nan=False, separators=(",", ":"))
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


class _Scale:
    """Knows where a record stands: its thread and its time."""

    def __init__(self, told: History, threads: dict[str, int]) -> None:
        self._start, self._threads = told.start, threads

    def at(self, station: str, time: float) -> Record:
        return {"pid": _PROCESS, "tid": self._threads[station], "ts": self.us(time - self._start)}

    @staticmethod
    def us(seconds: float) -> float:
        return round(1e6 * seconds, 3)


def _names(threads: dict[str, int]) -> Iterator[Record]:
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": "fullpipe"}}
    for name, thread in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": _PROCESS, "tid": thread, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": _PROCESS, "tid": thread, "args": {"sort_index": thread}}


def _slices(told: History, scale: _Scale) -> Iterator[Record]:
    for stay in told.all_stays():
        name = f"{'job' if stay.station == DRAFT else 'flight'} {stay.number}"
        yield {"ph": "X", "name": name, "cat": "draft" if stay.station == DRAFT else "stage",
               **scale.at(stay.station, stay.start), "dur": scale.us(stay.end - stay.start), "args": _rows(told, stay)}


def _rows(told: History, stay: Stay) -> Record:
    """nodes, tokens and positions run in parallel; prompt rows, and guesses that were never launched, have no entry."""
    known = [told.lives[node] for node in stay.nodes if node in told.lives]
    return {"rows": len(stay.nodes), "live": stay.alive, "dead": len(stay.nodes) - stay.alive,
            "nodes": [life.id for life in known], "tokens": [life.token for life in known],
            "positions": [life.position for life in known]}


def _flows(told: History, scale: _Scale) -> Iterator[Record]:
    """A node's way: from the draft call that guessed it, where one did, through the stages.

    A viewer ties an arrow to the slice that holds its time, so it stands in the slice's middle, where no other
    slice can claim it.
    """
    jobs = {stay.number: stay for stay in told.stays.get(DRAFT, [])}
    ways: defaultdict[int, list[Stay]] = defaultdict(list)
    for life in told.lives.values():
        if life.job in jobs:
            ways[life.id].append(jobs[life.job])
    for station in told.stages:
        for stay in told.stays[station]:
            for node in stay.nodes:
                if node in told.lives:
                    ways[node].append(stay)
    for node, way in ways.items():
        for index, stay in enumerate(way if len(way) > 1 else ()):
            phase = "s" if index == 0 else "t" if index < len(way) - 1 else "f"
            record = {"ph": phase, "name": f"node {node}", "cat": "node", "id": node,
                      **scale.at(stay.station, (stay.start + stay.end) / 2)}
            yield record | {"bp": "e"} if phase == "f" else record


def _marks(told: History, scale: _Scale) -> Iterator[Record]:
    """Hits, misses and cancellations; the ends of requests; the failure of a station."""
    for one in told.emissions:
        yield _mark(scale, one.fate, one.time, {"request": one.request, "token": one.token, "position": one.position})
    for death in told.deaths:
        cancelled = [node for node in death.nodes if (life := told.lives.get(node)) and life.died_in_flight()]
        if cancelled:
            yield _mark(scale, "cancel", death.time, {"request": death.request, "nodes": cancelled})
    for end in told.finishes:
        yield _mark(scale, "finished", end.time, {"request": end.request, "reason": end.reason})
    for failure in told.failures:
        yield _mark(scale, "failed", failure.time, {"station": failure.station, "reason": failure.reason})


def _mark(scale: _Scale, name: str, time: float, args: Record) -> Record:
    return {"ph": "i", "s": "t", "name": name, "cat": "engine", **scale.at("engine", time), "args": args}
