"""Draft jobs: what of the committed paths the draft has not seen, and behind it the nodes to propose children for."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

from fullpipe.messages import ArenaId, Drafted, Expansion, Flight, Part
from fullpipe.methods.base import Load, Method
from fullpipe.options import EngineOptions
from fullpipe.sequences.calibration import Calibration
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import LIVE, Node, State

_Parts = dict[int, tuple[Part, Sequence]]  # by request


class Jobs:
    """Makes draft jobs and remembers what was asked. asked: by node, until it is answered or dies. newest: id of a job
    from which to go on. calibration: how far the answers are believed. out: when the job that is on its way set off
    (None: none is), and its rows."""

    def __init__(self, options: EngineOptions, newest: int, calibration: Calibration) -> None:
        self._calibration = calibration
        self._chunk, self._fanout = options.prefill_chunk, options.fanout
        self._ids = count(newest + 1)
        self.asked: dict[int, tuple[Sequence, Node]] = {}
        self.closes: list[ArenaId] = []
        self.out: tuple[float | None, int] = None, 0
        self._deep: dict[int, tuple[Sequence, Node]] = {}  # nodes behind which the draft goes on by itself

    def next(self, method: Method, sequences: Collection[Sequence], load: Load) -> tuple[Flight, dict[int, int]] | None:
        """Make the next job, and count its rows by request; None where there is nothing to ask."""
        job = Flight(-1, closes=self.closes, fanout=self._fanout)
        parts: _Parts = {}
        if method.needs_draft:
            job.opens = [one.opening(one.draft, True) for one in sequences if not one.draft.opened]
            parts = self._behind([one for one in sequences if one.draft.rows < one.tree.root.position
                                  and method.follows(one, load)])
            known = [one for one in sequences if one.draft.rows >= one.tree.root.position]
            for sequence, nodes in method.expand(known, load):
                part, _ = parts.setdefault(sequence.request.id, (Part(sequence.arena), sequence))
                self._ask(sequence, nodes, part)
                self._lend(method, sequence, nodes[0], part, job, load)
        job.parts = [sequence.sealed(part, sequence.draft) for part, sequence in parts.values() if len(part)]
        if not (job.parts or job.opens or job.closes):
            return None
        job.id, self.closes = next(self._ids), []
        self.out = load.now, job.num_rows
        return job, {id: len(part) for id, (part, _) in parts.items() if len(part)}

    def _behind(self, sequences: Collection[Sequence]) -> _Parts:
        """Committed tokens that the draft lacks, a chunk in all. Who lacks least comes first: a request that has just
        missed does not wait for another's prompt."""
        left, parts = self._chunk, _Parts()
        for sequence in sorted(sequences, key=lambda one: one.tree.root.position - one.draft.rows):
            if left > 0:
                part = sequence.committed_rows(sequence.draft, left)
                parts[sequence.request.id] = part, sequence
                left -= len(part)
        return parts

    def _ask(self, sequence: Sequence, nodes: list[Node], part: Part) -> None:
        """Have the draft propose children for the nodes, each after those of its ancestors that the draft has not
        computed. One that is asked about again is sent again."""
        tree, wanted = sequence.tree, {node.id for node in nodes}
        sent: dict[int, Node] = {}
        room = sequence.room
        for node in nodes:
            if node.id in sent:
                continue
            missing = _not_in_draft(node, tree.root)
            lacking = sum([other.slot is None for other in missing]) if len(missing) > 1 else node.slot is None
            if lacking > room:
                tree.return_unasked(node)
                continue
            for other in missing:
                sequence.stand(other)
                other.in_draft = True
                sent[other.id] = other
                if other.id in wanted:
                    tree.ask(other)
                    self.asked[other.id] = (sequence, other)
            room = sequence.room if lacking else room
        sequence.add_nodes(part, sequence.draft, list(sent.values()), [id in wanted for id in sent])

    def _lend(self, method: Method, sequence: Sequence, node: Node, part: Part, job: Flight, load: Load) -> None:
        """Let the draft go on behind the first node that it is asked about, as far as the method wants: not to where
        nothing is to be guessed any more, and with half of the room, for launches need some meanwhile."""
        levels, least = method.levels(sequence, node, load)
        levels = min(levels, sequence.tree.horizon - node.position - 1, sequence.room // 2)
        if levels > 0 and node.waiting:
            part.ahead, job.least = _lend(sequence, levels), least
            self._deep[node.id] = sequence, node

    def answered(self, event: Drafted, floor: float) -> list[Expansion]:
        """Take what is answered, as far as it is believed; that is returned. A node that the reply leaves out stays
        asked: its answer may come with a later one. floor: see `TokenTree.propose`."""
        believed = []
        self.out = None, 0
        deep, self._deep = self._deep, {}
        for expansion in event.expansions:
            entry = self.asked.pop(expansion.node, None)
            if lent := deep.pop(expansion.node, None):
                sequence, node = lent
                believed.append(self._calibration.take(node, expansion))
                _take_chain(sequence, node, believed[-1], floor)
            elif entry:
                sequence, node = entry
                believed.append(self._calibration.take(node, expansion))
                sequence.tree.propose(node, believed[-1], floor)
        for sequence, _ in deep.values():  # the draft has left it out, or it was called back on its way
            _take_back(sequence)
        return believed

    def check(self) -> None:
        """Raise AssertionError unless every node that was asked about still waits."""
        assert all(node.waiting for _, node in self.asked.values())


def _lend(sequence: Sequence, count: int) -> list[int]:
    """Lend that many slots, for which there is room, to the draft."""
    assert not sequence.lent
    sequence.lent = [slot for _ in range(count) if (slot := sequence.slots.take()) is not None]
    return list(sequence.lent)


def _take_back(sequence: Sequence, used: Collection[int] = ()) -> None:
    """Have the slots that were lent back, but for those that nodes stand in now."""
    lent, sequence.lent = sequence.lent, []
    for slot in lent:
        if slot not in used:
            sequence.slots.give(slot)


def _take_chain(sequence: Sequence, node: Node, expansion: Expansion, floor: float) -> None:
    """Take an answer with a chain. While it was on its way text may have followed the chain: what is left of it then
    follows the root."""
    steps = len(expansion.computed)
    if node.state is State.COMMITTED:
        since = sequence.tokens[node.position + 1 : sequence.tree.root.position + 1]
        rest = _behind(expansion, since)
        node = sequence.tree.root
        expansion = rest or Expansion(node.id, [], [], [])
        node.asked = node.asked or rest is not None
    if expansion.tokens:
        sequence.tree.propose(node, expansion, floor)
    _adopt(sequence, node, expansion, steps - len(expansion.computed))


def _adopt(sequence: Sequence, node: Node, expansion: Expansion, passed: int) -> None:
    """Take guesses that the draft has computed on its own for nodes that it knows, each in the slot that was lent for
    it. passed: steps of the chain that the text has taken already, in slots of its own."""
    used: list[int] = []
    for slot, index in zip(sequence.lent[passed:], expansion.computed if node.state in LIVE else ()):
        child = node.children.get(expansion.tokens[index])
        if child is None or child.slot is not None or child.in_draft:
            break
        sequence.place(child, slot)
        child.in_draft = child.asked = child.answered = True
        node = child
        used.append(slot)
    _take_back(sequence, used)


def _behind(expansion: Expansion, tokens: list[int]) -> Expansion | None:
    """What an expansion says behind these tokens; None where its chains do not go there."""
    places = {(parent, token): index for index, (parent, token) in
              enumerate(zip(expansion.parents, expansion.tokens))}
    under = -1
    for token in tokens:
        if (under := places.get((under, token), -2)) < -1:
            return None
    found = Expansion(expansion.node, [], [], [])
    moved = {under: -1}
    for index, parent in enumerate(expansion.parents):
        if parent in moved and index > under:
            moved[index] = len(found.tokens)
            found.tokens.append(expansion.tokens[index])
            found.logprobs.append(expansion.logprobs[index])
            found.parents.append(moved[parent])
            found.sources += expansion.sources[index : index + 1]
    found.computed = [moved[index] for index in expansion.computed if index in moved and index != under]
    return found if found.tokens else None


def _not_in_draft(node: Node, root: Node) -> list[Node]:
    """The node, and before it those of its ancestors that the draft has not computed. A node is sent after its
    ancestors, so above the first that is known all are; but a root that text had brought before the draft's chain led
    to it is known in another slot only, and what is known behind it does not tell."""
    if root.in_draft and node.parent is not None and node.parent.in_draft:  # as a rule
        return [node]
    missing = [node]
    while (parent := missing[-1].parent) is not None and not parent.in_draft:
        missing.append(parent)
    if not root.in_draft and missing[-1] is not root:
        missing.append(root)
    missing.reverse()
    return missing
