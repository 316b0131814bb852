"""A slice of the model is a station: it takes flights in, and gives hidden states or tokens out.

`SliceRunner` is what target stages and a draft model share: slot tables per request, and the way from a flight's
integers to a decoder step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fullpipe.errors import UsageError
from fullpipe.messages import ArenaId, Flight, Landed, Opening, Scored
from fullpipe.models.lora import open_merged
from fullpipe.models.slice import Slice, load_slice
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from fullpipe.stations.base import Tapped
from fullpipe.stations.sampling import pick, tell_logprobs, typical
from fullpipe.stations.scores import score_prompts
from fullpipe.stations.step import step_of
from fullpipe.stations.structure import CannotFollow, Structures
from fullpipe.stations.table import Tables
from fullpipe.stations.wanted import Wanted


class SliceRunner:
    """Runs flights through one decoder slice, and knows the requests that they are of. structures: of their texts."""

    def __init__(self, slice: Slice, structures: Structures | None = None) -> None:
        self.slice, self._structures = slice, structures or Structures()
        self._tables = Tables()

    def open(self, openings: list[Opening]) -> None:
        self._tables.open(openings)

    def close(self, arenas: list[ArenaId]) -> None:
        self._tables.close(arenas)

    def forward(self, flight: Flight, hidden: Tensor | None) -> Tensor:
        """One step. hidden: [rows, hidden] from the stage before, None at the first. Returns the same shape."""
        return self.slice.forward(self._step(flight, hidden))

    def forward_tapped(self, flight: Flight, hidden: Tensor | None, taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same, and what the slice makes on the way, [rows, len(taps), hidden] (see `DecoderSlice.forward`)."""
        return self.slice.forward(self._step(flight, hidden), taps)

    def _step(self, flight: Flight, hidden: Tensor | None) -> Step:
        for part in flight.parts:
            self._tables[part.arena].apply(part)
        return step_of(flight, hidden, self._tables)

    def wanted(self, flight: Flight) -> Iterator[Wanted]:
        start = 0
        for part in flight.parts:
            for row in range(len(part)):
                if part.wants[row]:
                    yield Wanted(start + row, part, row, self._tables[part.arena], self._structures)
            start += len(part)

    def logits(self, hidden: Tensor, wanted: list[Wanted]) -> Tensor:
        """float32 [len(wanted), vocab] of those rows."""
        return self.slice.logits(hidden[torch.tensor([row.index for row in wanted])])

    def scores(self, flight: Flight, hidden: Tensor, limit: int | None) -> list[Scored]:
        """How likely the prompts in a flight are, for requests that ask (`scores.score_prompts`)."""
        return score_prompts(flight, self._tables, lambda rows: self.slice.logits(hidden[torch.tensor(rows)]),
                             limit=limit)


class ModelStage:
    """Is a stage of the target. The last one picks the token that follows each wanted row.

    vocab: number of real tokens; logits beyond it (padding of the matrix) are never picked.
    margins: report how far each pick stands above the second best.
    taps: hidden states to send to the draft station, of every row, prompt rows too (see `DecoderSlice.forward`).
    structures: knows what structured texts may say.
    """

    def __init__(self, slice: Slice, *, is_last: bool, vocab: int | None = None, margins: bool = False,
                 taps: Sequence[int] = (), structures: Structures | None = None) -> None:
        self._runner = SliceRunner(slice, structures)
        self._is_last, self._vocab, self._margins, self._taps = is_last, vocab, margins, list(taps)

    @property
    def cache_slots(self) -> int:
        return self._runner.slice.slots

    @torch.inference_mode()
    def run(self, flight: Flight, hidden: Tensor | None) -> Tensor | Landed | Tapped:
        self._runner.open(flight.opens)
        features: Tensor | None = None
        if self._taps:
            hidden, features = self._runner.forward_tapped(flight, hidden, self._taps)
        else:
            hidden = self._runner.forward(flight, hidden)
        answer = self._pick(flight, hidden) if self._is_last else hidden
        self._runner.close(flight.closes)
        return answer if features is None else Tapped(answer, self._taps, features)

    def _pick(self, flight: Flight, hidden: Tensor) -> Landed:
        wanted, prompts = list(self._runner.wanted(flight)), self._runner.scores(flight, hidden, self._vocab)
        if not wanted:
            return Landed(0.0, flight.id, prompts=prompts)
        logits, rows = self._runner.logits(hidden, wanted), [row.context() for row in wanted]
        tokens, margins = pick(logits, rows, limit=self._vocab, margins=self._margins)
        others = typical(logits, rows, tokens, limit=self._vocab)
        told = tell_logprobs(logits, rows, tokens, limit=self._vocab)
        nodes = [row.node for row in wanted]
        stuck = [(node, str(token)) for node, token in zip(nodes, tokens) if isinstance(token, CannotFollow)]
        return Landed(0.0, flight.id, nodes, [0 if isinstance(token, CannotFollow) else token for token in tokens],
                      margins, others, told, prompts=prompts, stuck=stuck)


def build_stage(*, model: str, first: int, last: int, is_first: bool, is_last: bool, dtype: str,
                vocab: int | None = None, margins: bool = False, taps: list[int] | None = None, device: str = "cpu",
                kv_pool_mib: int | None = None, kv_cache_dtype: str = "auto", sharing: int = 1,
                lora: str | None = None) -> ModelStage:
    """Load layers `first` (inclusive) to `last` (exclusive) of the model at path `model` as a stage on a device.

    taps: after how many layers of the model hidden states go to the draft station. Raises `UsageError` unless they
    rise and lie above `first` and not above `last`: others are not made here.
    lora: path of an adapter to merge into them.
    """
    taps = taps or []
    if taps != sorted({*taps}) or not all(first < tap <= last for tap in taps):
        raise UsageError(f"layers {first} to {last} cannot be tapped at {taps}",
                         hint=f"Give rising numbers of finished layers from {first + 1} to {last}.")
    files = open_merged(Path(model), Path(lora)) if lora else open_model(Path(model))
    slice = load_slice(files, first, last, has_embedding=is_first, has_head=is_last, dtype=dtype, device=device,
                       kv_pool_mib=kv_pool_mib, kv_cache_dtype=kv_cache_dtype, sharing=sharing)
    return ModelStage(slice, is_last=is_last, vocab=vocab, margins=margins, taps=taps,
                      structures=Structures(Path(model), vocab))
