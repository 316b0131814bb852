"""What is measured, in the order of its worth: a run that is cut short has the most telling cells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

STAGES = (2, 4, 8, 15)


@dataclass(frozen=True, slots=True)
class Cell:
    """One set-up, asked all prompts.

    draft: as `--draft` takes it, with names of `Modules` for modules: "spd", "exit", "ablation", "shared", "main", and
    of longer runs "long-exit", "long-ablation" and "long-spd"; several with a comma between. free: a draft call takes
    no time, instead of one step.
    """

    draft: str
    method: str
    stages: int
    width: int = 1
    refresh: bool = False
    temperature: float = 0.0
    free: bool = False

    @property
    def key(self) -> str:
        """Names the cell in the journal."""
        extras = [word for word, on in (("refresh", self.refresh), ("free", self.free)) if on]
        return "/".join([self.draft, self.method, f"n{self.stages}", f"w{self.width}", f"T{self.temperature:g}",
                         *extras])

    @property
    def pipeline(self) -> tuple[int, str, bool]:
        """Cells that share a loaded pipeline."""
        return self.stages, self.draft, self.free

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def study_cells() -> list[Cell]:
    """All but those of the main module: the paper's claims, n-gram, one module for all numbers of stages, longer runs,
    temperature 1; then refresh, an exit head that takes time, and trees."""
    claims = [cell for n in (8, 4, 15, 2) for cell in (
        Cell("spd", "spd", n), Cell("exit", "ppsd", n, free=True), Cell("ablation", "spd", n))]
    others = [Cell(draft, "spd", n) for draft in ("ngram", "shared") for n in (8, 4, 15, 2)]
    long = [Cell("long-exit", "ppsd", 8, free=True), *(Cell(draft, "spd", n) for draft in ("long-ablation", "long-spd")
                                                       for n in (8, 4))]
    hot = [cell for n in (8, 4, 15, 2) for cell in (
        Cell("spd", "spd", n, temperature=1.0), Cell("exit", "ppsd", n, temperature=1.0, free=True))]
    refreshed = [Cell("spd", "spd", n, 1, True) for n in (8, 15)]
    slow = [Cell("exit", "ppsd", n) for n in (8, 4, 15, 2)]
    trees = [Cell("spd", "spd", n, 4) for n in (8, 15, 4, 2)]
    return [*claims, *others, *long, *hot, *refreshed, *slow, *trees]


def main_cells() -> list[Cell]:
    """Of the module that is shipped: trained longer, for 4 and 8 stages; 2 and 15 are transfer."""
    chain = [Cell("main", "spd", n, temperature=t) for t in (0.0, 1.0) for n in (8, 4, 15, 2)]
    refreshed = [Cell("main", method, n, width, refresh) for n in (8, 15)
                 for method, width in (("spd", 1), ("fullpipe", 8)) for refresh in (False, True)]
    trees = [Cell("main", "spd", n, 4) for n in (8, 4, 15, 2)]
    mixed = [Cell("main,ngram", "fullpipe", n, 8) for n in (8, 4, 15, 2)]
    small = [Cell("main", "fullpipe", n, 8) for n in (4, 2)]
    return _once([*chain[:4], *refreshed, *chain[4:], *trees, *mixed, *small])


def _once(cells: list[Cell]) -> list[Cell]:
    return list(dict.fromkeys(cells))
