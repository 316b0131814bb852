"""Baselines that no user would choose: shares of a flight that nobody's guesses can change."""

from __future__ import annotations

from collections.abc import Sequence as Many

from fullpipe.costs import Machine
from fullpipe.errors import UsageError
from fullpipe.methods import Chosen, FullPipe, Load, PlainPipeline
from fullpipe.sequences.sequence import Sequence


class Balanced(PlainPipeline):
    """No guessing, and as many rows in every flight as keep all stages equally busy: with `running` sequences on n
    stages, running / n, rounded up, of those that have waited longest. Without it sequences that once landed together
    stay together for ever, and the pipeline carries one crowded flight. It is what pipeline-parallel servers do with
    microbatches."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self._num_stages = num_stages

    def launch(self, sequences: Many[Sequence], load: Load) -> Chosen:
        limit = -(-load.running // self._num_stages)
        waiting = sorted(sequences, key=lambda one: (one.waiting_since, one.request.id))
        return super().launch(waiting, load)[:limit]


class Separate(FullPipe):
    """Every sequence gets its whole width, whatever that costs the others: it never learns what rows cost."""

    def meet(self, machine: Machine) -> None:
        """It does not want to know."""


class Equal(Separate):
    """Every sequence gets the same share of a flight's rows, whatever its guesses are worth.

    rows: of a flight, shared by those that run; at least one each.
    """

    def __init__(self, rows: int, *, width: int) -> None:
        if rows < 1:
            raise UsageError(f"a flight needs at least one row (got {rows})")
        super().__init__(width=width)
        self._rows_together, self._full_width, self._full_draft_width = rows, width, self.draft_width

    def launch(self, sequences: Many[Sequence], load: Load) -> Chosen:
        self.width = min(self._full_width, max(1, self._rows_together // max(load.running, 1)))
        return super().launch(sequences, load)

    def expand(self, sequences: Many[Sequence], load: Load) -> Chosen:
        self.draft_width = min(self._full_draft_width, max(1, self._rows_together // max(len(sequences), 1)))
        return super().expand(sequences, load)
