"""The report's figures, each as one <svg> element that takes its ink from the page. Needs the extra `plot`.

Text stays text, so a figure can be searched and read out. Lines and letters are drawn in `currentColor`: a figure
fits a light page and a dark one. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fullpipe.bench.metrics import Blame, Estimate
from fullpipe.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Apart for every kind of colour vision, on white and on black.
_COLOURS = {"pp": "#8a8f98", "chain": "#c99700", "static-tree": "#3d9bd6", "pipedec": "#0f9d76", "spd": "#8b5fbf",
            "ppsd": "#b0548c", "fullpipe": "#d9541e"}
_OTHERS = ("#9a6fd0", "#c2608f", "#7c8f2e", "#5c7fa8")
_INK = "#010203"  # stands for the page's own colour, which only the page knows
_HOT = "#d9541e"
_WIDTH = 11.4  # inches at 72 points; what the page shows without scaling it down
_Z = 1.96  # standard normal quantile of a 95% interval

# The parts of `Blame`, in the order in which they are stacked.
PARTS = (("ideal", "slowest stage", "#8a8f98"),
         ("misses", "refill after misses", "#d9541e"),
         ("links", "links", "#3d9bd6"),
         ("rows", "more rows a flight", "#c99700"),
         ("draft", "waiting for guesses", "#9a6fd0"),
         ("overhead", "engine", "#0f9d76"))


@dataclass(frozen=True, slots=True)
class Panel:
    """One of several plots side by side: a title, and something per method."""

    title: str
    series: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Band:
    """A range that others have reported."""

    label: str
    low: float
    high: float


def require_plots() -> None:
    """Raises MissingExtra where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("the report's figures need matplotlib", hint="pip install 'fullpipe[plot]'") from None


def speedups(name: str, panels: Sequence[Panel], tasks: Sequence[str], baseline: str,
             bands: Sequence[Band]) -> str:
    """Bars by task class; `series` holds an `Estimate` (or None) per task. The baseline is the line at 1."""
    with _figure(name, len(panels), 3.7) as (figure, axes):
        for plot, panel in zip(axes, panels):
            _bars(plot, panel, tasks, bands)
        axes[0].set_ylabel(f"speedup over {baseline}")
        _legend(figure, axes[0])
        return _svg(name, figure)


def _bars(plot: Axes, panel: Panel, tasks: Sequence[str], bands: Sequence[Band]) -> None:
    step = 0.82 / max(len(panel.series), 1)
    for band in bands:
        plot.axhspan(band.low, band.high, color=_INK, alpha=0.09, linewidth=0)
        plot.text(len(tasks) - 0.53, band.high, band.label, ha="right", va="bottom", fontsize=8, alpha=0.75)
    for index, (method, estimates) in enumerate(panel.series.items()):
        where = [task - 0.41 + step * (index + 0.5) for task, one in enumerate(estimates) if one]
        found: list[Estimate] = [one for one in estimates if one]
        errors = [[one.value - (one.value if one.low is None else one.low) for one in found],
                  [(one.value if one.high is None else one.high) - one.value for one in found]]
        plot.bar(where, [one.value for one in found], 0.92 * step, color=colour(method), label=method, yerr=errors,
                 error_kw={"ecolor": _INK, "elinewidth": 1.1, "alpha": 0.75})
    plot.axhline(1, color=_INK, linewidth=0.8, alpha=0.6)
    plot.set_xticks(range(len(tasks)), tasks)
    plot.set_xlim(-0.5, len(tasks) - 0.5)
    plot.tick_params(axis="x", length=0)
    plot.set_title(panel.title)
    _lines(plot)


def acceptance(name: str, panels: Sequence[Panel]) -> str:
    """Hit rate by depth; `series` holds (hits, asked) per depth. Shaded: Wilson's 95% interval (1927).

    Few runs of hits are long, so deep places are counted together, in bins that widen as they deepen.
    """
    with _figure(name, len(panels), 3.2) as (figure, axes):
        for plot, panel in zip(axes, panels):
            bins = _bins(max((len(counts) for counts in panel.series.values()), default=1))
            for method, counts in panel.series.items():
                pooled = [tuple(map(sum, zip(*counts[start:stop]))) for start, stop in bins if start < len(counts)]
                where = [place for place, (_, asked) in enumerate(pooled) if asked]
                bounds = [_wilson(*pooled[place]) for place in where]
                plot.fill_between(where, [low for low, _ in bounds], [high for _, high in bounds],
                                  color=colour(method), alpha=0.14, linewidth=0)
                plot.plot(where, [pooled[place][0] / pooled[place][1] for place in where], color=colour(method),
                          marker="o", markersize=4, linewidth=1.6, label=method)
            plot.set_xticks(range(len(bins)), [str(start) if stop == start + 1 else f"{start}-{stop - 1}"
                                               for start, stop in bins], fontsize=8)
            plot.set_ylim(0, 1.02)
            plot.set_title(panel.title)
            plot.set_xlabel("tokens since the last miss")
            _percent(plot)
            _lines(plot)
        axes[0].set_ylabel("already in flight")
        _legend(figure, axes[0])
        return _svg(name, figure)


def _bins(depths: int) -> list[tuple[int, int]]:
    """0, 1, 2, 3, then two bins to each doubling: [4, 6), [6, 8), [8, 12), ..."""
    edges = [0, 1, 2, 3, 4]
    while edges[-1] < depths:
        step = 2 ** ((len(edges) - 5) // 2 + 1)
        edges.append(edges[-1] + step)
    return [pair for pair in pairwise(edges) if pair[0] < depths]


def _wilson(hits: int, asked: int) -> tuple[float, float]:
    share, z2 = hits / asked, _Z * _Z / asked
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) / asked + z2 / (4 * asked)) * _Z / (1 + z2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def cumulative(name: str, panels: Sequence[Panel], baseline: str) -> str:
    """For each speedup, the share of prompts that got at least as much; `series` holds a value per prompt."""
    with _figure(name, len(panels), 3.2) as (figure, axes):
        for plot, panel in zip(axes, panels):
            for method, values in panel.series.items():
                ordered = sorted(values)
                shares = [1 - rank / len(ordered) for rank in range(len(ordered))]
                plot.step([0.0, *ordered, ordered[-1]], [1.0, *shares, 0.0], where="pre", color=colour(method),
                          linewidth=1.6, label=method)
            plot.axvline(1, color=_INK, linewidth=0.8, alpha=0.6)
            plot.set_xlim(left=0)
            plot.set_ylim(0, 1.02)
            plot.set_title(panel.title)
            plot.set_xlabel(f"speedup over {baseline}, at least")
            _percent(plot)
            _lines(plot)
        axes[0].set_ylabel("prompts")
        _legend(figure, axes[0])
        return _svg(name, figure)


def occupancy(name: str, rows: Sequence[tuple[str, Sequence[float], float, float]]) -> str:
    """A heat map of busy shares. rows: (label, share of each stage, share of the draft, fill)."""
    stages = max(len(busy) for _, busy, _, _ in rows)
    columns = [*(f"stage {k}" if stages < 10 else str(k) for k in range(stages)), "draft", "fill"]
    with _figure(name, 1, 0.8 + 0.34 * len(rows)) as (figure, axes):
        plot = axes[0]
        for line, (_, busy, draft, fill) in enumerate(rows):
            for column, share in [*enumerate(busy), (stages + 0.25, draft), (stages + 1.5, fill)]:
                _tile(plot, column, line, share)
        plot.set_xlim(-0.55, stages + 2.05)
        plot.set_ylim(len(rows) - 0.45, -0.55)
        plot.set_xticks([*range(stages), stages + 0.25, stages + 1.5], columns)
        plot.set_yticks(range(len(rows)), [label for label, *_ in rows])
        plot.xaxis.tick_top()
        plot.tick_params(length=0)
        for side in plot.spines.values():
            side.set_visible(False)
        return _svg(name, figure)


def _tile(plot: Axes, column: float, line: int, share: float) -> None:
    from matplotlib.patches import Rectangle

    corner = column - 0.47, line - 0.44
    plot.add_patch(Rectangle(corner, 0.94, 0.88, facecolor=_HOT, alpha=share, linewidth=0))
    plot.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor=_INK, alpha=0.2, linewidth=0.6))
    plot.text(column, line, f"{100 * share:.0f}", ha="center", va="center", fontsize=9)


def time_per_token(name: str, rows: Sequence[tuple[str, Blame]], unit: str, scale: float) -> str:
    """Stacked bars of where the time goes; what is saved by several tokens in one flight hangs left of zero."""
    with _figure(name, 1, 1.1 + 0.34 * len(rows)) as (figure, axes):
        plot = axes[0]
        ends = [0.0] * len(rows)
        for part, label, shade in PARTS:
            values = [getattr(one, part) * scale for _, one in rows]
            if any(value > 0 for value in values):
                plot.barh(range(len(rows)), values, 0.66, left=ends, color=shade, label=label)
                ends = [end + value for end, value in zip(ends, values)]
        saved = [one.together * scale for _, one in rows]
        if any(saved):
            plot.barh(range(len(rows)), saved, 0.66, facecolor="none", edgecolor=_INK, hatch="////", linewidth=0.6,
                      alpha=0.55, label="saved (several tokens a flight)")
        for line, (end, (_, one)) in enumerate(zip(ends, rows)):
            plot.annotate(f"{one.total * scale:.3g}", (end, line), (4, 0), textcoords="offset points", va="center",
                          fontsize=9)
        plot.set_yticks(range(len(rows)), [label for label, _ in rows])
        plot.set_ylim(len(rows) - 0.5, -0.5)
        plot.set_xlabel(f"time per token, {unit}")
        plot.tick_params(axis="y", length=0)
        _lines(plot, axis="x")
        _legend(figure, plot)
        return _svg(name, figure)


@dataclass(frozen=True, slots=True)
class Sweep:
    """One method's tuning. lines: label -> [(x, TBT)]; best: the chosen point."""

    title: str
    knob: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    best: tuple[float, float]


def sweeps(name: str, panels: Sequence[Sweep], unit: str, scale: float) -> str:
    """TBT of every setting that was tried; a ring marks the one that was chosen."""
    with _figure(name, len(panels), 3.3, share_y=False) as (figure, axes):
        for plot, panel in zip(axes, panels):
            for index, (label, points) in enumerate(panel.lines.items()):
                shade = 0.25 + 0.75 * (index + 1) / len(panel.lines)
                plot.plot([x for x, _ in points], [scale * y for _, y in points], marker="o", markersize=4,
                          linewidth=1.4, color=_HOT, alpha=shade, label=label)
            plot.plot([panel.best[0]], [scale * panel.best[1]], marker="o", markersize=11, fillstyle="none",
                      color=_INK, linewidth=0)
            plot.set_ylim(bottom=0)
            values = sorted({x for points in panel.lines.values() for x, _ in points})
            if values[0] > 0 and len(values) > 2:
                plot.set_xscale("log", base=2)
            plot.set_xticks(values, [f"{value:g}" for value in values])
            plot.set_xticks([], minor=True)
            plot.set_xlabel(panel.knob)
            plot.set_title(panel.title)
            if len(panel.lines) > 1:
                plot.legend(fontsize=8, loc="best")
            _lines(plot)
        axes[0].set_ylabel(f"TBT, {unit}")
        return _svg(name, figure)


# ---- how they look ---------------------------------------------------------------------------------------


def colour(method: str) -> str:
    return _COLOURS.get(method) or _OTHERS[sum(method.encode()) % len(_OTHERS)]


@contextmanager
def _figure(name: str, panels: int, height: float, share_y: bool = True) -> Iterator[tuple[Figure, list[Axes]]]:
    """Plots side by side, in our own style whatever the user's is."""
    require_plots()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False,
            "font.size": 10, "axes.titlesize": 10,
            "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
            "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "axes.facecolor": "none", "figure.facecolor": "none", "axes.linewidth": 0.8, "hatch.linewidth": 0.6,
        })
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, list(figure.subplots(1, panels, sharey=share_y, squeeze=False)[0])


def _lines(plot: Axes, axis: str = "y") -> None:
    plot.grid(axis=axis, color=_INK, alpha=0.12, linewidth=0.8)  # type: ignore[arg-type]
    plot.set_axisbelow(True)


def _percent(plot: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    plot.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _legend(figure: Figure, plot: Axes) -> None:
    handles, labels = plot.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9, handlelength=1.2,
                      columnspacing=1.4)


def _svg(name: str, figure: Figure) -> str:
    """The element alone, in the page's ink, with ids that no other figure of the page has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace(_INK, "currentColor")
    return text.strip().replace("<svg ", '<svg role="img" ', 1)
