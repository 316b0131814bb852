"""Measuring on a tiny model: the work that is timed is the work that a stage does."""

from __future__ import annotations

import pytest
import torch

import tiny
from fullpipe.cluster import hops
from fullpipe.cluster.measure import _Cells, _ends, _layers, _Standing
from fullpipe.errors import PipelineError
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.files import ModelFiles
from fullpipe.models.weights import open_model
from fullpipe.stations.step import step_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_model(tiny.save(tiny.tiny_model("llama"), tmp_path_factory.mktemp("tiny")))


def test_a_measured_row_attends_to_the_whole_context_and_itself(files: ModelFiles) -> None:
    runner = _Standing(DecoderSlice(files, 0, 2, has_embedding=False, has_head=False, dtype=torch.float32), (9, 20))
    for rows in (9, 3):  # the larger one leaves nothing behind
        flight = runner.flight(rows, context=20)
        out = runner.forward(flight, torch.randn(rows, files.config.hidden))
        assert out.isfinite().all() and len(list(runner.wanted(flight))) == rows
        step = step_of(flight, out, runner._tables)
        assert step.spans.tolist() == [[0, 20, 20 + row, 21 + row] for row in range(rows)]
        assert step.reads.tolist() == list(range(20 + rows))


def test_cells_are_measured_in_turn_and_the_first_round_does_not_count() -> None:
    calls: list[tuple[int, int]] = []
    told: list[tuple[str, int, int]] = []

    def sample(rows: int, context: int) -> tuple[float, float]:
        calls.append((rows, context))
        return 1000.0 if len(calls) <= 4 else rows * context, 0.5

    cells = _Cells((1, 2), (10, 20), 3, lambda *news: told.append(news))
    first, second = cells.surface("things", sample)
    assert calls == [(1, 10), (1, 20), (2, 10), (2, 20)] * 4
    assert [[cost.seconds for cost in line] for line in first.costs] == [[10, 20], [20, 40]]
    assert second.at(1, 10) == 0.5 and first.costs[0][0].samples == 3
    assert told[0] == ("things", 1, 16) and told[-1] == ("things", 16, 16)


def test_layers_and_ends_have_a_cost_for_every_cell(files: ModelFiles) -> None:
    cells = _Cells((1, 4), (8,), 1, lambda *news: None)
    layers, flights = _layers(files, "float32", cells)
    heads, lookups = _ends(files, "float32", cells)
    assert layers.rows == flights.rows == heads.sizes == lookups.sizes == (1, 4)
    # A layer and a flight were told apart from what was timed; together they took time.
    assert all(layers.at(rows, 8) + flights.at(rows, 8) > 0 < heads.at(rows) for rows in (1, 4))


@pytest.mark.processes
def test_processes_that_cannot_talk_are_an_error_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops, "local_endpoint", lambda: "ipc:///no/such/folder/socket")
    with pytest.raises(PipelineError, match=r"could not talk: .*cannot listen on"):
        hops.measure_hops((64,), 2, lambda done: None)


def test_where_the_least_counts_what_follows_is_derived_from_the_least_of_each_time() -> None:
    times = iter([(9.0, 9.0), (5.0, 4.0), (8.0, 1.0), (6.0, 4.0)])
    cells = _Cells((1,), (10,), 3, lambda *news: None, least=True)
    (apart,) = cells.surface("things", lambda rows, context: next(times), lambda pair: (pair[0] - pair[1],))
    assert apart.at(1, 10) == 4.0, "5 - 1"
    assert apart.costs[0][0].samples == 3


@pytest.mark.processes
def test_processes_that_can_talk_measure_every_size() -> None:
    told: list[int] = []
    samples = hops.measure_hops((0, 4096), 2, told.append)
    assert {size: len(seconds) for size, seconds in samples.items()} == {0: 2, 4096: 2}
    assert all(0 < second < 10 for seconds in samples.values() for second in seconds) and told == [1, 2, 3, 4]
