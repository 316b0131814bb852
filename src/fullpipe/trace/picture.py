"""The pipeline over time becomes a picture: stages down, time across. No torch; needs matplotlib (extra `plot`).

A box is a flight's stay at a stage. Its filled part is the share of its rows that were alive when the stage was done
with them, its hatched part the share that had died; what is white is a bubble. So the coloured area over the whole
area of the stages is the window's fill (DESIGN section 8). On top stand the tokens of the text, as they came.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.messages import Event
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
_MARKS = {"hit": ("o", "#1a8a4a", 14), "miss": ("X", "#d23b2e", 34), "plain": ("o", "#555555", 14)}
_INK, _FRAME = "#222222", "#c8c8c8"

_READABLE_FLIGHTS = 80  # boxes beside one another on 13 inches that can still be told apart
_WIDTH, _LANE, _AROUND = 13.0, 0.34, 1.75  # inches: the figure, one station, title and axis and legend
_BOX = 0.84  # height of a box in its lane


@dataclass(frozen=True, slots=True)
class _Window:
    """Is the part of a run that is drawn, counted from the run's beginning."""

    start: float
    end: float
    unit: Literal["s", "steps"]


def draw(events: Iterable[Event], path: str | Path, *, title: str = "", start: float | None = None,
         end: float | None = None, clock: Clock = "time") -> None:
    """Draw a run to `path`, a .png or .svg file.

    start, end: counted from the beginning of the run. By default as much from its beginning as can be read, which is
    the whole of a run of up to 80 flights; the picture says what part it shows. clock: whose seconds the times are.
    Where every stage takes exactly 1 they are steps instead, each of which is one service of stage 0.

    Raises `UsageError` when there is nothing to draw, for another suffix or when the file cannot be written;
    `MissingExtra` without matplotlib.
    """
    write_comparison(path, [(title, events)], start=start, end=end, clock=clock)


def write_comparison(path: str | Path, runs: Sequence[tuple[str, Iterable[Event]]], *, start: float | None = None,
                     end: float | None = None, clock: Clock = "time") -> None:
    """Draw several runs below one another on one time scale, each under its title; otherwise as `draw`.

    By default the window is what can be read of the run that ended first. So a faster run is shown whole, and a slower
    one as far as it came in that time.
    """
    told = [(title, history(events)) for title, events in runs]
    if not told:
        raise UsageError("there is no run to draw", hint="Give at least one.")
    shortest = min((one for _, one in told), key=lambda one: one.end - one.start)
    _save(_figure(told, _window(shortest, start, end), clock), path)


def check_can_draw(path: Path) -> None:
    """Raise what `draw` would raise for this file name, or for want of matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot draw a picture of the kind {path.suffix or 'without a suffix'!r}: {path}",
                         hint="Name a .png or .svg file.")
    _new_figure(1.0)


def _window(told: History, start: float | None, end: float | None) -> _Window:
    span = told.end - told.start
    window = _Window(start or 0.0, _readable(told, start or 0.0) if end is None else end,
                     "steps" if told.in_steps else "s")
    if window.start >= span:
        raise UsageError(f"the window begins at {window.start:g} {window.unit}, the run ends at {span:g} {window.unit}",
                         hint="Name an earlier start.")
    if not window.start < window.end:
        raise UsageError(f"the window from {window.start:g} to {window.end:g} {window.unit} is empty",
                         hint="Name a start before the end.")
    return window


def _readable(told: History, start: float) -> float:
    """The end of a window whose boxes are still large enough."""
    first = told.stays[told.stages[0]] if told.stages else []
    later = [stay for stay in first if stay.start - told.start >= start]
    return (later[_READABLE_FLIGHTS].start if len(later) > _READABLE_FLIGHTS else told.end) - told.start


def _save(figure: Figure, path: str | Path) -> None:
    check_can_draw(Path(path))
    import matplotlib

    # A date, or names made of random numbers, would make two pictures of one run differ.
    with replacing(path) as file, matplotlib.rc_context({"svg.hashsalt": "fullpipe"}):
        figure.savefig(file, metadata={"Date": None} if file.suffix.lower() == ".svg" else {"Software": None})


def _figure(runs: Sequence[tuple[str, History]], window: _Window, clock: Clock) -> Figure:
    lanes = [len(told.stays) + 1 for _, told in runs]
    figure = _new_figure(_AROUND / 2 + sum(_AROUND / 2 + _LANE * count for count in lanes))
    grid = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=lanes)[:, 0]
    for axes, (title, told) in zip(grid, runs):
        _run(axes, told, window)
        _head(axes, title, told, window)
    axis = f"{clock} since the run began, in seconds" if window.unit == "s" else "steps since the run began"
    grid[-1].set_xlabel(axis, color=_INK)
    grid[-1].set_xlim(window.start, window.end)
    _legend(figure, [told for _, told in runs])
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
    """Draw the lanes from the top: the text, the draft, the stages."""
    names = ["tokens", *told.stays]
    for place, station in enumerate(told.stays, 1):
        axes.axhline(place + 0.5, color=_FRAME, linewidth=0.5, zorder=0)
        _lane(axes, place, _seen(told, station, window), told.start)
    _text(axes, told, window)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.tick_params(axis="x", color=_FRAME, labelcolor=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FRAME)


def _seen(told: History, station: str, window: _Window) -> list[Stay]:
    return [stay for stay in told.stays[station]
            if stay.end - told.start > window.start and stay.start - told.start < window.end]


def _lane(axes: Axes, place: int, stays: list[Stay], origin: float) -> None:
    for shade, colour in enumerate(_LIVE):
        some = [stay for stay in stays if stay.number % 2 == shade]
        if some and some[0].station == DRAFT:
            _boxes(axes, place, some, origin, facecolor=_DRAFT, edgecolor="white", linewidth=0.6)
        elif some:
            _boxes(axes, place, some, origin, facecolor=_DEAD, edgecolor=_HATCH, linewidth=0, hatch="/////")
            _fill(axes, place + _BOX / 2, some, origin, colour)  # the axis points down
            _boxes(axes, place, some, origin, facecolor="none", edgecolor="white", linewidth=0.6)


def _boxes(axes: Axes, place: int, stays: list[Stay], origin: float, **look: Any) -> None:
    axes.broken_barh([(stay.start - origin, stay.end - stay.start) for stay in stays], (place - _BOX / 2, _BOX), **look)


def _fill(axes: Axes, bottom: float, stays: list[Stay], origin: float, colour: str) -> None:
    """Draw the live part of each box, from its bottom up."""
    from matplotlib.collections import PolyCollection

    corners = []
    for stay in stays:
        left, right, top = stay.start - origin, stay.end - origin, bottom - _BOX * stay.alive / len(stay.nodes)
        corners.append([(left, bottom), (right, bottom), (right, top), (left, top)])
    axes.add_collection(PolyCollection(corners, facecolor=colour, linewidth=0), autolim=False)


def _text(axes: Axes, told: History, window: _Window) -> None:
    """Draw a mark per token. Tokens that came at one time are stacked."""
    places: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    marked = [one for one in told.emissions if not (told.speculated and one.fate == "last")]
    for time, together in groupby(marked, key=lambda one: one.time - told.start):
        group = list(together)
        gap = min(0.24, 0.9 / len(group))
        for rank, one in enumerate(group if window.start <= time <= window.end else ()):
            places[one.fate if told.speculated else "plain"].append((time, gap * ((len(group) - 1) / 2 - rank)))
    for mark, spots in places.items():
        shape, colour, size = _MARKS[mark]
        times, heights = zip(*spots)
        axes.scatter(times, heights, marker=shape, color=colour, s=size, linewidth=0, zorder=3, clip_on=False)


# ---- words -----------------------------------------------------------------------------------------------


def _head(axes: Axes, title: str, told: History, window: _Window) -> None:
    span = told.end - told.start
    whole = window.start <= 0 and window.end >= span
    part = "" if whole else f" (shown: {window.start:g} to {window.end:.4g} {window.unit} of {span:.4g})"
    # The empty second line is the summary's place.
    axes.set_title(f"{title}{part}\n", loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.annotate(_summary(told, window), (0, 1), xytext=(0, 6), xycoords="axes fraction",
                  textcoords="offset points", fontsize=9, color=_INK)


def _summary(told: History, window: _Window) -> str:
    """The figures of what is seen, in one line."""
    begin, end = told.start + window.start, min(told.start + window.end, told.end)
    fates = Counter(one.fate for one in told.emissions if begin <= one.time <= end)
    guessed = f", {fates['hit']} hits and {fates['miss']} misses" if told.speculated else ""
    live = dead = 0.0
    for stay in (stay for station in told.stages for stay in told.stays[station]):
        time = max(min(stay.end, end) - max(stay.start, begin), 0.0)
        live += time * stay.alive / len(stay.nodes)
        dead += time * (1 - stay.alive / len(stay.nodes))
    whole = max(len(told.stages) * (end - begin), live + dead) or 1.0
    return (f"{fates.total()} tokens in {end - begin:.4g} {window.unit}{guessed}.   Of the stages' time: "
            f"{live / whole:.0%} live rows, {dead / whole:.0%} dead rows, {1 - (live + dead) / whole:.0%} bubbles.")


def _legend(figure: Figure, runs: Sequence[History]) -> None:
    """Explain what occurs in the runs, and nothing else."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    handles: list[tuple[Any, str]] = [
        (tuple(Patch(facecolor=shade) for shade in _LIVE), "live rows (shades alternate by flight)"),
        (Patch(facecolor="white", edgecolor=_FRAME), "bubble"),
    ]
    if any(told.speculated for told in runs):
        handles += [(Patch(facecolor=_DEAD, edgecolor=_HATCH, hatch="/////", linewidth=0), "dead rows"),
                    (_mark("hit"), "hit: was in flight already"), (_mark("miss"), "miss: starts at stage 0")]
    if any(DRAFT in told.stays for told in runs):
        handles.insert(2, (Patch(facecolor=_DRAFT), "draft call"))
    if not all(told.speculated for told in runs):
        handles.append((_mark("plain"), "token"))
    figure.legend([handle for handle, _ in handles], [name for _, name in handles], loc="outside lower center",
                  ncols=len(handles), frameon=False, fontsize=9, handler_map={tuple: HandlerTuple(ndivide=None)})


def _mark(fate: str) -> Any:
    from matplotlib.lines import Line2D

    shape, colour, size = _MARKS[fate]
    return Line2D([], [], marker=shape, color=colour, linewidth=0, markersize=size**0.5 + 1)
