"""What rows cost on a pipeline is kept in a file, so that it need not be measured again. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fullpipe.costs import CostCurve, Machine


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Says what the file holds. of: what it was measured on. stage, draft: [rows, seconds], rising."""

    of: dict[str, Any]
    num_stages: int
    stage: list[tuple[int, float]]
    draft: list[tuple[int, float]] | None
    link_s: float


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
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return cls(folder / f"{name}.json", what)

    def load(self) -> Machine | None:
        """None where there are none, or none that can be read."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
            stage, draft = CostCurve(dict(found.stage)), CostCurve(dict(found.draft)) if found.draft else None
        except (OSError, ValueError):
            return None
        return Machine(found.num_stages, stage, draft, found.link_s) if found.of == self.of_what else None

    def save(self, machine: Machine) -> bool:
        """Whether it could be written. If not, it is measured again next time."""
        assert machine.stage is not None
        draft = list(zip(machine.draft.rows, machine.draft.seconds)) if machine.draft else None
        file = _File(of=self.of_what, num_stages=machine.num_stages, draft=draft, link_s=machine.link_s,
                     stage=list(zip(machine.stage.rows, machine.stage.seconds)))
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1))
            os.replace(fresh, self.path)
        except OSError:
            return False
        return True
