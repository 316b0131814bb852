"""The file that describes a cluster: devices, links, and what sits where. No torch.

The file is TOML. Its parts:

- `[cluster]` name, kind ("modelled" or "measured"), note (where the figures come from).
- `[target]` and `[draft]`: the shape of the models whose cost is imagined, for devices described by bandwidth
  and FLOP/s (a roofline). Devices described by curves or profiles do not need them.
- `[[devices]]` name, memory_gb, and one description of speed: `bandwidth_gb_s` with `tflop_s` (and
  `overhead_ms`); or `stage_ms` / `draft_ms`, a cost curve [[rows, milliseconds], ...]; or `profile`, a file of
  `fullpipe profile` (beside the cluster file), and `speed` relative to the machine that it was taken on; or
  `speed` alone, when every stage really runs here and its measured time is divided by it.
- `[links]` latency_ms and bandwidth_mbit_s between any two devices, with `[[links.pair]]` for those that differ.
- `[placement]` stages (a device each, in order), draft and engine (default: with stage 0), layers (how many
  each stage has; default: cut evenly by cost).

`checks` refuses what cannot be, with the line it stands on.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Curve = Annotated[list[tuple[Annotated[int, Field(ge=1)], Positive]], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(_Part):
    """Of a model that is only imagined. layer_params: weights of a layer. head_params: of the output matrix.
    hidden: width of a hidden state. kv_size: numbers that a token leaves in the cache of each layer. bits: of
    a weight; hidden states and cache have 16."""

    name: str
    layers: Annotated[int, Field(ge=1)]
    layer_params: Positive
    head_params: Positive
    hidden: Annotated[int, Field(ge=1)]
    kv_size: Annotated[int, Field(ge=1)]
    bits: Annotated[float, Field(gt=0, le=32)] = 16

    @property
    def num_layers(self) -> int:
        return self.layers

    @property
    def layer_bytes(self) -> float:
        return self.layer_params * self.bits / 8

    @property
    def head_bytes(self) -> float:
        return self.head_params * self.bits / 8

    @property
    def embedding_bytes(self) -> float:
        """It has the head's shape."""
        return self.head_bytes


class Device(_Part):
    """count: how many of them there are; then they are called name0, name1, ..."""

    name: str
    count: Annotated[int, Field(ge=1)] | None = None
    memory_gb: Positive | None = None
    bandwidth_gb_s: Positive | None = None
    tflop_s: Positive | None = None
    overhead_ms: NotNegative = 0.0
    stage_ms: Curve | None = None
    draft_ms: Curve | None = None
    profile: str | None = None
    speed: Positive | None = None

    @property
    def names(self) -> list[str]:
        return [self.name] if self.count is None else [f"{self.name}{index}" for index in range(self.count)]

    @property
    def kind(self) -> Literal["roofline", "curve", "profile", "measured"]:
        if self.bandwidth_gb_s is not None:
            return "roofline"
        if self.stage_ms is not None or self.draft_ms is not None:
            return "curve"
        return "profile" if self.profile is not None else "measured"

    @model_validator(mode="after")
    def _one_description(self) -> Self:
        ways = [self.bandwidth_gb_s is not None or self.tflop_s is not None,
                self.stage_ms is not None or self.draft_ms is not None,
                self.profile is not None or self.speed is not None]
        if sum(ways) != 1:
            raise ValueError("describe its speed in one way: bandwidth_gb_s with tflop_s, stage_ms or draft_ms, "
                             "or profile or speed")
        if (self.bandwidth_gb_s is None) != (self.tflop_s is None):
            raise ValueError("bandwidth_gb_s and tflop_s belong together")
        for curve in (self.stage_ms, self.draft_ms):
            if curve is not None and any(a[0] >= b[0] for a, b in pairwise(curve)):
                raise ValueError("a cost curve goes by rising numbers of rows")
        if self.overhead_ms and self.bandwidth_gb_s is None:
            raise ValueError("overhead_ms goes with bandwidth_gb_s; curves and profiles have it in their figures")
        return self


class Pair(_Part):
    ends: tuple[str, str]
    latency_ms: NotNegative
    bandwidth_mbit_s: Positive | None = None


class LinkTable(_Part):
    latency_ms: NotNegative | None = None
    bandwidth_mbit_s: Positive | None = None
    pair: list[Pair] = []


class Placement(_Part):
    stages: Annotated[list[str], Field(min_length=1)]
    draft: str | None = None
    engine: str | None = None
    layers: list[Annotated[int, Field(ge=0)]] | None = None


class About(_Part):
    name: str
    kind: Literal["modelled", "measured"]
    note: str = ""


class ClusterFile(_Part):
    """The file as it stands."""

    cluster: About
    target: Shape | None = None
    draft: Shape | None = None
    devices: Annotated[list[Device], Field(min_length=1)]
    links: LinkTable = LinkTable()
    placement: Placement

    @cached_property
    def blocks(self) -> dict[str, int]:
        """By a device's name the index of the block that describes it."""
        return {name: index for index, block in enumerate(self.devices) for name in block.names}
