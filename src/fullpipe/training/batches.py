"""In which order a module sees its training text: a pure function of seed and step, so a run can go on anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

_POOL = 64  # batches whose samples are sorted by length together, so that little is padding


def epoch_batches(lengths: Sequence[int], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of samples, batch by batch; every sample once.

    lengths: of the samples. tokens: that a batch may hold at most, padding counted (a longer sample stands alone).
    """
    shuffler = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    batches: list[list[int]] = []
    for pool in _pools(order, lengths, tokens * _POOL):
        batches += _cut(sorted(pool, key=lambda index: -lengths[index]), lengths, tokens)
    shuffler.shuffle(batches)
    return batches


def _pools(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    sums = accumulate(lengths[index] for index in order)
    pools: dict[int, list[int]] = {}
    for index, total in zip(order, sums):
        pools.setdefault(total // tokens, []).append(index)
    return list(pools.values())


def _cut(longest_first: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in longest_first:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
