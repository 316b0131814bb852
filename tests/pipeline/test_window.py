"""How many flights a stage may send ahead, worked out from what it has seen."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import Flight
from fullpipe.pipeline.frames import Come, Hop
from fullpipe.pipeline.hops import Outlet, Window
from fullpipe.pipeline.wire import encode

TIMES = st.floats(0.0, 100.0)


def _window(trips: list[float], own: float, theirs: float = 0.0) -> Window:
    window = Window()
    window.note_own(own)
    for trip in trips:
        window.note(trip, theirs)
    return window


@pytest.mark.parametrize(("trips", "own", "theirs", "most"), [
    ([], 0.01, 0.0, 1),
    ([0.0002], 0.01, 0.01, 1),
    ([0.1], 0.01, 0.01, 11),
    ([0.1], 0.01, 0.0, 11),
    ([0.3, 0.1, 0.2], 0.01, 0.01, 11),
    ([0.1], 0.001, 0.05, 3),
    ([0.1], 0.05, 0.001, 3),
    ([0.1], 0.0, 0.0, 1),
    ([-0.1], 0.01, 0.01, 1),
], ids=["no-trips", "local", "far", "far-unknown-successor", "shortest-counts", "slow-successor", "slow-itself",
        "no-service", "clock-noise"])
def test_window_fills_the_way_and_lets_one_wait(trips: list[float], own: float, theirs: float, most: int) -> None:
    assert _window(trips, own, theirs).most == most


def test_window_without_anything_known_is_one() -> None:
    assert Window().most == 1


def test_window_forgets_trips_and_services_of_long_ago() -> None:
    window = _window([0.001], 0.01)
    for _ in range(64):
        window.note(0.1, 0.0)
    assert window.most == 11, "the way has become longer"
    for _ in range(5):
        window.note_own(0.1)
    assert window.most == 2


def test_window_does_not_shrink_for_one_long_chunk() -> None:
    window = _window([0.1], 0.01)
    window.note_own(0.01)
    window.note_own(5.0)
    assert window.most == 11


@given(st.lists(TIMES, max_size=9), st.lists(TIMES, max_size=9), st.lists(TIMES, max_size=9))
def test_window_always_lets_one_come_and_never_more_than_the_way_holds(trips: list[float], own: list[float],
                                                                       theirs: list[float]) -> None:
    window = Window()
    for seconds in own:
        window.note_own(seconds)
    for trip, seconds in zip(trips, theirs):
        window.note(trip, seconds)
    assert window.most >= 1
    if len(trips) and len(theirs) and any(own):
        assert window.most == 1 or min(trips[: len(theirs)]) > 0


class _Successor:
    """Is a socket whose other end lets flights come when the test says so."""

    def __init__(self) -> None:
        self.sent = 0
        self.credits: deque[bytes] = deque()
        self.waited = 0

    def send_multipart(self, frames: list[Any]) -> None:
        self.sent += 1

    def poll(self, timeout: int | None = None) -> bool:
        if timeout is None and not self.credits:
            self.waited += 1
            self.let_come()
        return bool(self.credits)

    def recv(self) -> bytes:
        return self.credits.popleft()

    def let_come(self, held: float = 0.0) -> None:
        self.credits.append(encode(Come(held, 0.01)))


def test_outlet_waits_for_its_successor_to_begin() -> None:
    successor = _Successor()
    outlet = Outlet(successor)  # type: ignore[arg-type]
    for number in range(4):
        outlet.wait_for_room(10.0)
        outlet.send(Hop(Flight(number), []), {})
        assert successor.waited == number, "the first goes at once, each other one when that before it has begun"
    assert successor.sent == 4


def test_outlet_takes_in_all_that_has_come_without_waiting() -> None:
    successor = _Successor()
    outlet = Outlet(successor)  # type: ignore[arg-type]
    outlet.wait_for_room(10.0)
    outlet.send(Hop(Flight(0), []), {})
    successor.let_come()
    outlet.wait_for_room(10.0)
    assert successor.waited == 0 and not successor.credits
