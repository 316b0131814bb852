"""Gumbel noise is a pure function of seed, position and token id here.

The next token of a sampled request is `argmax(processed_logits + gumbel(seed, position))`. Stages, draft
and tests must all see the same noise whatever machine they run on, whichever rows share a batch and in
whatever order they are computed, so there is no generator with a state: the counter-based Philox4x64-10,
keyed by (seed, position), is run from counter zero every time.

Nobody draws more of it than an answer needs. Noise that is wanted of a few tokens is drawn for them alone, and of a
whole vocabulary most often only what is loud matters (`stations/sampling.py:pick`): finding the loud tokens takes no
logarithms. Both are left to the native kernels; without these the whole vector is drawn. No value depends on that.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.kernels import Kernels
from fullpipe.kernels import load as load_kernels

_CACHED = 64  # vectors kept; at a vocabulary of 152k one is 0.6 MB
_LOUD = 6.0  # of 152k values 376 are above; half as many or twice as many cost about the same
_LEAST = math.floor(math.exp(-math.exp(-_LOUD)) * 2.0**64)  # the word of a value at _LOUD
_MANY = 4  # of so many tokens one takes as long alone as all do together

QUIET = _LOUD + 2.0**-20
"""No value that `loud` leaves out is above it; the second term is for the rounding of logarithms."""

FAINT = -3.604
"""No value at all is below it."""


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
    def draw() -> Tensor:
        return _noise(uniforms(seed, position, vocab)).to(device)

    return _whole.get((seed, position, torch.device(device)), vocab, draw)[:vocab]


def gumbel_of(seed: int, position: int, tokens: NDArray[np.int64], vocab: int) -> NDArray[np.float32]:
    """The noise of some tokens below `vocab`: the same values that `gumbel` has at their places."""
    kernels = load_kernels()
    if kernels is None or _MANY * len(tokens) > vocab:
        return gumbel(seed, position, vocab).numpy()[tokens]
    tokens, words = np.ascontiguousarray(tokens), np.empty(len(tokens), np.uint64)
    kernels.words_of(seed, position, tokens.ctypes.data, len(tokens), words.ctypes.data)
    return _noise(_uniform(words)).numpy()


def loud(seed: int, position: int, vocab: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The tokens below `vocab` with the most noise, in order, and their noise. All others have at most `QUIET`."""
    tokens, noise = _loud.get((seed, position), vocab, lambda: _find_loud(load_kernels(), seed, position, vocab))
    count = np.searchsorted(tokens, vocab)
    return tokens[:count], noise[:count]


def _find_loud(kernels: Kernels | None, seed: int, position: int,
               vocab: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    if kernels is None:
        whole = gumbel(seed, position, vocab).numpy()
        tokens = np.flatnonzero(whole >= _LOUD)
        return tokens, whole[tokens]
    room = vocab // 256 + 64
    while True:
        tokens, words = np.empty(room, np.int64), np.empty(room, np.uint64)
        found = kernels.words_from(seed, position, vocab, _LEAST, room, tokens.ctypes.data, words.ctypes.data)
        if found <= room:
            return tokens[:found].copy(), _noise(_uniform(words[:found])).numpy()
        room = found


def uniforms(seed: int, position: int, count: int) -> Tensor:
    """The uniform numbers behind the noise: float64 [count], each an odd multiple of 2**-53 in (0, 1)."""
    key = np.array([seed, position], np.uint64)
    return _uniform(np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64))


def _uniform(words: NDArray[np.uint64]) -> Tensor:
    """Turns words into uniform numbers, in place."""
    # 52 random bits as the mantissa of a float64 in [1, 2): two integer passes instead of a conversion,
    # which has no vector form before AVX-512. The subtraction is exact.
    np.right_shift(words, np.uint64(12), out=words)
    np.bitwise_or(words, np.uint64(0x3FF0000000000000), out=words)
    return torch.from_numpy(words.view(np.float64)).sub_(1 - 2.0**-53)


def _noise(uniform: Tensor) -> Tensor:
    """Turns uniform numbers into noise; those that come in are lost."""
    return uniform.log_().neg_().log_().neg_().float()


_Kept = TypeVar("_Kept")


class _Cache(Generic[_Kept]):
    """Keeps what was last drawn: the rows of a flight share their positions, and so do target and draft.

    Locked, for several pipelines of one process may run in threads of their own.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[tuple[object, ...], tuple[int, _Kept]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], vocab: int, draw: Callable[[], _Kept]) -> _Kept:
        """What was drawn for a vocabulary at least as large."""
        with self._lock:
            known = self._kept.pop(key, None)
            if known is None or known[0] < vocab:
                known = vocab, draw()
            self._kept[key] = known
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return known[1]


_whole: _Cache[Tensor] = _Cache(_CACHED)
_loud: _Cache[tuple[NDArray[np.int64], NDArray[np.float32]]] = _Cache(_CACHED)
