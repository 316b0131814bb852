"""Cells through the real engine: every stage and the draft module are computed, time is counted in steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from spd_study.cells import Cell
from spd_study.journal import Journal

from fullpipe import LLM, SamplingParams
from fullpipe.planning.cluster import Cluster
from fullpipe.prompts import FilePrompt

DTYPE = "bfloat16"
NEAR = 0.25  # of logits: two steps of bfloat16 at 16 to 32; closer than that, more rows at once may flip a pick
SEED = 7

# As unit costs, but for the draft, which is done at once: an exit head that takes a step's time would halve the rate
# at which tokens enter, for it cannot begin before stage 1 is done.
_FREE = """
[cluster]
name = "{stages} stages, unit steps, free draft"
kind = "modelled"
note = "Every stage step takes 1 s, whatever its rows; a draft call and the links take nothing."
[[devices]]
name = "unit"
count = {stages}
stage_ms = [[1, 1000.0]]
[[devices]]
name = "drafter"
draft_ms = [[1, 0.0]]
[links]
latency_ms = 0.0
[placement]
stages = [{names}]
draft = "drafter"
"""


@dataclass(frozen=True, slots=True)
class Modules:
    """Where the draft modules are. study: a folder with spd{n}, exit{n}, ablation, spdall, and of longer runs
    long_exit8, long_ablation and long_spd48. main: a folder."""

    study: Path
    main: Path

    def draft(self, name: str, stages: int) -> str:
        """What to give to `LLM(draft=...)` for a cell's draft."""
        return ",".join(self._one(part, stages) for part in name.split(","))

    def has(self, cell: Cell) -> bool:
        """Whether the modules that a cell needs have been trained."""
        folders = [part.partition(":")[2] for part in self.draft(cell.draft, cell.stages).split(",")]
        return all((Path(folder) / "model.safetensors").exists() for folder in folders if folder)

    def _one(self, name: str, stages: int) -> str:
        match name:
            case "spd" | "exit":
                return f"{name}:{self.study / f'{name}{stages}'}"
            case "ablation":
                return f"spd:{self.study / 'ablation'}"
            case "shared":
                return f"spd:{self.study / 'spdall'}"
            case "long-exit":
                return f"exit:{self.study / 'long_exit8'}"
            case "long-ablation" | "long-spd":
                return f"spd:{self.study / ('long_ablation' if name == 'long-ablation' else 'long_spd48')}"
            case "main":
                return f"spd:{self.main}"
        return name


@dataclass(frozen=True, slots=True)
class Truth:
    """What `pp` says to a prompt. margins: per token, how far it stood above the second best (logits, noise in)."""

    tokens: list[int]
    margins: list[float]


class Study:
    """The prompts, the target's own answers to them, and the journal of what was measured."""

    def __init__(self, model: str, modules: Modules, prompts: Sequence[FilePrompt], tokens: int,
                 journal: Journal) -> None:
        self.model, self.modules, self.prompts, self.tokens = model, modules, prompts, tokens
        self.journal = journal
        self._truth: dict[tuple[str, float], Truth] = {}

    def params(self, temperature: float) -> SamplingParams:
        return SamplingParams(max_tokens=self.tokens, temperature=temperature, seed=SEED)

    def truth(self, prompt: FilePrompt, temperature: float) -> Truth:
        key = prompt.id, temperature
        if key not in self._truth:
            name = f"truth/{prompt.id}/T{temperature:g}/{self.tokens}"
            if name not in self.journal:
                with LLM(self.model, draft="none", method="pp", stages=1, dtype=DTYPE, costs="unit", threads=1,
                         margins=True) as llm:
                    for one in self.prompts:
                        said = llm.chat(asked(one), self.params(temperature))
                        self.journal.add(f"truth/{one.id}/T{temperature:g}/{self.tokens}",
                                         {"tokens": said.token_ids, "margins": said.margins})
            row = self.journal.rows[name]
            self._truth[key] = Truth(row["tokens"], row["margins"])
        return self._truth[key]

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure what the journal does not hold yet, as far as modules are there. Raises `AssertionError` for a text
        that is not the target's."""
        cells = [cell for cell in cells if self.modules.has(cell)]
        for pipeline, group in groupby(cells, lambda cell: cell.pipeline):
            left = [(cell, prompt) for cell in group for prompt in self.prompts
                    if self.key(cell, prompt) not in self.journal]
            if not left:
                continue
            with self.llm(*pipeline) as llm:
                for cell, prompt in left:
                    self._ask(llm, cell, prompt)

    def key(self, cell: Cell, prompt: FilePrompt) -> str:
        return f"{cell.key}/{prompt.id}/{self.tokens}"

    @contextmanager
    def llm(self, stages: int, draft: str, free: bool) -> Iterator[LLM]:
        names = ", ".join(f'"unit{k}"' for k in range(stages))
        time: dict[str, Any] = {"stages": stages, "costs": "unit"}
        if free:
            time = {"cluster": Cluster.parse(_FREE.format(stages=stages, names=names), "free draft", Path())}
        with LLM(self.model, draft=self.modules.draft(draft, stages), method="spd", dtype=DTYPE, threads=1,
                 margins=True, **time) as llm:
            yield llm

    def _ask(self, llm: LLM, cell: Cell, prompt: FilePrompt) -> None:
        llm.use(cell.method, width=cell.width, refresh=cell.refresh)
        truth = self.truth(prompt, cell.temperature)
        said = llm.chat(asked(prompt), self.params(cell.temperature))
        close = compare(truth, said.token_ids)
        sample = {"cell": cell.to_dict(), "prompt": prompt.id, "tokens": len(said.token_ids),
                  **{name: value for name, value in said.speculation.items()
                     if name in ("steps", "hits", "misses", "launched_rows", "wasted_rows", "draft_calls",
                                 "draft_rows", "fill")},
                  "near_tie": close, "wall_s": round(said.timing["wall_s"], 2)}
        self.journal.add(self.key(cell, prompt), sample)
        print(f"{self.key(cell, prompt)}: hit rate {sample['hits'] / max(1, sample['hits'] + sample['misses']):.1%}, "
              f"{sample['steps'] / sample['tokens']:.2f} steps per token, {sample['wall_s']:.0f} s", file=sys.stderr,
              flush=True)


def compare(truth: Truth, tokens: Sequence[int]) -> dict[str, float] | None:
    """None for the same text. One that leaves it where two picks stood closer than `NEAR`: the place and the margin.

    Raises `AssertionError` for any other text.
    """
    if list(tokens) == truth.tokens:
        return None
    place = next((k for k, (a, b) in enumerate(zip(truth.tokens, tokens)) if a != b), None)
    assert place is not None, f"a text of {len(tokens)} tokens instead of {len(truth.tokens)}"
    margin = truth.margins[place]
    assert margin < NEAR, f"token {place} is {tokens[place]}, not {truth.tokens[place]}, which led by {margin:.2f}"
    return {"place": place, "margin": margin}


def asked(prompt: FilePrompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.text}]
