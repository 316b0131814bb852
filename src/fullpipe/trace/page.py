"""A run becomes one HTML page with a scrubber: stages, token tree, text and counters, step by step. No torch.

A step is a moment at which the engine learned or did something: events of equal time are one step. The page holds
for every node the steps at which its state changed, so any step is drawn from scratch, forwards and backwards alike,
and only the current one is in the document. `page.html` beside this file is the page without its data.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from fullpipe.events import Died, Emitted, Fate, Finished, Launched
from fullpipe.messages import Drafted, Event, Landed
from fullpipe.trace.files import replacing
from fullpipe.trace.history import PROMPT, History, Stay, history

_NEVER = -1
_KINDS: dict[Fate, int] = {"miss": 0, "hit": 1, "last": 2}
# Inside a script element only these could end it, or begin a comment that hides its end.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
_TOLD = Launched | Landed | Drafted | Emitted | Died | Finished


def write_page(events: Iterable[Event], path: str | Path, *, tokenizer_texts: Mapping[int, str] | None = None,
               title: str = "", clock: str = "time") -> None:
    """Write the page to `path`, replacing what was there. It needs no network and no other file.

    tokenizer_texts: what tokens read; one that is missing is shown as its number. clock: the name of the time.

    Raises `UsageError` when the events show no work or the file cannot be written.
    """
    data = page_data(events, tokenizer_texts or {}) | {"title": title, "clock": clock}
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8").replace("{{DATA}}", text)
    with replacing(path) as file:
        file.write_text(page, encoding="utf-8")


def page_data(events: Iterable[Event], texts: Mapping[int, str]) -> dict[str, Any]:
    """What the page is drawn from. Steps are indices into `times`; -1 is never, or nobody.

    nodes: columns of the launched nodes, and of tokens that ended a text without being launched; `parent` and all
    other references to nodes are indices into them. stays: per station, columns. emissions: columns; `kind` is 1 for
    a hit, 0 for a miss, 2 for a request's last token, which is neither.
    """
    stream = list(events)
    told = history(stream)
    times = sorted({event.time for event in stream if isinstance(event, _TOLD)})
    steps = _Steps(times)
    index = {id: place for place, id in enumerate(told.lives)}
    nodes = _nodes(told, steps, index)
    emissions = _emissions(told, steps, index, nodes)
    used = {*nodes["token"], *nodes["next"]}
    return {
        "times": [time - told.start for time in times], "requests": sorted({one.request for one in told.emissions}),
        "stations": list(told.stays), "stays": [_stays(stays, told, index) for stays in told.stays.values()],
        "nodes": nodes, "emissions": emissions, "unit": "steps" if told.in_steps else "s",
        "finishes": [[steps.of(one.time), one.request, one.reason] for one in told.finishes],
        "texts": {token: texts[token] for token in sorted(used) if token in texts},
    }


class _Steps:
    def __init__(self, times: list[float]) -> None:
        self._times = times

    def of(self, time: float | None) -> int:
        return _NEVER if time is None else bisect_right(self._times, time) - 1


def _nodes(told: History, steps: _Steps, index: dict[int, int]) -> dict[str, list[int]]:
    lives = list(told.lives.values())
    return {
        "id": [life.id for life in lives],
        "request": [life.request for life in lives],
        "token": [life.token for life in lives],
        "position": [life.position for life in lives],
        "parent": [index.get(life.parent, _NEVER) for life in lives],
        "flight": [life.flight for life in lives],
        "job": [_NEVER if life.job is None else life.job for life in lives],
        "proposed": [steps.of(life.proposed) for life in lives],
        "launched": [steps.of(life.launched) for life in lives],
        "landed": [steps.of(life.landed) for life in lives],
        # The last prompt token is text from the beginning.
        "committed": [steps.of(life.launched if life.parent < 0 else life.committed) for life in lives],
        "died": [steps.of(life.died) for life in lives],
        "next": [_NEVER if life.next_token is None else life.next_token for life in lives],
    }


def _emissions(told: History, steps: _Steps, index: dict[int, int],
               nodes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Also appends to `nodes` the tokens that no node carries."""
    columns: dict[str, list[int]] = {"step": [], "request": [], "node": [], "kind": []}
    for number, one in enumerate(told.emissions):
        step = steps.of(one.time)
        if number in told.child:
            place = index[told.child[number]]
        else:
            place = len(nodes["id"])
            bare = {"request": one.request, "token": one.token, "position": one.position,
                    "parent": index.get(one.node, _NEVER), "committed": step}
            for name, column in nodes.items():
                column.append(bare.get(name, _NEVER))
        row = {"step": step, "request": one.request, "node": place, "kind": _KINDS[one.fate]}
        for name, value in row.items():
            columns[name].append(value)
    return columns


def _stays(stays: list[Stay], told: History, index: dict[int, int]) -> dict[str, list[Any]]:
    """rows: indices of nodes, -1 for a guess that was never launched; prompt rows are only counted."""
    return {
        "number": [stay.number for stay in stays],
        "start": [stay.start - told.start for stay in stays],
        "end": [stay.end - told.start for stay in stays],
        "prompt": [stay.nodes.count(PROMPT) for stay in stays],
        "rows": [[index.get(node, _NEVER) for node in stay.nodes if node != PROMPT] for stay in stays],
    }
