"""Tables of the report, as rows of text."""

from __future__ import annotations

from statistics import geometric_mean

from fullpipe_lab.studies.costs.comparing import TOGETHER, Results, heat_ratios
from fullpipe_lab.studies.costs.measuring import OTHERS, OURS, Cell
from fullpipe_lab.studies.costs.targets import HEAT_GAP

_TOKENS, _SECONDS, _HITS, _MISSES, _ROWS, _CALLS, _DRAFT_ROWS = range(7)  # of a run


def main_table(results: Results, heat: float) -> list[list[str]]:
    """Cluster by draft, all sets together: best other and `fullpipe` over `pp`, and the ratio."""
    found = {(one.cell.cluster, one.cell.draft): one for one in results.together if one.cell.temperature == heat}

    def three(cluster: str, draft: str) -> list[str]:
        one = found.get((cluster, draft))
        return [f"{one.other_over_pp:.2f}", f"{one.over_pp:.2f}", f"**{one.ratio:.2f}**"] if one else ["-"] * 3

    return [[cluster, *(value for draft in results.drafts for value in three(cluster, draft))]
            for cluster in results.clusters if any((cluster, draft) in found for draft in results.drafts)]


def worst_table(results: Results, count: int) -> list[list[str]]:
    """The cells with the least ratio."""
    lines = []
    for one in sorted(results.compared, key=lambda one: one.ratio)[:count]:
        cell = one.cell
        lines.append([f"{cell.temperature:g}", cell.cluster, cell.draft, cell.set, one.other,
                      f"{one.other_over_pp:.2f}", f"{one.over_pp:.2f}", f"{one.ratio:.2f}"])
    return lines


def heat_table(results: Results) -> list[list[str]]:
    """By draft and method the speedup at temperature 1 over that at 0, geometric mean over clusters and sets."""
    found = {method: heat_ratios(results, method) for method in (OURS, *OTHERS)}
    return [[draft, *(_mean([ratio for key, ratio in ratios.items() if key[1] == draft]) for ratios in found.values())]
            for draft in results.drafts]


def apart_table(results: Results) -> list[list[str]]:
    """The same by set and draft, and on how many clusters `fullpipe` is further apart than it should be."""
    found, lines = {method: heat_ratios(results, method) for method in (OURS, *OTHERS)}, []
    for name in results.sets:
        for draft in results.drafts:
            here = {method: [ratio for key, ratio in ratios.items() if key[1:] == (draft, name)]
                    for method, ratios in found.items()}
            apart = sum(abs(ratio - 1) > HEAT_GAP for ratio in here[OURS])
            lines.append([name, draft, f"{apart} of {len(here[OURS])}", *map(_mean, here.values())])
    return lines


def _mean(ratios: list[float]) -> str:
    return f"{geometric_mean(ratios):.3f}" if ratios else "-"


def work_table(results: Results, heat: float, draft: str) -> list[list[str]]:
    """What `fullpipe` spends by cluster: hit rate, rows and draft rows a token, rows of a draft call."""
    lines = []
    for cluster in results.clusters:
        if total := results.total(heat, cluster, draft, OURS):
            tokens, calls = total[_TOKENS], max(total[_CALLS], 1)
            lines.append([cluster, f"{total[_HITS] / max(total[_HITS] + total[_MISSES], 1):.1%}",
                          f"{total[_ROWS] / tokens:.1f}", f"{total[_CALLS] / tokens:.2f}",
                          f"{total[_DRAFT_ROWS] / tokens:.1f}", f"{total[_DRAFT_ROWS] / calls:.1f}"])
    return lines


def settings_table(results: Results, heat: float, draft: str) -> list[list[str]]:
    """The best settings by cluster, set by set, each with its speedup over `pp`."""
    def of(cluster: str, method: str) -> str:
        return "; ".join(f"{row['size']} {results.speedup(cell, method) or 0:.2f}"
                         for cell in (Cell(heat, cluster, draft, name) for name in results.sets)
                         if (row := results.row(cell, method)))

    return [[cluster, *(of(cluster, method) for method in OTHERS)] for cluster in results.clusters]


def at_the_edge(results: Results, method: str, largest: str) -> str:
    """In how many cells the best setting of a method is the largest that was offered."""
    rows = [row for cell in results.cells() if (row := results.row(cell, method))]
    return f"{sum(largest in row['size'].split() for row in rows)} of {len(rows)}"


def ratio_lines(results: Results) -> list[list[str]]:
    """Every cluster and draft: the ratio of each set, and of all together."""
    found: dict[tuple[float, str, str], dict[str, str]] = {}
    for one in (*results.compared, *results.together):
        where = found.setdefault((one.cell.temperature, one.cell.cluster, one.cell.draft), {})
        where[one.cell.set] = f"{one.ratio:.2f}"
    return [[f"{heat:g}", cluster, draft, *(ratios.get(name, "-") for name in (*results.sets, TOGETHER))]
            for (heat, cluster, draft), ratios in found.items()]
