"""What a training run is asked to do, checked before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fullpipe.assembly import stage_ends
from fullpipe.errors import UsageError
from fullpipe.models.config import ModelConfig
from fullpipe.training.objective import LOSSES

Kind = Literal["spd", "exit"]
_MOST_BOUNDS = 5  # a further one costs k x hidden x hidden weights for each type k above it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A training run. Everything that decides what comes out is here, so a run goes on only with an equal plan.

    stages: numbers of stages to train for. bounds: layers finished at each tap; None: `default_bounds`. layers: of the
    module. init_layers: layers of the target that they start as; None: from its middle. shared_head: use the target's
    head, frozen, instead of one of its own. loss: see `objective.divergence`.
    max_length: tokens of a text. batch_tokens: of a batch, on each device. accumulate: batches per step, whose loss is
    the mean over all of their labels.
    epochs, steps, minutes: the run ends at whichever comes first; the learning rate has fallen to 2% by then.
    rate: highest learning rate, after `warmup` steps. clip: greatest norm of a gradient.
    power, refreshed, ahead: see `objective.Fillings`. precision: "bf16" (weights stay float32) or "fp32".
    checkpointing: compute layers again in the backward pass; recompute_logits: logits too.
    """

    kind: Kind = "spd"
    stages: tuple[int, ...] = (8,)
    layers: int = 1
    bounds: tuple[int, ...] | None = None
    init_layers: tuple[int, ...] | None = None
    shared_head: bool = True
    loss: str = "forward-kl"
    max_length: int = 512
    batch_tokens: int = 1024
    accumulate: int = 1
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    power: float = 0.0
    refreshed: float = 0.15
    ahead: float = 0.15
    validation: float = 0.05
    seed: int = 0
    precision: str = "bf16"
    checkpointing: bool = False
    recompute_logits: bool = False

    def __post_init__(self) -> None:
        for ok, what in (
            (bool(self.stages) and min(self.stages) >= 1, "name at least one number of stages, 1 or more"),
            (self.layers >= 1, f"a module needs 1 layer or more (got {self.layers})"),
            (self.loss in LOSSES, f"unknown loss {self.loss!r}; known are {', '.join(LOSSES)}"),
            (self.kind == "spd" or len(self.stages) == 1, "an exit head is for one number of stages"),
            (self.max_length >= 16, f"texts need 16 tokens or more (got {self.max_length})"),
            (self.batch_tokens >= 1 and self.accumulate >= 1, "a step needs at least one token"),
            (any(length is not None for length in (self.epochs, self.steps, self.minutes)),
             "say how long: epochs, steps or minutes"),
            (all(length is None or 0 < length < math.inf for length in (self.epochs, self.steps, self.minutes)),
             "epochs, steps and minutes must be above 0"),
            (math.isfinite(self.power), f"the fill power must be a number (got {self.power})"),
            (0 <= self.weight_decay < math.inf, f"the weight decay must be 0 or more (got {self.weight_decay})"),
            (min(self.rate, self.clip) > 0, "the learning rate and the clip must be above 0"),
            (self.warmup >= 0, f"the warm-up must be 0 steps or more (got {self.warmup})"),
            (min(self.refreshed, self.ahead) >= 0 and self.refreshed + self.ahead <= 1,
             "the shares of refreshed and ahead fillings must be 0 or more, and 1 at most together"),
            (self.precision in ("bf16", "fp32"), f"unknown precision {self.precision!r}; known are bf16 and fp32"),
            (self.init_layers is None or len(self.init_layers) == self.layers,
             "name one of the target's layers for each layer of the module"),
        ):
            if not ok:
                raise UsageError(what)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def ends(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """Layers finished after each stage, for each number of stages: the cuts that the engine makes."""
        return tuple(stage_ends(config, stages) for stages in self.stages)

    def bounds_for(self, config: ModelConfig) -> tuple[int, ...]:
        """Raises `UsageError` for bounds that the module cannot have."""
        bounds = self.bounds if self.bounds is not None else default_bounds(self.kind, self.ends(config))
        first = bounds[0] == 0 if self.kind == "spd" else len(bounds) == 1 and bounds[0] >= 1
        if not first or list(bounds) != sorted(set(bounds)) or bounds[-1] > config.num_layers:
            wanted = "0, then rising numbers of layers" if self.kind == "spd" else "one number of layers, above 0"
            raise UsageError(f"taps {','.join(map(str, bounds))} cannot be: {wanted}, {config.num_layers} at most",
                             hint="Leave the taps out for a choice that fits the stages.")
        return bounds

    def init_for(self, config: ModelConfig) -> tuple[int, ...]:
        """The target's layers that the module's start as: neighbours from the middle, unless they are named."""
        first = (config.num_layers - self.layers) // 2
        layers = self.init_layers or tuple(range(first, first + self.layers))
        if max(layers) >= config.num_layers or min(layers) < 0:
            raise UsageError(f"the target has layers 0 to {config.num_layers - 1}, not {max(layers)}")
        return layers


def default_bounds(kind: Kind, ends: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Where to tap. An exit head: after stage 1. SPD: the embedding, the end of the first stage, then about every
    quarter, and all layers; each at the end of a stage of the finest cut, where features cross to the next anyway."""
    finest = max(ends, key=len)
    total = finest[-1]
    if kind == "exit":
        return (max(1, finest[0]),)
    between = sorted({end for end in finest if 0 < end < total})
    if len(between) > _MOST_BOUNDS - 2:
        wanted = [between[0], *(between[0] + (total - between[0]) * part / (_MOST_BOUNDS - 2)
                                for part in range(1, _MOST_BOUNDS - 2))]
        between = sorted({min(between, key=lambda end: abs(end - aim)) for aim in wanted})
    return (0, *between, total)
