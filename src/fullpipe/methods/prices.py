"""What a row is worth, by what the stations take for it.

Take R sequences on n stages that guess nothing: R / n roots in every flight, m of them, keep all stages busy, and a
token takes its sequence L = n c(m) seconds, c being the slowest stage's time by rows. Now let every flight carry one
guess more of path probability p. The R sequences wait d seconds longer for each flight, d = c'(rows); one of them is
spared a traversal with probability p. In sequence-seconds the guess is worth its row while

    p L >= R d(rows),

and by Little's law the least sequence-seconds per token is the most tokens per second with these sequences under way.
One sequence alone gets whatever pays. Where rows are nearly free (reading weights takes the time) d is near 0, and many
sequences are guessed for at once. Where each row costs its share, c = m d, the right side is n m d = L: no guess is
sure enough, and what is left is plain continuous batching. Nothing switches.

A root must be launched sooner or later; the question is only with how many others. One more than m waits for a period
if it stays behind, c(rows), but once. If it comes along, the flight is larger than others for as long as the roots in
it stay together, and each time every stage waits d longer for it: it comes along while c(rows) >= 16 R d(rows), 16
traversals being about how long that lasts.

Stages that take equally long keep as many flights between them as they once were given: one more than they can hold
only queues before some stage, for ever, and what it carries was decided earlier than need be. So with a full pipeline
under way a flight waits for the next landing, unless it has its share of roots together.
"""

from __future__ import annotations

import math

from fullpipe.costs import CostCurve, Machine

_LEAST_S = 1e-9  # a curve may say that a station takes no time
_TOGETHER = 16  # traversals for which roots of one flight stay together
_LEAST_CHUNK = 16  # rows of prompts in a flight, however dear: a prompt must end some day
_DRAFT_PATIENCE = 1.5  # a draft job may take so many times as long as a stage, or as a job of one row


class Prices:
    """machine: its curves are known, and may change.

    prefill_share: by how much, as a share of itself, the time between tokens may grow while a prompt comes in.
    """

    def __init__(self, machine: Machine, prefill_share: float) -> None:
        self._machine, self._prefill_share = machine, prefill_share

    @property
    def _curve(self) -> CostCurve:
        assert self._machine.gap is not None
        return self._machine.gap

    @property
    def _depth(self) -> int:
        """Flights that keep all stages and links busy."""
        return self._machine.num_devices + math.ceil(self._machine.link_s / max(self._curve(1), _LEAST_S))

    def full(self, under_way: int, roots: int, running: int) -> bool:
        """Whether the pipeline is so full that a flight with so many roots should wait for a landing."""
        return under_way > self._depth or (under_way == self._depth and roots < self.evenly(running))

    def evenly(self, running: int) -> int:
        """Roots per flight that keep all stages equally busy."""
        return -(-max(running, 1) // self._machine.num_devices)

    def least_guess(self, rows: int, running: int) -> float:
        """Log of the path probability that a guess needs to be worth a row where there are `rows` already: above 0 if
        even a sure one is not."""
        traversal = max(self._machine.num_devices * self._curve(self.evenly(running)) + self._machine.link_s, _LEAST_S)
        price = running * self._curve.marginal(max(rows, 1)) / traversal
        return math.log(price) if price > 0 else -math.inf

    def root_waits(self, number: int, prompt_rows: int, running: int) -> bool:
        """Whether a root is better off in the next flight than in this one, behind `number` rows and a prompt's."""
        dear = max(self._curve.marginal(prompt_rows + number),  # a prompt is there only once
                   _TOGETHER * self._curve.marginal(number))
        return number >= self.evenly(running) and running * dear > self._curve(number)

    def draft_rows(self, flight_rows: int, limit: int) -> int:
        """Rows of a draft job, up to `limit`, that do not make a flight of so many rows wait for long."""
        curve = self._machine.draft
        if curve is None:
            return limit
        patience = _DRAFT_PATIENCE * max(self._curve(flight_rows), curve(1))
        return max(1, curve.most_rows(patience, limit))

    def prompt_rows(self, chunk: int, flight_rows: int) -> int:
        """Rows of prompts, up to `chunk`, beside so many others."""
        # A root may land when a prompt's flight has just entered: it waits for it, and follows it through n stages.
        n = self._machine.num_devices
        allowed = self._curve(flight_rows) * (1 + self._prefill_share) * n / (n + 1)
        return min(chunk, max(self._curve.most_rows(allowed, flight_rows + chunk) - flight_rows, _LEAST_CHUNK))
