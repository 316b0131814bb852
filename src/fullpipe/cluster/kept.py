"""What is good to know the next time is kept in files: what rows cost on a pipeline, and how far its draft can be
believed. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fullpipe.costs import CostCurve, Machine
from fullpipe.sequences.calibration import Calibration, Counts, Right, check_counts

_Points = list[tuple[int, float]]  # rows and seconds, rising


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Says what the file holds. of: what it was measured on. The rest: see `Machine`."""

    of: dict[str, Any]
    stages: Annotated[list[_Points], Meta(min_length=1)]
    draft: _Points | None
    link_s: float
    shared: bool
    draft_link_s: float
    devices: list[str]
    reads_taps: bool


class _Fates(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Says what the file of a draft holds. of: which draft, before which model. kinds: see `Calibration.counts`. right:
    see `Calibration`."""

    of: dict[str, Any]
    kinds: Counts
    right: Right = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class KeptCosts:
    """Keeps the costs of one pipeline.

    path: of the file. of_what: everything that the costs depend on; costs of anything else are not taken for it.
    """

    path: Path
    of_what: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, what: dict[str, Any]) -> KeptCosts:
        what = what | {"machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores"}
        return cls(folder / f"{_name(what)}.json", what)

    def load(self) -> Machine | None:
        """None where there are none, or none that can be read."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
            stages = [CostCurve(dict(points)) for points in found.stages]
            draft = CostCurve(dict(found.draft)) if found.draft else None
        except (OSError, ValueError):
            return None
        if found.of != self.of_what or len(found.devices) not in (0, len(stages)):
            return None
        return Machine(len(stages), draft=draft, link_s=found.link_s, shared=found.shared,
                       draft_link_s=found.draft_link_s, stages=stages, devices=found.devices,
                       reads_taps=found.reads_taps)

    def save(self, machine: Machine) -> bool:
        """Whether it could be written. If not, it is measured again next time."""
        assert machine.stages, "they were measured"
        file = _File(of=self.of_what, stages=[_points(curve) for curve in machine.stages],
                     draft=_points(machine.draft) if machine.draft else None, link_s=machine.link_s,
                     shared=machine.shared, draft_link_s=machine.draft_link_s, devices=list(machine.devices),
                     reads_taps=machine.reads_taps)
        return _write(self.path, file)


@dataclass(frozen=True, slots=True)
class KeptFates:
    """Keeps what became of a draft's guesses. path: of the file. of_what: the model and the draft."""

    path: Path
    of_what: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, what: dict[str, Any]) -> KeptFates:
        return cls(folder / f"{_name(what)}.fates.json", what)

    def load(self) -> Calibration:
        """One that has seen nothing where there is no file, or none that can be read."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_Fates)
            check_counts(found.kinds)
        except (OSError, ValueError):
            return Calibration()
        return Calibration(found.kinds, found.right) if found.of == self.of_what else Calibration()

    def save(self, calibration: Calibration) -> bool:
        """Whether it could be written. If not, less is known next time."""
        return _write(self.path, _Fates(of=self.of_what, kinds=calibration.counts(), right=calibration.right))


def kept_right(folder: Path, model: list[Any], drafts: frozenset[str]) -> Right:
    """What all kept files say of these drafts before this model together, however many stages there were. model: as in
    `KeptFates.of_what`. drafts: paths of the models or modules among them."""
    moves = best = among = 0.0
    for path in sorted(folder.glob("*.fates.json")):
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Fates)
        except (OSError, ValueError):
            continue
        if found.of.get("model") == model and _drafts(found.of.get("draft")) == drafts:
            moves, best, among = (a + b for a, b in zip((moves, best, among), found.right))
    return moves, best, among


def _drafts(spec: Any) -> frozenset[str]:
    """The paths of models and modules in the spec of a draft station; none of n-gram."""
    args = spec.get("args", {}) if isinstance(spec, dict) else {}
    if several := args.get("drafts"):
        return frozenset().union(*map(_drafts, several))
    own = args.get("module", args.get("model"))  # a module names its target too
    return frozenset() if own is None else frozenset((str(own),))


def _name(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, file: msgspec.Struct) -> bool:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1))
        os.replace(fresh, path)
    except OSError:
        return False
    return True


def _points(curve: CostCurve) -> _Points:
    return list(curve.points.items())
