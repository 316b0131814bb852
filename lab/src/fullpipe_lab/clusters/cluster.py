"""A cluster that holds together: what its stations cost, what its links take, who sits where. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fullpipe.cluster.partition import cut
from fullpipe.cluster.profile import Profile
from fullpipe.costs import CostCurve
from fullpipe.errors import UsageError
from fullpipe.pipeline.links import Link, Links
from fullpipe.stations.drafts.names import ModuleSize, module_folder
from fullpipe_lab.clusters.checks import (
    check_file,
    check_layers,
    check_memory,
    load_profiles,
    missing_for_draft,
    refusal,
)
from fullpipe_lab.clusters.file import ClusterFile, Device, Shape

_MESSAGE_BYTES = 128  # of a flight beside its rows
_ROW_BYTES = 64  # of a row beside its hidden state: token, position, slot, path
_LOOPBACK = Link()
_NGRAM_CALL_S, _NGRAM_ROW_S = 5e-5, 4e-5
_MODULE_BITS = 16  # of a draft module's weights, whatever the target's


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
    def label(self) -> Literal["modelled", "measured", "unit"]:
        """Where its times come from; "unit" where every step takes the same, whatever its rows, and links nothing."""
        if self.file.cluster.kind == "measured":
            return "measured"
        links, devices = self.links, self.file.devices
        instant = all(link.instant for link in (*links.stage_hops, links.to_first, links.landing, links.draft,
                                                 *links.taps))
        curves = [curve for device in devices for curve in (device.stage_ms, device.draft_ms) if curve]
        costs = {ms for curve in curves for _, ms in curve}
        curved = all(device.kind == "curve" for device in devices)
        return "unit" if curved and instant and len(costs) == 1 else "modelled"

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
                return _curve_of(device.stage_ms)(rows)
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
                return _curve_of(device.draft_ms)(rows)
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
                             "would be a share", hint="Add [target] (see lab/docs/clusters.md).")
        if device.kind == "curve" and device.draft_ms is None:
            raise UsageError(f"{self.name}: {device.name} holds a draft module but has no draft_ms",
                             hint="Add draft_ms = [[rows, milliseconds], ...].")

    def check_draft(self) -> None:
        """Raises UsageError unless it is said what a call of the draft model costs. A file need not say so if it
        places no draft, for there are drafts without a model."""
        missing = missing_for_draft(self.file, self.file.devices[self.file.blocks[self.device_of("draft")]])
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
        total, layer, head = self.layer_costs()
        return [len(part) for part in cut([layer] * total, head, 0.0, self.num_stages)]

    def layer_costs(self) -> tuple[int, float, float]:
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
            raise UsageError(f"{where} is not TOML: {error}", hint="See lab/docs/clusters.md.") from None
        except ValidationError as error:
            raise refusal(error, text, where) from None
        check_file(file, text, where)
        cluster = cls(file, text, str(folder), load_profiles(file, text, where, folder))
        check_layers(cluster, text, where)
        check_memory(cluster, text, where)
        return cluster


class DraftCosts:
    """Says what a cluster's pipeline costs whose draft station asks these drafts, one after another.

    drafts: "ngram", "spd:DIR" or "exit:DIR" for draft modules, and anything else for the draft model. n-gram runs on a
    processor: a call takes 0.05 ms and 0.04 ms a row (docs/log). A module takes its share of the target's layers
    (`Cluster.module_seconds`). A cluster whose draft has a cost curve means that curve, whoever guesses; one whose
    draft is measured counts the call as a whole, unless n-gram guesses alone.

    Raises UsageError for a module whose folder does not say how large it is.
    """

    def __init__(self, cluster: Cluster, drafts: Sequence[str]) -> None:
        self._cluster = cluster
        folders = [folder for name in drafts if (folder := module_folder(name))]
        models = [name for name in drafts if name not in ("ngram", "none") and not module_folder(name)]
        whole = cluster.draft_is_curve or (cluster.draft_is_measured and bool(folders or models))
        self._modules = [] if whole else [ModuleSize.of(folder) for folder in folders]
        self._model = bool(models) or whole
        self._ngram = "ngram" in drafts and not whole

    def check(self) -> None:
        """Raises UsageError unless the cluster says what these drafts cost. n-gram's costs are known."""
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
    return resources.files("fullpipe_lab.clusters") / "presets"


def _roofline(device: Device, weights: float, bits: float, cache: float, rows: int) -> float:
    """Reading the weights and the cache once, or computing two operations per weight and row, whichever takes
    longer (S. Williams et al., "Roofline", 2009), and what a step costs besides."""
    assert device.bandwidth_gb_s is not None and device.tflop_s is not None
    read = (weights * bits / 8 + 2 * cache) / (device.bandwidth_gb_s * 1e9)
    compute = 2 * weights * rows / (device.tflop_s * 1e12)
    return max(read, compute) + device.overhead_ms / 1e3


@lru_cache
def _measured_curve(points: tuple[tuple[int, float], ...]) -> CostCurve:
    return CostCurve({rows: ms / 1e3 for rows, ms in points})


def _curve_of(points: list[tuple[int, float]] | None) -> CostCurve:
    assert points is not None, "checked when the file was read"
    return _measured_curve(tuple(points))


def _as_link(latency_ms: float, mbit_s: float | None) -> Link:
    return Link(latency_ms / 1e3) if mbit_s is None else Link(latency_ms / 1e3, mbit_s * 1e6 / 8)
