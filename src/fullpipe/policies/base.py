"""The promise of a policy: which nodes enter the pipeline next, and which the draft should look at.

A policy sees one request's tree and keeps no state of its own. Asked twice without anything having
happened it may answer differently only because the tree took notice of the first answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from fullpipe.errors import UsageError
from fullpipe.tree.token_tree import Node, State, TokenTree

PROBABILITY_FLOOR = 1e-4  # below this path probability a node is worth less than what it costs


class Policy(ABC):
    """width: nodes per flight at most. floor: least path probability of a node, given the root."""

    name: ClassVar[str]
    needs_draft: ClassVar[bool] = True

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
        """The nodes whose children the draft should propose next, at most `room`; empty for none.

        Called when the draft station is idle. The caller asks for all that is named.
        """


def root_if_new(tree: TokenTree) -> list[Node]:
    return [tree.root] if tree.root.state is State.PROPOSED else []
