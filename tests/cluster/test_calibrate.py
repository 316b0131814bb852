"""What rows cost is measured before an engine exists, and leaves the pipeline as an engine wants to find it."""

from __future__ import annotations

import pytest

from driving import TellingEngine
from fullpipe.cluster.calibrate import measure_machine
from fullpipe.errors import StationFailed
from fullpipe.messages import Event, Failed
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
DEVICES = {"draft": "stage 0"}


def pipeline(draft: bool = True) -> InProcessPipeline:
    """Stage 1 is the slowest for few rows, stage 0 for many; a draft call takes a tenth of a second for each row."""
    costs = {"stage 0": lambda rows: 0.2 * rows, "stage 1": lambda rows: 1.0 + 0.01 * rows,
             "draft": lambda rows: 0.1 * rows}
    return InProcessPipeline([ScriptedStage(k, 2, TRUTH) for k in range(2)],
                             ScriptedDraft(TRUTH, accuracy=0.7) if draft else None,
                             costs=lambda station, rows, measured, context: costs[station](rows),
                             links=Links.even(2, Link(0.25)), device_of=lambda station: DEVICES.get(station, station))


@pytest.mark.parametrize("draft", [True, False])
def test_stages_and_draft_are_measured_by_rows(draft: bool) -> None:
    """The rest the pipeline knows."""
    machine = measure_machine(pipeline(draft), (1, 4, 16))
    assert (machine.num_stages, machine.link_s, machine.shared, machine.draft_link_s) == (2, 0.5, draft, 0.0)
    assert machine.stage is not None and machine.devices == ["stage 0", "stage 1"]
    assert [machine.stage(rows) for rows in (1, 4, 16)] == pytest.approx([1.01, 1.04, 3.2])
    assert [machine.stages[0](rows) for rows in (1, 4, 16)] == pytest.approx([0.2, 0.8, 3.2])
    if draft:
        assert machine.draft is not None
        assert [machine.draft(rows) for rows in (1, 16)] == pytest.approx([0.1, 1.6])
    else:
        assert machine.draft is None


def test_a_draft_that_must_not_be_asked_is_not() -> None:
    assert measure_machine(pipeline(), (1, 2), draft=False).draft is None


def test_an_engine_goes_on_with_a_pipeline_that_has_been_measured() -> None:
    measured = pipeline()
    engine = TellingEngine(measured, make_method("fullpipe", machine=measure_machine(measured)))
    sequence = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=40)))
    while engine.busy:
        engine.step()
        engine.check()
    tokens = [4, 8, 15]
    for _ in range(40):
        tokens.append(hash_token(tokens, 50, 3))
    assert sequence.tokens == tokens


def test_a_station_that_dies_meanwhile_is_named() -> None:
    class Dying(InProcessPipeline):
        def events(self, wait: float | None = None) -> list[Event]:
            return [Failed(0.0, "stage 1", "it fell over", "buy another")] if self.newest_flight > 2 \
                else super().events(wait)

    with pytest.raises(StationFailed, match="stage 1 failed: it fell over\nbuy another"):
        measure_machine(Dying([ScriptedStage(0, 1, TRUTH)]))
