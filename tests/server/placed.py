"""Placings that are imagined: hosts h1, h2, h3 with a stage each, until one is lost."""

from __future__ import annotations

from typing import Any

from fullpipe.cluster.links import Pair
from fullpipe.cluster.placing import HostView
from fullpipe.cluster.plan import Plan, Promise, StagePlan


def stage(host: str, first: int, last: int) -> StagePlan:
    return StagePlan(host=host, first=first, last=last)


class Placed:
    """Three hosts 10 ms apart; the engine and the draft are on the first."""

    def __init__(self, *, spare: tuple[str, ...] = ()) -> None:
        self.names: list[str] = ["h1", "h2", "h3", *spare]
        self.lost: dict[str, str] = {}
        self.plan: Plan | None = self._plan("h1", "h2", "h3")
        self.latency_s, self.bandwidth = 0.01, 117.5e6

    def _plan(self, *hosts: str, ms: float | None = 23.04) -> Plan:
        stages = tuple(stage(host, 10 * rank, 10 * rank + 10) for rank, host in enumerate(hosts))
        return Plan(model="m", draft="d", method="fullpipe", stage=stages,
                    promise=None if ms is None else Promise(plan_ms=ms, pp_ms=99.0))

    def lose(self, name: str, why: str = "it does not answer") -> None:
        self.names.remove(name)
        self.lost[name] = why
        self.plan = self._plan("h1", "h3", ms=31.0)

    def gain(self, name: str) -> None:
        del self.lost[name]
        self.names.insert(1, name)

    def replan(self, *hosts: str, **more: Any) -> None:
        self.plan = self._plan(*hosts, **more)

    def view(self) -> list[HostView]:
        assert self.plan
        stations: dict[str, list[str]] = {"h1": ["draft"]}
        for rank, one in enumerate(self.plan.stages):
            stations.setdefault(one.host, []).insert(0, f"stage {rank}")
        return [HostView(name, f"10.0.0.{name[1:]}", "ready", tuple(stations.get(name, ())), head=name == "h1")
                for name in self.names] + [HostView(name, "", "lost", (), why) for name, why in self.lost.items()]

    def links(self) -> dict[tuple[str, str], Pair]:
        return {(a, b): Pair(self.latency_s, self.bandwidth) for a in self.names for b in self.names if a != b}
