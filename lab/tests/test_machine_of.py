"""What a method is told of an imagined cluster is what its stations then take."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullpipe_lab.clusters import Cluster, DraftCosts, machine_of, unit_cluster
from fullpipe_lab.recording import Answer, Head
from fullpipe_lab.sweep import Plan, Setting, Unit, Worker

HOSTS = """
[cluster]
name = "two hosts"
kind = "modelled"
note = "Rows are dear, and the draft sits with stage 0."

[[devices]]
name = "a"
stage_ms = [[1, 20.0], [4, 29.0], [8, 44.0]]
draft_ms = [[1, 12.0], [8, 24.0]]

[[devices]]
name = "b"
stage_ms = [[1, 21.0], [4, 29.0], [8, 40.0]]
draft_ms = [[1, 12.0]]

[links]
latency_ms = 10.0

[placement]
stages = [{stages}]
draft = "{draft}"
"""


def hosts(stages: tuple[str, ...] = ("a", "b"), draft: str = "a") -> Cluster:
    text = HOSTS.format(stages=", ".join(f'"{name}"' for name in stages), draft=draft)
    return Cluster.parse(text.lstrip(), "here", Path())


@pytest.mark.parametrize("drafts", [("model",), ("ngram",), ("model", "ngram")], ids=str)
@pytest.mark.parametrize("preset", ["gpus-8", "gpus-14", "edge-5", "home-6"])
def test_curves_are_the_costs_of_the_cluster(preset: str, drafts: tuple[str, ...]) -> None:
    cluster = Cluster.load(preset)
    machine, costs = machine_of(cluster, drafts), DraftCosts(cluster, drafts)
    assert machine.stage and machine.draft and machine.num_stages == len(machine.stages) == cluster.num_stages
    for rows in (1, 8, 64):
        stages = [costs(f"stage {k}", rows, 0.0, 256) for k in range(cluster.num_stages)]
        assert [curve(rows) for curve in machine.stages] == pytest.approx(stages)
        assert machine.stage(rows) == pytest.approx(max(stages))
        assert machine.draft(rows) == pytest.approx(costs("draft", rows, 0.0, 256))


@pytest.mark.parametrize(("stages", "draft", "shared", "link_s", "draft_link_s"), [
    (("a", "b"), "a", True, 0.02, 0.0), (("a", "b"), "b", False, 0.02, 0.02), (("a",), "a", True, 0.0, 0.0)])
def test_who_shares_a_device_and_what_links_take(stages: tuple[str, ...], draft: str, shared: bool, link_s: float,
                                                 draft_link_s: float) -> None:
    machine = machine_of(hosts(stages, draft), ["model"])
    assert (machine.shared, machine.link_s, machine.draft_link_s) == (shared, link_s, draft_link_s)
    assert list(machine.devices) == list(stages)


def test_without_a_draft_there_is_none() -> None:
    machine = machine_of(hosts(), ["none"])
    assert machine.draft is None and not machine.shared and machine.stage is not None


def test_what_would_have_to_run_is_not_known_in_advance() -> None:
    text = unit_cluster(2).text.replace("stage_ms = [[1, 1.0]]", "speed = 2.0")
    machine = machine_of(Cluster.parse(text, "here", Path()), ["ngram"])
    assert (machine.num_stages, machine.stage, machine.draft, machine.shared) == (2, None, None, False)


def test_stations_that_take_what_the_file_says_teach_a_machine_nothing(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """And a sweep hands each method a machine of its own."""
    made = []

    def note(cluster: Cluster, drafts: list[str]) -> object:
        machine = machine_of(cluster, drafts)
        made.append((machine, machine.stage, machine.draft))
        return machine

    monkeypatch.setattr("fullpipe_lab.sweep.machine_of", note)
    head = Head("a model", "float32", 24, 0.0, 7, (), 96)
    answer = Answer("set/0#0", "set", [1, 2, 3, 4, 5, 1, 2, 3], ([4, 5, 1, 2, 3] * 5)[:24], "length")
    cluster = hosts()
    worker = Worker(Plan({cluster.name: (cluster.text, cluster.folder)}, head, None, str(tmp_path / "memo"), 1))
    settings = [Setting("fullpipe", "ngram"), Setting("fullpipe", "ngram", 4), Setting("pp", "none")]
    samples = worker.run(Unit(answer, tuple((cluster.name, one, "main") for one in settings)))
    assert [one.width for one in samples] == [None, 4, None] and samples[0].hits > 0
    assert len({id(machine) for machine, *_ in made}) == 3
    assert all(machine.stage is stage and machine.draft is draft for machine, stage, draft in made)
    assert samples[0].tbt_s == worker.run(Unit(answer, ((cluster.name, settings[0], "main"),)))[0].tbt_s
