"""Stations remember cancels, which overtake the flights that they are about. No torch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection
from itertools import islice

from fullpipe.messages import Flight

_MOST = 1 << 16
_PROMPT = -1  # the node id of every prompt row: not an id, so nobody can mean it


class Cancelled:
    """Holds the nodes that nobody needs, as far as a worker has heard. Safe between threads.

    A node passes a station once at most, so an id is forgotten when its row is dropped. An id whose row
    has been computed here already is never met again; so only the newest `most` ids are kept.
    Forgetting one too early costs a row of work and nothing else.

    An id counts from the moment at which its `cancel` arrives here, in seconds of `time.monotonic`.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._ids: dict[int, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, nodes: Collection[int], due: float = 0.0) -> None:
        with self._lock:
            self._ids.update((node, due) for node in nodes if node != _PROMPT)
            for node in list(islice(self._ids, max(0, len(self._ids) - self._most))):
                del self._ids[node]

    def take(self, nodes: Collection[int]) -> set[int]:
        """Which of these nodes are cancelled by now; they are forgotten."""
        now = time.monotonic()
        with self._lock:
            found = {node for node in nodes if self._ids.get(node, math.inf) <= now}
            for node in found:
                del self._ids[node]
        return found


class CancelTimes:
    """Holds when each node was cancelled that is still in a flight, for stations of one process and one clock."""

    def __init__(self) -> None:
        self._times: dict[int, float] = {}
        self._under_way: dict[int, list[int]] = {}  # flight -> its nodes
        self._flying: set[int] = set()  # the nodes of all of these

    def launch(self, flight: Flight) -> None:
        self._under_way[flight.id] = nodes = flight.nodes
        self._flying.update(nodes)

    def land(self, flight: int) -> None:
        """What has landed need not stay cancelled."""
        nodes = self._under_way.pop(flight)
        self._flying.difference_update(nodes)
        for node in self._times.keys() & nodes if self._times else ():
            del self._times[node]

    def add(self, nodes: Collection[int], now: float) -> None:
        for node in self._flying.intersection(nodes):  # others have nothing to be dropped
            self._times[node] = now

    def heard(self, flight: Flight, until: float) -> set[int]:
        """Rows of the flight that were cancelled by then."""
        if not self._times:
            return set()
        return {node for node in flight.nodes if self._times.get(node, math.inf) <= until}
