"""Expected against seen: how often guesses came true, by who made them and by decile of what was claimed. No torch.

    watched = WatchedCalibration()
    for answer in answers:
        replay(answer, params, draft, method, hardware, calibration=watched)
    print(show(watched.table()))
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fullpipe.sequences.calibration import Calibration

_PLACES = ("", ", asked again", ", behind a guess")


@dataclass(frozen=True, slots=True)
class Line:
    """Guesses of one kind whose claimed probability lies in one decile.

    number: of guesses. claimed: how many would have come true at the draft's word; believed: by the map as it was when
    each was decided, which had seen only what came before; seen: how many did.
    """

    kind: int
    decile: int
    number: int
    claimed: float
    believed: float
    seen: int


class WatchedCalibration(Calibration):
    """A calibration that keeps what it was told, and what it would have said."""

    def __init__(self) -> None:
        super().__init__()
        self._fates: list[tuple[int, float, float, bool]] = []

    def note(self, kind: int, logprob: float, hit: bool) -> None:
        before, believed = self.noted, self.map(kind, logprob)
        super().note(kind, logprob, hit)
        if self.noted > before:
            self._fates.append((kind, math.exp(min(logprob, 0.0)), math.exp(believed), hit))

    def table(self) -> list[Line]:
        """By kind and decile, rising."""
        cells: dict[tuple[int, int], list[tuple[float, float, bool]]] = defaultdict(list)
        for kind, claimed, believed, hit in self._fates:
            cells[kind, min(int(10 * claimed), 9)].append((claimed, believed, hit))
        return [Line(kind, decile, len(cell), *map(sum, zip(*cell))) for (kind, decile), cell in sorted(cells.items())]

    def surprise(self) -> tuple[float, float]:
        """Nats of all fates together (the logarithmic score of each guess alone), claimed and believed."""
        return (sum(_surprise(claimed, hit) for _, claimed, _, hit in self._fates),
                sum(_surprise(believed, hit) for _, _, believed, hit in self._fates))


def _surprise(probability: float, hit: bool) -> float:
    return -math.log(min(max(probability if hit else 1 - probability, 1e-6), 1.0))


def name_of(kind: int) -> str:
    """Of a kind: "one draft", "draft 0 alone", "drafts 0 and 1", and where the guess stood."""
    source, place = divmod(kind, len(_PLACES))
    drafts = [str(k) for k in range(source.bit_length()) if source >> k & 1]
    alone = "one draft" if not drafts else f"draft {drafts[0]} alone"
    return (f"drafts {' and '.join(drafts)}" if len(drafts) > 1 else alone) + _PLACES[place]


def show(lines: Iterable[Line]) -> str:
    """As a table in Markdown."""
    rows = ["| who | claimed | guesses | at its word | believed | seen |", "|---|---|---|---|---|---|"]
    rows += [f"| {name_of(one.kind)} | {one.decile / 10:.1f} to {one.decile / 10 + 0.1:.1f} | {one.number} | "
             f"{one.claimed / one.number:.3f} | {one.believed / one.number:.3f} | {one.seen / one.number:.3f} |"
             for one in lines]
    return "\n".join(rows)
