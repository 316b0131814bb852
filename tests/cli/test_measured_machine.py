"""What the product tells its method of the stations: measured once, kept, and followed from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Models

from fullpipe.assembly import measured, prepare, start
from fullpipe.cluster.kept import KeptCosts
from fullpipe.costs import CostCurve, Machine
from fullpipe.live_costs import LiveMachine
from fullpipe.llm import LLM
from fullpipe.options import Options
from fullpipe.request import SamplingParams


def options(models: Models, **changes: object) -> Options:
    return Options.of(model=str(models.target), dtype="float32", draft=str(models.draft), threads=1, **changes)


def test_in_one_process_draft_and_stage_take_turns(models: Models) -> None:
    prepared = prepare(options(models, method="fullpipe"))
    with start(prepared) as pipeline:
        machine = measured(prepared, pipeline)
    assert isinstance(machine, LiveMachine) and machine.stage and machine.draft
    assert (machine.num_stages, machine.shared, machine.link_s, machine.draft_link_s) == (1, True, 0.0, 0.0)
    assert len(machine.stages) == len(machine.devices) == 1 and machine.stage(32) >= machine.stage(1) > 0


def test_a_method_that_asks_nothing_has_nothing_measured(models: Models) -> None:
    prepared = prepare(options(models, method="chain"))
    told: list[str] = []
    with start(prepared) as pipeline:
        machine = measured(prepared, pipeline, told.append)
    assert machine.stage is None and machine.shared and not told


def test_what_was_kept_is_where_it_begins(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """And legs correct it: this machine does not take an hour for a row."""
    kept = Machine(1, CostCurve({1: 3600.0}), CostCurve({1: 3600.0}), shared=True)
    monkeypatch.setattr(KeptCosts, "load", lambda self: kept)
    told: list[str] = []
    with LLM(str(models.target), dtype="float32", draft=str(models.draft), method="fullpipe", threads=1,
             progress=told.append) as llm:
        machine = llm._machine
        assert isinstance(machine, LiveMachine) and machine.stage and machine.stage(1) == 3600.0
        llm.generate("abc", SamplingParams(max_tokens=40, ignore_eos=True))
        assert machine.stage(1) < 3000.0
    assert any(line.startswith("what rows cost: from ") and Path(line.split()[4].rstrip(";")).suffix == ".json"
               for line in told)
    assert kept.stage and kept.stage(1) == 3600.0
