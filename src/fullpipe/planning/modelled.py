"""Time per token without a pipeline: a recurrence over tokens, for thousands of set-ups at once. NumPy only.

Nothing here runs an engine, a tree of a real draft, or a model: every figure is modelled. What is modelled:

Each stage k takes `stages[k]` seconds for a flight, whatever is in it, and each hop between stages `hops[k]`. A
traversal takes S = to_first + sum of stages + sum of hops + landing. A draft call takes d = draft + 2 draft_link.

- `pp`: a token per traversal, S.
- `chain`, `static-tree`: with the pipeline empty the draft is called once for each layer of the tree, `depth` times,
  and then all of it travels as one flight: a round takes depth d + S and gives 1 + (guesses accepted in a row) tokens.
- `pipedec`, `fullpipe`: the root enters; then a layer of the tree follows every B seconds. B, the bottleneck's period,
  is the largest of the stages' times, d, and stages[0] + 2 to_first (the engine waits to hear that stage 0 is free).
  Stations are queues in a row and each takes the same time for every flight, so flights that enter B apart land B
  apart. A *hit* (the token that follows was in flight) therefore commits B after its predecessor. A *miss* empties the
  pipeline; the new root enters as soon as stage 0 has finished what it is computing (nothing stops that; rows that wait
  are dropped without cost), and its answer comes S later, or later still where a slower stage beyond is at work for a
  dead flight when it comes. The first layer after it waits for the draft, which first finishes the call it is in: that
  layer enters max(stages[0], rest + d) after the root, and if that is more than B the first hit comes so much later.
  With unit stages, no links and d at most 1 a hit costs 1 and a miss n, so a token costs p + (1 - p) n on average: n /
  (1 + (1 - p)(n - 1)) times faster than pp.

Who hits is drawn per token. With `hits`, token number j after the last miss (0: the answer to the new root) is
followed by a hit with probability hits[j], the last of which goes on for ever. With `ranks` the truth is the draft's
guess number r with probability ranks[r], at every node alike and independently, and the draft knows these
probabilities: then the layers that a method of some width keeps are determined, and are followed node by node. A layer
is the best `width` children of the layer before it, without the nodes that commits have killed by the time it enters.

The draws are one sequence of uniform numbers for all set-ups: two set-ups differ by what they are, not by luck, and a
result depends on set-up, number of tokens and seed alone.

Not modelled: prompts; costs that depend on rows, context or the moment; bandwidth; acceptance that follows the text;
a limit on how far the tree may grow; a pipeline that is held up stage by stage behind a slow one, and how that clears;
nodes that enter late: `fullpipe`'s siblings that missed their layer, and `pipedec`'s when its newest layers have all
died. So for widths above 1 the model takes `fullpipe` for `pipedec` with a draft that runs ahead, and is pessimistic
about both. Held against the engine with scripted stations over 2,000 tokens, two guesses (0.7, 0.3), width 4 and 8
unit stages, its time per token is 12% above `pipedec`'s and 24% above `fullpipe`'s. At width 1 and unit costs it is the
engine's, token by token; for stages of uneven times it is within 8%, the most where one is four times slower than the
others (tests hold both).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullpipe.errors import UsageError

METHODS = ("pp", "chain", "static-tree", "pipedec", "fullpipe")

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]

_IN_ROUNDS = ("pp", "chain", "static-tree")  # the pipeline is empty before each flight
_GUESSES = 16  # per node, of a geometric draft: as many as the engine asks for
_SAME = 1e-9  # of a period: moments that lie closer are one moment, and what ends then does not delay


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One method on one imagined pipeline. Times in seconds, or in any one unit.

    stages: what each takes for this method's flights. hops: latency between stages, one for all or one each. to_first,
    landing: from the engine to stage 0, from the last stage to the engine. draft: a draft call; draft_link: one way.
    hits: chance of a hit by tokens since the last miss; the last holds for all that follow. ranks: instead of
    it, the chance that the truth is the draft's first guess, its second, and so on. width: nodes in a layer (one,
    unless `ranks` are given). depth: layers below the root (chain, static-tree).

    Raises UsageError for what cannot be.
    """

    method: str
    stages: tuple[float, ...]
    hops: float | tuple[float, ...] = 0.0
    to_first: float = 0.0
    landing: float = 0.0
    draft: float = 0.0
    draft_link: float = 0.0
    hits: tuple[float, ...] | None = None
    ranks: tuple[float, ...] | None = None
    width: int = 1
    depth: int = 4

    def __post_init__(self) -> None:
        times = (*self.stages, *self._hops, self.to_first, self.landing, self.draft, self.draft_link)
        chances = (*(self.hits or ()), *(self.ranks or ()))
        for ok, what in (
            (self.method in METHODS, f"unknown method {self.method!r}; methods are: {', '.join(METHODS)}"),
            (bool(self.stages), "there must be a stage"),
            (len(self._hops) == len(self.stages) - 1, f"{len(self._hops)} hops cannot join {len(self.stages)} stages"),
            (all(math.isfinite(time) and time >= 0 for time in times), f"times must be 0 or more (got {times})"),
            (max(self.stages, default=0) > 0, "some stage must take time"),
            (min(self.width, self.depth) >= 1, f"width and depth must be 1 or more (got {self.width}, {self.depth})"),
            (self.method == "pp" or (self.hits is None) != (self.ranks is None),
             f"{self.method} needs an acceptance: hits, or ranks"),
            (all(0 <= chance <= 1 for chance in chances), f"chances must be in [0, 1] (got {chances})"),
            (sum(self.ranks or ()) <= 1 + 1e-9, f"ranks must not sum to more than 1 (got {self.ranks})"),
            (all(a >= b for a, b in pairwise(self.ranks or ())),
             f"a draft's later guesses are not likelier than its earlier ones (got {self.ranks})"),
            (self.hits != () and self.ranks != (), "an acceptance must not be empty"),
            (self.width == 1 or self.hits is None or self.method == "pp",
             "a width means nothing beside hits, which say what the tree achieves; give ranks"),
        ):
            if not ok:
                raise UsageError(what)

    @property
    def _hops(self) -> tuple[float, ...]:
        return self.hops if isinstance(self.hops, tuple) else (self.hops,) * (len(self.stages) - 1)

    @property
    def traversal(self) -> float:
        """From the engine's sending a flight into an empty pipeline to its having the answer."""
        return self.to_first + sum(self.stages) + sum(self._hops) + self.landing

    @property
    def call(self) -> float:
        """A draft call as the engine sees it."""
        return self.draft + 2 * self.draft_link

    @property
    def turn(self) -> float:
        """From the engine's sending a flight into an idle stage 0 to its hearing that stage 0 is free again."""
        return self.stages[0] + 2 * self.to_first

    @property
    def period(self) -> float:
        """Least time between two flights of a full pipeline."""
        return max(*self.stages, self.turn, self.call)

    @property
    def stall(self) -> float:
        """How long a new root that is sent at once waits at stages beyond the first, for the dead flight that is being
        computed there when it comes. Flights are B apart everywhere, so the one there began a remainder of B ago."""
        lead = self.to_first + np.cumsum(np.add(self.stages[:-1], self._hops))
        waits = _rest(self.traversal - lead, self.period, np.array(self.stages[1:])) - lead
        return float(waits.max(initial=0.0))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a set-up came to. seconds: from the first token to the last, modelled."""

    setup: Setup
    tokens: int
    seconds: float
    hits: int
    misses: int

    @property
    def tbt(self) -> float:
        """Mean time between tokens, modelled."""
        return self.seconds / (self.tokens - 1)

    @property
    def steps_per_token(self) -> float:
        """In service periods of stage 0, modelled."""
        return self.tbt / self.setup.stages[0]

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses)


def modelled(setups: Sequence[Setup], tokens: int = 1000, seed: int = 0) -> list[Outcome]:
    """The outcome of every set-up over so many tokens, in the order given.

    For a thousand set-ups and a thousand tokens it takes 0.4 s with hits or width 1, and 3 s with trees of width 8, on
    one core of the development machine. Raises UsageError for fewer than 2 tokens.
    """
    if tokens < 2:
        raise UsageError(f"tokens must be 2 or more (got {tokens})", hint="A time between tokens needs two of them.")
    draws = np.random.default_rng(seed).random(tokens - 1)
    outcomes: list[Outcome | None] = [None] * len(setups)
    for members in _alike(setups):
        group = [setups[index] for index in members]
        for index, outcome in zip(members, _run(group, draws)):
            outcomes[index] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def moments(setup: Setup, hits: Sequence[bool]) -> list[float]:
    """When each token is committed, counted from the first, where it is known which of them were followed by a hit."""
    clock, times = _Clock([setup]), [0.0]
    for hit in hits:
        clock.commit(np.array([hit]))
        times.append(float(clock.now[0]))
    return times


def _alike(setups: Sequence[Setup]) -> Iterator[list[int]]:
    """Indices of set-ups whose hits are drawn in the same way."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for index, setup in enumerate(setups):
        groups.setdefault((setup.ranks is None, setup.width if setup.ranks else 1), []).append(index)
    yield from groups.values()


def _run(group: list[Setup], draws: Numbers) -> list[Outcome]:
    clock, luck = _Clock(group), _luck(group)
    hits = np.zeros(len(group), np.int64)
    for draw in draws:
        hit = luck.draw(float(draw))
        clock.commit(hit)
        hits += hit
    return [Outcome(setup, len(draws) + 1, float(seconds), int(count), len(draws) - int(count))
            for setup, seconds, count in zip(group, clock.now, hits)]


# ---- time ------------------------------------------------------------------------------------------------


class _Clock:
    """The moments of commits, as the engine sees them. All arrays are [set-ups].

    now: the last commit, counted from the first. sent: when the newest root was. asked: when the draft was asked about
    it. follower: when the first layer after it is sent. fresh: no token was committed since the last miss.
    """

    def __init__(self, group: Sequence[Setup]) -> None:
        def column(values: Iterator[float]) -> Numbers:
            return np.fromiter(values, np.float64, len(group))

        self._in_rounds = np.array([setup.method in _IN_ROUNDS for setup in group])
        self._ahead = np.array([setup.method == "fullpipe" for setup in group])
        self._turn = column(setup.turn for setup in group)
        self._call = column(setup.call for setup in group)
        self._period = column(setup.period for setup in group)
        self._traversal = column(setup.traversal for setup in group)
        self._to_first = column(setup.to_first for setup in group)
        self._stall = column(setup.stall for setup in group)
        self._round = column(setup.traversal + setup.call * setup.depth * (setup.method != "pp") for setup in group)
        self.now = np.zeros(len(group))
        self._fresh = np.ones(len(group), np.bool_)
        self._sent = -self._traversal  # the answer to the first root comes at 0
        self._asked = self._sent
        self._follower = self._sent + np.maximum(self._turn, self._call)

    def commit(self, hit: Flags) -> None:
        """The next token: a hit or a miss."""
        sent, asked = self._restart()
        late = np.maximum(self._follower - self._sent, self._period)
        after_hit = np.where(self._in_rounds, 0.0, np.where(self._fresh, late, self._period))
        restarted = np.maximum(sent - self.now, self._stall) + self._traversal
        after_miss = np.where(self._in_rounds, self._round, restarted)
        self.now = self.now + np.where(hit, after_hit, after_miss)
        self._fresh = ~hit
        self._sent = np.where(hit, self._sent, sent)
        self._asked = np.where(hit, self._asked, asked)
        self._follower = np.maximum(self._sent + self._turn, self._asked + self._call)

    def _restart(self) -> tuple[Numbers, Numbers]:
        """When a new root is sent, and the draft asked about it, if the last commit was a miss: as soon as each has
        finished what it is at."""
        now, since = self.now, self.now - self._follower
        layered = since >= 0
        sent = np.where(layered, now + _rest(since, self._period, self._turn, self._to_first),
                        np.maximum(now, self._sent + self._turn))
        in_step = np.where(layered, now + _rest(since, self._period, self._call),
                           np.maximum(now, self._asked + self._call))
        ahead = now + _rest(now - self._asked, self._call, self._call)
        return sent, np.where(self._ahead, ahead, in_step)


def _rest(since: Any, period: Any, busy: Any, way: Any = 0.0) -> Any:
    """What is left of the work in progress at a station that was sent work `since` ago and is busy for `busy` of every
    `period`; floats or arrays. What ends, or would begin, at this very moment is no hindrance, and work that is still
    on its way, which takes `way`, is dropped when it arrives and takes as long back."""
    period = np.maximum(period, np.finfo(np.float64).tiny)  # a draft that takes no time
    phase = np.remainder(since, period)
    at_once = np.minimum(phase, period - phase) <= _SAME * period
    return np.where(at_once, 0.0, np.maximum(np.where(phase < way, 2 * way, busy) - phase, 0.0))


# ---- luck ------------------------------------------------------------------------------------------------


class _Chances:
    """Hits drawn by their number since the last miss."""

    def __init__(self, group: Sequence[Setup]) -> None:
        lists = [_chances(setup) for setup in group]
        longest = max(map(len, lists))
        self._table = np.array([[*chances, *[chances[-1]] * (longest - len(chances))] for chances in lists])
        self._which = np.arange(len(group))
        self._run = np.zeros(len(group), np.int64)

    def draw(self, uniform: float) -> Flags:
        hit: Flags = uniform < self._table[self._which, np.minimum(self._run, self._table.shape[1] - 1)]
        self._run = np.where(hit, self._run + 1, 0)
        return hit


def _chances(setup: Setup) -> tuple[float, ...]:
    """By hits since the last miss; none after the last layer of a tree that travels at once."""
    if setup.method == "pp":
        return (0.0,)
    chances = setup.hits if setup.hits is not None else (setup.ranks or (0.0,))[:1]
    if setup.method not in _IN_ROUNDS:
        return chances
    return (*(chances[min(layer, len(chances) - 1)] for layer in range(setup.depth)), 0.0)


class _Trees:
    """Hits by following the newest layer of each set-up's tree: arrays [set-ups, width].

    worth: log-probability of each node, -inf where there is none. strayed: at which depth below the last root that
    was missed its path left the truth; `_TRUE` for the node that has not. A commit at a depth kills what strayed there.
    """

    _TRUE = np.iinfo(np.int64).max

    def __init__(self, group: Sequence[Setup]) -> None:
        self._width = group[0].width
        guesses = min(self._width, max(len(setup.ranks or ()) for setup in group))
        ranks = np.zeros((len(group), max(len(setup.ranks or ()) for setup in group)))
        for row, setup in enumerate(group):
            ranks[row, : len(setup.ranks or ())] = setup.ranks or ()
        self._reach = np.cumsum(ranks, axis=1)
        with np.errstate(divide="ignore"):
            self._logs = np.log(ranks[:, :guesses])
        self._depth = np.array([setup.depth if setup.method in _IN_ROUNDS else self._TRUE for setup in group])
        self._lag = np.array([_lag(setup) for setup in group])
        self._run = np.zeros(len(group), np.int64)
        self._worth = np.full((len(group), self._width), -np.inf)
        self._strayed = np.zeros((len(group), self._width), np.int64)
        self._begin(np.ones(len(group), np.bool_))

    def draw(self, uniform: float) -> Flags:
        """The layer below the newest token: does it hold the token that follows?"""
        truth = (uniform >= self._reach).sum(axis=1)  # beyond the last guess: the draft did not think of it
        depth = self._run + 1
        known = depth - self._lag  # tokens since the root that are committed when this layer enters
        worth = np.where(self._strayed > known[:, None], self._worth, -np.inf)
        children = worth[:, :, None] + self._logs[:, None, :]
        right = np.arange(children.shape[2])[None, None, :] == truth[:, None, None]
        true_parent = (self._strayed == self._TRUE)[:, :, None]
        strayed = np.where(true_parent & ~right, depth[:, None, None], self._strayed[:, :, None])
        self._keep(children.reshape(len(depth), -1), strayed.reshape(len(depth), -1))
        hit: Flags = ((self._strayed == self._TRUE) & (self._worth > -np.inf)).any(axis=1) & (depth <= self._depth)
        self._run = np.where(hit, depth, 0)
        self._begin(~hit)
        return hit

    def _keep(self, worth: Numbers, strayed: Counts) -> None:
        best = np.argpartition(-worth, self._width - 1, axis=1)[:, : self._width]
        self._worth = np.take_along_axis(worth, best, axis=1)
        self._strayed = np.take_along_axis(strayed, best, axis=1)

    def _begin(self, which: Flags) -> None:
        """A new root stands alone."""
        self._worth[which] = -np.inf
        self._worth[which, 0] = 0.0
        self._strayed[which] = self._TRUE


def _lag(setup: Setup) -> int:
    """A layer at depth d of the tree enters when d - lag tokens below its root are committed."""
    if setup.method in _IN_ROUNDS:
        return setup.depth + 1
    return math.ceil(setup.traversal / setup.period * (1 - _SAME)) - 1


def _luck(group: list[Setup]) -> _Chances | _Trees:
    return _Chances(group) if group[0].ranks is None or group[0].width == 1 else _Trees(group)


# ---- sweeps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of a sweep. speedup: pp's time between tokens on the same stages and links over this method's;
    modelled, as all of it."""

    acceptance: float
    speedup: float
    outcome: Outcome


def sweep(*, methods: Sequence[str] = METHODS[1:], stages: Sequence[int], acceptances: Sequence[float],
          links: Sequence[float] = (0.0,), drafts: Sequence[float] = (1.0,), widths: Sequence[int] = (1,),
          depths: Sequence[int] = (1, 2, 4, 8, 16), stage: float = 1.0, tokens: int = 1000,
          seed: int = 0) -> list[Point]:
    """Every combination, with equal stages of `stage` seconds; in the order of the arguments, methods last.

    acceptances: chance that the draft's first guess is right; guess r, from 0, is with a (1 - a)^r, as
    `sources/scripted.py:ScriptedDraft` claims. links: latency of every hop between stages, in seconds. drafts: seconds
    of a draft call. widths: of the methods with trees. depths: of chain and static-tree, which are shown with the best.

    Raises UsageError for what no set-up can be.
    """
    named: list[tuple[float, Setup]] = []
    for number, acceptance, link, draft, width, method in product(stages, acceptances, links, drafts, widths, methods):
        if width > 1 and method in ("pp", "chain") and 1 in widths:
            continue  # they have no width, and stand there already
        base = Setup(method=method, stages=(stage,) * number, hops=link, draft=draft, ranks=geometric(acceptance),
                     width=1 if method in ("pp", "chain") else width)
        named += [(acceptance, replace(base, depth=depth)) for depth in
                  (depths if method in ("chain", "static-tree") else depths[:1])]
    best: dict[Setup, Point] = {}
    for (acceptance, setup), outcome in zip(named, modelled([setup for _, setup in named], tokens, seed)):
        key = replace(setup, depth=1)
        if key not in best or outcome.tbt < best[key].outcome.tbt:
            best[key] = Point(acceptance, replace(setup, method="pp").traversal / outcome.tbt, outcome)
    return list(best.values())


def geometric(acceptance: float) -> tuple[float, ...]:
    """Guess r is right with probability a (1 - a)^r; in a draft of that acceptance. Raises UsageError unless it is in
    [0, 1]."""
    if not 0 <= acceptance <= 1:
        raise UsageError(f"an acceptance must be in [0, 1] (got {acceptance:g})")
    return tuple(acceptance * (1 - acceptance) ** guess for guess in range(_GUESSES))
