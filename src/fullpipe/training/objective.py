"""What a draft module is trained for: to say what the target would say, at every filling of the pipeline."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fullpipe.models.spd_module import depths_in_flight, types_by_depth


def divergence(student: Tensor, teacher: Tensor, loss: str) -> Tensor:
    """How far the student is from the teacher, per row, over the draft vocabulary: [rows, vocab] twice -> [rows].

    forward-kl: sum p log(p / q) (SPD section 3.3, soft labels, temperature 1). reverse-kl: sum q log(q / p).
    total-variation: half the sum of |p - q|, which is the share of drafts that rejection sampling would refuse.
    """
    q, p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    match loss:
        case "forward-kl":
            return (p.exp() * (p - q)).sum(-1)
        case "reverse-kl":
            return (q.exp() * (q - p)).sum(-1)
        case "total-variation":
            return (p.exp() - q.exp()).abs().sum(-1) / 2
    raise ValueError(f"no such loss: {loss}")


@dataclass(frozen=True, slots=True)
class Filling:
    """How the pipeline is filled while every position of a text is the newest token.

    stages, fill: tokens in flight of how many stages. types: their row types, newest first. weight: of its loss.
    """

    stages: int
    fill: int
    shift: int
    lead: int
    types: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Fillings:
    """Draws fillings as the module will meet them.

    ends: for each number of stages, layers finished after each. Half of all forwards have a full pipeline, as in
    SPD; the others one that is filling up after a miss, uniformly.
    refreshed: share of forwards in which the newest token is not new but in flight (asked about again).
    ahead: share in which drafts run ahead of the launches, by one to three tokens.
    power: the loss at a filling of f of n stages counts (f / n) ** power; above 0 a full pipeline counts more,
    below 0 the first steps after a miss do.
    """

    bounds: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]
    refreshed: float = 0.15
    ahead: float = 0.15
    power: float = 0.0

    def draw(self, random: random.Random) -> Filling:
        ends = random.choice(self.ends)
        stages = len(ends)
        fill = stages if stages == 1 or random.random() < 0.5 else random.randint(1, stages - 1)
        kind = random.random()
        shift = random.randint(1, max(1, stages - 1)) if kind < self.refreshed else 0
        lead = random.randint(1, 3) if self.refreshed <= kind < self.refreshed + self.ahead else 0
        return self.of(ends, fill, shift, lead)

    def of(self, ends: Sequence[int], fill: int, shift: int = 0, lead: int = 0) -> Filling:
        """A certain filling. Where a token in flight has every depth that the module reads it is a complete one,
        and where nothing of it has been read yet (early exits) the module is asked once it has."""
        stages, table = len(ends), types_by_depth(self.bounds, ends)
        depths = depths_in_flight(stages, fill, shift=shift, lead=lead)
        types = [table[min(depth, stages)] for depth in depths]
        last = len(self.bounds) - 1
        types = types[: types.index(last)] if last in types else types
        return Filling(stages, fill, shift, lead, tuple(kind for kind in types if kind >= 0),
                       (fill / stages) ** self.power)


def accepted(student: Tensor, wanted: Tensor, draft_ids: Tensor, top: int = 1) -> Tensor:
    """Whether the token that the target picks is among the student's `top` best: student [rows, vocab], wanted
    int64 [rows] of the whole vocabulary -> bool [rows]."""
    best = draft_ids[student.topk(top, -1).indices]
    return (best == wanted[:, None]).any(-1)


def inverse(draft_ids: Tensor, vocab: int) -> Tensor:
    """int64 [vocab]: index in the draft vocabulary, -1 where a token is not in it."""
    table = torch.full((vocab,), -1, dtype=torch.int64)
    table[draft_ids] = torch.arange(len(draft_ids))
    return table
