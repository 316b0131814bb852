"""One training forward: a batch of texts, a filling of the pipeline, and how far the module is from the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fullpipe.models.spd_module import Layout, PipelineDraftModule
from fullpipe.training.features import FeatureStore, Outer
from fullpipe.training.objective import Filling, divergence

_ROWS = 1024  # rows whose logits over the draft vocabulary stand in memory at a time, where they are made again


@dataclass(frozen=True, slots=True)
class Batch:
    """features: [batch, size, bounds, hidden], the embedding first where the module reads it. final: [batch, size,
    hidden], the target's last hidden states. best: int64 [batch, size], its likeliest next tokens. learn: bool [batch,
    size], positions whose next token is a label."""

    features: Tensor
    final: Tensor
    best: Tensor
    learn: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.features.to(device), self.final.to(device), self.best.to(device), self.learn.to(device))


def make_batch(indices: Sequence[int], tokens: Sequence[Tensor], learn: Sequence[Tensor], store: FeatureStore,
               outer: Outer, columns: Sequence[int]) -> Batch:
    """columns: for each bound of the module, its column in the store; -1 for the embedding. tokens: int64 [s] and
    learn: bool [s] (is this token a label) of every sample."""
    size = max(len(tokens[index]) for index in indices)
    stored = [store[index] for index in indices]
    embedded = outer.embed(torch.stack([_to(tokens[index], size) for index in indices]))
    hidden = torch.stack([_to(one, size) for one, _ in stored]).to(embedded.dtype)
    features = torch.stack([embedded if column < 0 else hidden[:, :, column] for column in columns], 2)
    labels = torch.stack([_to(learn[index][1:], size) for index in indices])
    return Batch(features, hidden[:, :, -1], torch.stack([_to(best, size) for _, best in stored]), labels)


def _to(x: Tensor, size: int) -> Tensor:
    """Rows of zeros added up to `size`."""
    out = x.new_zeros((size, *x.shape[1:]))
    out[: len(x)] = x
    return out


@lru_cache(maxsize=8)  # a mask is (blocks x size)^2 bytes where a module has several layers
def layout_of(types: tuple[int, ...], complete: int, size: int, layers: int, device: torch.device) -> Layout:
    return Layout.of(types, complete, size, layers).to(device)


class Student(nn.Module):
    """The module with its loss, as one thing that can be spread over devices.

    outer: on the device of the batches. in_vocab: int64 [vocab], index of a token in the draft vocabulary or -1.
    recompute_logits: make the logits a part at a time, and again in the backward pass, instead of keeping them all.
    """

    _in_vocab: Tensor

    def __init__(self, module: PipelineDraftModule, outer: Outer, in_vocab: Tensor, *, loss: str,
                 recompute_logits: bool = False) -> None:
        super().__init__()
        self.module = module
        self._outer = outer
        self.register_buffer("_in_vocab", in_vocab, persistent=False)
        self._loss, self._recompute = loss, recompute_logits

    def answers(self, batch: Batch, filling: Filling) -> tuple[Tensor, Tensor, Tensor]:
        """For every position whose next token is a label: the module's hidden state [rows, hidden], the target's
        [rows, hidden], and the target's token int64 [rows]."""
        complete = len(self.module.shape.bounds) - 1
        layout = layout_of(filling.types, complete, batch.features.shape[1], self.module.shape.num_layers,
                           batch.features.device)
        hidden, _ = self.module(layout.rows(self.module, batch.features), layout.positions(), layout.masks,
                                layout.queries)
        return hidden[batch.learn], batch.final[batch.learn], batch.best[batch.learn]

    def forward(self, batch: Batch, filling: Filling) -> tuple[Tensor, Tensor]:
        """The loss, and int64 [3]: labels, labels in the draft vocabulary, and of these those that the module got."""
        hidden, final, best = self.answers(batch, filling)
        known = self._in_vocab[best] >= 0
        wanted = self._in_vocab[best[known]]
        counts = torch.tensor([len(best), len(wanted), 0])
        total = hidden.sum() * 0.0  # joined to the graph even where no label counts
        for rows, target, token in zip(*(torch.split(part, _ROWS) for part in (hidden[known], final[known], wanted))):
            if self._recompute and torch.is_grad_enabled():
                loss, right = checkpoint(self._part, rows, target, token, use_reentrant=False)
            else:
                loss, right = self._part(rows, target, token)
            total = total + loss
            counts[2] += right.cpu()
        return filling.weight * total / max(1, len(wanted)), counts

    def _part(self, rows: Tensor, final: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.module.logits(rows)
        with torch.no_grad():
            said = self._outer.logits(final)
        return divergence(scores, said, self._loss).sum(), (scores.argmax(-1) == wanted).sum()
