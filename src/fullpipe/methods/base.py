"""The promise of a method: which nodes of all running sequences enter the pipeline next, and which the draft should
look at.

A method keeps no state of a sequence; what it remembers is of the machine. Asked twice without anything having
happened it may answer differently only because the trees took notice of the first answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import ClassVar

from fullpipe.costs import Machine
from fullpipe.errors import UsageError
from fullpipe.messages import Drafted, Expansion, Landed
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node, State, TokenTree

PROBABILITY_FLOOR = 1e-4  # below this path probability a node is worth less than what it costs

Chosen = list[tuple[Sequence, list[Node]]]
"""Nodes by sequence, each sequence's in order: parents before children. Sequences that get nothing are left out."""


@dataclass(slots=True)
class Load:
    """What the stations carry while a method chooses.

    running: all sequences that run, those whose prompt is still on its way included. prompt_rows: rows of prompts that
    the flight carries already. under_way: flights that have not landed. now: the pipeline's time. asked_at: when the
    draft job set off whose answer is awaited, None without one; asked_rows: its rows.
    """

    running: int
    prompt_rows: int = 0
    under_way: int = 0
    now: float = 0.0
    asked_at: float | None = None
    asked_rows: int = 0


class Method(ABC):
    """width: nodes of a sequence in one flight at most. floor: least path probability of a node, given the root.
    machine: what is known of the stations; None: nothing, and rows cost nothing. refresh: have the draft look again at
    nodes in flight (`RefreshingMethod`).

    Raises UsageError for values out of range.
    """

    name: ClassVar[str]
    needs_draft: ClassVar[bool] = True
    refresh: bool = False

    def __init__(self, *, width: int = 8, floor: float = PROBABILITY_FLOOR, machine: Machine | None = None) -> None:
        if width < 1:
            raise UsageError(f"width must be 1 or more (got {width})",
                             hint="The width is the number of tree nodes in a flight.")
        if not 0 <= floor < 1:
            raise UsageError(f"the probability floor must be in [0, 1) (got {floor})")
        self.width = width
        self.floor = math.log(floor) if floor else -math.inf
        self.machine = machine

    @property
    def least_slots(self) -> int:
        """Slots beyond prompt and answer without which the method could wait for ever."""
        return 2

    @property
    def most_nodes(self) -> int | None:
        """Nodes of a sequence in one flight at most; None: as many as pay."""
        return self.width

    @property
    def spare_slots(self) -> int:
        """Slots of a sequence that a flight takes as a rule."""
        return self.width

    @abstractmethod
    def launch(self, sequences: Many[Sequence], load: Load) -> Chosen:
        """The nodes that should enter stage 0 now; empty to wait. The caller launches all of them.

        sequences: those whose root may enter, or has. At most `Sequence.room` nodes of each get a new slot. Never names
        a node whose parent is neither launched nor earlier in the list. Where a root waits and nothing is under way,
        something is chosen, or a draft job is out, or `expand` chooses one at once: a root is held for the draft's
        answer and for nothing else.
        """

    @abstractmethod
    def expand(self, sequences: Many[Sequence], load: Load) -> Chosen:
        """The nodes whose children the draft should propose next. The caller asks for all of them. Called when the
        draft station is idle. Never names a node for which an answer is awaited."""

    def follows(self, sequence: Sequence, load: Load) -> bool:
        """Whether the draft should be sent text that it has not seen, so that it can be asked about what follows."""
        return True

    def answered(self, expansions: Many[Expansion]) -> None:  # noqa: B027 - most methods learn nothing of a draft
        """Hear what the draft answered, as far as it is believed."""

    def levels(self, sequence: Sequence, node: Node, load: Load) -> tuple[int, float]:
        """How far the draft should go on by itself behind the first node that it is asked about: levels at most, and
        the log-probability, given the node, below which it need not."""
        return 0, 0.0

    def prompt_rows(self, chunk: int, deciding: int) -> int | None:
        """Rows of prompts in the next flight at most, at least 1. None: a `chunk` of each prompt.

        deciding: sequences that are past their prompt and would be held up.
        """
        return None

    def meet(self, machine: Machine) -> None:  # noqa: B027 - most methods ask nothing of time
        """Learn what a pipeline says of itself, before the first choice for it."""

    def observe(self, event: Landed | Drafted) -> None:  # noqa: B027
        """Take note of what a flight or a draft job took, before anything else follows from it."""


class PerTree(Method):
    """A method that looks at each sequence as if it were alone."""

    def launch(self, sequences: Many[Sequence], load: Load) -> Chosen:
        return [(one, nodes) for one in sequences if (nodes := self.launch_tree(one.tree, one.room))]

    def expand(self, sequences: Many[Sequence], load: Load) -> Chosen:
        return [(one, nodes) for one in sequences if (nodes := self.expand_tree(one.tree, one.room))]

    @abstractmethod
    def launch_tree(self, tree: TokenTree, room: int) -> list[Node]:
        """What of one tree enters stage 0 now, parents first, at most `room`; empty to wait."""

    @abstractmethod
    def expand_tree(self, tree: TokenTree, room: int) -> list[Node]:
        """What of one tree the draft looks at next, at most `room` that it does not know yet; empty for none."""


class RefreshingMethod(Method):
    """A method that can have the draft look again at nodes in flight.

    That is of use with a draft that reads hidden states out of the stages: they deepen with every step, so it answers
    better each time. refresh: do that. draft_width: nodes of a sequence in one draft job at most, new and again.
    """

    def __init__(self, *, width: int, floor: float, draft_width: int, refresh: bool = False,
                 machine: Machine | None = None) -> None:
        super().__init__(width=width, floor=floor, machine=machine)
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
