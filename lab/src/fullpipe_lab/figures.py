"""Pictures of reports: SVG by matplotlib, the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

COLOURS = ("#d9541e", "#3d9bd6", "#c99700", "#9a6fd0", "#5b616b", "#a9aeb6", "#c2608f", "#4c9f70")
Bar = tuple[float, float | None, float | None]
"""A height, and where its whisker begins and ends."""


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fullpipe", "font.size": 9,
                                    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
        yield


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()


def bars(title: str, groups: Sequence[str], series: Mapping[str, Sequence[Bar | None]]) -> str:
    """Groups of bars side by side, one of each series."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(2 + 1.6 * len(groups), 3.2), layout="constrained")
        plot = figure.subplots()
        width = 0.8 / max(len(series), 1)
        for index, (name, heights) in enumerate(series.items()):
            found = [(at, bar) for at, bar in enumerate(heights) if bar is not None]
            plot.bar([at + (index + 0.5) * width - 0.4 for at, _ in found], [bar[0] for _, bar in found], width * 0.92,
                     label=name, color=COLOURS[index % len(COLOURS)])
            for at, (_, low, high) in found:
                if low is not None and high is not None:
                    plot.plot([at + (index + 0.5) * width - 0.4] * 2, [low, high], color="black", linewidth=0.8)
        plot.set_xticks(range(len(groups)), groups)
        plot.set_title(title)
        plot.grid(axis="y", alpha=0.2)
        if series:
            plot.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.1))
        return _svg(figure)


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a row: lines by name, each of (x, y, top), with the range up to top shaded."""

    title: str
    x_label: str
    lines: Mapping[str, Sequence[tuple[float, float, float]]]


def panels(rows: Sequence[Sequence[Panel]], *, log: bool = True) -> str:
    """Rows of line plots with one legend below them all."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for panel in row for name in panel.lines))
    with _style():
        figure = Figure(figsize=(4 * max(map(len, rows)), 3.6 * len(rows)), layout="constrained")
        plots = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
        for row, line in zip(rows, plots):
            for panel, plot in zip(row, line):
                _draw(plot, panel, names, log)
        handles = {label: handle for line in plots for plot in line
                   for handle, label in zip(*plot.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(len(handles), 1),
                      frameon=False)
        return _svg(figure)


def _draw(plot: Any, panel: Panel, names: Sequence[str], log: bool) -> None:
    for name, points in panel.lines.items():
        xs, ys, tops = zip(*points)
        colour = COLOURS[names.index(name) % len(COLOURS)]
        plot.plot(xs, ys, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=name)
        plot.fill_between(xs, ys, tops, color=colour, alpha=0.10, linewidth=0)
    ticks = sorted({point[0] for points in panel.lines.values() for point in points})
    if log:
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
    plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    plot.set_xlabel(panel.x_label)
    plot.set_title(panel.title)
    plot.grid(alpha=0.15)


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a map with its label. shape: as matplotlib names markers."""

    label: str
    x: float
    y: float
    shape: str


@dataclass(frozen=True, slots=True)
class Map:
    """Heights over x, in logarithms, and y. xs, values: a line for each y, all of one length."""

    title: str
    xs: Sequence[Sequence[float]]
    ys: Sequence[float]
    values: Sequence[Sequence[float]]
    marks: Sequence[Mark]


def maps(found: Sequence[Map], x_label: str, y_label: str, label: str) -> str:
    """Maps side by side, each with a scale of its own."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(5.2 * len(found), 4.6), layout="constrained")
        for plot, one in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
            ys = [[y] * len(xs) for xs, y in zip(one.xs, one.ys)]
            drawn = plot.contourf(one.xs, ys, one.values, levels=14, cmap="YlGnBu_r")
            figure.colorbar(drawn, ax=plot, label=label, format="%g")
            for mark, colour in zip(one.marks, COLOURS):
                plot.plot(mark.x, mark.y, mark.shape, color=colour, markersize=9, markeredgecolor="black",
                          markeredgewidth=2.5 if mark.shape == "x" else 0.8, linestyle="none", label=mark.label,
                          clip_on=False, zorder=3)
            plot.set_xscale("log", base=2)
            plot.xaxis.set_major_formatter("{x:g}")
            plot.set_xlabel(x_label)
            plot.set_ylabel(y_label)
            plot.set_title(one.title)
            plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
        return _svg(figure)
