"""From the journal to the receipt, and from the receipt alone to the report and its figure."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _receipt import receipt
from batching.cells import ALONE, DYNAMIC, METHODS, MOST_AT_ONCE, PLAIN
from spd_study.journal import Journal

from fullpipe.bench.crowd import Spread

WANTED = {1: 5.0, 4: 2.5, 8: 1.5}
"""By requests at once, how many times the throughput of pp the issue asks for; elsewhere it is never below 1."""

_PLAIN = (PLAIN, "pp-bunched")
_COLOURS = {DYNAMIC: "#d9541e", "equal": "#c99700", "separate": "#9a6fd0", ALONE: "#3d9bd6", PLAIN: "#5b616b",
            "pp-bunched": "#a9aeb6", "pp-one-after-another": "#c2608f"}
_SLACK = 1.005  # a TBT this much longer is not called longer: flights are whole


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell of the receipt, and what is said of it. ttft, tbt: seconds, over requests."""

    method: str
    load: str
    amount: float
    temperature: float
    row: Mapping[str, Any]
    ttft: Spread
    tbt: Spread

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Measured:
        cell, requests = row["cell"], row["requests"]
        ttft = [first - arrived for _, arrived, first, *_ in requests]
        tbt = [(last - first) / (tokens - 1) for _, _, first, last, tokens, *_ in requests if tokens > 1]
        return cls(cell["method"], cell["load"], cell["amount"], cell["temperature"], row, Spread.of(ttft),
                   Spread.of(tbt))

    @property
    def throughput(self) -> float:
        return float(self.row["tokens"] / self.row["span_s"])

    @property
    def hit_rate(self) -> float:
        hits, misses = (sum(one[place] for one in self.row["requests"]) for place in (5, 6))
        return hits / (hits + misses)

    @property
    def waste(self) -> float:
        """Rows launched for nothing, by emitted token."""
        launched = sum(one[7] for one in self.row["requests"])
        return (launched - self.row["tokens"]) / self.row["tokens"]

    @property
    def stage_busy(self) -> float:
        """Share of the time in which the stages, on the mean, are at work."""
        busy = [seconds for name, (seconds, *_) in self.row["stations"].items() if name.startswith("stage")]
        return sum(busy) / len(busy) / self.row["span_s"]

    @property
    def draft_busy(self) -> float:
        return float(self.row["stations"].get("draft", (0.0,))[0] / self.row["span_s"])

    @property
    def rows_per_flight(self) -> float:
        """At the last stage, prompts' rows included."""
        _, rows, calls = self.row["stations"][f"stage {self.row['stages'] - 1}"]
        return float(rows / calls)


class Results:
    """Cells by load; those of a load that have not been measured are left out."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], temperature: float) -> None:
        self.cells = [one for row in rows if (one := Measured.of(row)).temperature == temperature]
        self.methods = [name for name in METHODS if any(one.method == name for one in self.cells)]

    def amounts(self, load: str) -> list[float]:
        return sorted({one.amount for one in self.cells if one.load == load})

    def at(self, load: str, amount: float, method: str) -> Measured | None:
        found = (one for one in self.cells if (one.load, one.amount, one.method) == (load, amount, method))
        return next(found, None)

    def plain(self, load: str, amount: float) -> list[Measured]:
        """pp with the same requests in flight, both ways."""
        return [one for name in _PLAIN if (one := self.at(load, amount, name))]


def write_report(journal: Journal, out: Path) -> None:
    """receipt.json anew if the journal has cells, then report.md and batching.svg. findings.md, if it is there, stands
    in the report as it is: it says in words what the tables show."""
    path = out / "receipt.json"
    rows = [row for row in journal.rows.values() if "cell" in row]
    if rows:
        runs = [row for key, row in journal.rows.items() if key.startswith("run/")]
        path.write_text(json.dumps(receipt("batching", {"runs": runs}, rows)) + "\n")
    value = json.loads(path.read_text())
    findings = out / "findings.md"
    (out / "report.md").write_text(report_of(value, findings.read_text() if findings.exists() else ""))
    (out / "batching.svg").write_text(figure_of(value))


# ---- the report ------------------------------------------------------------------------------------------


def report_of(value: Mapping[str, Any], findings: str = "") -> str:
    rows = value["samples"]
    heats = sorted({row["cell"]["temperature"] for row in rows})
    parts = [_head(value), findings.strip()]
    for heat in heats:
        parts += _tables(Results(rows, heat), f", temperature {heat:g}" if len(heats) > 1 else "")
    parts.append(_provenance(value))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(value: Mapping[str, Any]) -> str:
    rows = value["samples"]
    first = rows[0]
    engine = [1e3 * row["engine_s"] / row["tokens"] for row in rows if row["cell"]["method"] == DYNAMIC]
    own = f" ({min(engine):.1f} to {max(engine):.1f} ms a token of dynamic batching on this machine)" if engine else ""
    methods = "\n".join(f"- `{name}`: {what}." for name, what in METHODS.items()
                        if any(row["cell"]["method"] == name for row in rows))
    return f"""# Many requests at once: dynamic batching in virtual time

**Virtual time.** The machine is imagined: {first['cluster']} (preset `{first['preset']}`). The tokens are real: the
target's are recorded answers of {first['target']} ({first['dtype']}), and what the draft guesses is what
{first['draft']} says of those texts. Nothing here was timed on a GPU.

![throughput, TBT and TTFT by load](batching.svg)

Methods, all under the same engine:

{methods}

What is assumed:

- Costs are a roofline: {' '.join(first['note'].split())}
- The 70B target is taken to say what the recorded model said, and the 1B draft to guess as well as the recorded one.
- The engine's own time is not in virtual time{own}.
- {len(first['prompts'])} recorded prompts, each asked for equally often, again and again where more requests are
  needed, in one shuffled order for all methods. No prefix is shared between them.
- Of the caches of a flight's requests only the longest is counted as read: with 32 requests of 300 tokens the others
  would add 2% to a stage's step, for all methods alike.
- A closed loop has so many requests at any time, a new one when one ends, until the list is empty; its ebb is counted.
  In the open loop requests come by a Poisson process; up to {MOST_AT_ONCE} are admitted, the others wait.
- TTFT counts from a request's coming, TBT is the mean time between the tokens of one request; median, p90 and p99 are
  over requests. Throughput is emitted tokens / (last token - first coming). Every text is the recorded one: a run in
  which it is not fails."""


def _tables(results: Results, suffix: str) -> list[str]:
    parts = []
    for load, title, unit in (("closed", "Requests at once", "at once"), ("poisson", "Poisson arrivals", "a second")):
        if not results.amounts(load):
            continue
        parts.append(f"## {title}{suffix}")
        parts.append(_table(results, load, unit, "Throughput, tokens a second", lambda one: f"{one.throughput:.1f}"))
        if load == "closed":
            parts.append(_ratios(results))
        parts.append(_table(results, load, unit, "TBT in ms: median / p90 / p99", lambda one: _ms(one.tbt)))
        parts.append(_table(results, load, unit, "TTFT in s: median / p90 / p99", lambda one: _s(one.ttft)))
        parts.append(_table(results, load, unit, "The longest wait for a token in ms: p99 of gaps / longest",
                            lambda one: " / ".join(f"{1e3 * gap:.0f}" for gap in one.row["gaps"][2:])))
        parts.append(_work(results, load, unit))
    return parts


def _table(results: Results, load: str, unit: str, title: str, cell: Callable[[Measured], str]) -> str:
    lines = []
    for amount in results.amounts(load):
        found = [results.at(load, amount, method) for method in results.methods]
        lines.append([f"{amount:g}", *(cell(one) if one else "-" for one in found)])
    return f"{title}:\n\n{_markdown([unit, *results.methods], lines)}"


def _ratios(results: Results) -> str:
    """Dynamic batching against the better of the two plain pipelines, and what was asked for."""
    lines = []
    for amount in results.amounts("closed"):
        ours, plain = results.at("closed", amount, DYNAMIC), results.plain("closed", amount)
        if ours is None or not plain:
            continue
        wanted = WANTED.get(int(amount), 1.0)
        gain = ours.throughput / max(one.throughput for one in plain)
        shares = [getattr(ours.tbt, name) / min(getattr(one.tbt, name) for one in plain)
                   for name in ("median", "p90", "p99")]
        slower = [share for share in shares if share > _SLACK]
        lines.append([f"{amount:g}", f"{gain:.2f}x", f"{wanted:g}x", "yes" if gain >= wanted else "**no**",
                      " / ".join(f"{share:.2f}" for share in shares), "**no**" if slower else "yes",
                      _over(ours, results.at("closed", amount, ALONE)),
                      _over(ours, results.at("closed", amount, "equal")),
                      _over(ours, results.at("closed", amount, "separate"))])
    if not lines:
        return ""
    heads = ["at once", "throughput over pp", "asked for", "reached", "TBT / pp's: median / p90 / p99", "never longer",
             "throughput over one-after-another", "over equal", "over separate"]
    return ("Dynamic batching against the better of `pp` and `pp-bunched` with the same requests in flight (each "
            f"figure against the better one for that figure), and against the others:\n\n{_markdown(heads, lines)}")


def _over(ours: Measured, other: Measured | None) -> str:
    return f"{ours.throughput / other.throughput:.2f}x" if other else "-"


def _work(results: Results, load: str, unit: str) -> str:
    """What the machine did: why the figures are what they are."""
    return _table(results, load, unit, "What the stations did: rows a flight / stages busy / draft busy / hit rate / "
                  "rows wasted by token", lambda one: f"{one.rows_per_flight:.1f} / {one.stage_busy:.0%} / "
                  f"{one.draft_busy:.0%} / {one.hit_rate:.2f} / {one.waste:.1f}")


def _ms(spread: Spread) -> str:
    return " / ".join(f"{1e3 * value:.1f}" for value in (spread.median, spread.p90, spread.p99))


def _s(spread: Spread) -> str:
    return " / ".join(f"{value:.2f}" for value in (spread.median, spread.p90, spread.p99))


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---:"] * len(heads)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def _provenance(value: Mapping[str, Any]) -> str:
    versions = sorted({row["version"] for row in value["samples"]})
    mixed = "" if len(versions) == 1 else f" **Cells are of {len(versions)} versions of the code.**"
    runs = [run["command"] for run in value["results"]["runs"]]
    commands = "\n".join(dict.fromkeys(runs))
    changed = " with changes that were not committed" if value["dirty"] else ""
    return (f"## Where this comes from\n\nCommit {value['commit'][:12]}{changed}, {value['date']}, "
            f"{value['machine']['cpu']}.{mixed} All requests of all cells are in receipt.json; each as [prompt, came, "
            "first token, last token, tokens, hits, misses, launched rows, draft rows].\n\n"
            f"```\n{commands}\n```")


# ---- the figure ------------------------------------------------------------------------------------------


def figure_of(value: Mapping[str, Any]) -> str:
    """Loads above each other, metrics side by side, at the lowest temperature; the same receipt, the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = value["samples"]
    results = Results(rows, min(row["cell"]["temperature"] for row in rows))
    loads = [load for load in ("closed", "poisson") if results.amounts(load)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "batching", "font.size": 9,
                                    "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(12, 3.6 * len(loads)), layout="constrained")
        plots = figure.subplots(len(loads), 3, squeeze=False)
        for load, line in zip(loads, plots):
            _panels(results, load, line)
        handles = {label: handle for line in plots for handle, label in zip(*line[0].get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panels(results: Results, load: str, plots: Sequence[Any]) -> None:
    panels: tuple[tuple[str, Callable[[Measured], tuple[float, float]]], ...] = (
        ("tokens/s, virtual time", lambda one: (one.throughput, one.throughput)),
        ("TBT in ms: median, up to p99", lambda one: (1e3 * one.tbt.median, 1e3 * one.tbt.p99)),
        ("TTFT in s: median, up to p99", lambda one: (one.ttft.median, one.ttft.p99)))
    for plot, (title, pick) in zip(plots, panels):
        for method in results.methods:
            cells = [(amount, *pick(one)) for amount in results.amounts(load)
                     if (one := results.at(load, amount, method))]
            if not cells:
                continue
            xs, middles, tops = zip(*cells)
            plot.plot(xs, middles, color=_COLOURS[method], marker="o", markersize=3.5, linewidth=1.5, label=method)
            plot.fill_between(xs, middles, tops, color=_COLOURS[method], alpha=0.10, linewidth=0)
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        plot.set_xticks(results.amounts(load), [f"{amount:g}" for amount in results.amounts(load)])
        plot.set_xlabel("requests at once" if load == "closed" else "requests a second (Poisson)")
        plot.set_title(title)
        plot.grid(alpha=0.15)
