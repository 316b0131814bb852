"""From a receipt to a report: one Markdown file and a few figures, made of the receipt and of nothing else. No torch.

Whoever reads it must be able to tell what was measured from what was imagined: every figure of time names its clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fullpipe.files import write_whole
from fullpipe_lab import figures
from fullpipe_lab.files import make_folder
from fullpipe_lab.metrics import ALL, PLAIN, Estimate, Results, Summary
from fullpipe_lab.receipts import ClusterInfo, Receipt, Sample, Tuning

OURS = "fullpipe"
_ALLOWANCE = 1.02  # `fullpipe` may be this much slower than the best other method and still count as even


def render(template: str, **values: Any) -> str:
    """The text of a template in `templates`; blank lines in a row become one."""
    rules = Environment(loader=PackageLoader("fullpipe_lab"), undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True, keep_trailing_newline=True)
    rules.filters |= {"cell": show, "columns": _columns, "filled": _filled, "flat": lambda text: " ".join(text.split())}
    return re.sub(r"\n{3,}", "\n\n", rules.get_template(template).render(values)).strip() + "\n"


def show(value: Any) -> str:
    """A value as a table's cell has it."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "**no**"
        case float():
            return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _filled(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[Any]]:
    return [[row.get(name) for name in names or _columns(rows)] for row in rows]


# ---- the report of `fullpipe-lab bench` --------------------------------------------------------------------


def write_report(receipt: Receipt, folder: Path) -> list[Path]:
    """Write report.md and figures/*.svg into `folder`; returns what was written, the report first.

    Raises UsageError for samples that cannot be compared and for a folder that cannot be written.
    """
    results = Results(receipt)
    clusters = [_cluster(results, info, f"speedup-{index}") for index, info in enumerate(results.clusters)]
    texts = {"report.md": _report(results, clusters)}
    for one in clusters:
        texts[f"figures/{one['figure']}.svg"] = one["svg"]
    make_folder(folder / "figures")
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]


def _report(results: Results, clusters: Sequence[Mapping[str, Any]]) -> str:
    samples = [one for group in results.groups.values() for one in group.values()]
    compared = [[key.cluster, f"{key.temperature:g}", key.method, f"{one.same_texts} of {one.compared}", one.near_ties]
                for key, one in results.summaries.items() if key.task == ALL and one.compared]
    return render("bench.md.j2", receipt=results.receipt, clock=results.clock, tasks=results.tasks, clusters=clusters,
                  methods=list(dict.fromkeys(one.method for one in samples)), texts=compared,
                  prompts=len({one.prompt for one in samples}), against=_against(results))


def _against(results: Results) -> list[list[str]]:
    return [[info.name, f"{heat:g}", *(_best_other(results, info.name, heat, task) for task in results.tasks)]
            for info in results.clusters for heat in results.temperatures(info.name)
            if {OURS, *results.methods(info.name)} > {OURS} and results.at(info.name, heat, OURS)]


def _best_other(results: Results, cluster: str, heat: float, task: str) -> str:
    ours = results.at(cluster, heat, OURS, task)
    others = {other.tbt_s: method for method in results.methods(cluster)
              if method != OURS and (other := results.at(cluster, heat, method, task))}
    if ours is None or not ours.tbt_s or not others:
        return "-"
    ratio = min(others) / ours.tbt_s
    standing = "" if ratio > 1 else "even with " if ratio * _ALLOWANCE >= 1 else "SLOWER than "
    return f"{ratio:.2f}x ({standing}{others[min(others)]})"


def _cluster(results: Results, info: ClusterInfo, figure: str) -> dict[str, Any]:
    heats, methods = results.temperatures(info.name), results.methods(info.name)
    found = [(heat, method, one) for heat in heats for method in methods
             if (one := results.at(info.name, heat, method))]
    series = {f"{method}, T {heat:g}" if len(heats) > 1 else method:
              [_bar(results.at(info.name, heat, method, task)) for task in results.tasks]
              for heat, method, _ in found if method != PLAIN}
    return {
        "info": info, "figure": figure,
        "svg": figures.bars(f"speedup over pp, {info.name}, {results.clock}", results.tasks, series),
        "speedups": [[f"{heat:g}", method, *(_speedup(results.at(info.name, heat, method, task))
                                              for task in results.tasks)] for heat, method, _ in found],
        "counts": [_counts(heat, method, one, _setting(results, info.name, heat, method))
                   for heat, method, one in found],
        "tuning": [_tried(one) for one in results.receipt.tuning if one.cluster == info.name
                   and len(one.candidates) > 1]}


def _bar(one: Summary | None) -> figures.Bar | None:
    return (one.over_pp.value, one.over_pp.low, one.over_pp.high) if one and one.over_pp else None


def _speedup(one: Summary | None) -> str:
    if one is None or one.over_pp is None:
        return "-"
    return f"{one.over_pp.value:.2f}x ({interval(one.over_pp)}{one.steps_per_token:.2f} steps)"


def interval(estimate: Estimate) -> str:
    """Its ends, where it has an interval."""
    return f"{estimate.low:.2f}-{estimate.high:.2f}, " if estimate.low is not None else ""


def _setting(results: Results, cluster: str, heat: float, method: str) -> Sample:
    return next(iter(results.groups[cluster, heat, method].values()))


def _counts(heat: float, method: str, one: Summary, setting: Sample) -> list[str]:
    return [f"{heat:g}", method, _words(setting), f"{1e3 * one.tbt_s:.3g}", f"{1e3 * one.ttft_s:.3g}",
            f"{1 / one.s_per_token:.2f}", f"{one.steps_per_token:.2f}", f"{one.hit_rate:.1%}",
            f"{one.mean_acceptance_length:.2f}", f"{one.fill:.0%}", f"{one.waste:.1f}", f"{one.draft_busy:.0%}",
            f"{max(one.bytes_per_token, default=0):,.0f}", f"{1e6 * one.engine_s_per_step:.0f}"]


def _words(one: Any) -> str:
    """How a method was set: of a `Sample` or a `Candidate`."""
    parts = [f"w {one.width}"] if one.width is not None else []
    parts += [f"d {one.depth}"] if one.depth is not None else []
    return ", ".join([*parts, one.draft] if one.draft != "none" else parts)


def _tried(one: Tuning) -> list[str]:
    tried = [f"{_words(each)}: {1e3 * each.tbt_s:.3g}" for each in one.candidates]
    tried[one.best] = f"**{tried[one.best]}**"
    return [f"{one.temperature:g}", one.method, "; ".join(tried)]
