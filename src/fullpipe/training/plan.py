"""What a training run is asked to do, checked before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fullpipe.assembly import stage_ends
from fullpipe.errors import UsageError
from fullpipe.options import option

if TYPE_CHECKING:
    from fullpipe.models.config import ModelConfig

LOSSES = ("forward-kl", "reverse-kl", "total-variation")
Kind = Literal["spd", "exit"]
_MOST_BOUNDS = 5  # a further one costs k x hidden x hidden weights for each type k above it


def listed(least: int, help: str, *flags: str) -> Any:
    """An option that is a list of numbers from `least` on, or is not given."""
    return field(default=None, metadata={"help": help, "flags": flags, "least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What a training run uses besides; nothing of it decides what comes out, but for the vocabulary."""

    vocab: Path | None = option(None, "A draft vocabulary of `fullpipe train vocab`.", metavar="FILE")
    vocab_size: int = option(8192, "Without --vocab: the tokens said most.")
    threads: int | None = option(None, "Compute threads.")
    save_minutes: float = option(2.0, "Minutes between saves.")
    features: Path | None = option(None, "Where the target's hidden states are kept, 2 bytes a number; runs on the "
                                   "same text can share them. Default: in --out.", metavar="DIR")
    feature_taps: tuple[int, ...] | None = listed(1, "Further layers to keep there, for other runs.")

    def __post_init__(self) -> None:
        for ok, what in (
            (self.vocab_size >= 1, f"the vocabulary needs 1 token or more (got {self.vocab_size})"),
            (self.save_minutes > 0, f"the minutes between saves must be above 0 (got {self.save_minutes:g})"),
        ):
            if not ok:
                raise UsageError(what)


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
    stages: tuple[int, ...] = option((8,), "Stages of the pipelines that it will draft for.")
    layers: int = option(1, "Decoder layers of the module.")
    bounds: tuple[int, ...] | None = listed(0, "Layers finished where hidden states are read, 0 being the embedding. "
                                            "Default: chosen for the stages.", "--taps")
    init_layers: tuple[int, ...] | None = listed(0, "Layers of the target that the module's start as. Default: from "
                                                 "its middle.")
    shared_head: bool = option(True, "Use the target's head, frozen, or train one.")
    loss: str = option("forward-kl", "forward-kl, reverse-kl or total-variation.")
    max_length: int = option(512, "Tokens of a text; longer ones are cut into several.")
    batch_tokens: int = option(1024, "Tokens of a batch, on each device.")
    accumulate: int = option(1, "Batches per step.")
    epochs: float | None = option(None, "Passes over the text. Default: 1, without --steps and --minutes.")
    steps: int | None = option(None, "Steps at most.")
    minutes: float | None = option(None, "Minutes at most, earlier ones of the same run counted.")
    rate: float = option(1e-3, "Highest learning rate.", "--lr")
    warmup: int = option(50, "Steps until it is reached.")
    weight_decay: float = option(0.0, "As in AdamW.")
    clip: float = option(1.0, "Greatest norm of a gradient.")
    power: float = option(0.0, "The loss with f tokens in flight counts (f / stages) ** POWER: above 0 a full pipeline "
                          "counts more.", "--fill-power")
    refreshed: float = option(0.15, "Share of batches in which the newest token is already in flight.")
    ahead: float = option(0.15, "Share in which drafts run ahead of the launches.")
    validation: float = option(0.05, "Share of the texts that is held out.")
    seed: int = option(0, "Of the order of the text, and of what is drawn.")
    precision: str = option("bf16", "bf16 (weights stay fp32), or fp32.")
    checkpointing: bool = option(False, "Compute layers again in the backward pass: less memory, more time.",
                                 "--gradient-checkpointing")
    recompute_logits: bool = option(False, "The same for logits over the draft vocabulary.")

    def __post_init__(self) -> None:
        for ok, what in (
            (bool(self.stages) and min(self.stages) >= 1, "name at least one number of stages, 1 or more"),
            (self.layers >= 1, f"a module needs 1 layer or more (got {self.layers})"),
            (self.loss in LOSSES, f"unknown loss {self.loss!r}; known are {', '.join(LOSSES)}"),
            (self.kind == "spd" or len(self.stages) == 1, "an exit head is for one number of stages"),
            (self.max_length >= 16, f"texts need 16 tokens or more (got {self.max_length})"),
            (self.batch_tokens >= 1 and self.accumulate >= 1, "a step needs at least one token"),
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

    @property
    def passes(self) -> float | None:
        """Passes over the text at most: one where nothing else ends the run."""
        return 1.0 if self.epochs is None and self.steps is None and self.minutes is None else self.epochs

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
