"""The pipeline over time as a picture: stages down, time across. No torch; needs matplotlib (extra `plot`).

A box is a flight's stay at a stage. Its filled part is the share of its rows that were alive when the stage was done
with them, its hatched part the share that had died; what is white is a bubble. So the coloured area over the whole
area of the stages is the window's fill (DESIGN section 8). On top stand the tokens of the text, as they came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.messages import Emitted, Event
from fullpipe.trace.files import replacing
from fullpipe.trace.history import DRAFT, History, Stay, history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Clock = Literal["virtual time", "wall-clock time", "time"]
SUFFIXES = (".png", ".svg")

# Blues of two shades, so that a flight can be followed down the stages; dead grey; hit and miss also differ in shape,
# for those who do not tell green from red.
_LIVE = ("#2f6fb3", "#6aa5dc")
_DEAD, _HATCH = "#ececec", "#a8a8a8"
_DRAFT = "#c9a7dd"
_HIT, _MISS = "#1a8a4a", "#d23b2e"
_INK, _FRAME = "#222222", "#c8c8c8"

_READABLE_FLIGHTS = 80  # boxes beside one another on 13 inches that can still be told apart
_WIDTH, _LANE, _AROUND = 13.0, 0.34, 1.75  # inches: the figure, one station, title and axis and legend
_BOX = 0.84  # height of a box in its lane


@dataclass(frozen=True, slots=True)
class _Window:
    """Seconds since the run began."""

    start: float
    end: float


def draw(events: Iterable[Event], path: str | Path, *, title: str = "", start: float | None = None,
         end: float | None = None, clock: Clock = "time") -> None:
    """Draw a run to `path`, a .png or .svg file.

    start, end: seconds since the run began. By default as much from its beginning as can be read, which is the
    whole of a run of up to 80 flights; the picture says what part it shows. clock: the name of the time axis.

    Raises `UsageError` when there is nothing to draw, for another suffix or when the file cannot be written;
    `MissingExtra` without matplotlib.
    """
    told = history(events)
    _save([(title, told)], _window(told, start, end), path, clock)


def compare(runs: Sequence[tuple[str, Iterable[Event]]], path: str | Path, *, start: float | None = None,
            end: float | None = None, clock: Clock = "time") -> None:
    """Draw the same window of several runs below one another, each under its label; otherwise as `draw`.

    By default the window is what can be read of the run that ended first.
    """
    told = [(label, history(events)) for label, events in runs]
    if not told:
        raise UsageError("there is no run to draw", hint="Give at least one.")
    shortest = min((one for _, one in told), key=lambda one: one.end - one.start)
    _save(told, _window(shortest, start, end), path, clock)


def check_can_draw(path: Path) -> None:
    """Raise what `draw` would raise for this file name, or for want of matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot draw a picture of the kind {path.suffix or 'without a suffix'!r}: {path}",
                         hint="Name a .png or .svg file.")
    _new_figure(1.0)


def _window(told: History, start: float | None, end: float | None) -> _Window:
    span = told.end - told.start
    first = start or 0.0
    if end is None:
        later = [stay for stay in told.stays[told.stages[0]] if stay.start - told.start >= first] if told.stages else []
        end = later[_READABLE_FLIGHTS].start - told.start if len(later) > _READABLE_FLIGHTS else span
    if first >= span:
        raise UsageError(f"the window begins at {first:g} s, the run ends at {span:g} s", hint="Name an earlier start.")
    if not first < end:
        raise UsageError(f"the window from {first:g} s to {end:g} s is empty", hint="Name a start before the end.")
    return _Window(first, end)


def _save(runs: list[tuple[str, History]], window: _Window, path: str | Path, clock: Clock) -> None:
    check_can_draw(Path(path))
    figure = _figure(runs, window, clock)
    import matplotlib

    # A date, or names made of random numbers, would make two pictures of one run differ.
    with replacing(path) as file, matplotlib.rc_context({"svg.hashsalt": "fullpipe"}):
        figure.savefig(file, metadata={"Date": None} if file.suffix.lower() == ".svg" else {"Software": None})


def _figure(runs: list[tuple[str, History]], window: _Window, clock: Clock) -> Figure:
    lanes = [len(told.stays) + 1 for _, told in runs]
    figure = _new_figure(_AROUND / 2 + sum(_AROUND / 2 + _LANE * count for count in lanes))
    grid = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=lanes)
    for axes, (label, told) in zip(grid[:, 0], runs):
        _run(axes, told, window)
        _head(axes, label, told, window)
    last = grid[-1, 0]
    last.set_xlabel(f"{clock} since the run began, in seconds", color=_INK)
    last.set_xlim(window.start, window.end)
    _legend(figure, any(DRAFT in told.stays for _, told in runs))
    return figure


def _new_figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a picture of the pipeline needs matplotlib",
                           hint="pip install 'fullpipe[plot]'") from error
    return Figure(figsize=(_WIDTH, height), dpi=120, layout="constrained", facecolor="white")


# ---- one run ---------------------------------------------------------------------------------------------


def _run(axes: Axes, told: History, window: _Window) -> None:
    """Lanes from the top: the text, the draft, the stages."""
    names = ["tokens", *told.stays]
    for place, station in enumerate(names[1:], 1):
        seen = [stay for stay in told.stays[station]
                if stay.end - told.start > window.start and stay.start - told.start < window.end]
        _lane(axes, place, station, seen, told.start)
    _text(axes, told, window)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.tick_params(axis="x", color=_FRAME, labelcolor=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FRAME)


def _lane(axes: Axes, place: int, station: str, stays: list[Stay], origin: float) -> None:
    bottom = place + _BOX / 2  # the axis points down
    axes.axhline(place + 0.5, color=_FRAME, linewidth=0.5, zorder=0)
    for shade in (0, 1):
        some = [stay for stay in stays if stay.number % 2 == shade]
        if not some:
            continue
        spans = [(stay.start - origin, stay.end - stay.start) for stay in some]
        if station == DRAFT:
            axes.broken_barh(spans, (place - _BOX / 2, _BOX), facecolor=_DRAFT, edgecolor="white", linewidth=0.6)
            continue
        axes.broken_barh(spans, (place - _BOX / 2, _BOX), facecolor=_DEAD, edgecolor=_HATCH, linewidth=0, hatch="/////")
        _fill(axes, some, spans, bottom, _LIVE[shade])
        axes.broken_barh(spans, (place - _BOX / 2, _BOX), facecolor="none", edgecolor="white", linewidth=0.6)


def _fill(axes: Axes, stays: list[Stay], spans: list[tuple[float, float]], bottom: float, colour: str) -> None:
    """The live part of each box, from its bottom up."""
    from matplotlib.collections import PolyCollection

    corners = []
    for stay, (left, width) in zip(stays, spans):
        top = bottom - _BOX * stay.alive / len(stay.nodes)
        corners.append([(left, bottom), (left + width, bottom), (left + width, top), (left, top)])
    axes.add_collection(PolyCollection(corners, facecolor=colour, linewidth=0), autolim=False)


def _text(axes: Axes, told: History, window: _Window) -> None:
    """A mark per token. Tokens that came at one time are stacked."""
    places: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    counted = [one for index, one in enumerate(told.emissions) if index not in told.last]
    for time, together in groupby(counted, key=lambda one: one.time):
        group = list(together)
        gap = min(0.24, 0.9 / len(group))
        for rank, one in enumerate(group):
            if window.start <= time - told.start <= window.end:
                places[one.hit].append((time - told.start, gap * ((len(group) - 1) / 2 - rank)))
    for hit, marker, colour, size in ((True, "o", _HIT, 14), (False, "X", _MISS, 34)):
        axes.scatter([x for x, _ in places[hit]], [y for _, y in places[hit]], marker=marker, color=colour, s=size,
                     linewidth=0, zorder=3, clip_on=False)


# ---- words -----------------------------------------------------------------------------------------------


def _head(axes: Axes, label: str, told: History, window: _Window) -> None:
    span = told.end - told.start
    whole = window.start <= 0 and window.end >= span
    part = "" if whole else f" (shown: {window.start:g} to {window.end:.4g} s of {span:.4g} s)"
    # The empty second line is the summary's place.
    axes.set_title(f"{label}{part}\n", loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.annotate(_summary(told, window), (0, 1), xytext=(0, 6), xycoords="axes fraction",
                  textcoords="offset points", fontsize=9, color=_INK)


def _summary(told: History, window: _Window) -> str:
    """The figures of what is seen, in one line."""
    from_, to = told.start + window.start, min(told.start + window.end, told.end)
    seen = {index: one for index, one in enumerate(told.emissions) if from_ <= one.time <= to}
    hits, misses = _hits_and_misses(told, seen)
    live = dead = 0.0
    for station in told.stages:
        for stay in told.stays[station]:
            time = max(min(stay.end, to) - max(stay.start, from_), 0.0)
            live += time * stay.alive / len(stay.nodes)
            dead += time * (1 - stay.alive / len(stay.nodes))
    whole = max(len(told.stages) * (to - from_), live + dead) or 1.0
    return (f"{len(seen)} tokens in {to - from_:.4g} s, {hits} hits and {misses} misses.   Of the stages' time: "
            f"{live / whole:.0%} live rows, {dead / whole:.0%} dead rows, {1 - (live + dead) / whole:.0%} bubbles.")


def _hits_and_misses(told: History, seen: dict[int, Emitted]) -> tuple[int, int]:
    counted = [one.hit for index, one in seen.items() if index not in told.last]
    return sum(counted), len(counted) - sum(counted)


def _legend(figure: Figure, with_draft: bool) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[tuple[Any, str]] = [
        (tuple(Patch(facecolor=shade) for shade in _LIVE), "live rows (shades alternate by flight)"),
        (Patch(facecolor=_DEAD, edgecolor=_HATCH, hatch="/////", linewidth=0), "dead rows"),
        (Patch(facecolor="white", edgecolor=_FRAME), "bubble"),
        (Line2D([], [], marker="o", color=_HIT, linewidth=0, markersize=5), "hit: was in flight already"),
        (Line2D([], [], marker="X", color=_MISS, linewidth=0, markersize=7), "miss: starts at stage 0"),
    ]
    if with_draft:
        handles.insert(3, (Patch(facecolor=_DRAFT), "draft call"))
    figure.legend([handle for handle, _ in handles], [name for _, name in handles], loc="outside lower center",
                  ncols=len(handles), frameon=False, fontsize=9, handler_map={tuple: HandlerTuple(ndivide=None)})
