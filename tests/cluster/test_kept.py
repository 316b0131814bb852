"""Costs that were measured once are found again, and only by who would measure the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fullpipe.cluster.kept import KeptCosts
from fullpipe.costs import CostCurve, Machine

MACHINE = Machine(2, draft=CostCurve({1: 0.001, 8: 0.002}), link_s=0.25, shared=True, draft_link_s=0.125,
                  stages=[CostCurve({1: 0.01, 4: 0.02}), CostCurve({1: 0.015})], devices=["here", "here"],
                  reads_taps=True)
OLD = {"num_stages": 2, "stage": [[1, 0.01]], "draft": None, "link_s": 0.0}


def told(machine: Machine) -> dict[str, Any]:
    return {name: getattr(machine, name) for name in ("num_stages", "link_s", "shared", "draft_link_s",
                                                     "reads_taps")} | {
        "stages": [curve.points for curve in machine.stages], "devices": list(machine.devices),
        "draft": machine.draft and machine.draft.points, "gap": machine.gap and machine.gap.points}


@pytest.mark.parametrize("machine", [MACHINE, Machine(1, CostCurve({1: 0.5}))], ids=["all", "little"])
def test_all_of_it_comes_back(tmp_path: Path, machine: Machine) -> None:
    kept = KeptCosts.of(tmp_path / "new", {"model": "a", "stages": 2})
    assert kept.load() is None
    assert kept.save(machine)
    found = KeptCosts.of(tmp_path / "new", {"stages": 2, "model": "a"}).load()
    assert found is not None and told(found) == told(machine)
    assert KeptCosts.of(tmp_path / "new", {"model": "b", "stages": 2}).load() is None


@pytest.mark.parametrize("change", [
    lambda file: file.pop("shared"), lambda file: file.update(stages=[]), lambda file: file.update(stages=[[]]),
    lambda file: file.update(stages=[[[1, -1.0]]]), lambda file: file.update(devices=["a"]),
    lambda file: file.update(of={}), lambda file: file.update(extra=1),
    lambda file: [file.pop(name) for name in list(file) if name != "of"] and file.update(OLD)],
    ids=["a field less", "no stage", "no points", "negative", "a device less", "of another", "a field more", "old"])
def test_a_file_that_is_not_quite_it_is_as_good_as_none(tmp_path: Path, change: Any) -> None:
    kept = KeptCosts.of(tmp_path, {"model": "a"})
    kept.save(MACHINE)
    file = json.loads(kept.path.read_text())
    change(file)
    kept.path.write_text(json.dumps(file))
    assert kept.load() is None
    assert kept.save(MACHINE) and kept.load() is not None


def test_damage_is_as_good_as_none(tmp_path: Path) -> None:
    kept = KeptCosts.of(tmp_path, {"model": "a"})
    kept.save(MACHINE)
    kept.path.write_bytes(kept.path.read_bytes()[:-9])
    assert kept.load() is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert not KeptCosts.of(tmp_path / "file", {"model": "a"}).save(MACHINE)
