"""Draft modules with all stages computing: acceptance and steps per token by number of stages.

    python -m fullpipe_lab.studies.modules --cell spd:DIR,spd,8 --cell spd:DIR+ngram,fullpipe,8,w8 [--cell ...]
        [--model smollm2-135m] [--prompts FILE ...] [--limit 2] [--tokens 64] [--journal FILE] [--write]

A cell is draft, method and number of stages, then w and a width, t and a temperature, r for refresh; drafts are joined
with +. Every stage step and every draft call takes one step. Each text must be that of `pp`; one that leaves it where
two picks stood closer than 0.25 (bfloat16 at 16 to 32) is counted as a near-tie. Each answer is in the journal when the
next begins: a run that is killed goes on where it was. `--write` keeps the receipt in lab/receipts/modules.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullpipe.cli.console import print_table
from fullpipe.errors import UsageError
from fullpipe.options import Options
from fullpipe.prompts import FilePrompt, choose
from fullpipe.request import SamplingParams
from fullpipe_lab.asking import Said, Simulated
from fullpipe_lab.files import Journal
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt

NEAR = 0.25  # of logits
SEED = 7


@dataclass(frozen=True, slots=True)
class Cell:
    """One set-up, asked all prompts."""

    draft: str
    method: str
    stages: int
    width: int | None = None
    temperature: float = 0.0
    refresh: bool | None = None

    @classmethod
    def of(cls, text: str) -> Cell:
        """Raises UsageError for what is no cell."""
        try:
            draft, method, stages, *more = text.split(",")
            values: dict[str, Any] = {}
            for one in more:
                name, kind = {"w": ("width", int), "t": ("temperature", float), "r": ("refresh", bool)}[one[0]]
                values[name] = kind(one[1:] or 1)
            return cls(draft.replace("+", ","), method, int(stages), **values)
        except (ValueError, KeyError, IndexError):
            raise UsageError(f"{text!r} is no cell", hint="Write DRAFT,METHOD,STAGES[,wN][,tX][,r].") from None

    @property
    def name(self) -> str:
        extras = [f"w{self.width}"] * (self.width is not None) + ["refresh"] * bool(self.refresh)
        return "/".join([self.draft, self.method, f"n{self.stages}", f"T{self.temperature:g}", *extras])


class Study:
    """Prompts, the target's own answers to them, and what was measured."""

    def __init__(self, model: str, prompts: Sequence[FilePrompt], tokens: int, journal: Journal) -> None:
        self._model, self._prompts, self._tokens, self._journal = model, prompts, tokens, journal

    def run(self, cell: Cell) -> None:
        """Measure what the journal lacks. Raises AssertionError for a text that is not the target's."""
        plain = Cell("none", "pp", 1, temperature=cell.temperature)
        for one in (plain, cell):
            left = [prompt for prompt in self._prompts if self._key(one, prompt) not in self._journal]
            if not left:
                continue
            options = Options.of(model=self._model, draft=one.draft, method=one.method, width=one.width,
                                 refresh=one.refresh, dtype="bfloat16", threads=1, margins=True)
            with Simulated(options, one.stages, costs="unit") as run:
                for prompt in left:
                    (said,) = run.ask([run.encode([{"role": "user", "content": prompt.text}])], SamplingParams(
                        max_tokens=self._tokens, temperature=one.temperature, seed=SEED))
                    truth = self._journal.rows.get(self._key(plain, prompt))
                    self._journal.add(self._key(one, prompt), _sample(one, prompt, said, truth))
                    print(self._key(one, prompt), file=sys.stderr, flush=True)

    def samples(self, cell: Cell) -> list[dict[str, Any]]:
        return [self._journal.rows[self._key(cell, prompt)] for prompt in self._prompts]

    def _key(self, cell: Cell, prompt: FilePrompt) -> str:
        return f"{self._model}/{cell.name}/{prompt.id}/{self._tokens}"


def _sample(cell: Cell, prompt: FilePrompt, said: Said, truth: dict[str, Any] | None) -> dict[str, Any]:
    stats = said.stats
    return {"cell": cell.name, "prompt": prompt.id, "tokens": said.tokens, "margins": said.margins,
            "steps": stats.steps, "hits": stats.hits, "misses": stats.misses, "draft_calls": stats.draft_calls,
            "draft_rows": stats.draft_rows, "near_tie": near_tie(truth, said.tokens) if truth else None}


def near_tie(truth: dict[str, Any], tokens: Sequence[int]) -> int | None:
    """Where a text leaves the target's at a near-tie; None for the same text. Raises AssertionError for any other."""
    if list(tokens) == truth["tokens"]:
        return None
    place = next((k for k, (a, b) in enumerate(zip(truth["tokens"], tokens)) if a != b), None)
    assert place is not None, f"a text of {len(tokens)} tokens instead of {len(truth['tokens'])}"
    margin = truth["margins"][place]
    lead = math.inf if margin is None else margin  # None: it had no rival
    assert lead < NEAR, f"token {place} is {tokens[place]}, not {truth['tokens'][place]}, which led by {lead:.2f}"
    return place


def row(cell: Cell, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a cell's answers say, over all prompts together."""
    hits, misses, steps = (sum(one[name] for one in samples) for name in ("hits", "misses", "steps"))
    return {"cell": cell.name, "prompts": len(samples), "hit_rate": round(hits / max(hits + misses, 1), 4),
            "steps_per_token": round(steps / sum(len(one["tokens"]) for one in samples), 4),
            "near_ties": sum(one["near_tie"] is not None for one in samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=Path, nargs="*")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--journal", type=Path, default=Path("modules-journal.jsonl"))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    cells = [Cell.of(text) for text in asked.cell]
    study = Study(asked.model, choose(asked.prompts, asked.limit), asked.tokens, Journal(asked.journal))
    for cell in cells:
        study.run(cell)
    rows = [row(cell, study.samples(cell)) for cell in cells]
    print_table(list(rows[0]), [[str(value) for value in one.values()] for one in rows])
    if asked.write:
        samples = [sample for cell in cells for sample in study.samples(cell)]
        save_receipt(study_receipt("modules", {"model": asked.model, "cells": rows}, samples), STUDIES / "modules.json")


if __name__ == "__main__":
    main()
