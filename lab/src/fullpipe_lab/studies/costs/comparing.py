"""What the rows say: the best other method of every cell, what `fullpipe` makes of it, and what the issue asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fullpipe.errors import UsageError
from fullpipe_lab.studies.costs.measuring import DRAFTS, OTHERS, OURS, PLAIN, Cell, between

CPU = "cpu-"  # clusters of this name have rows that cost something
GPU_TARGETS = {"gpus-8": (12.0, 7.0), "gpus-14": (12.5, 8.0)}
"""By preset, the least speedup over `pp` of all sets together, and of MT-Bench: with the draft model alone, at
temperature 0, as the committed report of these presets has it."""
LEAST, MEAN_ON_CPU, OVER_TREE, HEAT_GAP = 0.98, 1.35, 2.4, 0.05
_TOGETHER = "all"
_TOKENS, _SECONDS, _HITS, _MISSES, _ROWS, _CALLS, _DRAFT_ROWS = range(7)  # of a run


def best_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each method's best setting in each cell; "tried" says what the others took.

    Raises UsageError where the rows of one cell are of two descriptions of its cluster, of two recordings or drafts.
    """
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    inputs: dict[tuple[Any, ...], str] = {}
    for row in rows:
        cell = row["cell"]
        where = cell["temperature"], cell["cluster"], cell["set"]
        if inputs.setdefault(where, row["inputs"]) != row["inputs"]:
            raise UsageError(f"the journal holds rows of two versions of {cell['cluster']}, of the answers or of the "
                             "draft", hint="Move the journal away, and measure again.")
        groups.setdefault((*where, cell["draft"], row["method"]), {})[row["size"]] = row
    found = []
    for sizes in groups.values():
        best = min(sizes.values(), key=between)
        tried = {size: round(between(row), 3) for size, row in sizes.items()}
        kept = {name: value for name, value in best.items() if name not in ("key", "inputs", "prompts")}
        found.append(kept | ({"tried": tried} if len(tried) > 1 else {}))
    return found


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell, or all sets of a cluster and draft together (set "all": of each set its own best other).

    other: the name of the best other method with its setting. pp_s, other_s, ours_s: seconds between tokens.
    """

    cell: Cell
    other: str
    pp_s: float
    other_s: float
    ours_s: float

    @property
    def ratio(self) -> float:
        return self.other_s / self.ours_s

    @property
    def over_pp(self) -> float:
        return self.pp_s / self.ours_s

    @property
    def other_over_pp(self) -> float:
        return self.pp_s / self.other_s


class Results:
    """Rows of `best_of`, to be looked up. Cells that lack a method are left out of what needs it."""

    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self._rows: dict[tuple[Cell, str], Mapping[str, Any]] = {
            (Cell(**one["cell"]), one["method"]): one for one in samples}
        found = {cell for cell, _ in self._rows}
        self.temperatures = sorted({cell.temperature for cell in found})
        self.clusters = sorted({cell.cluster for cell in found}, key=_natural)
        self.drafts = [name for name in DRAFTS if any(cell.draft == name for cell in found)]
        self.sets = list(dict.fromkeys(cell.set for cell, _ in self._rows))
        self.versions = len({one["version"] for one in samples})

    def row(self, cell: Cell, method: str) -> Mapping[str, Any] | None:
        if method == PLAIN:
            cell = Cell(cell.temperature, cell.cluster, "none", cell.set)
        return self._rows.get((cell, method))

    def speedup(self, cell: Cell, method: str) -> float | None:
        """Over `pp`, on the same prompts."""
        plain, row = self.row(cell, PLAIN), self.row(cell, method)
        return between(plain) / between(row) if plain and row else None

    def cells(self) -> Iterator[Cell]:
        for heat in self.temperatures:
            for cluster in self.clusters:
                for draft in self.drafts:
                    for name in self.sets:
                        yield Cell(heat, cluster, draft, name)

    @cached_property
    def compared(self) -> list[Compared]:
        """All cells that have `fullpipe` and every other method."""
        return [one for cell in self.cells() if (one := self._compare(cell))]

    @cached_property
    def together(self) -> list[Compared]:
        """The same with all sets of a cluster and draft in one, where none is missing."""
        groups: dict[tuple[float, str, str], list[Compared]] = {}
        for one in self.compared:
            groups.setdefault((one.cell.temperature, one.cell.cluster, one.cell.draft), []).append(one)
        return [Compared(Cell(*key, _TOGETHER), ", ".join(dict.fromkeys(one.other for one in found)),
                         sum(one.pp_s for one in found), sum(one.other_s for one in found),
                         sum(one.ours_s for one in found))
                for key, found in groups.items() if len(found) == len(self.sets)]

    def total(self, heat: float, cluster: str, draft: str, method: str) -> list[float] | None:
        """A method's runs on all sets, summed; None where a set is missing."""
        rows = [self.row(Cell(heat, cluster, draft, name), method) for name in self.sets]
        if not all(rows):
            return None
        return [sum(column) for column in zip(*(run for row in rows if row for run in row["runs"]))]

    def _compare(self, cell: Cell) -> Compared | None:
        others = [row for method in (PLAIN, *OTHERS) if (row := self.row(cell, method))]
        ours = self.row(cell, OURS)
        if ours is None or len(others) < 1 + len(OTHERS):
            return None
        best = min(others, key=between)
        return Compared(cell, f"{best['method']} {best['size']}".strip(), between(others[0]), between(best),
                        between(ours))


def _natural(name: str) -> list[Any]:
    """Numbers in a name count as numbers."""
    return [float(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))]


# ---- targets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for and what was found. where: the cells that fall short, worst first."""

    what: str
    wanted: str
    found: str
    reached: bool
    where: str = ""


def targets(results: Results) -> list[Target]:
    """Those of the issue that replays of one request decide, as far as the rows go."""
    made = [_least(results), _mean_on_cpu(results), *_on_gpus(results), _over_trees(results), _by_heat(results)]
    return [one for one in made if one]


def _least(results: Results) -> Target | None:
    if not results.compared:
        return None
    short = sorted((one for one in results.compared if one.ratio < LEAST), key=lambda one: one.ratio)
    worst = min(one.ratio for one in results.compared)
    return Target("`fullpipe` / the best other method, every cell", f"at least {LEAST}", f"{worst:.3f} at the worst; "
                  f"{len(short)} of {len(results.compared)} cells below", not short,
                  ", ".join(f"{one.cell} {one.ratio:.2f}" for one in short[:5]))


def _mean_on_cpu(results: Results) -> Target | None:
    ratios = [one.ratio for one in results.compared if one.cell.cluster.startswith(CPU)]
    if not ratios:
        return None
    mean = sum(ratios) / len(ratios)
    by_draft = {draft: [one.ratio for one in results.compared if one.cell.cluster.startswith(CPU)
                        and one.cell.draft == draft] for draft in results.drafts}
    return Target("the same, mean over the cells of CPU clusters", f"at least {MEAN_ON_CPU}", f"{mean:.3f}",
                  mean >= MEAN_ON_CPU, ", ".join(f"{draft} {sum(found) / len(found):.2f}"
                                                 for draft, found in by_draft.items() if found))


def _on_gpus(results: Results) -> Iterator[Target]:
    for cluster, (everything, hardest) in GPU_TARGETS.items():
        at = [one for one in (*results.together, *results.compared)
              if (one.cell.temperature, one.cell.cluster, one.cell.draft) == (0.0, cluster, "model")]
        for one in at:
            wanted = {_TOGETHER: everything, "mt_bench": hardest}.get(one.cell.set)
            if wanted is not None:
                yield Target(f"{cluster}, draft model, T 0, over `pp`: {one.cell.set}", f"at least {wanted:g}",
                             f"{one.over_pp:.2f}", one.over_pp >= wanted)


def _over_trees(results: Results) -> Target | None:
    found = {cell: tree / ours for cell in results.cells() if cell.cluster in GPU_TARGETS
             if (ours_row := results.row(cell, OURS)) and (tree_row := results.row(cell, "static-tree"))
             for ours, tree in [(between(ours_row), between(tree_row))]}
    if not found:
        return None
    short = sorted((cell for cell, ratio in found.items() if ratio < OVER_TREE), key=found.__getitem__)
    return Target("over `static-tree`, every cell of the GPU presets", f"at least {OVER_TREE}",
                  f"{min(found.values()):.2f} at the worst; {len(short)} of {len(found)} cells below", not short,
                  ", ".join(f"{cell} {found[cell]:.2f}" for cell in short[:5]))


def _by_heat(results: Results) -> Target | None:
    found = heat_ratios(results, OURS)
    if not found:
        return None
    mean = geometric(found.values())
    outside = [key for key, ratio in found.items() if abs(ratio - 1) > HEAT_GAP]
    return Target("speedup at temperature 1 / at 0, geometric mean over all cells", f"within {HEAT_GAP:.0%}",
                  f"{mean:.3f}", abs(mean - 1) <= HEAT_GAP,
                  f"{len(outside)} of {len(found)} cells alone are further apart")


def heat_ratios(results: Results, method: str) -> dict[tuple[str, str, str], float]:
    """A method's speedup at temperature 1 over that at 0, by cluster, draft and set."""
    found = {}
    for cell in results.cells():
        if cell.temperature == 0:
            cold = results.speedup(cell, method)
            hot = results.speedup(Cell(1.0, cell.cluster, cell.draft, cell.set), method)
            if cold and hot:
                found[cell.cluster, cell.draft, cell.set] = hot / cold
    return found


def geometric(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    found = list(ratios)
    return math.exp(sum(map(math.log, found)) / len(found))


# ---- tables ------------------------------------------------------------------------------------------------


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
    """Geometric means over clusters and sets of the speedup at temperature 1 over that at 0, by draft and method."""
    lines = []
    for draft in results.drafts:
        means = [geometric(ratios) if (ratios := [ratio for (_, one, _), ratio in heat_ratios(results, method).items()
                                                  if one == draft]) else None for method in (OURS, *OTHERS)]
        lines.append([draft, *("-" if mean is None else f"{mean:.3f}" for mean in means)])
    return lines


def apart_table(results: Results) -> list[list[str]]:
    """Where `fullpipe` alone is further apart than it should be: by set and draft, how many clusters, the mean, and
    that of the others there."""
    ours = heat_ratios(results, OURS)
    others = {method: heat_ratios(results, method) for method in OTHERS}
    lines = []
    for name in results.sets:
        for draft in results.drafts:
            here = [key for key in ours if key[1:] == (draft, name)]
            outside = [key for key in here if abs(ours[key] - 1) > HEAT_GAP]
            if here:
                lines.append([name, draft, f"{len(outside)} of {len(here)}", f"{geometric(ours[key] for key in here):.3f}",
                              *(f"{geometric(others[method][key] for key in here):.3f}" if all(
                                  key in others[method] for key in here) else "-" for method in OTHERS)])
    return lines


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


def others(results: Results) -> dict[str, Any]:
    """What does not change while the policy is worked on: by temperature, cluster, draft, set and method the best
    speedup over `pp` and its setting; and the seconds of `pp`."""
    found: dict[str, Any] = {"pp_s": {}}
    for cell in results.cells():
        heat = f"{cell.temperature:g}"
        if plain := results.row(cell, PLAIN):
            found["pp_s"].setdefault(heat, {}).setdefault(cell.cluster, {})[cell.set] = round(between(plain), 6)
        best = {method: [round(speedup, 4), row["size"]] for method in OTHERS
                if (row := results.row(cell, method)) and (speedup := results.speedup(cell, method))}
        if best:
            where = found.setdefault(heat, {}).setdefault(cell.cluster, {}).setdefault(cell.draft, {})
            where[cell.set] = best
    return found


def ratio_lines(results: Results) -> list[list[str]]:
    """Every cluster and draft: ratio of each set and of all together."""
    by_key: dict[tuple[float, str, str], dict[str, float]] = {}
    for one in (*results.compared, *results.together):
        by_key.setdefault((one.cell.temperature, one.cell.cluster, one.cell.draft), {})[one.cell.set] = one.ratio
    show: Callable[[float | None], str] = lambda ratio: "-" if ratio is None else f"{ratio:.2f}"
    return [[f"{heat:g}", cluster, draft, *(show(found.get(name)) for name in (*results.sets, _TOGETHER))]
            for (heat, cluster, draft), found in by_key.items()]
