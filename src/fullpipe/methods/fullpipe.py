"""Ours: whenever stage 0 is about to be free, the most promising nodes of all trees that have not been launched.

PipeDec launches a layer and never looks back. Here a sibling that just missed the cut stays a candidate
at any depth: as its rivals are launched or die it becomes the best of the rest and enters late instead of
never, and what then lands on it is a hit that PipeDec would have flushed the pipeline for. The draft runs
ahead by the same order, so that a late node's children are known when it enters and can enter with it.

With several sequences, and where it is known what rows cost, a node enters that saves more time than it costs
(`prices`). Where nothing is known rows are free, and each sequence gets its `width` best.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable
from collections.abc import Sequence as Many

from fullpipe.costs import Machine
from fullpipe.errors import UsageError
from fullpipe.live_costs import learning
from fullpipe.messages import Drafted, Expansion, Landed
from fullpipe.methods.alone import Alone
from fullpipe.methods.base import PROBABILITY_FLOOR, Chosen, Load, RefreshingMethod
from fullpipe.methods.prices import Prices
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Candidates, Node, State

_FLIGHTS_AHEAD = 2  # the draft looks at nothing whose children come after so many flights' worth of better nodes
# Of a flight, and of a draft job. With 256, 8 requests on eight imagined GPUs lose 30% of their tokens a second: a
# price is that of one row more, and does not see how slow a flight gets with all that are just worth it
# (lab/reports/batching).
_MOST_ROWS = 96
_WIDTH = 8  # where nobody knows what rows cost
_SPARE_ROWS = 32  # slots of a sequence for each flight that may be under way, where nobody has said a width


class FullPipe(RefreshingMethod):
    """width: nodes of a sequence in one flight at most; None: what pays, or 8 where nobody knows what rows cost.

    draft_width: nodes of a sequence in one draft call at most; None: what pays, up to the width where one is given; or,
    where nobody knows what rows cost, twice the width, but 16 to 32: with 64 instead of 32 the draft computed 1.8 times
    as many nodes for 0.7% fewer steps (GSM8K question 1, width 64, docs/log).
    refresh: siblings that a refreshed answer brings up enter late like all others.
    prefill_share: see `Prices`.
    """

    name = "fullpipe"

    def __init__(self, *, width: int | None = None, floor: float = PROBABILITY_FLOOR, draft_width: int | None = None,
                 refresh: bool = False, machine: Machine | None = None, prefill_share: float = 1.0) -> None:
        wide = _WIDTH if width is None else width
        asked = min(max(16, 2 * wide), 32) if draft_width is None else draft_width
        super().__init__(width=wide, floor=floor, draft_width=asked, refresh=refresh, machine=machine)
        if prefill_share <= 0:
            raise UsageError(f"the prefill share must be above 0 (got {prefill_share:g})",
                             hint="1 lets tokens take twice as long while a prompt comes in.")
        self._has_width, self._prefill_share = width is not None, prefill_share
        self._most_asked = draft_width
        self._reads_taps = False
        self._prices: Prices | None = None
        self._alone: Alone | None = None
        self._learn()
        self._rows = 1  # of the newest flight, without prompts'
        self._least = -math.inf  # log path probability below which no guess was worth its row then

    @property
    def most_nodes(self) -> int | None:
        return self.width if self._has_width or self._prices is None else None

    @property
    def spare_slots(self) -> int:
        return self.width if self.most_nodes is not None else _SPARE_ROWS

    def launch(self, sequences: Many[Sequence], load: Load) -> Chosen:
        if self._alone and load.running == 1:
            nodes = self._alone.launch(sequences[0], load, self.most_nodes) if sequences else []
            self._alone.sent(nodes, load)
            return [(sequences[0], nodes)] if nodes else []
        prices = self._prices
        if prices and prices.full(load.under_way, _roots(sequences), load.running):
            return []
        share, limit = self._shares(load.running)
        least = (lambda number, is_root: self._least_worth(prices, number, is_root, load)) if prices else _anything
        taken = _merge(sequences, lambda one: one.tree.unlaunched(self.floor), share, least, limit, self.most_nodes)
        self._rows = max(1, sum(len(nodes) for _, nodes in taken))
        if prices:
            self._least = prices.least_guess(load.prompt_rows + self._rows, load.running)
        return taken

    def expand(self, sequences: Many[Sequence], load: Load) -> Chosen:
        """The nodes whose children may be worth a row. With many sequences: those at least as likely as the last that
        was."""
        if self._alone and load.running == 1 and sequences:
            nodes = self._alone.expand(sequences[0], load, self._most_asked, self.most_nodes)
            return [(sequences[0], nodes)] if nodes else []
        if self._least >= 0:  # even a sure guess is worth less than its row
            return []
        many = max(len(sequences), 1)
        if self._prices:
            ahead, limit = max(_FLIGHTS_AHEAD * self._rows // many, 2), self._prices.draft_rows(self._rows, _MOST_ROWS)
            share = max(1, limit // many)
        else:
            ahead, share, limit = _FLIGHTS_AHEAD * self.width, self.draft_width, self.draft_width * many
        least = max(self.floor, self._least)
        chosen = _merge(sequences, lambda one: one.tree.unasked(max(least, one.tree.launch_cutoff(ahead))), share,
                        _anything, limit, self._most_asked if self._prices else share)
        return [(one, self.fill(one.tree, nodes)) for one, nodes in chosen] if self.refresh else chosen

    def levels(self, sequence: Sequence, node: Node, load: Load) -> tuple[int, float]:
        return self._alone.levels() if self._alone and load.running == 1 else super().levels(sequence, node, load)

    def prompt_rows(self, chunk: int, deciding: int) -> int | None:
        if self._prices is None:
            return None
        return self._prices.prompt_rows(chunk, self._rows) if deciding else chunk

    def meet(self, machine: Machine) -> None:
        self._reads_taps = machine.reads_taps
        self.machine = learning(self.machine or machine)
        self._learn()

    def observe(self, event: Landed | Drafted) -> None:
        if self.machine is None:
            return
        self.machine.observe(event)
        if not self._alone:
            self._learn()

    def answered(self, expansions: Many[Expansion]) -> None:
        if self._alone:
            self._alone.answered(expansions)

    def follows(self, sequence: Sequence, load: Load) -> bool:
        return not (self._alone and load.running == 1) or self._alone.follows(sequence, load)

    def _learn(self) -> None:
        """Weigh costs from when they are known. For one sequence those of draft calls too, but not where the draft
        reads hidden states: its answer may wait for the very launch that would be held for it."""
        machine = self.machine
        if machine and machine.gap:
            self._prices = self._prices or Prices(machine, self._prefill_share)
            weighs = machine.draft and not (self.refresh or self._reads_taps)
            self._alone = Alone(machine, self.floor) if weighs else None

    def _shares(self, running: int) -> tuple[int, int]:
        """Rows of a flight that a sequence has first of all, and rows of all together."""
        many = max(running, 1)
        if self._prices is None:
            return self.width, self.width * many
        limit = _MOST_ROWS if self.most_nodes is None else min(self.most_nodes * many, _MOST_ROWS)
        limit = max(limit, self._prices.evenly(many))  # roots are not left behind
        return max(1, limit // many), limit

    @staticmethod
    def _least_worth(prices: Prices, number: int, is_root: bool, load: Load) -> float:
        """Log of the path probability that a node needs to come along with `number` others and a prompt's rows."""
        if not is_root:
            return prices.least_guess(load.prompt_rows + number, load.running)
        return math.inf if prices.root_waits(number, load.prompt_rows, load.running) else -math.inf


def _merge(sequences: Many[Sequence], candidates: Callable[[Sequence], Candidates], share: int,
           least: Callable[[int, bool], float], limit: int, most: int | None = None) -> Chosen:
    """Up to `limit` nodes of all trees, best first, while they are at least as likely as `least` of how many there are
    already and whether it is a root that waits; a root comes along in any case where nothing else does. Of equals that
    of the sequence that has waited longer, and before all others those that are among the first `share` of their
    sequence. most: nodes of one sequence; None: any.
    """
    heap = [found for one in sequences if (found := _Ranked(one, candidates(one), share, most)).advance()]
    heapq.heapify(heap)
    taken: list[_Ranked] = []
    number = 0
    ranked: _Ranked | None = heapq.heappop(heap) if heap else None
    while ranked and number < limit:
        is_root = ranked.root_waits and not ranked.nodes
        if (number or not is_root) and ranked.best < least(number, is_root):  # a root need not wait in an empty flight
            ranked = heapq.heappop(heap) if heap else None
            continue
        if not ranked.nodes:
            taken.append(ranked)
        ranked.take()
        number += 1
        if not ranked.advance():
            ranked = heapq.heappop(heap) if heap else None
        elif heap:
            ranked = heapq.heappushpop(heap, ranked)
    return [(one.sequence, one.nodes) for one in taken]


class _Ranked:
    """A sequence while nodes of it are chosen; of several the one whose next node goes first is the least.

    share: nodes that it has before all others. most: nodes that it has at all. nodes: those that were chosen. best: log
    path probability of the next.
    """

    __slots__ = ("_kept", "_most", "_new", "_room", "_share", "_source", "best", "nodes", "root_waits", "sequence")

    def __init__(self, sequence: Sequence, source: Candidates, share: int, most: int | None) -> None:
        self.sequence, self.nodes, self.best = sequence, list[Node](), -math.inf
        self.root_waits = sequence.tree.root.state is State.PROPOSED
        self._source, self._share, self._room, self._new = source, share, sequence.room, 0
        self._most = sys.maxsize if most is None else most
        self._kept = sequence.tree.root.slot is None  # the root never lacks a slot

    def advance(self) -> bool:
        """Look at the next node. False: there is none, or no slot for it."""
        best = self._source.best() if len(self.nodes) < self._most else None
        if best is None or (self._room <= self._new and not (self._kept and not self._new)
                            and not self._source.has_slot()):
            return False
        self.best = best
        return True

    def take(self) -> None:
        node = self._source.take()
        self._new += node.slot is None
        self.nodes.append(node)

    def __lt__(self, other: _Ranked) -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[bool, float, float, int]:
        one = self.sequence
        return len(self.nodes) >= self._share, -self.best, one.waiting_since, one.request.id


def _anything(number: int, is_root: bool) -> float:
    return -math.inf


def _roots(sequences: Many[Sequence]) -> int:
    """How many roots wait."""
    return sum(one.tree.root.state is State.PROPOSED for one in sequences)
