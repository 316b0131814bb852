"""The last stage says here how likely a prompt was, token by token, to requests that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullpipe.messages import ArenaId, Flight, Scored
from fullpipe.request import SamplingParams
from fullpipe.stations.sampling import RowContext, tell_logprobs
from fullpipe.stations.table import Tables

_AT_ONCE = 32  # rows: the logits of a prompt's chunk over a large vocabulary would be hundreds of megabytes

Logits = Callable[[list[int]], Tensor]
"""float [rows, vocab] of some rows of a flight."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Is a prompt row of which somebody asks how likely the prompt's next token is.

    index: of the row in its flight. position, token: of what follows it.
    """

    index: int
    arena: ArenaId
    position: int
    token: int
    params: SamplingParams


def asked(flight: Flight, tables: Tables) -> Iterator[Asked]:
    """Every such row of a flight whose parts the tables have taken over."""
    start = 0
    for part in flight.parts:
        table = tables[part.arena]
        for row in range(len(part)) if table.scored else ():
            if (following := part.positions[row] + 1) < table.prompt_len:
                yield Asked(start + row, part.arena, following, table.scored[following], table.params)
        start += len(part)


def score_prompts(flight: Flight, tables: Tables, logits: Logits, *, limit: int | None = None) -> list[Scored]:
    """How likely the prompts in a flight are, for those who ask. Costs nothing where nobody does.

    limit: the real vocabulary, as in `sampling.process`.
    """
    rows = list(asked(flight, tables))
    scores: list[Scored] = []
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        scores += _scores(logits([row.index for row in some]), some, limit)
    return scores


def _scores(logits: Tensor, rows: Sequence[Asked], limit: int | None) -> list[Scored]:
    tokens = [row.token for row in rows]
    given = logits[:, :limit]
    own = given.gather(1, torch.tensor(tokens)[:, None])
    ranks = (given > own).sum(1) + 1
    told = tell_logprobs(logits, [_as_logprobs(row) for row in rows], tokens, limit=limit)
    return [Scored(row.arena, row.position, rank, said) for row, rank, said in zip(rows, ranks.tolist(), told)]


def _as_logprobs(row: Asked) -> RowContext:
    """A row that asks of the token behind it what this one asks of the prompt's."""
    return RowContext(SamplingParams(logprobs=row.params.prompt_logprobs), row.position)
