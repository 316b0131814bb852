"""Some tokens may not follow a path, whatever their logits are: allowed ids, bad words, ends that come too early. Pure
functions of the path. What a structure lets follow is `structure.Walk`'s."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from fullpipe.request import SamplingParams
from fullpipe.stations.bits import Bits, bits_of, put
from fullpipe.stations.structure import Place


def may_follow(params: SamplingParams, ends: Collection[int], place: Place, vocab: int) -> Bits | None:
    """Which of `vocab` tokens may follow; None: all. ends: the model's end tokens."""
    alone = [*_singled_out(params, ends, place)]
    if params.allowed_token_ids is None and not alone:
        return None
    if params.allowed_token_ids is None:
        found = np.full(-(-vocab // 8), 255, np.uint8)
    else:  # there may be many
        ids = np.array(params.allowed_token_ids, np.int64)
        allowed = np.zeros(vocab, np.bool_)
        allowed[ids[ids < vocab]] = True
        found = bits_of(allowed)
    put(found, alone, False)
    return found


def leading(params: SamplingParams, ends: Collection[int], place: Place, tokens: Sequence[int]) -> int:
    """How many of these tokens may follow, one behind the other."""
    allowed = None if params.allowed_token_ids is None else frozenset(params.allowed_token_ids)
    for at, token in enumerate(tokens):
        if allowed is not None and token not in allowed:
            return at
        if token in _singled_out(params, ends, place.then(tokens[:at])):
            return at
    return len(tokens)


def _singled_out(params: SamplingParams, ends: Collection[int], place: Place) -> Iterator[int]:
    """Ends before their time, and tokens that would complete a bad word."""
    if place.length < params.min_tokens:
        yield from ends
        yield from params.stop_token_ids
    if not (words := params.bad_word_ids):
        return
    before = place.last(max(map(len, words)) - 1)
    for word in words:
        start = len(before) - len(word) + 1
        if start >= 0 and tuple(before[start:]) == word[:-1]:
            yield word[-1]
