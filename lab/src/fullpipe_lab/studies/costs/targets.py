"""What the issue asks for, and what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean
from typing import Any

from fullpipe_lab.studies.costs.comparing import TOGETHER, Results, heat_ratios
from fullpipe_lab.studies.costs.measuring import OURS, Cell

CPU = "cpu-"  # clusters of this name have rows that cost something
GPU_TARGETS = {"gpus-8": (12.0, 7.0), "gpus-14": (12.5, 8.0)}
"""By preset, the least speedup over `pp` of all sets together, and of MT-Bench: with the draft model alone, at
temperature 0, as the committed report of these presets has it."""
LEAST, MEAN_ON_CPU, OVER_TREE, HEAT_GAP = 0.98, 1.35, 2.4, 0.05
_NAMED = 5  # cells that fall short


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for and what was found. where: cells that fall short, worst first, or what it is the mean of."""

    what: str
    wanted: str
    found: str
    reached: bool
    where: str = ""


def targets(results: Results, many: Sequence[Mapping[str, Any]] = ()) -> list[Target]:
    """Those of the issue that replays decide, as far as the rows go. many: rows of `report.many_rows`."""
    made = [_least(results), _mean_on_cpu(results), *_on_gpus(results), _over_trees(results), _by_heat(results),
            _never_below_pp(many)]
    return [one for one in made if one]


def _least(results: Results) -> Target | None:
    return _every({one.cell: one.ratio for one in results.compared}, LEAST,
                  "`fullpipe` / the best other method, every cell")


def _over_trees(results: Results) -> Target | None:
    found = {cell: ours / tree for cell in results.cells() if cell.cluster in GPU_TARGETS
             if (ours := results.speedup(cell, OURS)) and (tree := results.speedup(cell, "static-tree"))}
    return _every(found, OVER_TREE, "over `static-tree`, every cell of the GPU presets")


def _every(found: Mapping[Cell, float], least: float, what: str) -> Target | None:
    if not found:
        return None
    short = sorted((cell for cell, ratio in found.items() if ratio < least), key=found.__getitem__)
    return Target(what, f"at least {least}", f"{min(found.values()):.3f} at the worst; {len(short)} of {len(found)} "
                  "cells below", not short, ", ".join(f"{cell} {found[cell]:.2f}" for cell in short[:_NAMED]))


def _mean_on_cpu(results: Results) -> Target | None:
    by_draft = {draft: [one.ratio for one in results.compared if one.cell.cluster.startswith(CPU)
                        and one.cell.draft == draft] for draft in results.drafts}
    ratios = [ratio for found in by_draft.values() for ratio in found]
    if not ratios:
        return None
    mean = fmean(ratios)
    return Target("the same, mean over the cells of CPU clusters", f"at least {MEAN_ON_CPU}", f"{mean:.3f}",
                  mean >= MEAN_ON_CPU, ", ".join(f"{draft} {fmean(found):.2f}" for draft, found in by_draft.items()
                                                 if found))


def _on_gpus(results: Results) -> Iterator[Target]:
    for one in (*results.together, *results.compared):
        cell = one.cell
        if (cell.temperature, cell.draft) == (0.0, "model") and cell.cluster in GPU_TARGETS:
            everything, hardest = GPU_TARGETS[cell.cluster]
            wanted = {TOGETHER: everything, "mt_bench": hardest}.get(cell.set)
            if wanted is not None:
                yield Target(f"{cell.cluster}, draft model, T 0, over `pp`: {cell.set}", f"at least {wanted:g}",
                             f"{one.over_pp:.2f}", one.over_pp >= wanted)


def _never_below_pp(many: Sequence[Mapping[str, Any]]) -> Target | None:
    if not many:
        return None
    short = [f"{one['at once']} on {one['cluster']} {one['ratio']:.2f}" for one in many if one["ratio"] < 1]
    return Target("many requests: tokens a second over the better `pp`, every load", "at least 1",
                  f"{min(one['ratio'] for one in many):.3f} at the worst", not short, ", ".join(short))


def _by_heat(results: Results) -> Target | None:
    found = heat_ratios(results, OURS)
    if not found:
        return None
    mean = geometric_mean(found.values())
    outside = [key for key, ratio in found.items() if abs(ratio - 1) > HEAT_GAP]
    return Target("speedup at temperature 1 / at 0, geometric mean over all cells", f"within {HEAT_GAP:.0%}",
                  f"{mean:.3f}", abs(mean - 1) <= HEAT_GAP,
                  f"{len(outside)} of {len(found)} cells alone are further apart")
