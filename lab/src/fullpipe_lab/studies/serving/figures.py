"""What the samples of a comparison of servers say: rates and times by level, equal texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from fullpipe.server.load import LoadResult, Spread


@dataclass(frozen=True)
class Level:
    """One contender at so many requests at once, over all rounds. cpu: processor seconds of its processes, by
    round."""

    contender: str
    level: int
    results: list[LoadResult]
    cpu: list[Mapping[str, float]]

    @cached_property
    def rates(self) -> list[float]:
        """Output tokens per second of each round."""
        return [result.summary().tokens_per_s for result in self.results]

    @property
    def tokens_per_s(self) -> float:
        return median(self.rates)

    @property
    def tokens(self) -> int:
        return sum(result.summary().tokens for result in self.results)

    @property
    def span_s(self) -> float:
        return sum(result.span_s for result in self.results)

    @property
    def failures(self) -> int:
        return sum(result.summary().failed for result in self.results)

    @cached_property
    def ttft(self) -> Spread | None:
        return Spread.of(sample.ttft_s for result in self.results for sample in result.whole)

    @cached_property
    def tbt(self) -> Spread | None:
        return Spread.of(sample.tbt_s for result in self.results for sample in result.whole)

    @property
    def first_texts(self) -> dict[str, str]:
        """What was said to each prompt, the first time."""
        return {sample.prompt: sample.text for result in reversed(self.results) for sample in result.whole}

    @property
    def cpu_per_token(self) -> float:
        """Processor seconds of the server's processes; threads that wait by spinning count, too."""
        return sum(sum(one.values()) for one in self.cpu) / self.tokens if self.tokens else 0.0


def levels_of(receipt: dict[str, Any]) -> dict[tuple[int, str], Level]:
    """By level and contender, in order of the levels."""
    found: dict[tuple[int, str], Level] = {}
    for cell in sorted(receipt["cells"], key=lambda cell: (cell["level"], cell["round"])):
        key = cell["level"], cell["contender"]
        level = found.setdefault(key, Level(cell["contender"], cell["level"], [], []))
        level.results.append(LoadResult.from_dict(cell["load"]))
        level.cpu.append(cell["cpu"])
    return found


def same_texts(levels: Mapping[tuple[int, str], Level]) -> list[list[str]]:
    """By level and pair of servers, of how many prompts that both answered the first text is the same."""
    rows = []
    for (level, name), one in levels.items():
        for (other_level, other), two in levels.items():
            if level == other_level and name < other:
                mine, theirs = one.first_texts, two.first_texts
                both = mine.keys() & theirs.keys()
                rows.append([str(level), f"{name}, {other}",
                             f"{sum(mine[key] == theirs[key] for key in both)} of {len(both)}"])
    return rows
