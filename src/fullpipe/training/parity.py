"""The forward that a checkpoint keeps, with what it must say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fullpipe.models.config import ModelConfig
from fullpipe.models.spd_checkpoint import ModuleConfig, ParityFixture, as_stored
from fullpipe.models.spd_module import PipelineDraftModule, fixture_logits
from fullpipe.training.features import Outer

_ROWS = 12


@torch.no_grad()
def make_fixture(config: ModuleConfig, tensors: Mapping[str, Tensor], target: ModelConfig, outer: Outer,
                 features: Tensor) -> ParityFixture:
    """A dozen tokens of a text in a row, deepest first, the newest asked. features: [s, bounds, hidden]."""
    count, kinds = min(_ROWS, len(features)), len(config.bounds)
    types = [max(0, kinds - 1 - max(0, row - (count - kinds))) for row in range(count)]
    rows = {kind: torch.tensor([row for row in range(count) if types[row] == kind]) for kind in sorted(set(types))}
    read = {kind: features[where, : kind + 1].float() for kind, where in rows.items()}
    blank = ParityFixture(read, rows, torch.arange(count), torch.ones(count, count).tril().bool(),
                          torch.tensor([count - 1]), torch.zeros(1, config.draft_vocab_size))
    module = PipelineDraftModule(config, target)
    module.load_state_dict({name: value.float() for name, value in as_stored(tensors).items()})
    module.adopt(outer.final_norm, outer.head_rows.float() if config.shared_head else None)
    return ParityFixture(blank.features, blank.rows, blank.positions, blank.mask, blank.queries,
                         fixture_logits(module, blank))
