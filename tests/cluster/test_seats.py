"""Stations have seats: what each reserves on its host, and which files it is given. Nothing is started."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from host_reports import MODEL
from host_reports import host as report
from imagined import host, imagined

from adapters import write_adapter
from fullpipe.cluster.hosts import HostEntry
from fullpipe.cluster.plan import Plan, StagePlan, memory_of
from fullpipe.cluster.seats import Seats
from fullpipe.cluster.wanted import Wanted
from fullpipe.errors import DamagedModel
from fullpipe.pipeline.launch.local import LocalLauncher

PLAN = Plan(model=MODEL, stage=(StagePlan(host="a", first=0, last=20), StagePlan(host="b", first=20, last=28)))


def seats(memory: dict[str, int], paths: tuple[Path, ...] = ()) -> Seats:
    survey = imagined({name: host(draft=None) for name in "ab"})
    entries = {name: HostEntry(name=name, address=f"10.0.0.{at}") for at, name in enumerate("ab", 1)}
    wanted = Wanted(MODEL, "none", (MODEL,) * len(paths), paths, None, lambda plan: ([], None))
    return Seats(PLAN, wanted, survey, {name: report(name) for name in "ab"}, entries, memory)


def test_stations_reserve_the_memory_that_the_plan_gives_them() -> None:
    needed = memory_of(PLAN, seats({}).survey.hosts, None)
    there = seats({"a": needed["a"], "b": needed["b"] - 1})
    places = there.hosting(LocalLauncher, print).places
    assert places[0].needs.memory == needed["a"] > 0
    assert places[1].needs.memory == 0, "less is kept account of there than the host has"
    assert [place.needs.memory for place in seats({}).hosting(LocalLauncher, print).places] == [0, 0]


def write(path: Path, name: str) -> None:
    """A model's file without a tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    write(path, "one")
    return path


def test_stations_are_not_placed_with_files_that_are_others_than_they_were(model: Path) -> None:
    there = seats({}, (model,))
    source = there.hosting(LocalLauncher, print).sources[str(model)]
    assert source.manifest == there.wanted.manifest(model)
    there.wanted.check_unchanged()
    write(model, "two")
    os.utime(model, ns=(1, 1))  # the clock of files may be coarse
    with pytest.raises(DamagedModel, match=r"m\.gguf has been changed while this runs") as caught:
        there.hosting(LocalLauncher, print)
    assert caught.value.hint
    write(model, "one")
    there.wanted.check_unchanged()


def test_stages_elsewhere_are_given_the_adapter_whole(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", {"model.layers.0.mlp.up_proj": (96, 64)})
    there = seats({})
    wanted = replace(there.wanted, adapter=tmp_path / "adapter")
    first, second = replace(there, wanted=wanted).hosting(LocalLauncher, print).places
    assert not first.fetch and not first.paths, "the head has it"
    (fetch,) = second.fetch
    assert fetch.path == str(tmp_path / "adapter") and fetch.ranges == fetch.manifest.everything()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedModel, match="adapter has been changed while this runs"):
        replace(there, wanted=wanted).hosting(LocalLauncher, print)


def test_what_is_placed_later_may_have_other_files(model: Path) -> None:
    before = seats({}, (model,)).wanted.manifest(model)
    write(model, "another")
    assert seats({}, (model,)).wanted.manifest(model) != before
