"""Ours: of all requests' nodes those that save more time than they cost.

Take R requests on n stages that guess nothing: R / n roots in every flight, m of them, keep all stages busy, and a
token takes its request L = n c(m) seconds, c being the slowest stage's time by rows. Now let every flight carry one
guess more of path probability p. The R requests wait d seconds longer for each flight, d = c'(rows); one of them is
spared a traversal with probability p. In request-seconds the guess is worth its row while

    p L >= R d(rows),

and by Little's law the least request-seconds per token is the most tokens per second with these requests under way. One
request alone gets whatever pays. Where rows are nearly free (reading weights takes the time) d is near 0, and many
requests are guessed for at once. Where each row costs its share, c = m d, the right side is n m d = L: no guess is sure
enough, and what is left is plain continuous batching. Nothing switches.

A root must be launched sooner or later; the question is only with how many others. One more than m waits for a period
if it stays behind, c(rows), but once. If it comes along, the flight is larger than others for as long as the roots in
it stay together, and each time every stage waits d longer for it: it comes along while c(rows) >= 16 R d(rows), 16
traversals being about how long that lasts.

Stages that take equally long keep as many flights between them as they once were given: one more than they can hold
only queues before some stage, for ever, and what it carries was decided earlier than need be. So with a full pipeline
under way a flight waits for the next landing, unless it has its share of roots together.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from fullpipe.batching.base import Batching, Chosen
from fullpipe.costs import CostCurve
from fullpipe.errors import UsageError
from fullpipe.methods.base import Policy
from fullpipe.sequences.sequence import Track
from fullpipe.sequences.tree import Candidates, Node, State

_FLIGHTS_AHEAD = 2  # the draft looks at nothing whose children come after so many flights' worth of better nodes
_TOGETHER = 16  # traversals for which roots of one flight stay together
_LEAST_CHUNK = 16  # rows of prompts in a flight, however dear: a prompt must end some day
_DRAFT_PATIENCE = 1.5  # a draft job may take so many times as long as a stage, or as a job of one row


class Dynamic(Batching):
    """costs: of the slowest stage, by rows of a flight. draft_costs: of the draft, by rows of a job; None: no matter.

    num_stages, link_s: of the pipeline; link_s is what a traversal takes on its links, in seconds.
    max_rows: of a flight. Each request comes first with its equal share of them, and what is left goes to the best.
    prefill_share: by how much, as a share of itself, the time between tokens may grow while a prompt comes in.
    """

    def __init__(self, costs: CostCurve, *, num_stages: int, draft_costs: CostCurve | None = None, link_s: float = 0.0,
                 max_rows: int = 256, max_draft_rows: int = 256, prefill_share: float = 1.0) -> None:
        if max_rows < 1 or max_draft_rows < 1:
            raise UsageError("a flight and a draft job need at least one row")
        if prefill_share <= 0:
            raise UsageError(f"the prefill share must be above 0 (got {prefill_share:g})",
                             hint="1 lets tokens take twice as long while a prompt comes in.")
        self._costs, self._draft_costs = costs, draft_costs
        self._max_rows, self._max_draft_rows = max_rows, max_draft_rows
        self._prefill_share, self._num_stages, self._link_s = prefill_share, num_stages, link_s
        self._depth = num_stages + math.ceil(link_s / costs(1))
        self._rows = 1  # of the newest flight, without prompts'
        self._least = -math.inf  # log path probability below which no guess was worth its row then

    def launch(self, policy: Policy, tracks: Sequence[Track], prompt_rows: int, running: int,
               under_way: int) -> Chosen:
        if under_way > self._depth or (under_way == self._depth and _roots(tracks) < self._evenly(running)):
            return []
        share = max(1, self._max_rows // max(running, 1))
        taken = _merge(tracks, lambda track: track.tree.unlaunched(policy.floor), share,
                       lambda number, is_root: self._least_worth(number, is_root, prompt_rows, running),
                       self._max_rows)
        self._rows = max(1, sum(len(nodes) for _, nodes in taken))
        self._least = self._least_guess(prompt_rows + self._rows, running)
        return taken

    def expand(self, policy: Policy, tracks: Sequence[Track]) -> Chosen:
        """The nodes whose children may be worth a row: those at least as likely as the last that was."""
        ahead = max(_FLIGHTS_AHEAD * self._rows // max(len(tracks), 1), 2)
        limit = self._draft_rows()

        def candidates(track: Track) -> Candidates:
            floor = max(policy.floor, self._least, track.tree.launch_cutoff(ahead))
            return track.tree.unasked(floor)

        if self._least >= 0:  # even a sure guess is worth less than its row
            return []
        share = max(1, limit // max(len(tracks), 1))
        return _merge(tracks, candidates, share, lambda number, is_root: -math.inf, limit)

    def prompt_rows(self, chunk: int, deciding: int) -> int | None:
        if not deciding:
            return chunk
        # A root may land when a prompt's flight has just entered: it waits for it, and follows it through n stages.
        allowed = self._costs(self._rows) * (1 + self._prefill_share) * self._num_stages / (self._num_stages + 1)
        return min(chunk, max(self._costs.most_rows(allowed, self._rows + chunk) - self._rows, _LEAST_CHUNK))

    def _least_worth(self, number: int, is_root: bool, prompt_rows: int, running: int) -> float:
        """Log of the path probability that a node needs to come along with `number` others and a prompt's rows."""
        rows = prompt_rows + number
        if not is_root:
            return self._least_guess(rows, running)
        dear = max(self._costs.marginal(rows), _TOGETHER * self._costs.marginal(number))  # a prompt is there only once
        waits = number >= self._evenly(running) and running * dear > self._costs(number)
        return math.inf if waits else -math.inf

    def _least_guess(self, rows: int, running: int) -> float:
        """The same for a guess, where there are `rows` already: above 0 if even a sure one is not worth it."""
        traversal = self._num_stages * self._costs(self._evenly(running)) + self._link_s
        price = running * self._costs.marginal(max(rows, 1)) / traversal
        return math.log(price) if price > 0 else -math.inf

    def _evenly(self, running: int) -> int:
        """Roots per flight that keep all stages equally busy."""
        return -(-max(running, 1) // self._num_stages)

    def _draft_rows(self) -> int:
        if self._draft_costs is None:
            return self._max_draft_rows
        patience = _DRAFT_PATIENCE * max(self._costs(self._rows), self._draft_costs(1))
        return max(1, self._draft_costs.most_rows(patience, self._max_draft_rows))


def _merge(tracks: Sequence[Track], candidates: Callable[[Track], Candidates], share: int,
           least: Callable[[int, bool], float], limit: int) -> Chosen:
    """Up to `limit` nodes of all trees, best first, while they are at least as likely as `least` of how many there are
    already and whether it is a root that waits; a root comes along in any case where nothing else does. Of equals that
    of the request that has waited longer, and before all others those that are among the first `share` of their
    request.
    """
    heap: list[tuple[bool, float, float, int, Candidates, Track]] = []
    taken: dict[int, tuple[Track, list[Node]]] = {}
    number = 0

    def push(source: Candidates, track: Track, has: int) -> None:
        if (best := source.best()) is None:
            return
        new = _new_slots(taken.get(track.request.id))
        kept = new == 0 and track.tree.root.slot is None  # the root never lacks a slot
        if track.room > new or kept or source.has_slot():
            since = track.stats.last_token or track.stats.started
            heapq.heappush(heap, (has >= share, -best, since, track.request.id, source, track))

    for track in tracks:
        push(candidates(track), track, 0)
    while heap and number < limit:
        _, negative, _, _, source, track = heapq.heappop(heap)
        is_root = track.request.id not in taken and track.tree.root.state is State.PROPOSED
        if (number or not is_root) and -negative < least(number, is_root):  # a root need not wait in an empty flight
            continue
        node = source.take()
        _, nodes = taken.setdefault(track.request.id, (track, []))
        nodes.append(node)
        number += 1
        push(source, track, len(nodes))
    return list(taken.values())


def _roots(tracks: Sequence[Track]) -> int:
    """How many roots wait."""
    return sum(track.tree.root.state is State.PROPOSED for track in tracks)


def _new_slots(entry: tuple[Track, list[Node]] | None) -> int:
    """How many slots the nodes taken so far will need."""
    return sum(node.slot is None for node in entry[1]) if entry else 0
