"""A small model guesses: the whole of it is on the draft station, with slots of its own.

It expands any number of nodes per call under the tree mask. Candidates are ranked by its own logits plus
the very noise that the target will add at that position (DESIGN section 3).
"""

from __future__ import annotations

from pathlib import Path

import torch

from fullpipe.messages import ArenaId, Expansion, Flight, Part
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.dtypes import DTYPES
from fullpipe.models.weights import open_model
from fullpipe.stations.sampling import rank
from fullpipe.stations.target import SliceRunner, Wanted


class DraftModel:
    """Guesses with a whole model.

    vocab: number of real tokens that target and draft share; nothing beyond it is proposed.
    """

    def __init__(self, slice: DecoderSlice, *, vocab: int | None = None) -> None:
        self._runner = SliceRunner(slice)
        self._vocab = vocab

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
                self._go_on(job, row, expansion)
        self._runner.close(job.closes)
        return expansions


    def _go_on(self, job: Flight, row: Wanted, expansion: Expansion) -> None:
        """Guess further along the likeliest chain, a step at a time, while there are slots and it is likely enough."""
        part, path, best, chain = row.part, row.part.paths[row.row], 0, 0.0
        for step, slot in enumerate(part.ahead, 1):
            chain += min(expansion.logprobs[best], 0.0)
            if chain < job.least:
                return
            path = [*path, slot]
            one = Part(part.arena, [], [-1], [expansion.tokens[best]], [part.positions[row.row] + step], [slot], [path],
                       [True])
            flight = Flight(job.id, [one])
            hidden = self._runner.forward(flight, None)
            (wanted,) = self._runner.wanted(flight)
            (tokens,), (logprobs,) = rank(self._runner.logits(hidden, [wanted]), [wanted.context()], job.fanout,
                                          limit=self._vocab)
            expansion.computed.append(best)
            parents = [best] * len(tokens)
            best = len(expansion.tokens)
            expansion.tokens += tokens
            expansion.logprobs += logprobs
            expansion.parents += parents


def build_draft_model(*, model: str, dtype: str, vocab: int | None = None) -> DraftModel:
    """Load the whole model at path `model` as a draft."""
    files = open_model(Path(model))
    slice = DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=DTYPES[dtype])
    return DraftModel(slice, vocab=vocab)
