"""The file of measured costs: what lies between two sizes, and what a damaged file says."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.cluster.profile import Cost, Curve, Profile, Shape, Surface
from fullpipe.errors import UsageError


def cost(seconds: float) -> Cost:
    return Cost(seconds=seconds, spread=0.0, samples=3)


def curve(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> Curve:
    return Curve(sizes=sizes, costs=tuple(map(cost, seconds)))


def surface(scale: float = 1.0) -> Surface:
    """rows 1, 4; contexts 10, 30: 2 and 4 seconds, 8 and 16, times scale."""
    lines = ((2.0, 4.0), (8.0, 16.0))
    return Surface(rows=(1, 4), contexts=(10, 30), costs=tuple(tuple(cost(scale * s) for s in line) for line in lines))


def profile(**changes: Any) -> Profile:
    shape = Shape(name="a model", num_layers=6, layer_bytes=10, head_bytes=10, embedding_bytes=10, kv_bytes=2,
                  row_bytes=4)
    values: dict[str, Any] = {
        "target": shape, "draft_model": None, "dtype": "bfloat16", "threads": 1, "machine": {"cpu": "some", "cores": 2},
        "commit": "unknown", "dirty": False, "date": "2026-11-21T00:00:00Z", "layers": surface(),
        "flights": surface(0.5), "heads": curve((1, 4), (1.0, 2.0)), "lookups": curve((1,), (0.25,)), "drafts": None,
        "messages": curve((100, 200), (3.0, 4.0))}
    return Profile(**(values | changes))


@pytest.mark.parametrize(("rows", "context", "seconds"), [
    (1, 10, 2), (4, 30, 16), (1, 20, 3), (2.5, 10, 5), (2.5, 20, 7.5),
    (0, 0, 2),  # below the grid: its corner
    (1, 40, 5), (7, 10, 14), (7, 50, 42),  # beyond it: the last slopes go on
])
def test_a_layer_costs_what_lies_between_its_neighbours(rows: float, context: float, seconds: float) -> None:
    assert profile().layer(rows, context) == pytest.approx(seconds)


def test_a_stage_is_the_sum_of_its_parts() -> None:
    found = profile()
    middle = found.flight(4, 30) + 3 * found.layer(4, 30)
    assert found.stage(3, 4, 30, is_first=False, is_last=False) == middle == 8 + 48
    assert found.stage(3, 4, 30, is_first=True, is_last=True) == middle + 0.25 + 2
    assert found.stage(0, 4, 30, is_first=False, is_last=True) == 2  # a head alone
    assert found.message(150) == 3.5
    assert (found.num_layers, found.row_bytes) == (6, 4)


def test_a_cost_never_falls() -> None:
    falling = profile(heads=curve((1, 2, 4), (5.0, 4.0, 3.0)))
    assert falling.head(1) == falling.head(3) == falling.head(100) == 5.0


sizes = st.lists(st.integers(1, 100), min_size=1, max_size=5, unique=True).map(lambda found: tuple(sorted(found)))


@given(sizes=sizes, data=st.data())
def test_costs_that_rise_give_a_curve_that_rises(sizes: tuple[int, ...], data: st.DataObject) -> None:
    seconds = sorted(data.draw(st.lists(st.floats(0, 10), min_size=len(sizes), max_size=len(sizes))))
    found = curve(sizes, tuple(seconds))
    assert [found.at(size) for size in sizes] == pytest.approx(seconds)
    asked = sorted(data.draw(st.lists(st.floats(0, 300), min_size=2, max_size=8)))
    answers = [found.at(size) for size in asked]
    assert all(a <= b + 1e-9 for a, b in pairwise(answers)) and answers[0] >= seconds[0]


def test_a_cost_is_median_and_median_deviation() -> None:
    assert Cost.of([3.0, 1.0, 100.0]) == Cost(seconds=3.0, spread=2.0, samples=3)
    assert Cost.of([-2.0, -1.0, 4.0]).seconds == 0  # a difference of noisy times


def test_a_profile_without_a_draft_says_how_to_get_one() -> None:
    with pytest.raises(UsageError, match="no draft") as caught:
        profile().draft(1, 1)
    assert "--draft" in str(caught.value)
    assert profile(drafts=surface()).draft(4, 10) == 8


# ---- the file --------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    for found in (profile(), profile(drafts=surface(), draft_model=profile().target)):
        found.save(tmp_path / "profile.json")
        assert Profile.load(tmp_path / "profile.json") == found
    assert os.listdir(tmp_path) == ["profile.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        profile(threads=7).save(path)
    assert Profile.load(path).threads == 1 and os.listdir(tmp_path) == ["profile.json"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*profile"):
        profile().save(tmp_path / "nowhere" / "profile.json")
    with pytest.raises(UsageError, match="cannot read the profile"):
        Profile.load(tmp_path / "nowhere")


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = to

    return change


@pytest.mark.parametrize(("change", "says", "way_out"), [
    (_set("format", to="something"), "format: this is no profile", "writes profiles"),
    (_set("version", to=2), "version: this is version 2", "A newer Fullpipe made it"),
    (_set("version", to="1"), "version: this is version '1'", "Measure again"),
    (_set("layers", "costs", 1, 0, "seconds", to=-1.0), "layers.costs.1.0.seconds: .*greater", "Measure again"),
    (_set("heads", "costs", 0, "spread", to=float("nan")), "heads.costs.0.spread: .*finite", "Measure again"),
    (_set("messages", "costs", 0, "seconds", to=float("inf")), "messages.costs.0.seconds: .*finite", "Measure again"),
    (_set("heads", "sizes", to=[4, 1]), r"heads: sizes must rise \(got \[4, 1\]\)", "Measure again"),
    (_set("layers", "rows", to=[1]), "layers: costs: 2 entries for 1 sizes", "Measure again"),
    (_set("threads", to=0), "threads: .*greater", "Measure again"),
    (_set("extra", to=1), "extra: Extra inputs", "Measure again"),
    (lambda values: values.pop("target"), "target: Field required", "Measure again"),
])
def test_a_file_that_cannot_be_used_names_the_field(tmp_path: Path, change: Callable[[dict[str, Any]], None],
                                                    says: str, way_out: str) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=says) as caught:
        Profile.load(path)
    assert str(path) in caught.value.message and way_out in (caught.value.hint or "")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=str(path)) as caught:
        Profile.load(path)
    assert "fullpipe profile" in (caught.value.hint or "")
