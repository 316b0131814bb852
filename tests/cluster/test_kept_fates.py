"""What was learned of a draft is there the next time, and a damaged file is as good as none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fullpipe.cluster.kept import KeptFates
from fullpipe.sequences.calibration import Calibration

WHAT = {"model": ["/models/one.gguf", [7, 8]], "draft": {"builder": "a:b", "args": {}}}


def learned() -> Calibration:
    one = Calibration()
    for number in range(300):
        one.note(0, math.log(0.5), number % 5 > 0)
        one.note(9, math.log(0.3), number % 9 == 0)
    return one


def test_it_is_there_the_next_time(tmp_path: Path) -> None:
    one = learned()
    assert KeptFates.of(tmp_path / "new", WHAT).save(one)
    again = KeptFates.of(tmp_path / "new", WHAT).load()
    assert again.counts() == one.counts() and again.noted == 0
    assert math.exp(again.map(0, math.log(0.5))) == pytest.approx(0.8, abs=0.05)


def test_another_draft_is_not_taken_for_it(tmp_path: Path) -> None:
    kept = KeptFates.of(tmp_path, WHAT)
    kept.save(learned())
    assert KeptFates.of(tmp_path, WHAT | {"draft": None}).load().counts() == {}
    assert KeptFates(kept.path, WHAT | {"draft": None}).load().counts() == {}, "nor where names fall together"


def _without_a_knot(file: dict[str, Any]) -> None:
    file["kinds"]["0"].pop()


def _of_too_many(file: dict[str, Any]) -> None:
    file["kinds"]["0"][0] = [1.0, 0.5, 2.0]


def _of_another_form(file: dict[str, Any]) -> None:
    file["kinds"] = []


@pytest.mark.parametrize("change", [_without_a_knot, _of_too_many, _of_another_form])
def test_what_cannot_be_read_is_as_good_as_none(tmp_path: Path, change: Any) -> None:
    kept = KeptFates.of(tmp_path, WHAT)
    assert kept.load().counts() == {}
    kept.save(learned())
    file = json.loads(kept.path.read_text())
    change(file)
    kept.path.write_text(json.dumps(file))
    assert kept.load().counts() == {}
    kept.path.write_text("{")
    assert kept.load().counts() == {}


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not KeptFates.of(tmp_path / "file", WHAT).save(learned())
