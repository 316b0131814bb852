"""A small model guesses: the whole of it is on the draft station, with a cache of its own.

It expands any number of nodes per call under the tree mask. Candidates are ranked by its own logits plus
the very noise that the target will add at that position (DESIGN section 3).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from fullpipe.messages import ArenaId, Expansion, Flight, Part
from fullpipe.models.slice import Slice, load_slice
from fullpipe.models.weights import open_model
from fullpipe.stations.drafts.chains import go_on
from fullpipe.stations.sampling import rank
from fullpipe.stations.structure import Structures
from fullpipe.stations.target import SliceRunner
from fullpipe.stations.wanted import Wanted


class DraftModel:
    """Guesses with a whole model.

    vocab: number of real tokens that target and draft share; nothing beyond it is proposed. structures: what
    structured texts may say; without them guesses are held to no structure.
    """

    def __init__(self, slice: Slice, *, vocab: int | None = None, structures: Structures | None = None) -> None:
        self._runner = SliceRunner(slice, structures or Structures(strict=False))
        self._vocab = vocab

    @property
    def cache_slots(self) -> int:
        return self._runner.slice.slots

    @torch.inference_mode()
    def run(self, job: Flight) -> list[Expansion]:
        self._runner.open(job.opens)
        hidden = self._runner.forward(job, None)
        wanted = list(self._runner.wanted(job))
        expansions = []
        if wanted:
            tokens, logprobs = rank(self._runner.logits(hidden, wanted), [row.context() for row in wanted],
                                    job.fanout, limit=self._vocab)
            expansions = [Expansion(row.node, guesses, weights, [-1] * len(guesses))
                          for row, guesses, weights in zip(wanted, tokens, logprobs)]
            first: dict[ArenaId, tuple[Wanted, Expansion]] = {}
            for row, expansion in zip(wanted, expansions):
                first.setdefault(row.part.arena, (row, expansion))
            for row, expansion in first.values():
                go_on(row.part, row.row, expansion, job.least, partial(self._ask, job.fanout))
        self._runner.close(job.closes)
        return expansions

    def _ask(self, fanout: int, one: Part) -> tuple[list[int], list[float]]:
        """What follows the only row of a part."""
        flight = Flight(-1, [one])
        hidden, wanted = self._runner.forward(flight, None), list(self._runner.wanted(flight))
        (tokens,), (logprobs,) = rank(self._runner.logits(hidden, wanted), [wanted[0].context()], fanout,
                                      limit=self._vocab)
        return tokens, logprobs


def build_draft_model(*, model: str, dtype: str, vocab: int | None = None, device: str = "cpu",
                      kv_pool_mib: int | None = None, kv_cache_dtype: str = "auto", sharing: int = 1) -> DraftModel:
    """Load the whole model at path `model` as a draft, on a device."""
    files = open_model(Path(model))
    slice = load_slice(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=dtype,
                       device=device, kv_pool_mib=kv_pool_mib, kv_cache_dtype=kv_cache_dtype, sharing=sharing)
    return DraftModel(slice, vocab=vocab, structures=Structures(Path(model), vocab, strict=False))
