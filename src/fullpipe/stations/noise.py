"""Gumbel noise is a pure function of seed, position and token id here.

The next token of a sampled request is `argmax(processed_logits + gumbel(seed, position))`. Stages, draft
and tests must all see the same noise whatever machine they run on, whichever rows share a batch and in
whatever order they are computed, so there is no generator with a state: the counter-based Philox4x64-10,
keyed by (seed, position), is run from counter zero every time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

_CACHED = 64  # vectors kept; at a vocabulary of 152k one is 0.6 MB


def gumbel(seed: int, position: int, vocab: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise for the token at `position`: float32 [vocab], shared, not to be written to.

    The first V values are the same for every `vocab` >= V, so that a target and a draft whose
    vocabularies are padded differently agree on all ids they share.

    seed: 0 <= seed < 2**64. position: that of the token to be picked, 0 <= position < 2**64.

    How exact the samples are. Take the top 52 bits m of each Philox word: u = (m + 1/2) / 2**52 lies
    strictly between 0 and 1 and is exact in float64, so `-log(-log(u))` is finite: -3.60 to 36.74. What
    lies beyond has probability 2**-53 a value, 2e-11 over a vocabulary of 152k. Rounding the result to
    float32 moves a value by at most 2**-21 below 16 (only one value in nine million lies above). The gap
    between best and second best of Gumbel-perturbed logits is below e with probability at most
    1 - exp(-e), whatever the logits, so moving each score by 2**-21 changes the picked token with
    probability below 1e-6: far less than one bfloat16 rounding of a logit does.

    The logarithms are taken in float64 on the CPU, where implementations differ in the last bit at most.
    Rounding to float32 swallows that, save for about one value in 10**8.
    """
    return _cache.get(seed, position, vocab, torch.device(device))


def uniforms(seed: int, position: int, count: int) -> Tensor:
    """The uniform numbers behind the noise: float64 [count], each an odd multiple of 2**-53 in (0, 1)."""
    key = np.array([seed, position], np.uint64)
    words = np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64)
    # 52 random bits as the mantissa of a float64 in [1, 2): two integer passes instead of a conversion,
    # which has no vector form before AVX-512. The subtraction is exact.
    np.right_shift(words, np.uint64(12), out=words)
    np.bitwise_or(words, np.uint64(0x3FF0000000000000), out=words)
    return torch.from_numpy(words.view(np.float64)).sub_(1 - 2.0**-53)


class _Cache:
    """Keeps the last few vectors: the rows of a flight share their positions, and so do target and draft.

    Locked, for several pipelines of one process may run in threads of their own.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, seed: int, position: int, vocab: int, device: torch.device) -> Tensor:
        key = (seed, position, device)
        with self._lock:
            noise = self._kept.pop(key, None)
            if noise is None or len(noise) < vocab:
                noise = uniforms(seed, position, vocab).log_().neg_().log_().neg_().float().to(device)
            self._kept[key] = noise
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return noise[:vocab]


_cache = _Cache(_CACHED)
