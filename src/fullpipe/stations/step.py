"""A flight becomes a step here: behind it nothing knows requests."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fullpipe.messages import Flight
from fullpipe.models.step import Step
from fullpipe.stations.table import Tables


def step_of(flight: Flight, hidden: Tensor | None, tables: Tables) -> Step:
    """Make a step of a flight whose parts the tables have taken over. hidden: [rows, hidden] from the stage before;
    None: the rows are tokens."""
    parts = flight.parts
    if hidden is None:
        hidden = torch.tensor(list(chain.from_iterable(part.tokens for part in parts)), dtype=torch.int64)
    positions = np.fromiter(chain.from_iterable(part.positions for part in parts), np.int64)
    slots = np.fromiter(chain.from_iterable(part.slots for part in parts), np.int32)
    spans, reads, at = np.zeros((len(positions), 4), np.int64), [np.zeros(0, np.int32)], 0
    row = 0
    for part in parts:
        table = tables[part.arena]
        shared = [table.shared(part, own) for own in range(len(part))]
        line = table.committed_slots()[: max(shared, default=0)]
        branch = at + len(line)
        reads.append(line)
        for count, path in zip(shared, part.paths):
            spans[row] = at, at + count, branch, branch + len(path)
            branch += len(path)
            row += 1
        reads.append(np.fromiter(chain.from_iterable(part.paths), np.int32))
        at = branch
    return Step(hidden, positions, slots, np.concatenate(reads), spans)
