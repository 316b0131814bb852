"""Figures out of samples: pooled over prompts, with an interval over prompts where one is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Sample = dict[str, Any]
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Pooled:
    """Of one cell. draft_rows: nodes asked about, for each emitted token. penalty: steps beyond a token a step, the
    way of the first token through the pipeline not counted."""

    stages: int
    prompts: int
    tokens: int
    hit_rate: float
    steps_per_token: float
    draft_rows: float
    penalty: float

    @property
    def length(self) -> float:
        """Equivalent acceptance length: how many times the tokens of `pp`, which needs `stages` steps for one."""
        return self.stages / self.steps_per_token


def pooled(samples: Sequence[Sample]) -> Pooled:
    """All answers of a cell as one. Raises ValueError for samples of cells with other numbers of stages."""
    stages, = {sample["cell"]["stages"] for sample in samples}
    tokens, hits = sum(one["tokens"] for one in samples), sum(one["hits"] for one in samples)
    misses, steps = sum(one["misses"] for one in samples), sum(one["steps"] for one in samples)
    ideal = tokens + (stages - 1) * len(samples)
    return Pooled(stages, len(samples), tokens, hits / max(1, hits + misses), steps / tokens,
                  sum(one["draft_rows"] for one in samples) / tokens, steps - ideal)


def interval(samples: Sequence[Sample], figure: Callable[[Pooled], float]) -> tuple[float, float]:
    """95%, by drawing prompts with replacement; the same on every run."""
    draw = random.Random(0)
    found = sorted(figure(pooled(draw.choices(samples, k=len(samples)))) for _ in range(_DRAWS))
    return found[_DRAWS // 40], found[-_DRAWS // 40 - 1]


def saved(before: Sequence[Sample], after: Sequence[Sample]) -> float:
    """Which share of the miss penalty `before` is gone `after`, on the prompts that both have."""
    both = {one["prompt"] for one in before} & {one["prompt"] for one in after}
    first, second = (pooled([one for one in samples if one["prompt"] in both]).penalty for samples in (before, after))
    return 1 - second / first if first else 0.0
