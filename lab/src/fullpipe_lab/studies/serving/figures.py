"""What the samples of a comparison say: rates and times by level, where a token's time goes, equal texts. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from fullpipe.bench.load import LoadResult, Spread

_COUNTER = re.compile(r"fullpipe_(\w+)_total(?:\{station=(.*)\})?")


@dataclass(frozen=True)
class Level:
    """One contender at so many requests at once, over all rounds. counters, cpu: what grew meanwhile, one per round."""

    contender: str
    level: int
    results: list[LoadResult]
    counters: list[Mapping[str, float]]
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
    def token_s(self) -> float | None:
        """Time that passed per output token, all requests together; None without a token."""
        return self.span_s / self.tokens if self.tokens else None

    @cached_property
    def texts(self) -> list[dict[str, str]]:
        """Of each round, what was said to each prompt."""
        return [{sample.prompt: sample.text for sample in result.whole} for result in self.results]

    def per_token(self, name: str) -> dict[str, float] | None:
        """A counter of Fullpipe's by station ("" for one without), per output token; None where it was not told."""
        found: dict[str, float] = {}
        for counters in self.counters:
            for key, value in counters.items():
                if (match := _COUNTER.fullmatch(key)) and match[1] == name:
                    found[match[2] or ""] = found.get(match[2] or "", 0.0) + value
        return {station: value / self.tokens for station, value in found.items()} if found and self.tokens else None

    @property
    def cores_busy(self) -> float:
        """Of the server's processes, on average."""
        return sum(sum(one.values()) for one in self.cpu) / self.span_s if self.span_s else 0.0

    def cpu_per_token(self) -> dict[str, float]:
        """Processor seconds by process; processes of the same kind are numbered. The load generator is one."""
        if not self.tokens:
            return {}
        spent: dict[str, float] = {}
        for round_ in self.cpu:
            seen: dict[str, int] = {}
            for key, value in sorted(round_.items(), key=lambda entry: int(entry[0].rsplit("(", 1)[1][:-1])):
                role = key.rsplit(" (", 1)[0]
                seen[role] = seen.get(role, 0) + 1
                label = role if role == "server" else f"{role} {seen[role]}"
                spent[label] = spent.get(label, 0.0) + value
        spent["load generator"] = sum(result.client_cpu_s for result in self.results)
        return {label: value / self.tokens for label, value in spent.items()}


def levels_of(receipt: dict[str, Any]) -> dict[tuple[int, str], Level]:
    """By level and contender, in order of the levels."""
    found: dict[tuple[int, str], Level] = {}
    for cell in sorted(receipt["cells"], key=lambda cell: (cell["level"], cell["round"])):
        key = cell["level"], cell["contender"]
        level = found.setdefault(key, Level(cell["contender"], cell["level"], [], [], []))
        level.results.append(LoadResult.from_dict(cell["load"]))
        level.counters.append(cell["counters"])
        level.cpu.append(cell["cpu"])
    return found


# ---- where the time goes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Seconds per output token, by the clock of the stage that worked longest: useful + wasted + waiting = all of it.

    useful: its work on rows that were alive in the end; wasted: on those thrown away; waiting: the rest.
    """

    station: str
    useful: float
    wasted: float
    waiting: float


def parts_of(level: Level) -> Parts | None:
    """None where the server's counters do not tell."""
    busy, alive, whole = level.per_token("stage_busy_seconds"), level.per_token("stage_alive_seconds"), level.token_s
    if not busy or whole is None:
        return None
    station = max(busy, key=lambda name: busy[name])
    useful = (alive or {}).get(station, 0.0)
    return Parts(station, useful, busy[station] - useful, whole - busy[station])


def blame(ours: Level, theirs: Level) -> str:
    """Which part of a step is the one that, added to those before it, takes longer than all of theirs."""
    mine, other = ours.token_s, theirs.token_s
    if mine is None or other is None:
        return "nothing was answered"
    if mine <= other:
        return "ahead"
    parts = parts_of(ours)
    if parts is None:
        return "behind; the server's counters do not tell why"
    if parts.useful > other:
        return (f"computing: {parts.station} works {_ms(parts.useful)} per token on rows that count, more than vLLM "
                f"takes altogether ({_ms(other)})")
    if parts.useful + parts.wasted > other:
        return (f"speculation: rows thrown away cost {parts.station} {_ms(parts.wasted)} per token; without them it "
                f"works {_ms(parts.useful)}, less than vLLM takes altogether ({_ms(other)})")
    return (f"waiting: {parts.station}, the busiest, works {_ms(parts.useful + parts.wasted)} per token and has "
            f"nothing to do for {_ms(parts.waiting)} (vLLM altogether: {_ms(other)}); {_meanwhile(ours)}")


def _meanwhile(ours: Level) -> str:
    engine = sum((ours.per_token("engine_seconds") or {}).values())
    draft = sum((ours.per_token("draft_seconds") or {}).values())
    return (f"meanwhile per token: engine {_ms(engine)}, draft {_ms(draft)}; the server's processes kept "
            f"{ours.cores_busy:.1f} cores busy")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


# ---- texts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Of `compared` prompts answered by both. same_prompt: both counted the prompt's tokens alike."""

    compared: int
    same_text: int
    same_prompt: int


def agreement(one: Level, other: Level) -> Agreement:
    """By the first answers to each prompt."""
    mine, theirs = _first(one), _first(other)
    both = mine.keys() & theirs.keys()
    return Agreement(len(both), sum(mine[key][0] == theirs[key][0] for key in both),
                     sum(mine[key][1] == theirs[key][1] for key in both))


def steady(level: Level) -> tuple[int, int]:
    """Prompts answered in several rounds, and those of them with the same text each time."""
    texts: dict[str, list[str]] = {}
    for round_ in level.texts:
        for prompt, text in round_.items():
            texts.setdefault(prompt, []).append(text)
    several = [said for said in texts.values() if len(said) > 1]
    return len(several), sum(len(set(said)) == 1 for said in several)


def _first(level: Level) -> dict[str, tuple[str, int | None]]:
    samples = (sample for result in reversed(level.results) for sample in result.whole)
    return {sample.prompt: (sample.text, sample.prompt_tokens) for sample in samples}
