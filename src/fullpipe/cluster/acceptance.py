"""An acceptance says how often a draft's guesses come true: measured if it was, else what its kind usually does.

The defaults are rounded figures of what was seen with the Qwen2.5-Coder pair (docs/log): 0.73 of the best guesses on
chats and 0.92 on code for the model; n-gram has something to say only where a text repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["none", "ngram", "model", "model+ngram", "module"]
Task = Literal["chat", "code", "edit", "mixed"]

TASKS: tuple[Task, ...] = ("mixed", "chat", "code", "edit")

# Of what guesses beside the best are right, as much is in time to be a hit: a second guess shares the rows with the
# best one's children, and has few children of its own. On the virtual clock, from 1 to 8 stages, 0.1 to 100 ms apart.
_BESIDE = 0.25
# A real draft says where it is unsure, and there the rows go: of 64-token answers of the Qwen pair on 2 to 4 hosts, 0.1
# to 100 ms apart, 93% to 97% were hits where 89% were its best guess and nearly all among its guesses (docs/log).
_UNSURE = 0.5
_LEAST_MOVES = 64  # fewer say too little of a draft

_BEST: dict[Kind, dict[Task, float]] = {
    "none": dict.fromkeys(TASKS, 0.0),
    "ngram": {"mixed": 0.4, "chat": 0.15, "code": 0.35, "edit": 0.8},
    "model": {"mixed": 0.8, "chat": 0.73, "code": 0.88, "edit": 0.9},
    "model+ngram": {"mixed": 0.85, "chat": 0.75, "code": 0.9, "edit": 0.95},
    "module": {"mixed": 0.7, "chat": 0.65, "code": 0.75, "edit": 0.75},
}
_OTHERS = {"none": 0.0, "ngram": 0.1, "model": 0.6, "model+ngram": 0.6, "module": 0.6}  # share of the rest


@dataclass(frozen=True, slots=True)
class Acceptance:
    """best: share of tokens that were the draft's best guess. among: that were among its guesses. measured: whether
    these are figures of this draft."""

    best: float
    among: float
    measured: bool = False

    def hit(self, guesses: float) -> float:
        """The probability that a token is in flight when it is known, with so many guesses of each place there."""
        share = _UNSURE * guesses / (1 + guesses) if self.measured else _BESIDE * (1 - 1 / max(guesses, 1.0))
        return self.best + (self.among - self.best) * share

    @classmethod
    def usual(cls, kind: Kind, task: Task = "mixed") -> Acceptance:
        best = _BEST[kind][task]
        return cls(best, best + _OTHERS[kind] * (1 - best))

    @classmethod
    def counted(cls, moves: float, best: float, among: float) -> Acceptance | None:
        """Of the counts of a calibration; None where too few tokens were counted."""
        if moves < _LEAST_MOVES:
            return None
        best = min(best / moves, 1.0)
        return cls(best, min(max(among / moves, best), 1.0), measured=True)


def kind_of(drafts: tuple[str, ...], modules: bool = False) -> Kind:
    """What kind of draft these are together. modules: one of them reads hidden states."""
    if not drafts:
        return "none"
    if modules:
        return "module"
    if drafts == ("ngram",):
        return "ngram"
    return "model+ngram" if "ngram" in drafts else "model"
