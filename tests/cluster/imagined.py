"""Hosts that are imagined: profiles with given times, and links."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fullpipe.cluster.links import Pair
from fullpipe.cluster.profile import Cost, Curve, Profile, Shape, Surface
from fullpipe.cluster.survey import HostCosts, Survey

ROWS = (1, 2, 4, 8, 16, 32)
RISE = (1.0, 1.15, 1.45, 2.2, 4.2, 8.2)  # of one core of notes/kernels.md
MEGA = 1 << 20


def cost(seconds: float) -> Cost:
    return Cost(seconds=seconds, spread=0.0, samples=1)


def curve(seconds: float, rise: tuple[float, ...] = RISE) -> Curve:
    return Curve(sizes=ROWS, costs=tuple(cost(seconds * factor) for factor in rise))


def surface(seconds: float, rise: tuple[float, ...] = RISE) -> Surface:
    return Surface(rows=ROWS, contexts=(256,), costs=tuple((cost(seconds * factor),) for factor in rise))


def shape(num_layers: int, layer_bytes: int = 30 * MEGA) -> Shape:
    return Shape(name="m", num_layers=num_layers, layer_bytes=layer_bytes, head_bytes=layer_bytes,
                 embedding_bytes=layer_bytes, kv_bytes=1024, row_bytes=6144)


def profile(num_layers: int = 28, *, layer: float = 1.2e-3, flight: float = 2e-4, head: float = 6e-3,
            draft: float | None = 12e-3, rise: tuple[float, ...] = RISE, threads: int = 1) -> Profile:
    return Profile(target=shape(num_layers), draft_model=None if draft is None else shape(24, 12 * MEGA),
                   dtype="stored", threads=threads, machine={"cpu": "imagined"}, commit="none", dirty=False,
                   date="2026-11-26T00:00:00Z", layers=surface(layer, rise), flights=surface(flight, (1.0,) * 6),
                   heads=curve(head, rise), lookups=curve(1e-5, (1.0,) * 6),
                   drafts=None if draft is None else surface(draft, rise), messages=curve(1e-4, (1.0,) * 6))


def host(slower: float = 1.0, num_layers: int = 28, *, cores: int = 1, free: int = 1 << 34, processor: str = "",
         **times: Any) -> HostCosts:
    """slower: by how much all takes longer."""
    usual = {"layer": 1.2e-3, "flight": 2e-4, "head": 6e-3, "draft": 12e-3} | times
    scaled = {name: value if value is None or not isinstance(value, float) else value * slower
              for name, value in usual.items()}
    return HostCosts(profile(num_layers, **scaled), cores, free, processor)


def imagined(hosts: Mapping[str, HostCosts], ways: Mapping[tuple[str, str], float] | float = 0.0,
             head: str | None = None, bandwidth: float = 125e6) -> Survey:
    """ways: seconds between two hosts, or between any two."""
    if not isinstance(ways, Mapping):
        ways = {(a, b): ways for a in hosts for b in hosts if a != b}
    return Survey(dict(hosts), head or next(iter(hosts)), {pair: Pair(way, bandwidth) for pair, way in ways.items()})
