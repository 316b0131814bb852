"""The live line and the live picture, drawn from events."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fullpipe.cli.watch import PipelineLine, Watch
from fullpipe.messages import Died, Emitted, Event, Landed, Launched
from recorded import recorded


def test_the_line_shows_live_rows_newest_flight_first() -> None:
    line = PipelineLine(stages=3, width=4)
    line(Launched(0.0, 0, [1], [-1], [7], [0]))
    line(Launched(1.0, 1, [2, 3, 4, 5], [1, 1, 1, 1], [8, 9, 10, 11], [1, 1, 1, 1]))
    assert line.line().startswith("stages |█▂ |   5 live rows in flight   0 tokens")
    line(Landed(2.0, 0, [1], [8], [], []))
    line(Emitted(2.0, 0, 1, 8, 1, hit=True))
    line(Died(2.0, 0, [3, 4, 5]))
    assert line.line() == "stages |▂  |   1 live rows in flight   1 tokens, 1 already in flight when needed"


def drawn(watch: Watch, *, width: int = 80, height: int = 40) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width, height=height).print(watch)
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def hear(watch: Watch, *events: Event) -> None:
    for event in events:
        watch(event)


def test_the_picture_step_by_step() -> None:
    watch = Watch(stages=3)
    watch.name = {7: " a", 8: "b\n", 9: "c", 10: "d"}.__getitem__
    assert drawn(watch)[-1] == "0 tokens, 0 hits, 0 misses, hit rate -"
    hear(watch, Launched(0.0, 0, [1], [-1], [7], [0]), Launched(1.0, 1, [2, 3], [1, 1], [8, 9], [1, 1]),
         Launched(2.0, 2, [4], [2], [10], [2]))
    watch.text = "so far\nand on"
    assert drawn(watch) == [
        "so far", "and on",
        "── stages: rows alive, dead ────────────────────────────────────────────────────",
        "  0 d", "  1 b⏎         c", "  2 ·a",
        "── tree: text, landed, in flight ───────────────────────────────────────────────",
        "·a", "  b⏎", "    d", "  c",
        "── acceptance ──────────────────────────────────────────────────────────────────",
        "0 tokens, 0 hits, 0 misses, hit rate -"]
    hear(watch, Landed(3.0, 0, [1], [8], [], []), Died(3.0, 0, [3]), Emitted(3.0, 0, 1, 8, 1, hit=True))
    told = drawn(watch)
    # A traversal took 3 s: the flights of 1 s and 2 s have come 2/3 and 1/3 of the way.
    assert told[3:6] == ["  0", "  1 d", "  2 b⏎         c"]
    assert told[7:9] == ["b⏎", "  d"] and told[-1] == "1 tokens, 1 hits, 0 misses, hit rate 100%  ●"
    hear(watch, Landed(4.0, 1, [2], [9], [], []), Died(4.0, 0, [4]), Emitted(4.0, 0, 2, 9, 2, hit=False))
    told = drawn(watch)
    assert told[7:9] == ["c", "── acceptance ─".ljust(80, "─")]
    assert told[-1] == "2 tokens, 1 hits, 1 misses, hit rate 50%  ●×"


@pytest.mark.parametrize(("width", "height"), [(100, 40), (40, 24), (20, 12)])
@pytest.mark.parametrize("stages", [1, 4, 20])
def test_it_fits_the_terminal_at_every_moment(width: int, height: int, stages: int) -> None:
    watch = Watch(stages)
    watch.text = "word " * 200
    for event in recorded("fullpipe", stages, tokens=10, accuracy=0.5, width=8):
        watch(event)
        lines = drawn(watch, width=width, height=height)
        assert max(map(len, lines)) <= width
        assert len(lines) <= height


def test_its_figures_are_those_of_the_run() -> None:
    watch, events = Watch(4), recorded(tokens=20)
    hear(watch, *events)
    hits = sum(isinstance(event, Emitted) and event.hit for event in events)
    assert drawn(watch)[-1].startswith(f"20 tokens, {hits} hits, {20 - hits} misses, hit rate {hits / 20:.0%}")
