"""What the page and /metrics say of several hosts is put together here: who is there, what lies between them, what the
plan promised and what came of it, and what has happened.

`Hosts` reads the placing, which the engine's thread changes while it is read; what it takes are copies.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

from fullpipe.cluster.links import Pair
from fullpipe.cluster.placing import HostView
from fullpipe.cluster.plan import Plan
from fullpipe.events import Attached, Emitted, Finished
from fullpipe.messages import Event
from fullpipe.supervision import Observer

WINDOW = 5.0  # seconds that times per token are taken over
_KEPT = 50  # lines of what has happened
_SHOWN = 8

Kind = Literal["bad", "good", "plain"]


class Placed(Protocol):
    """What is asked of a placing (`cluster.placing.Placing`)."""

    @property
    def plan(self) -> Plan | None: ...

    def view(self) -> list[HostView]: ...

    def links(self) -> dict[tuple[str, str], Pair]: ...


class Line(NamedTuple):
    """Says what has happened, and when, in seconds since 1970."""

    time: float
    kind: Kind
    text: str


def station_and_host(label: str) -> tuple[str, str]:
    """What failed, and where, out of what workers are known by: "stage 1 on h2", several with commas between. On one
    machine nothing is said of where."""
    parts = [part.partition(" on ") for part in label.split(", ")]
    return ", ".join(part[0] for part in parts), ", ".join(dict.fromkeys(part[2] for part in parts if part[2]))


class Hosts(Observer):
    """Watches the hosts of a service. May be called from any thread.

    clock: seconds since 1970.
    """

    def __init__(self, placing: Placed, clock: Callable[[], float] = time.time) -> None:
        self._placing, self._clock = placing, clock
        self._lock = threading.Lock()
        self._lines: deque[Line] = deque(maxlen=_KEPT)
        self._states = {host.name: host.state for host in self._views()}
        self._failed: dict[str, str] = {}  # hosts that a failure came from, and its reason, until there is a pipeline
        self._stopped: float | None = None  # since when there is none
        self._newest: dict[int, float] = {}  # when each request's newest token came
        self._gaps: deque[tuple[float, float]] = deque(maxlen=4_000)  # between a request's tokens, and when

    # ---- what is told ----------------------------------------------------------------------------------------

    def on_restart(self, station: str, reason: str) -> None:
        with self._lock:
            self._stopped = self._clock() if self._stopped is None else self._stopped
            self._failed.update(dict.fromkeys(filter(None, station_and_host(station)[1].split(", ")), reason))
            self._say("bad", reason)

    def on_recut(self, why: str) -> None:
        with self._lock:
            self._stopped = self._clock()
            self._look()
            self._say("plain", f"going over to another plan: {why}")

    def __call__(self, event: Event) -> None:
        match event:
            case Emitted():
                with self._lock:
                    if event.request in self._newest:
                        self._gaps.append((event.time, event.time - self._newest[event.request]))
                    self._newest[event.request] = event.time
            case Finished():
                with self._lock:
                    self._newest.pop(event.request, None)
            case Attached():
                with self._lock:
                    self._go_on()

    def _go_on(self) -> None:
        """There is another pipeline: what the old one took tells nothing of it."""
        self._newest, self._gaps = {}, deque(maxlen=self._gaps.maxlen)
        self._failed = {}
        self._look()
        took = "" if self._stopped is None else f" after {self._clock() - self._stopped:.1f} s"
        self._stopped = None
        plan = self._placing.plan
        where = ", ".join(host.name for host in self._views() if host.stations)
        promised = f": {plan.promise.plan_ms:.1f} ms a token planned" if plan and plan.promise else ""
        self._say("good", f"going on with {where}{took}{promised}")

    def _views(self) -> list[HostView]:
        """By their names, host 10 after host 9: one that is lost stays in its place."""
        return sorted(self._placing.view(), key=lambda host: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", host.name)])

    def _look(self) -> None:
        """Take in who has gone and come since the last look."""
        for host in self._views():
            before = self._states.get(host.name)
            self._states[host.name] = host.state
            if host.state == "lost" and before != "lost":
                self._say("bad", f"lost {host.name}: {host.why}")
            elif host.state == "ready" and before != "ready":
                self._say("good", f"{host.name} is there")

    def _say(self, kind: Kind, text: str) -> None:
        self._lines.append(Line(self._clock(), kind, text))

    # ---- what is said ----------------------------------------------------------------------------------------

    def hosts(self) -> list[HostView]:
        """All of them. One is "failed" from when its station complained, or was complained of, until there is a
        pipeline again. Whether it is lost, or the next one that it lost its connection to, shows meanwhile."""
        with self._lock:
            self._look()
            failed = dict(self._failed)
        return [HostView(host.name, host.address, "failed", host.stations, failed[host.name], host.head)
                if host.state == "ready" and host.name in failed else host for host in self._views()]

    def links(self) -> Mapping[tuple[str, str], Pair]:
        """What was measured between them."""
        return self._placing.links()

    def ways(self) -> set[tuple[str, str]]:
        """Where a token's hidden states go, from host to host, and back."""
        views = self._views()
        plan, head = self._placing.plan, next((host.name for host in views if host.head), "")
        if plan is None:
            return set()
        round = [head, *(stage.host for stage in plan.stages), head]
        draft = [head, plan.draft_host or head, head] if plan.method != "pp" else []
        return {(a, b) for a, b in (*pairwise(round), *pairwise(draft)) if a != b}

    @property
    def planned_s(self) -> float | None:
        """Seconds per token that the plan promises one request alone; None: it promises nothing."""
        plan = self._placing.plan
        return plan.promise.plan_ms / 1e3 if plan and plan.promise else None

    @property
    def seen_s(self) -> float | None:
        """Mean seconds between a request's tokens, over the newest ones; None: there were none on this pipeline."""
        with self._lock:
            until = self._gaps[-1][0] if self._gaps else 0.0
            gaps = [gap for when, gap in self._gaps if when > until - WINDOW]
        return sum(gaps) / len(gaps) if gaps else None

    def picture(self) -> dict[str, Any]:
        """What the page shows, as JSON has it. Of a link: from, to, milliseconds one way, Mbit/s (null: without bound),
        and whether tokens go there."""
        hosts = [{"name": host.name, "address": host.address, "state": host.state, "why": host.why,
                  "stations": host.stations, "head": host.head} for host in self.hosts()]
        with self._lock:
            happened = [list(line) for line in list(self._lines)[-_SHOWN:]]
        return {"hosts": hosts, "links": list(self._told_links()), "planned_ms": _ms(self.planned_s),
                "seen_ms": _ms(self.seen_s), "happened": happened}

    def _told_links(self) -> Iterator[list[Any]]:
        used = self.ways()
        for (a, b), link in sorted(self.links().items()):
            mbit = None if math.isinf(link.bandwidth) else round(8e-6 * link.bandwidth, 1)
            yield [a, b, round(1e3 * link.latency_s, 2), mbit, (a, b) in used]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 1)
