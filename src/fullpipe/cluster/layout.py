"""A layout says which hosts have which layers, and who drafts; here is what it takes, for flights of any rows.

A period, from flight to flight, is at least what the slowest stage takes; stage 0's, if it sits elsewhere than the
engine, with the way to the engine and back, by which it hears of its next flight; what the bytes of a flight take on
any link; what the draft takes for the levels of a flight; and what stations that share cores take together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fullpipe.cluster.acceptance import Acceptance, Kind
from fullpipe.cluster.links import Pair, between
from fullpipe.cluster.modes import CONTEXT, WIDTHS, Floats, Modes, fullpipe_modes, in_turn_modes
from fullpipe.cluster.profile import Profile, Shape
from fullpipe.cluster.survey import HostCosts, Survey
from fullpipe.costs import CostCurve
from fullpipe.stations.drafts.names import ModuleSize

CACHE_TOKENS = 4096  # for which a stage must have memory
_ROW_BYTES, _MESSAGE_BYTES = 64, 128  # of a row beside its hidden state, of a flight beside its rows
_NGRAM_CALL_S, _NGRAM_ROW_S = 5e-5, 4e-5
_LEAST_S = 1e-9  # that a layer takes, whatever was measured

Ints = NDArray[np.intp]


def stage_bytes(shape: Shape, layers: int, *, is_first: bool = False, is_last: bool = False) -> int:
    """Memory of a stage: weights, and cache for a request of usual length."""
    ends = is_first * shape.embedding_bytes + is_last * shape.head_bytes
    return ends + layers * (shape.layer_bytes + CACHE_TOKENS * shape.kv_bytes)


@dataclass(frozen=True, slots=True)
class Guesser:
    """names: the drafts, as in options. kind: of all together. acceptance: how often they are right. module: how large
    it is, for one that reads hidden states."""

    names: tuple[str, ...]
    kind: Kind
    acceptance: Acceptance
    module: ModuleSize | None = None

    def call(self, profile: Profile, rows: float) -> float:
        """Seconds of a call with so many rows on a host."""
        if self.kind == "ngram":
            return _NGRAM_CALL_S + rows * _NGRAM_ROW_S
        if self.module is not None:
            layers = self.module.layers * profile.layer(rows, CONTEXT)
            return profile.flight(rows, CONTEXT) + layers + self.module.head * profile.head(rows)
        return profile.draft(rows, CONTEXT)

    def memory(self, profile: Profile) -> int:
        """Bytes of the draft on a host."""
        shape = profile.draft_model
        if self.kind not in ("model", "model+ngram") or shape is None:
            return 0
        return stage_bytes(shape, shape.num_layers, is_first=True, is_last=True)


@dataclass(frozen=True, slots=True)
class Layout:
    """order: hosts of the stages. layers: how many each has. draft_host: None: nobody drafts."""

    order: tuple[str, ...]
    layers: tuple[int, ...]
    draft_host: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Is stations that share cores. members: stages, by index. slots: of them that compute at a time."""

    members: tuple[int, ...]
    slots: int
    has_draft: bool


class Ground:
    """Knows of a survey what all layouts need, by WIDTHS. most: rows of a flight; None: any."""

    def __init__(self, survey: Survey, guesser: Guesser | None = None, most: int | None = None) -> None:
        self.survey, self.guesser, self._width = survey, guesser, most
        self.row_bytes = survey.hosts[survey.head].profile.row_bytes
        self.sizes = np.array([_MESSAGE_BYTES + rows * (_ROW_BYTES + self.row_bytes) for rows in WIDTHS], np.float64)
        profiles = {name: host.profile for name, host in survey.hosts.items()}
        self.layer = {name: np.array([max(of.layer(rows, CONTEXT), _LEAST_S) for rows in WIDTHS])
                      for name, of in profiles.items()}
        self.flight = {name: np.array([of.flight(rows, CONTEXT) for rows in WIDTHS]) for name, of in profiles.items()}
        self.lookup = {name: np.array(list(map(of.embedding, WIDTHS))) for name, of in profiles.items()}
        self.head = {name: np.array(list(map(of.head, WIDTHS))) for name, of in profiles.items()}
        self._modes: dict[tuple[str, bool], Modes] = {}

    def modes(self, draft_host: str, in_turn: bool) -> Modes:
        """Of `fullpipe` with the draft there. in_turn: draft and stages take turns."""
        if (draft_host, in_turn) not in self._modes:
            assert self.guesser is not None
            asked = self.calls(draft_host), self.way_s(draft_host), self.guesser.acceptance, self._width
            found = fullpipe_modes(*asked)
            self._modes[draft_host, in_turn] = found.beside(in_turn_modes(*asked)) if in_turn else found
        return self._modes[draft_host, in_turn]

    def in_process(self) -> Modes:
        """Of one process on the head's host that drafts and verifies in turn."""
        assert self.guesser is not None
        return in_turn_modes(self.calls(self.survey.head), 0.0, self.guesser.acceptance, self._width, "chain")

    def calls(self, host: str) -> CostCurve:
        """Seconds of a draft call by rows."""
        assert self.guesser is not None
        guesser, profile = self.guesser, self.survey.hosts[host].profile
        return CostCurve.of(lambda rows: guesser.call(profile, rows), WIDTHS)

    def way_s(self, host: str) -> float:
        """From the engine to a draft and back."""
        head = self.survey.head
        return self.way(head, host).latency_s + self.way(host, head).latency_s

    def way(self, a: str, b: str) -> Pair:
        return between(self.survey.pairs, a, b)

    def ways(self, order: tuple[str, ...]) -> tuple[Floats, Floats]:
        """Seconds of a traversal on links, and of a flight's bytes on the slowest."""
        head = self.survey.head
        hops = [self.way(*pair) for pair in pairwise(order)]
        latency = sum(hop.latency_s for hop in hops) + self.way(head, order[0]).latency_s \
            + self.way(order[-1], head).latency_s
        per_byte = [1 / hop.bandwidth for hop in hops]
        return latency + sum(per_byte) * self.sizes, max(per_byte, default=0.0) * self.sizes


class Skeleton:
    """Is a layout whose layers are still to be cut: what its stations and links take, by WIDTHS.

    layer, beside: seconds of a layer and of all else, [width, stage]. links: of a traversal. occupied: what a flight's
    bytes take on the slowest link. pad: seconds that a stage rests between flights. least, most: layers of a stage.
    """

    def __init__(self, ground: Ground, order: Sequence[str], draft_host: str | None = None) -> None:
        survey = ground.survey
        self.order, self.draft_host, self.num_layers = tuple(order), draft_host, survey.num_layers
        self.layer = np.stack([ground.layer[name] for name in order], axis=1)
        self.beside = np.stack([ground.flight[name] for name in order], axis=1)
        self.beside[:, 0] += ground.lookup[order[0]]
        self.beside[:, -1] += ground.head[order[-1]]
        self.links, self.occupied = ground.ways(self.order)
        self.pad = np.zeros(len(order))
        self.pad[0] = ground.way_s(order[0])
        self.least = np.array([1] * (len(order) - 1) + [int(len(order) == 1)], dtype=np.intp)
        self.most = np.array([self._room(survey.hosts[name], index, ground.guesser)
                              for index, name in enumerate(order)], dtype=np.intp)
        self.groups = _groups(survey, self.order, draft_host)

    def _room(self, host: HostCosts, index: int, guesser: Guesser | None) -> int:
        """Layers that a host has memory for."""
        shape, room = host.profile.target, host.room
        if guesser and self.draft_host == self.order[index]:
            room -= guesser.memory(host.profile)
        room -= stage_bytes(shape, 0, is_first=index == 0, is_last=index == len(self.order) - 1)
        return min(max(room // stage_bytes(shape, 1), -1), self.num_layers)

    @property
    def fits(self) -> bool:
        """Whether there is memory for all layers, and layers for all stages."""
        return bool((self.most >= self.least).all() and self.most.sum() >= self.num_layers >= self.least.sum())

    @cached_property
    def alone_in_turn(self) -> bool:
        """Whether the draft and all stages take turns."""
        return any(group.has_draft and group.slots == 1 and len(group.members) == len(self.order)
                   for group in self.groups)

    def shared_with_draft(self, modes: Modes) -> Floats:
        """Seconds that each stage's core is the draft's in a period, [mode, stage], where they are two on one core."""
        shared = np.zeros((len(modes), len(self.order)))
        for group in self.groups:
            if group.has_draft and group.slots == 1:
                shared[:, list(group.members)] = modes.asks[:, None]
        return shared

    def seconds(self, layers: Ints, modes: Modes) -> Floats:
        """Seconds per token, [..., mode], of cuts [..., mode or 1, stage]."""
        stages = self.beside[modes.at] + layers * self.layer[modes.at]
        period = np.maximum((stages + self.pad).max(-1), np.maximum(self.occupied[modes.at], modes.chain))
        for group in self.groups:
            load = stages[..., list(group.members)].sum(-1) + (modes.asks if group.has_draft else 0.0)
            period = np.maximum(period, load / group.slots)
        first = (self.beside[0] + layers * self.layer[0]).sum(-1) + self.links[0]
        wide = stages.sum(-1) + self.links[modes.at]
        found: Floats = modes.period * period + modes.first * first + modes.wide * wide + modes.fixed
        return found


def _groups(survey: Survey, order: tuple[str, ...], draft_host: str | None) -> list[Group]:
    """Those that are more than their slots."""
    def processor(name: str) -> str:
        return survey.hosts[name].processor or f"host {name}"

    groups = []
    for name in dict.fromkeys(map(processor, order)):
        members = tuple(index for index, host in enumerate(order) if processor(host) == name)
        has_draft = draft_host is not None and processor(draft_host) == name
        slots = min(survey.hosts[order[index]].slots for index in members)
        if len(members) + has_draft > slots:
            groups.append(Group(members, slots, has_draft))
    return groups
