"""A cluster in a file: devices, links, and what sits where. No torch.

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

Everything that cannot be is refused with the line it stands on.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullpipe.cluster.partition import cut
from fullpipe.cluster.profile import Profile
from fullpipe.errors import UsageError
from fullpipe.pipeline.links import Link, Links
from fullpipe.stations.drafts.names import ModuleSize, module_folder

_MESSAGE_BYTES = 128  # of a flight beside its rows
_ROW_BYTES = 64  # of a row beside its hidden state: token, position, slot, path
_LOOPBACK = Link()
_PACE_ROWS, _PACE_CONTEXT = (1, 2, 4, 8, 16, 32, 64, 256), 512
_NGRAM_CALL_S, _NGRAM_ROW_S = 5e-5, 4e-5
_MODULE_BITS = 16  # of a draft module's weights, whatever the target's
_HEADER = re.compile(r"\s*\[\[?[^,\[\]]+\]\]?\s*(#|$)")  # of a table; a line of an array has commas
_LONG_TEXT = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'')

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Curve = Annotated[list[tuple[Annotated[int, Field(ge=1)], NotNegative]], Field(min_length=1)]


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


@dataclass(frozen=True)
class Cluster:
    """A cluster that holds together: every name is known, every link is there, everything fits.

    file: its description. text: as it was read. folder: where its profiles are looked for. profiles: of the
    devices that name one, by block.
    """

    file: ClusterFile
    text: str
    folder: str
    profiles: Mapping[str, Profile]

    @property
    def name(self) -> str:
        return self.file.cluster.name

    @property
    def num_stages(self) -> int:
        return len(self.file.placement.stages)

    @property
    def is_measured(self) -> bool:
        """Whether costs come from running the stages or the draft, so that two runs differ."""
        names = [*self.file.placement.stages, self.device_of("draft")]
        return any(self._device(name).kind == "measured" for name in names)

    @property
    def draft_is_curve(self) -> bool:
        """Whether a draft call's cost is given as it is, whoever drafts."""
        return self._device(self.device_of("draft")).draft_ms is not None

    @property
    def draft_is_measured(self) -> bool:
        """Whether a draft call costs what it takes here."""
        return self._device(self.device_of("draft")).kind == "measured"

    def device_of(self, station: str) -> str:
        """Where a station ("stage 3", "draft", "engine") sits."""
        place = self.file.placement
        if station.startswith("stage "):
            return place.stages[int(station.removeprefix("stage "))]
        return (place.draft if station == "draft" else place.engine) or place.stages[0]

    # ---- time --------------------------------------------------------------------------------------------

    def stage_seconds(self, index: int, rows: int, context: int, measured: float = 0.0) -> float:
        """What `rows` rows take on a stage, with `context` tokens in the cache. measured: seconds that it took
        here, where that counts."""
        device = self._device(self.device_of(f"stage {index}"))
        is_last = index == self.num_stages - 1
        match device.kind:
            case "roofline":
                target = self._shape("target")
                layers = self.layers[index]
                weights = layers * target.layer_params + is_last * target.head_params
                return _roofline(device, weights, target.bits, layers * target.kv_size * context, rows)
            case "curve":
                return _on_curve(device.stage_ms or [], rows)
            case "profile":
                profile = self.profiles[device.name]
                return profile.stage(self.layers[index], rows, context, is_first=index == 0,
                                     is_last=is_last) / (device.speed or 1.0)
        return measured / (device.speed or 1.0)

    def draft_seconds(self, rows: int, context: int, measured: float = 0.0) -> float:
        """What a draft call with `rows` rows takes. Raises UsageError as `check_draft` does."""
        device = self._device(self.device_of("draft"))
        match device.kind:
            case "roofline":
                self.check_draft()
                draft = self._shape("draft")
                weights = draft.layers * draft.layer_params + draft.head_params
                return _roofline(device, weights, draft.bits, draft.layers * draft.kv_size * context, rows)
            case "curve":
                self.check_draft()
                return _on_curve(device.draft_ms or [], rows)
            case "profile":
                return self.profiles[device.name].draft(rows, context) / (device.speed or 1.0)
        return measured / (device.speed or 1.0)

    def module_seconds(self, module: ModuleSize, rows: int, context: int) -> float:
        """What a job of a draft module takes, at a device that has a bandwidth or a profile: its share of the target's
        layers and head, once. rows: asked about in the job; one more is computed for each token in flight, a full
        pipeline's worth of them. Raises UsageError as `check_module` does."""
        self.check_module()
        device, computed = self._device(self.device_of("draft")), rows + self.num_stages
        if device.kind == "profile":
            profile, beside = self.profiles[device.name], module.layers - module.depth  # what keeps no cache
            seconds = profile.flight(computed, context) + module.depth * profile.layer(computed, context)
            seconds += beside * profile.layer(computed, 0) + module.head * profile.head(rows)
            return seconds / (device.speed or 1.0)
        target = self._shape("target")
        weights = module.layers * target.layer_params + module.head * target.head_params
        return _roofline(device, weights, _MODULE_BITS, module.depth * target.kv_size * context, computed)

    def check_module(self) -> None:
        """Raises UsageError unless it is said what a job of a draft module costs."""
        device = self._device(self.device_of("draft"))
        if device.kind == "roofline" and self.file.target is None:
            raise UsageError(f"{self.name}: {device.name} holds a draft module, but no target is described of which it "
                             "would be a share", hint="Add [target] (see docs/clusters.md).")
        if device.kind == "curve" and device.draft_ms is None:
            raise UsageError(f"{self.name}: {device.name} holds a draft module but has no draft_ms",
                             hint="Add draft_ms = [[rows, milliseconds], ...].")

    def check_draft(self) -> None:
        """Raises UsageError unless it is said what a call of the draft model costs. A file need not say so if it
        places no draft, for there are drafts without a model."""
        missing = _missing_for_draft(self.file, self.file.devices[self.file.blocks[self.device_of("draft")]])
        if missing is not None:
            what, hint = missing
            raise UsageError(f"{self.name}: {what}", hint=hint)

    def __call__(self, station: str, rows: int, measured: float, context: int = 0) -> float:
        """Seconds of virtual time (see `pipeline.inprocess.Costs`)."""
        if not rows:
            return 0.0
        if station == "draft":
            return self.draft_seconds(rows, context, measured)
        return self.stage_seconds(int(station.removeprefix("stage ")), rows, context, measured)

    def pace(self, sources: Sequence[str]) -> dict[str, dict[int, float]]:
        """Seconds that each station takes at least, by rows, for `WorkersPipeline(pace=...)`; at a context of 512
        tokens, for a running stage is not told how long its requests are. Devices to be measured are not paced."""
        costs = DraftCosts(self, sources)
        stations = [f"stage {index}" for index in range(self.num_stages)] + (["draft"] if sources else [])
        return {name: {rows: costs(name, rows, 0.0, _PACE_CONTEXT) for rows in _PACE_ROWS} for name in stations
                if self._device(self.device_of(name)).kind != "measured"}

    # ---- links -------------------------------------------------------------------------------------------

    @cached_property
    def links(self) -> Links:
        stages = [self.device_of(f"stage {k}") for k in range(self.num_stages)]
        engine, draft = self.device_of("engine"), self.device_of("draft")
        return Links(stage_hops=[self._link(*pair) for pair in pairwise(stages)],
                     to_first=self._link(engine, stages[0]), landing=self._link(stages[-1], engine),
                     draft=self._link(engine, draft), taps=[self._tap_link(k) for k in range(self.num_stages)])

    def _tap_link(self, stage: int) -> Link:
        """From a stage to the draft. Most drafts read no hidden states, so a file need not describe this link; where it
        does not, they go the flight's own way: through the stages after it, the engine, and on to the draft."""
        here, draft = self.device_of(f"stage {stage}"), self.device_of("draft")
        table = self.file.links
        if here == draft or table.latency_ms is not None or any({here, draft} == set(pair.ends) for pair in table.pair):
            return self._link(here, draft)
        way = [*(self.device_of(f"stage {k}") for k in range(stage, self.num_stages)), self.device_of("engine"), draft]
        hops = [self._link(*pair) for pair in pairwise(way)]
        return Link(sum(hop.latency_s for hop in hops), min(hop.bandwidth for hop in hops))

    def message_bytes(self, rows: int) -> int:
        """Of a flight with its hidden states on the way to the next stage."""
        return _MESSAGE_BYTES + rows * (_ROW_BYTES + self._hidden_bytes)

    @cached_property
    def _hidden_bytes(self) -> int:
        """Of a hidden state: of the target described, else of the one profiled; 0 where neither is known."""
        if self.file.target is not None:
            return 2 * self.file.target.hidden
        return next((profile.row_bytes for profile in self.profiles.values()), 0)

    def _link(self, a: str, b: str) -> Link:
        if a == b:
            return _LOOPBACK
        table = self.file.links
        for pair in table.pair:
            if {a, b} == set(pair.ends):
                return _as_link(pair.latency_ms, pair.bandwidth_mbit_s or table.bandwidth_mbit_s)
        assert table.latency_ms is not None, "checked when the file was read"
        return _as_link(table.latency_ms, table.bandwidth_mbit_s)

    # ---- layers ------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> list[int]:
        """How many layers each stage has: as given, or cut so that the slowest stage costs least."""
        given = self.file.placement.layers
        if given is not None:
            return given
        total, layer, head = self._layer_costs()
        return [len(part) for part in cut([layer] * total, head, 0.0, self.num_stages)]

    def _layer_costs(self) -> tuple[int, float, float]:
        if self.file.target is not None:
            return self.file.target.layers, self.file.target.layer_bytes, self.file.target.head_bytes
        for profile in self.profiles.values():
            return profile.num_layers, profile.layer(1, 0), profile.head(1)
        return self.num_stages, 1.0, 0.0  # curves are for whole stages: nothing to cut

    def _device(self, name: str) -> Device:
        return self.file.devices[self.file.blocks[name]]

    def _shape(self, which: Literal["target", "draft"]) -> Shape:
        shape = self.file.target if which == "target" else self.file.draft
        assert shape is not None, "checked when the file was read"
        return shape

    # ---- reading -----------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file, or a preset by its name (`presets()`). Raises UsageError with the line."""
        path = Path(path)
        if not path.exists() and path.suffix != ".toml":
            return cls._preset(str(path))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the cluster {path}: {error}",
                             hint=f"Give a TOML file, or a preset: {', '.join(presets())}.") from error
        return cls.parse(text, str(path), path.parent)

    @classmethod
    def _preset(cls, name: str) -> Cluster:
        if name not in presets():
            raise UsageError(f"there is no cluster {name!r}", hint=f"Give a TOML file, or a preset: "
                                                                   f"{', '.join(presets())}.")
        text = (_folder() / f"{name}.toml").read_text(encoding="utf-8")
        return cls.parse(text, f"preset {name}", Path())

    @classmethod
    def parse(cls, text: str, where: str, folder: Path) -> Cluster:
        """where: what to call it in messages. folder: where profiles are looked for."""
        try:
            file = ClusterFile.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{where} is not TOML: {error}", hint="See docs/clusters.md.") from None
        except ValidationError as error:
            raise _refusal(error, text, where) from None
        _Check(file, text, where).run()
        cluster = cls(file, text, str(folder), _load_profiles(file, text, where, folder))
        _check_layers(cluster, text, where)
        _check_memory(cluster, text, where)
        return cluster


class DraftCosts:
    """A cluster's costs for a pipeline whose draft station asks these sources, one after another.

    sources: "ngram", "spd:DIR" or "exit:DIR" for draft modules, and anything else for the draft model. n-gram runs on a
    processor: a call takes 0.05 ms and 0.04 ms a row (docs/log.md). A module takes its share of the target's layers
    (`Cluster.module_seconds`). A cluster whose draft has a cost curve means that curve, whoever guesses; one whose
    draft is measured counts the call as a whole, unless n-gram guesses alone.

    Raises UsageError for a module whose folder does not say how large it is.
    """

    def __init__(self, cluster: Cluster, sources: Sequence[str]) -> None:
        self._cluster = cluster
        folders = [folder for name in sources if (folder := module_folder(name))]
        models = [name for name in sources if name not in ("ngram", "none") and not module_folder(name)]
        whole = cluster.draft_is_curve or (cluster.draft_is_measured and bool(folders or models))
        self._modules = [] if whole else [ModuleSize.of(folder) for folder in folders]
        self._model = bool(models) or whole
        self._ngram = "ngram" in sources and not whole

    def check(self) -> None:
        """Raises UsageError unless the cluster says what these sources cost. n-gram's costs are known."""
        if self._modules:
            self._cluster.check_module()
        if self._model:
            self._cluster.check_draft()

    def __call__(self, station: str, rows: int, measured: float, context: int) -> float:
        if station != "draft" or not rows:
            return self._cluster(station, rows, measured, context)
        seconds = _NGRAM_CALL_S + rows * _NGRAM_ROW_S if self._ngram else 0.0
        if self._model:
            seconds += self._cluster(station, rows, measured, context)
        return seconds + sum(self._cluster.module_seconds(module, rows, context) for module in self._modules)


_UNIT = """
[cluster]
name = "{stages} stages, unit steps"
kind = "modelled"
note = "Every stage step and every draft call takes 1 ms, whatever its rows; links take nothing."

[[devices]]
name = "unit"
count = {stages}
stage_ms = [[1, 1.0]]

[[devices]]
name = "drafter"
draft_ms = [[1, 1.0]]

[links]
latency_ms = 0.0

[placement]
stages = [{names}]
draft = "drafter"
"""


def unit_cluster(stages: int) -> Cluster:
    """Stages and a draft whose every step takes one unit of time, on links that take none: what is left is the
    counting of pipeline steps. Comparable with any paper that counts steps."""
    if stages < 1:
        raise UsageError(f"a pipeline needs at least one stage (got {stages})")
    names = ", ".join(f'"unit{index}"' for index in range(stages))
    return Cluster.parse(_UNIT.format(stages=stages, names=names).lstrip(), f"{stages} unit stages", Path())


def presets() -> list[str]:
    """Names of the clusters that come with Fullpipe."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def _folder() -> Any:
    return resources.files("fullpipe.planning") / "presets"


def _roofline(device: Device, weights: float, bits: float, cache: float, rows: int) -> float:
    """Reading the weights and the cache once, or computing two operations per weight and row, whichever takes
    longer (S. Williams et al., "Roofline", 2009), and what a step costs besides."""
    assert device.bandwidth_gb_s is not None and device.tflop_s is not None
    read = (weights * bits / 8 + 2 * cache) / (device.bandwidth_gb_s * 1e9)
    compute = 2 * weights * rows / (device.tflop_s * 1e12)
    return max(read, compute) + device.overhead_ms / 1e3


def _on_curve(curve: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds; straight lines between the points, the first one's cost below it, the last slope beyond."""
    xs, ys = [point[0] for point in curve], [point[1] / 1e3 for point in curve]
    if rows > xs[-1] and len(xs) > 1:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        return ys[-1] + max(slope, 0.0) * (rows - xs[-1])
    return float(np.interp(rows, xs, ys))


def _as_link(latency_ms: float, mbit_s: float | None) -> Link:
    return Link(latency_ms / 1e3) if mbit_s is None else Link(latency_ms / 1e3, mbit_s * 1e6 / 8)


# ---- refusing with the line --------------------------------------------------------------------------------


def _refusal(error: ValidationError, text: str, where: str) -> UsageError:
    first = error.errors()[0]
    place = [step for step in first["loc"] if isinstance(step, (str, int))]
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "there is no such setting"
    elif first["type"] == "missing":
        what = "this setting is missing"
    name = ".".join(str(step) for step in place)
    return UsageError(f"{where}, line {line_of(text, place)}: {name}: {what}", hint="See docs/clusters.md.")


def line_of(text: str, place: Sequence[str | int]) -> int:
    """The line of a TOML document on which a setting stands, or its table, or 1. place: keys and indices.

    Settings are looked for under table headers, as docs/clusters.md writes them, not in dotted keys and inline tables.
    """
    lines = _without_texts(text).splitlines()
    tables = [step for step in place if isinstance(step, str)]
    number = next((step for step in place if isinstance(step, int)), 0)
    for depth in range(len(tables), 0, -1):
        header = re.escape(".".join(tables[:depth]))
        found = [index for index, line in enumerate(lines, 1) if re.match(rf"\s*\[\[?\s*{header}\s*\]\]?", line)]
        if found:
            best = found[min(number, len(found) - 1)]
            return _key_line(lines, best, tables[depth]) if depth < len(tables) else best
    return 1


def _key_line(lines: Sequence[str], header: int, key: str) -> int:
    for index in range(header, len(lines)):
        if _HEADER.match(lines[index]):
            break
        if re.match(rf"\s*{re.escape(key)}\s*=", lines[index]):
            return index + 1
    return header


def _without_texts(text: str) -> str:
    """The document with its texts of several lines left empty: what looks like a setting there is none."""
    return _LONG_TEXT.sub(lambda found: "\n" * found[0].count("\n"), text)


class _Check:
    """What cannot be said field by field."""

    def __init__(self, file: ClusterFile, text: str, where: str) -> None:
        self.file, self.text, self.where = file, text, where
        self.names = [name for device in file.devices for name in device.names]

    def run(self) -> None:
        self._names()
        self._placement()
        self._shapes()
        self._links()

    def refuse(self, place: Sequence[str | int], what: str, hint: str) -> UsageError:
        return UsageError(f"{self.where}, line {line_of(self.text, place)}: {what}", hint=hint)

    def _names(self) -> None:
        for index, name in enumerate(self.names):
            if name in self.names[:index]:
                raise self.refuse(["devices", self.file.blocks[name], "name"], f"two devices are called {name!r}",
                                  "Give each device a name of its own.")

    def _placement(self) -> None:
        place = self.file.placement
        for key, names in (("stages", place.stages), ("draft", [place.draft]), ("engine", [place.engine])):
            for name in names:
                if name is not None and name not in self.names:
                    raise self.refuse(["placement", key], f"there is no device {name!r}",
                                      f"Devices are: {', '.join(self.names)}.")
        for index, pair in enumerate(self.file.links.pair):
            for name in pair.ends:
                if name not in self.names:
                    raise self.refuse(["links", "pair", index, "ends"], f"there is no device {name!r}",
                                      f"Devices are: {', '.join(self.names)}.")

    def _shapes(self) -> None:
        place, blocks = self.file.placement, self.file.blocks
        for name in place.stages:
            device = self.file.devices[blocks[name]]
            if device.kind == "roofline" and self.file.target is None:
                raise self.refuse(["devices", blocks[name]], f"{name} has a bandwidth, but no model is "
                                  "described whose weights it reads", "Add [target] (see docs/clusters.md).")
            if device.kind == "curve" and device.stage_ms is None:
                raise self.refuse(["devices", blocks[name]], f"{name} holds a stage but has no stage_ms",
                                  "Add stage_ms = [[rows, milliseconds], ...].")
        if place.draft is not None:
            missing = _missing_for_draft(self.file, self.file.devices[blocks[place.draft]])
            if missing is not None:
                raise self.refuse(["placement", "draft"], *missing)

    def _links(self) -> None:
        place, table = self.file.placement, self.file.links
        for index, pair in enumerate(table.pair):
            if any(set(pair.ends) == set(other.ends) for other in table.pair[:index]):
                raise self.refuse(["links", "pair", index, "ends"], f"the link between {pair.ends[0]!r} and "
                                  f"{pair.ends[1]!r} is described twice", "It is the same both ways: leave one out.")
        engine, draft = place.engine or place.stages[0], place.draft or place.stages[0]
        needed = [*pairwise(place.stages), (engine, place.stages[0]), (place.stages[-1], engine), (engine, draft)]
        for a, b in needed:
            known = table.latency_ms is not None or any({a, b} == set(pair.ends) for pair in table.pair)
            if a != b and not known:
                raise self.refuse(["links"], f"there is no link between {a!r} and {b!r}",
                                  f'Add [[links.pair]] with ends = ["{a}", "{b}"], or links.latency_ms for all.')


def _missing_for_draft(file: ClusterFile, device: Device) -> tuple[str, str] | None:
    """What is missing to say what a call of a draft model on this device costs, and what to do about it."""
    if device.kind == "roofline" and file.draft is None:
        return f"{device.name} holds the draft, but no draft is described", "Add [draft] (see docs/clusters.md)."
    if device.kind == "curve" and device.draft_ms is None:
        return f"{device.name} holds the draft but has no draft_ms", "Add draft_ms = [[rows, milliseconds], ...]."
    return None


def _load_profiles(file: ClusterFile, text: str, where: str, folder: Path) -> dict[str, Profile]:
    """By the name of the device block. Raises UsageError with the line that names a profile which cannot be used."""
    profiles: dict[str, Profile] = {}
    for index, device in enumerate(file.devices):
        if device.profile is None:
            continue
        line = f"{where}, line {line_of(text, ['devices', index, 'profile'])}"
        try:
            profile = profiles[device.name] = Profile.load(folder / device.profile)
        except UsageError as error:
            raise UsageError(f"{line}: {error.message}", hint=error.hint) from None
        first = next(iter(profiles.values()))
        if profile.num_layers != first.num_layers:
            raise UsageError(f"{line}: this profile is of a model of {profile.num_layers} layers, the one before of "
                             f"{first.num_layers}", hint="Profile the same model on every machine.")
        if file.placement.draft in device.names and profile.drafts is None:
            raise UsageError(f"{line}: {file.placement.draft} holds the draft, but its profile has none",
                             hint="Measure one too: `fullpipe profile --draft MODEL`.")
    return profiles


def _check_layers(cluster: Cluster, text: str, where: str) -> None:
    given, total = cluster.file.placement.layers, cluster._layer_costs()[0]
    if given is None:
        if cluster.num_stages > total:
            raise UsageError(f"{where}, line {line_of(text, ['placement', 'stages'])}: {total} layers cannot be cut "
                             f"into {cluster.num_stages} stages", hint="Name fewer stages.")
    elif len(given) != cluster.num_stages or sum(given) != total:
        raise UsageError(f"{where}, line {line_of(text, ['placement', 'layers'])}: {len(given)} numbers of layers, "
                         f"{sum(given)} in all, for {cluster.num_stages} stages and {total} layers",
                         hint="Give one number per stage that add up to all layers, or leave it out.")


def _check_memory(cluster: Cluster, text: str, where: str) -> None:
    """Weights alone: what the cache takes depends on requests."""
    held, file = _held(cluster), cluster.file
    for name, index in file.blocks.items():
        room = file.devices[index].memory_gb
        if room is not None and held[name] > room * 1e9:
            raise UsageError(
                f"{where}, line {line_of(text, ['devices', index])}: {name} has {room:g} GB, "
                f"and the weights placed there take {held[name] / 1e9:.1f} GB",
                hint="Use more stages, fewer bits, or placement.layers to give it less.")


def _held(cluster: Cluster) -> dict[str, float]:
    """Bytes of weights by device, of models that are described or profiled. A device that has both ends of the target
    holds one matrix for embedding and head."""
    file, place = cluster.file, cluster.file.placement
    held = dict.fromkeys(file.blocks, 0.0)
    profile = next(iter(cluster.profiles.values()), None)
    if target := file.target or (profile and profile.target):
        for index, name in enumerate(place.stages):
            held[name] += cluster.layers[index] * target.layer_bytes
        held[place.stages[0]] += target.embedding_bytes
        if place.stages[0] != place.stages[-1]:
            held[place.stages[-1]] += target.head_bytes
    if place.draft is not None and (draft := file.draft or (profile and profile.draft_model)):
        held[place.draft] += draft.num_layers * draft.layer_bytes + draft.head_bytes
    return held
