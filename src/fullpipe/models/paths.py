"""Steps are made here of what each row reads, for whoever holds paths: tests and the laboratory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from torch import Tensor

from fullpipe.models.step import Step


def step_of_paths(x: Tensor, paths: Sequence[Sequence[int]]) -> Step:
    """Make a step of rows by what each reads, slots in order of position. Those that stand together and begin with one
    slot are rows of one request. x: as in `Step`."""
    reads, spans = list[int](), list[tuple[int, int, int, int]]()
    for _, alike in groupby(paths, key=lambda path: path[0]):
        request = list(alike)
        longest, start = max(request, key=len), len(reads)
        reads += longest
        for path in request:
            shared = next((at for at, (a, b) in enumerate(zip(longest, path)) if a != b), len(path))
            spans.append((start, start + shared, len(reads), len(reads) + len(path) - shared))
            reads += path[shared:]
    positions, slots = [len(path) - 1 for path in paths], [path[-1] for path in paths]
    return Step(x, np.array(positions, np.int64), np.array(slots, np.int32), np.array(reads, np.int32),
                np.array(spans, np.int64).reshape(-1, 4))
