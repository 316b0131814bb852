"""The planner looks for the layout with the least predicted time per token.

Up to `EXHAUSTIVE` hosts it looks at all: every subset in every order, the draft on any host, every cut. A lower bound
of each (layers may be split, and all of them cost what the quickest host takes) says in which order to look and when to
stop, so the answer is that of looking at everything; of answers within a percent that with the fewest hosts. Of orders
with the same ends, which differ in their links alone, those are left out whose links are slower for all flights.

Beyond that, it takes the best of the hosts that seem quickest, and then adds, exchanges and moves single hosts as long
as that helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np

from fullpipe.cluster import cuts
from fullpipe.cluster.layout import Ground, Guesser, Ints, Layout, Skeleton
from fullpipe.cluster.modes import PP, Floats, Mode, Modes
from fullpipe.cluster.pins import FREE, Pins
from fullpipe.cluster.survey import Survey
from fullpipe.errors import UsageError

EXHAUSTIVE = 6
_WORTH_A_HOST = 0.01  # a host more may be lost, so it must save more than this share of a token's time


@dataclass(frozen=True, slots=True)
class Candidate:
    """Is a layout with what it promises. cut: the name of its cut. mode: how it decodes. seconds: per token.
    pp_seconds: without a draft, on the same layout."""

    layout: Layout
    cut: str
    mode: Mode
    seconds: float
    pp_seconds: float

    @property
    def method(self) -> str:
        return self.mode.method


@dataclass(frozen=True, slots=True)
class Found:
    """best: of all. by_hosts: the best for each number of stages. by_cut: for each cut, with the hosts and the order of
    the best. pp: the best without a draft. guessing: the best with one, None without any. here: the best on the head's
    host alone, None where it has no room, or is not to be asked."""

    best: Candidate
    by_hosts: tuple[Candidate, ...]
    by_cut: tuple[Candidate, ...]
    pp: Candidate
    guessing: Candidate | None
    here: Candidate | None


def search(survey: Survey, guesser: Guesser | None = None, pins: Pins = FREE) -> Found:
    """The best layout, and what stands beside it. Raises UsageError where what is pinned cannot be, or no layout has
    memory for the model."""
    pins.check(survey)
    if pins.method in ("fullpipe", "chain") and guesser is None:
        raise UsageError(f"the method {pins.method} needs a draft", hint="Name one (a model, or ngram).")
    search = _Search(Ground(survey, guesser, pins.width), pins)
    kinds = [kind for kind in ("fullpipe", "chain") if guesser and pins.method in ("auto", kind)]
    plain, guessing = search.by_hosts(["pp"]), search.by_hosts(kinds)
    wanted = plain if pins.method == "pp" else guessing if pins.method != "auto" else [*plain, *guessing]
    if not wanted or not plain:
        raise _no_room(pins, survey) if not plain else UsageError(
            f"the method {pins.method} has no place with what is pinned", hint="Pin less, or another method.")
    here = search.head_alone([*kinds, "pp"])
    best = _simplest([*wanted, *([here] if here and here.method in {one.method for one in wanted} else [])])
    sizes = sorted({len(one.layout.order) for one in wanted})
    by_hosts = tuple(min((one for one in wanted if len(one.layout.order) == size), key=_seconds) for size in sizes)
    return Found(best, by_hosts, tuple(search.with_cuts(best)), min(plain, key=_seconds),
                 min(guessing, key=_seconds, default=None), here)


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds


def _simplest(candidates: Sequence[Candidate]) -> Candidate:
    """Of those that are as good as the best, the one with fewest hosts."""
    least = min(map(_seconds, candidates))
    good = [one for one in candidates if one.seconds <= least * (1 + _WORTH_A_HOST)]
    return min(good, key=lambda one: (len({*one.layout.order, one.layout.draft_host} - {None}), one.seconds))


def predict(survey: Survey, layout: Layout, guesser: Guesser | None = None, *, width: int | None = None,
            method: str = "auto") -> Candidate:
    """What a layout promises, in its best mode. Raises UsageError where it has no memory for it."""
    pins = Pins(order=layout.order, layers=layout.layers, draft_host=layout.draft_host, width=width, method=method)
    return search(survey, guesser, pins).best


def _no_room(pins: Pins, survey: Survey) -> UsageError:
    shape = survey.hosts[survey.head].profile.target
    need = shape.num_layers * shape.layer_bytes + shape.head_bytes + shape.embedding_bytes
    free = ", ".join(f"{name} {host.room / 1e9:.2f}" for name, host in survey.hosts.items())
    hint = (f"Its weights take {need / 1e9:.2f} GB. To spare have, in GB: {free}. Add hosts, free memory, or take a "
            "smaller or more quantised model.")
    if pins.stages is not None and _has_room(replace(pins, stages=None), survey):
        return UsageError(f"{pins.stages} stages have no room on these hosts; another number has",
                          hint=f"Leave the number to the planner. {hint}")
    where = ", ".join(pins.order or pins.hosts or ())
    return UsageError(f"the model has no room on {where}" if where else
                      "the hosts have no memory for the model together", hint=hint)


def _has_room(pins: Pins, survey: Survey) -> bool:
    """Whether the model has a place, as it is pinned."""
    return bool(_Search(Ground(survey, None, pins.width), pins).by_hosts(["pp"]))


@dataclass(slots=True)
class _Search:
    """Holds what is searched in. ground: what is known of the hosts."""

    ground: Ground
    pins: Pins
    _kept: dict[tuple[tuple[str, ...], str | None], Skeleton] = field(default_factory=dict)

    # ---- what is looked at -----------------------------------------------------------------------------------

    def by_hosts(self, kinds: Sequence[str]) -> list[Candidate]:
        """The best for each number of stages, with one of these methods."""
        pins = self.pins
        names = list(pins.order or pins.hosts or self.ground.survey.hosts)
        if pins.order or len(names) <= EXHAUSTIVE:
            sizes = [len(names)] if pins.order or pins.hosts else list(range(1, len(names) + 1))
            sizes = [size for size in sizes if pins.stages in (None, size)]
            orders = ([pins.order] if pins.order else self._orders(names, size) for size in sizes)
            return [found for some in orders if (found := self.best(some, kinds))]
        grown = self._grown(names, kinds)
        only = len(names) if pins.hosts else pins.stages
        return [one for one in grown if only in (None, len(one.layout.order))]

    def head_alone(self, kinds: Sequence[str]) -> Candidate | None:
        """The best on the head's host, with nothing elsewhere; None where it is not to be asked."""
        pins, head = self.pins, self.ground.survey.head
        if {*(pins.hosts or pins.order or [head]), pins.draft_host or head} != {head} or pins.stages not in (None, 1):
            return None
        return _Search(self.ground, replace(pins, draft_host=head), self._kept).best([(head,)], kinds)

    def with_cuts(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same hosts and order with each cut that may be."""
        if len(candidate.layout.order) == 1 or self.pins.layers or self.pins.cut:
            return
        for cut in cuts.CUTS:
            other = _Search(self.ground, replace(self.pins, cut=cut), self._kept)
            if found := other.best([candidate.layout.order], [candidate.method]):
                yield found

    def _orders(self, names: Sequence[str], size: int) -> list[tuple[str, ...]]:
        """All that may be best of so many hosts."""
        if size <= 3 or self.pins.cut == cuts.UNIFORM:  # there it matters who is first to have a layer more
            return list(permutations(names, size))
        alike: dict[tuple[frozenset[str], str, str], list[tuple[tuple[str, ...], Floats]]] = {}
        for order in permutations(names, size):
            same = alike.setdefault((frozenset(order), order[0], order[-1]), [])
            links = np.concatenate(self.ground.ways(order))
            if not any((links >= other).all() for _, other in same):
                same[:] = [one for one in same if not (one[1] >= links).all()]
                same.append((order, links))
        return [order for same in alike.values() for order, _ in same]

    def _skeletons(self, order: tuple[str, ...], kind: str) -> Iterator[tuple[Skeleton, Modes]]:
        """The order with the draft on each host that may have it, and in which modes. kind: the method."""
        guesser, pins, head = self.ground.guesser, self.pins, self.ground.survey.head
        if kind == "pp":
            yield self._skeleton(order, None), PP
        elif kind == "chain" and order == (head,) and pins.draft_host in (None, head):
            yield self._skeleton(order, head), self.ground.in_process()
        elif kind == "fullpipe":
            assert guesser is not None
            hosts = [pins.draft_host] if pins.draft_host else [head] if guesser.kind == "ngram" \
                else list(self.ground.survey.hosts)
            for host in hosts:
                if guesser.memory((there := self.ground.survey.hosts[host]).profile) <= there.room:
                    skeleton = self._skeleton(order, host)
                    yield skeleton, self.ground.modes(host, skeleton.alone_in_turn)

    def _skeleton(self, order: tuple[str, ...], draft_host: str | None) -> Skeleton:
        key = order, draft_host
        if key not in self._kept:
            self._kept[key] = Skeleton(self.ground, order, draft_host)
        return self._kept[key]

    # ---- the best of them ------------------------------------------------------------------------------------

    def best(self, orders: Iterable[tuple[str, ...]], kinds: Sequence[str]) -> Candidate | None:
        """None where there is memory for none."""
        pairs = (pair for order in orders for kind in kinds for pair in self._skeletons(order, kind))
        looked = [(float(bounds.min()), number, skeleton, modes, bounds)
                  for number, (skeleton, modes) in enumerate(pairs)
                  if len(modes) and skeleton.fits for bounds in [lower_bounds(skeleton, modes)]]
        found: tuple[float, Ints, Mode, Skeleton] | None = None
        for bound, _, skeleton, modes, bounds in sorted(looked, key=lambda one: one[:2]):
            if found and bound >= found[0]:
                break
            promising = modes.only(np.flatnonzero(bounds < found[0]).tolist()) if found else modes
            cut = self._cut(skeleton, promising)
            if cut and (not found or cut[0] < found[0]):
                found = cut[0], cut[1], promising.modes[cut[2]], skeleton
        return self._candidate(*found) if found else None

    def _cut(self, skeleton: Skeleton, modes: Modes) -> tuple[float, Ints, int] | None:
        """The pinned cut, or the best."""
        pins = self.pins
        if pins.layers is None and pins.cut in (None, cuts.BEST):
            return cuts.best(skeleton, modes)
        if pins.layers:
            layers: Ints | None = np.array(pins.layers, dtype=np.intp)
        else:
            layers = cuts.uniform(skeleton) if pins.cut == cuts.UNIFORM else cuts.balanced(skeleton)
        if layers is None or (layers > skeleton.most).any():
            return None
        seconds = skeleton.seconds(layers[None], modes)
        return float(seconds.min()), layers, int(seconds.argmin())

    def _candidate(self, seconds: float, layers: Ints, mode: Mode, skeleton: Skeleton) -> Candidate:
        layout = Layout(skeleton.order, tuple(map(int, layers)), skeleton.draft_host)
        return Candidate(layout, self._name(skeleton, layers), mode, seconds,
                         float(skeleton.seconds(layers[None], PP).min()))

    def _name(self, skeleton: Skeleton, layers: Ints) -> str:
        """What a cut is called."""
        if self.pins.layers is not None:
            return "pinned"
        if self.pins.cut:
            return self.pins.cut
        even = cuts.uniform(skeleton)
        if even is not None and (layers == even).all():
            return cuts.UNIFORM
        return cuts.BALANCED if (layers == cuts.balanced(skeleton)).all() else cuts.BEST

    # ---- many hosts ------------------------------------------------------------------------------------------

    def _grown(self, names: list[str], kinds: Sequence[str]) -> list[Candidate]:
        """One for each number of hosts, from those that seem quickest to all."""
        start = self._quickest(names)[:EXHAUSTIVE]
        sizes = range(1, EXHAUSTIVE + 1)
        found = [best for size in sizes if (best := self.best(self._orders(start, size), kinds))]
        order = found[-1].layout.order if found else tuple(start)
        while len(order) < min(len(names), self.ground.survey.num_layers):
            others = [name for name in names if name not in order]
            grown = self.best(((*order[:at], name, *order[at:]) for name in others
                               for at in range(len(order) + 1)), kinds)
            if grown:
                found.append(self._improved(grown, names, kinds))
            order = found[-1].layout.order if grown else (*order, others[0])  # else not even one more was enough
        return found

    def _quickest(self, names: Sequence[str]) -> list[str]:
        """By what a layer takes, and the way from the head and back."""
        ground, layers = self.ground, self.ground.survey.num_layers
        return sorted(names, key=lambda name: float(ground.layer[name][0]) * layers / len(names) + ground.way_s(name))

    def _improved(self, candidate: Candidate, names: Sequence[str], kinds: Sequence[str]) -> Candidate:
        """With two hosts exchanged, or one moved, as long as that helps."""
        while True:
            order = candidate.layout.order
            near = self.best(sorted({*_exchanged(order, names), *_shifted(order)}), kinds)
            if near is None or near.seconds >= candidate.seconds * (1 - 1e-9):
                return candidate
            candidate = near


def _exchanged(order: tuple[str, ...], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """With a host in another's place, which takes its place if it has a stage."""
    for at, here in enumerate(order):
        for name in names:
            if name != here:
                yield tuple(name if k == at else here if one == name else one for k, one in enumerate(order))


def _shifted(order: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """With a host moved to another place."""
    for at, name in enumerate(order):
        rest = order[:at] + order[at + 1:]
        yield from ((*rest[:to], name, *rest[to:]) for to in range(len(order)) if to != at)


def lower_bounds(skeleton: Skeleton, modes: Modes) -> Floats:
    """Seconds per token that no cut goes below, by mode: the longest stage as if layers could be split, the sum as if
    the quickest host computed all."""
    cost, layers = skeleton.layer[modes.at], skeleton.num_layers
    beside = skeleton.beside[modes.at]
    busy = beside + np.maximum(skeleton.pad, skeleton.shared_with_draft(modes))
    split = (layers + (busy / cost).sum(-1)) / (1 / cost).sum(-1)
    period = np.maximum.reduce([split, busy.max(-1), skeleton.occupied[modes.at], modes.chain])
    first = skeleton.beside[0].sum() + layers * skeleton.layer[0].min() + skeleton.links[0]
    wide = beside.sum(-1) + layers * cost.min(-1) + skeleton.links[modes.at]
    found: Floats = modes.period * period + modes.first * first + modes.wide * wide + modes.fixed
    return found
