"""What the rows say: the best other method of every cell, and `fullpipe` beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fullpipe.errors import UsageError
from fullpipe_lab.studies.costs.measuring import DRAFTS, OTHERS, OURS, PLAIN, Cell, between

TOGETHER = "all"


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
        return [Compared(Cell(*key, TOGETHER), ", ".join(dict.fromkeys(one.other for one in found)),
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
