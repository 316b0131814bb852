"""What a sequence that has the stations to itself launches, holds and asks, by expected seconds per token.

`docs/speculation-costs.md` derives the rule; in short, with c and d the seconds of a stage and of a draft call by rows:

- A guess of path probability p is worth p V seconds, V being about what one level of the tree takes (`_Value`), and at
  most what is left until its parent lands. Its row makes every other row of the flight wait: c' once where the text
  goes on behind the flight, c' at each of n stages where the flight holds a miss, and every level of its branch takes
  the draft longer. It enters while it is worth more.
- A flight is held for the draft's next answer while sharing one launch among one more level saves more than the wait
  costs if the text leaves the flight.
- The draft is asked about a node while its children would be worth their rows and its own row, and while the call does
  not keep stage 0 from a root that is about to need it. What is said of a token later than the token is known is worth
  nothing.
- With a draft far away the draft goes on by itself, as many levels as its way is worth.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

from fullpipe.costs import CostCurve, Machine
from fullpipe.methods.base import Load
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node, State, TokenTree

if TYPE_CHECKING:
    from fullpipe.messages import Expansion

_PRIOR = 0.85  # of a draft's best guess to be right, before it has said anything
_FOLLOW = 0.05  # share of an answer's news by which what is held of the draft follows
_BEYOND = 0.2  # of what a traversal takes beyond one level: found by trying (docs/speculation-costs.md)
_LEAST_DOUBT = 0.01  # of a level, whatever the draft says: nothing is certain for ever
_MOST_LEVELS = 24  # that a draft goes on by itself
_LEAST_CHAIN = math.log(0.1)  # chains less likely than this it gives up
_SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # rows of a flight that are compared
_MOVED = 0.01  # a hit rate that moves by less changes no bound
_MOST_ASKED = 64  # rows of a draft job
_GIVEN_UP = 16  # flights in which the draft was not asked
_USUAL_LEVELS = 16  # more do not count when it is remembered how many a flight had


class Alone:
    """Decides for one sequence by the costs of a machine whose curves are known.

    floor: log of the least path probability, given the root, of a node worth anything.
    """

    def __init__(self, machine: Machine, floor: float) -> None:
        self.machine, self._floor = machine, floor
        self._right = self._chain = _PRIOR  # of the best guess; expected length of the likeliest chain of an answer
        self._levels = 1.0  # of the likeliest chain in a flight, of late
        self._rows = 1  # of the newest flight
        self._sent: deque[int] = deque(maxlen=64)  # rows of the newest flights
        self._request, self._unasked = -1, 0  # whose flights these are; flights since the draft was asked
        self._most: tuple[CostCurve | None, float, int] = None, 0.0, 0  # for what it was found, and it
        self._busy = [0.0] * machine.num_stages  # until when each stage is, as far as can be told

    # ---- what is launched --------------------------------------------------------------------------------

    def launch(self, sequence: Sequence, load: Load, most: int | None = None) -> list[Node]:
        """What enters stage 0 now, parents first, `most` nodes at most; empty to wait for an answer or a landing."""
        self._meet(sequence)
        if self.machine.shared and load.asked_at is not None:  # stage 0 would begin no sooner
            return []
        flight = self._fill(sequence, load, min(self._most_rows(), most or sys.maxsize))
        if flight.nodes and self._held(flight, sequence, load):
            for node in reversed(flight.nodes):
                sequence.tree.return_unlaunched(node)
            return []
        if flight.nodes:
            self._rows = len(flight.nodes)
            self._levels += 0.1 * (min(flight.levels, _USUAL_LEVELS) - self._levels)
        return flight.nodes

    def _meet(self, sequence: Sequence) -> None:
        """Try the draft with each request, though it has been given up with the one before: where stage 0 never rests
        there is no shade to try it in, and what it has said of another text says little of this one."""
        if sequence.request.id != self._request:
            if self._unasked > _GIVEN_UP:
                self._right = self._chain = _PRIOR
            self._request, self._unasked = sequence.request.id, 0

    def _fill(self, sequence: Sequence, load: Load, limit: int) -> _Flight:
        """The nodes that are worth their rows, best first."""
        tree, value = sequence.tree, self._value()
        candidates, flight = tree.unlaunched(self._floor), _Flight(self.machine.num_devices)
        marginal, draft_row, right = self._stage.marginal, self._draft_row(), self._right
        passed, room, now, proposed = dict[int, Node](), sequence.room, load.now, State.PROPOSED
        first_price = self._price_of_flight(tree, load)
        nodes = flight.nodes
        while len(nodes) < limit and (best := candidates.best()) is not None:
            if room <= 0 and not candidates.has_slot() and not (not nodes and tree.root.slot is None):
                break
            node, probability = candidates.take(), math.exp(best)
            if not nodes:
                price = 0.0 if node is tree.root else first_price(node, probability)
            else:
                price = flight.price(marginal(len(nodes) + load.prompt_rows), draft_row, right)
            parent = node.parent
            # Seconds until the parent lands, after which nobody has to guess the node.
            left = math.inf if parent is None or parent.state is proposed else parent.due - now
            if probability * min(value, left) < price or (parent is not None and parent.id in passed):
                passed[node.id] = node
                if probability * value < price:
                    break
                continue
            room -= node.slot is None
            flight.take(node, probability)
        for node in reversed(passed.values()):
            tree.return_unlaunched(node)
        return flight

    def _price_of_flight(self, tree: TokenTree, load: Load) -> Callable[[Node, float], float]:
        """What launching at all costs, by the first node and its probability: stage 0 may be busy when a root needs
        it."""
        row = self._stage.marginal(1) / 2
        delay = self._delay(tree, self._stage(1 + load.prompt_rows), load)
        missing = self._missing(tree)

        def price(node: Node, probability: float) -> float:
            left = missing - probability if node.parent is tree.root else missing
            return row + delay * max(left, 0.0)

        return price

    def _delay(self, tree: TokenTree, takes: float, load: Load) -> float:
        """Seconds by which work of so many seconds at stage 0 would keep a next root waiting."""
        root = tree.root
        if root.state is not State.IN_FLIGHT:
            return 0.0
        return min(max(max(load.now, self._busy[0]) + takes - root.due, 0.0), takes)

    @staticmethod
    def _missing(tree: TokenTree) -> float:
        """How likely it is that what follows the root is not in flight."""
        root = tree.root
        return max(1.0 - sum(math.exp(child.cum - root.cum) for child in root.children.values()
                             if child.state is not State.PROPOSED), 0.0)

    def sent(self, nodes: list[Node], load: Load) -> None:
        """A flight sets off: with these nodes and a prompt's rows. Foresee when it lands."""
        rows = len(nodes) + load.prompt_rows
        if not rows:
            return
        machine, moment = self.machine, load.now
        self._sent.append(rows)
        self._unasked += 1
        hop, before = machine.link_s / machine.num_stages, list(self._sent)[-1 - load.under_way : -1]
        for index, curve in enumerate(machine.stages):
            queue = self._busy[index] - moment if index else 0.0
            if queue > 0:  # for no longer than all that is under way takes: so what was foreseen wrongly passes
                queue = min(queue, sum(map(curve, before)))
            self._busy[index] = moment + max(queue, 0.0) + curve(rows)
            moment = self._busy[index] + hop
        for node in nodes:
            node.due = moment

    # ---- whether it is held ------------------------------------------------------------------------------

    def _held(self, flight: _Flight, sequence: Sequence, load: Load) -> bool:
        """Whether to wait for what the draft says behind the flight's likeliest chain."""
        tree, end = sequence.tree, flight.end
        if end is None or end.position >= tree.horizon:
            return False
        reached = math.exp(end.cum - tree.root.cum)
        if self.machine.shared:
            if end.asked or sequence.room < len(flight.nodes) + 2 or not self._pays_asking(tree, reached, load):
                return False
            wait = self._draft(1) + self.machine.draft_link_s
        else:
            if load.asked_at is None or not end.waiting:
                return False
            wait = max(load.asked_at + self._draft(load.asked_rows) + self.machine.draft_link_s - load.now, 0.0)
        levels, goes_on = flight.levels, reached * self._right
        saved = levels * (self._level(levels) - self._level(levels + 1))
        lost = max(flight.first - goes_on, flight.first * (1 - (1 - _LEAST_DOUBT) ** levels))
        row = self._stage.marginal(len(flight.nodes) + load.prompt_rows)
        return goes_on * saved > lost * (wait + self.machine.num_devices * row)

    # ---- what the draft is asked -------------------------------------------------------------------------

    def expand(self, sequence: Sequence, load: Load, most: int | None = None, wide: int | None = None) -> list[Node]:
        """The nodes that the draft should look at now, `most` at most; empty for none. wide: rows of a flight at most,
        and of a draft job where `most` does not say (with no bound 1% fewer steps, for a third more of our time).

        Beside the first none whose children come after a flight's worth of better nodes: where rows cost nothing,
        nothing else would bound the tree.
        """
        tree, value, candidates = sequence.tree, self._value(), sequence.tree.unasked(self._floor)
        nodes, passed, asked = list[Node](), list[Node](), 0.0
        draft, row, limit = self._draft, self._stage.marginal(1), min(_MOST_ASKED, most or wide or _MOST_ASKED)
        least = tree.launch_cutoff(min(self._most_rows(), wide or sys.maxsize))
        while len(nodes) < limit and (best := candidates.best()) is not None:
            node, probability = candidates.take(), math.exp(best)
            if not nodes:
                if not self._pays_asking(tree, probability, load, node.due):
                    passed.append(node)
                    break
            elif best < least:
                passed.append(node)
                break
            else:
                price = asked * (draft.marginal(len(nodes)) + row)
                left = math.inf if node.state is State.PROPOSED else node.due - load.now - draft(len(nodes) + 1)
                gain = probability * self._right
                if gain * min(value, left) < price:
                    passed.append(node)
                    if gain * value < price:
                        break
                    continue
            nodes.append(node)
            asked += probability
        for node in reversed(passed):
            tree.return_unasked(node)
        self._unasked = 0 if nodes else self._unasked
        return nodes

    def _pays_asking(self, tree: TokenTree, probability: float, load: Load, due: float = math.inf) -> bool:
        """Whether a call is worth it that asks about a node of this probability first, which lands when it is due. In
        the shade, while stage 0 has nothing else to do, one about the root always is: so a draft that has turned
        useless is tried again."""
        price = self._stage.marginal(1) / 2 if probability < 1 else 0.0
        if self.machine.shared:
            price += self._delay(tree, self._draft(1), load) * self._missing(tree)
        return probability * self._answer(due, self._draft(1), load) >= price

    def _answer(self, due: float, takes: float, load: Load) -> float:
        """Seconds that an answer about a sure node is worth which takes so long. The node lands when it is due, and
        what is said of the token behind it by then is worth the time that is left."""
        begins = max(load.now, self._busy[0]) if self.machine.shared else load.now
        left = max(due - begins - takes - self.machine.draft_link_s, 0.0)
        value = self._value()
        return self._chain * value - self._right * max(value - left, 0.0)

    def follows(self, sequence: Sequence, load: Load) -> bool:
        """Whether the draft is to be sent the text that it has not seen: while it is any good, or in the shade."""
        root = sequence.tree.root
        takes = self._draft(root.position - sequence.draft.rows)
        delay = self._delay(sequence.tree, takes, load) if self.machine.shared else 0.0
        return self._answer(root.due, takes, load) >= delay * self._missing(sequence.tree)

    def levels(self) -> tuple[int, float]:
        """How far the draft goes on by itself, and how likely a chain must be for that."""
        return (self._per_way() - 1, _LEAST_CHAIN)

    def _per_way(self) -> int:
        """Levels per draft job: its way is shared by them, and a miss finds the draft busy for half of them."""
        way = self.machine.draft_link_s
        if way <= 0:
            return 1
        doubt = max(1 - self._right, _LEAST_DOUBT)
        return min(max(int(math.sqrt(way / (doubt * max(self._draft(1), 1e-9)))), 1), _MOST_LEVELS)

    def answered(self, expansions: Many[Expansion]) -> None:
        """Learn what the draft's answers are worth; the first of them is about the likeliest node."""
        for expansion in expansions[:1]:
            right, chain = _likeliest(expansion)
            self._right += _FOLLOW * (right - self._right)
            self._chain += _FOLLOW * (chain - self._chain)

    # ---- what things take --------------------------------------------------------------------------------

    @property
    def _stage(self) -> CostCurve:
        assert self.machine.gap is not None
        return self.machine.gap

    @property
    def _draft(self) -> CostCurve:
        assert self.machine.draft is not None
        return self.machine.draft

    def _draft_row(self) -> float:
        """Seconds that a row more in each draft call makes every level wait."""
        if self.machine.shared or self._draft(1) > self._stage(1):
            return self._draft.marginal(1)
        return 0.0

    def _period(self, levels: float) -> float:
        """Seconds from flight to flight with so many levels in each."""
        asking = levels * (self._draft(1) + self.machine.draft_link_s / self._per_way())
        return asking + self._stage(levels) if self.machine.shared else max(asking, self._stage(levels))

    def _value(self) -> float:
        """Seconds that a sure guess is worth."""
        level = self._level(self._levels)
        return level + _BEYOND * (self._traversal() - level)

    def _level(self, levels: float) -> float:
        """Seconds of a level where flights have so many; no more than without a draft."""
        return min(self._period(levels) / levels, self._traversal())

    def _traversal(self) -> float:
        return self.machine.num_devices * self._stage(1) + self.machine.link_s

    def _most_rows(self) -> int:
        """Rows of a flight at which a row's share of it and of the wait for it after a miss is least."""
        stage, right = self._stage, self._right
        known, at, found = self._most
        if known is not stage or abs(at - right) > _MOVED:
            stages, doubt = self.machine.num_devices, 1 - right
            _, found = min([(stage(rows) * (1 / rows + doubt * stages / 2), rows) for rows in _SIZES])
            self._most = stage, right, found
        return found


class _Flight:
    """Nodes while they are chosen.

    first, levels, end: of the chain that begins with the first node and goes on with the likeliest child each time: the
    probability of its first node, how many there are, and the last.
    alive: probability that the text gets to the flight.
    """

    __slots__ = ("_ids", "_leaves", "_out", "_stages", "alive", "end", "first", "levels", "nodes")

    def __init__(self, stages: int) -> None:
        self.nodes: list[Node] = []
        self.end: Node | None = None
        self.levels, self.first, self.alive, self._stages = 0, 0.0, 0.0, stages
        self._ids: set[int] = set()
        self._leaves: dict[int, float] = {}  # their probabilities by id
        self._out: float | None = 0.0  # the sum of these; None: not known

    def take(self, node: Node, probability: float) -> None:
        parent = node.parent
        self.first = self.first or probability
        if self.end is None or parent is self.end:
            self.end, self.levels = node, self.levels + 1
        if parent is not None and parent.id in self._ids:
            if self._leaves.pop(parent.id, None) is not None:
                self._out = None
        else:
            self.alive = min(self.alive + probability, 1.0)
        self._leaves[node.id] = probability
        self._out = None if self._out is None else self._out + probability
        self._ids.add(node.id)
        self.nodes.append(node)

    def price(self, row: float, draft_row: float, right: float) -> float:
        """What a row more costs all others that is worth it: `row` seconds at a stage, `draft_row` at the draft."""
        if self._out is None:
            self._out = sum(self._leaves.values())
        through = min(self._out * right, self.alive)
        return (through + (self.alive - through) * self._stages) * row + self.alive * draft_row


def _likeliest(expansion: Expansion) -> tuple[float, float]:
    """The probability of the best guess, and the expected length of the likeliest chain."""
    best: dict[int, tuple[float, int]] = {}
    for index, (logprob, parent) in enumerate(zip(expansion.logprobs, expansion.parents)):
        if parent not in best or logprob > best[parent][0]:
            best[parent] = min(logprob, 0.0), index
    at, log, right, length = -1, 0.0, 0.0, 0.0
    while at in best:
        step, following = best[at]
        log += step
        length += math.exp(log)
        right = right or math.exp(log)
        at = following
    return right, length
