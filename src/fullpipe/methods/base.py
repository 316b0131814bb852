"""The promise of a policy: which nodes enter the pipeline next, and which the draft should look at.

A policy sees one request's tree and keeps no state of its own. Asked twice without anything having
happened it may answer differently only because the tree took notice of the first answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from fullpipe.errors import UsageError
from fullpipe.sequences.tree import Node, State, TokenTree

PROBABILITY_FLOOR = 1e-4  # below this path probability a node is worth less than what it costs


class Policy(ABC):
    """width: nodes per flight at most. floor: least path probability of a node, given the root. refresh: have the draft
    look again at nodes in flight (`RefreshingPolicy`)."""

    name: ClassVar[str]
    needs_draft: ClassVar[bool] = True
    refresh: bool = False

    def __init__(self, *, width: int = 8, floor: float = PROBABILITY_FLOOR) -> None:
        if width < 1:
            raise UsageError(f"width must be 1 or more (got {width})",
                             hint="The width is the number of tree nodes in a flight.")
        if not 0 <= floor < 1:
            raise UsageError(f"the probability floor must be in [0, 1) (got {floor})")
        self.width = width
        self.floor = math.log(floor) if floor else -math.inf

    @property
    def least_slots(self) -> int:
        """Slots beyond prompt and answer without which the policy could wait for ever."""
        return 2

    @abstractmethod
    def launch(self, tree: TokenTree, room: int) -> list[Node]:
        """The nodes that should enter stage 0 now, parents first, at most `room`; empty to wait.

        Called when stage 0 can take a flight. Never names a node whose parent is neither launched nor
        earlier in the list. The caller launches all that is named.
        """

    @abstractmethod
    def expand(self, tree: TokenTree, room: int) -> list[Node]:
        """The nodes whose children the draft should propose next, at most `room` that it does not know yet; empty for
        none.

        Called when the draft station is idle. The caller asks for all that is named. Never names a node for which an
        answer is awaited.
        """


class RefreshingPolicy(Policy):
    """A policy that can have the draft look again at nodes in flight.

    That is of use with a source that reads hidden states out of the stages: they deepen with every step, so it answers
    better each time. refresh: do that. draft_width: nodes asked about in one draft job at most, new and again.
    """

    def __init__(self, *, width: int, floor: float, draft_width: int, refresh: bool = False) -> None:
        super().__init__(width=width, floor=floor)
        if draft_width < 1:
            raise UsageError(f"draft_width must be 1 or more (got {draft_width})")
        self.draft_width = draft_width
        self.refresh = refresh

    def fill(self, tree: TokenTree, nodes: list[Node]) -> list[Node]:
        """The new `nodes` to ask about, and behind them those in flight that have deepened.

        These ride along only: a job that has no new node is not sent. The draft takes one job at a time, so such a job
        would make the next new node wait for what is left of it, and the one that comes when it is least expected, the
        root after a miss, is the one that everything waits for. In steady state a new node comes with every step, and
        where none does, at the horizon or with everything below the floor, there is little left to be saved.
        """
        if not (self.refresh and nodes):
            return nodes
        return nodes + tree.deepened(self.draft_width - len(nodes))


def root_if_new(tree: TokenTree) -> list[Node]:
    return [tree.root] if tree.root.state is State.PROPOSED else []
