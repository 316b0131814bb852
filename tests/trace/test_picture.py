"""The picture: what is filled is what was alive, and every word on it is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.messages import Event
from fullpipe.trace import picture
from fullpipe.trace.history import DRAFT, history
from fullpipe.trace.picture import draw, write_comparison
from recorded import recorded, uneven

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

LIVE, DEAD = ((0x2F, 0x6F, 0xB3), (0x6A, 0xA5, 0xDC)), (0xEC, 0xEC, 0xEC)


def grey_pixels(path: Path) -> int:
    from matplotlib.image import imread

    image = np.rint(255 * imread(path)[:, :, :3]).astype(int)
    return int((image == DEAD).all(axis=2).sum())


def words(path: Path) -> list[str]:
    """Matplotlib draws glyphs, and names what they spell in comments."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return recorded("fullpipe", accuracy=0.4, tokens=12, costs=uneven)


def area(corners: np.ndarray) -> float:
    return abs(float(np.prod(corners.max(axis=0) - corners.min(axis=0))))


def test_the_coloured_area_is_the_time_of_live_rows(events: list[Event]) -> None:
    from matplotlib.collections import PolyCollection

    told = history(events)
    stays = [stay for stage in told.stages for stay in told.stays[stage]]
    live = sum((stay.end - stay.start) * stay.alive / len(stay.nodes) for stay in stays)
    figure = picture._figure([("", told)], picture._window(told, None, None), "time")
    drawn: dict[bool, float] = {True: 0.0, False: 0.0}
    for shape in figure.axes[0].collections:
        if isinstance(shape, PolyCollection):
            red, green, blue = (round(255 * part) for part in (*shape.get_facecolor()[:1, :3].ravel(),) or (1, 1, 1))
            hatched = shape.get_hatch() is not None
            if hatched or (red, green, blue) in LIVE:
                drawn[hatched] += sum(area(path.vertices) for path in shape.get_paths())
    whole = sum(stay.end - stay.start for stay in stays)
    assert drawn[True] == pytest.approx(0.84 * whole), "a box per stay"
    assert drawn[False] == pytest.approx(0.84 * live) and live < whole


def test_without_deaths_nothing_is_hatched(tmp_path: Path) -> None:
    draw(recorded("pp", tokens=5), tmp_path / "pp.png")
    only_legend = grey_pixels(tmp_path / "pp.png")
    draw(recorded("fullpipe", accuracy=0.4, tokens=5, costs=uneven), tmp_path / "f.png")
    assert only_legend < 200 < grey_pixels(tmp_path / "f.png")


def test_it_names_its_clock_its_lanes_and_its_figures(events: list[Event], tmp_path: Path) -> None:
    draw(events, tmp_path / "a.svg", title="four stages", clock="virtual time")
    told, said = history(events), words(tmp_path / "a.svg")
    assert {"virtual time since the run began, in seconds", "tokens", *told.stays} <= set(said)
    assert any("four stages" in line for line in said)
    assert any(f"12 tokens in {told.end - told.start:.4g} s, {told.hits} hits and {told.misses} misses." in line
               for line in said)
    for meaning in ("live rows (shades alternate by flight)", "dead rows", "bubble", "draft call"):
        assert meaning in said


def test_the_window_is_said(events: list[Event], tmp_path: Path) -> None:
    draw(events, tmp_path / "a.svg", title="part", start=3.0, end=9.0, clock="wall-clock time")
    span = history(events).end - history(events).start
    said = words(tmp_path / "a.svg")
    assert any(f"part (shown: 3 to 9 s of {span:.4g})" in line for line in said)
    inside = [event for event in history(events).emissions if 3 <= event.time <= 9]
    assert any(line.startswith(f"{len(inside)} tokens in 6 s") for line in said) and inside


def test_a_long_run_is_cut_where_boxes_become_too_small(tmp_path: Path) -> None:
    events = recorded("pp", tokens=100)
    draw(events, tmp_path / "a.svg")
    assert any("(shown: 0 to 320 steps of 400)" in line for line in words(tmp_path / "a.svg"))


def test_two_runs_share_one_axis(tmp_path: Path) -> None:
    pp, ours = recorded("pp", tokens=20), recorded("fullpipe", accuracy=1.0, tokens=20)
    write_comparison(tmp_path / "c.svg", [("plain", pp), ("filled", ours)], clock="virtual time")
    said = words(tmp_path / "c.svg")
    end = history(ours).end
    assert any(line.startswith(f"plain (shown: 0 to {end:g} steps of 80)") for line in said)
    assert any(line.strip() == "filled" for line in said)
    assert said.count("steps since the run began") == 1
    assert said.count("stage 0") == 2 and said.count(DRAFT) == 1


def test_a_plain_pipeline_has_neither_hits_nor_misses(tmp_path: Path) -> None:
    draw(recorded("pp", tokens=5, costs=uneven), tmp_path / "pp.svg")
    said = words(tmp_path / "pp.svg")
    figures = re.compile(r"5 tokens in [\d.]+ s\.   Of the stages' time: 2\d% live rows, 0% dead rows")
    assert any(figures.match(line) for line in said)
    assert "token" in said and not any("hit" in line or "miss" in line for line in said)


def test_unit_steps_are_steps_and_not_seconds(tmp_path: Path) -> None:
    draw(recorded("fullpipe", tokens=12), tmp_path / "a.svg", start=3.0, end=9.0, clock="virtual time")
    said = words(tmp_path / "a.svg")
    assert "steps since the run began" in said and any(" tokens in 6 steps, " in line for line in said)
    assert any("(shown: 3 to 9 steps of " in line for line in said) and not any("second" in line for line in said)


def test_the_same_run_gives_the_same_file(events: list[Event], tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(events, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(("window", "message"), [
    ({"start": 5.0, "end": 5.0}, "the window from 5 to 5 s is empty"),
    ({"start": 1e6, "end": 2e6}, "the window begins at 1e"),
])
def test_a_window_with_nothing_in_it(events: list[Event], tmp_path: Path, window: dict[str, float],
                                     message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(events, tmp_path / "a.png", **window)
    assert not list(tmp_path.iterdir())


def test_other_kinds_of_file_and_no_runs(events: list[Event], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot draw a picture of the kind '\.bmp'"):
        draw(events, tmp_path / "a.bmp")
    with pytest.raises(UsageError, match="no run to draw"):
        write_comparison(tmp_path / "a.png", [])


def test_without_matplotlib(events: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"needs matplotlib\npip install 'fullpipe\[plot\]'"):
        draw(events, tmp_path / "a.png")
