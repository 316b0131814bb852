"""Draft jobs: what of the committed paths the draft has not seen, and behind it the nodes to propose children for."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

from fullpipe.messages import ArenaId, Drafted, Flight, Part
from fullpipe.methods.base import Method
from fullpipe.options import EngineOptions
from fullpipe.sequences.calibration import Calibration
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node

_Parts = dict[int, tuple[Part, Sequence]]  # by request


class Jobs:
    """Makes draft jobs and remembers what was asked. asked: by node, until it is answered or dies. newest: id of a job
    from which to go on. calibration: how far the answers are believed."""

    def __init__(self, options: EngineOptions, newest: int, calibration: Calibration) -> None:
        self._calibration = calibration
        self._chunk, self._fanout = options.prefill_chunk, options.fanout
        self._ids = count(newest + 1)
        self.asked: dict[int, tuple[Sequence, Node]] = {}
        self.closes: list[ArenaId] = []

    def next(self, method: Method, sequences: Collection[Sequence]) -> tuple[Flight, dict[int, int]] | None:
        """Make the next job, and count its rows by request; None where there is nothing to ask."""
        job = Flight(-1, closes=self.closes, fanout=self._fanout)
        parts: _Parts = {}
        if method.needs_draft:
            job.opens = [one.opening(one.draft, True) for one in sequences if one.draft.capacity < one.slots.capacity]
            parts = self._behind(sequences)
            known = [one for one in sequences if one.draft.rows >= one.tree.root.position]
            for sequence, nodes in method.expand(known):
                part, _ = parts.setdefault(sequence.request.id, (Part(sequence.arena), sequence))
                self._ask(sequence, nodes, part)
        job.parts = [sequence.sealed(part, sequence.draft) for part, sequence in parts.values() if len(part)]
        if not (job.parts or job.opens or job.closes):
            return None
        job.id, self.closes = next(self._ids), []
        return job, {id: len(part) for id, (part, _) in parts.items() if len(part)}

    def _behind(self, sequences: Collection[Sequence]) -> _Parts:
        """Committed tokens that the draft lacks, a chunk in all. Who lacks least comes first: a request that has just
        missed does not wait for another's prompt."""
        left, parts = self._chunk, _Parts()
        for sequence in sorted(sequences, key=lambda one: one.tree.root.position - one.draft.rows):
            if left > 0 and sequence.draft.rows < sequence.tree.root.position:
                part = sequence.committed_rows(sequence.draft, left)
                parts[sequence.request.id] = part, sequence
                left -= len(part)
        return parts

    def _ask(self, sequence: Sequence, nodes: list[Node], part: Part) -> None:
        """Have the draft propose children for the nodes, each after those of its ancestors that the draft has not
        computed. One that is asked about again is sent again."""
        wanted = {node.id for node in nodes}
        sent: set[int] = set()
        for node in nodes:
            missing = [] if node.id in sent else _not_in_draft(node)
            if sum(other.slot is None for other in missing) > sequence.room:
                sequence.tree.return_unasked(node)
                continue
            for other in missing:
                sequence.add_node(part, sequence.draft, other, wants=other.id in wanted)
                other.in_draft = True
                sent.add(other.id)
                if other.id in wanted:
                    sequence.tree.ask(other)
                    self.asked[other.id] = (sequence, other)

    def answered(self, event: Drafted) -> None:
        """Take what is answered. A node that the reply leaves out stays asked: its answer may come with a later one."""
        for expansion in event.expansions:
            if entry := self.asked.pop(expansion.node, None):
                sequence, node = entry
                sequence.tree.propose(node, self._calibration.take(node, expansion))

    def check(self) -> None:
        """Raise AssertionError unless every node that was asked about still waits."""
        assert all(node.waiting for _, node in self.asked.values())


def _not_in_draft(node: Node) -> list[Node]:
    """The node, and before it those of its ancestors that the draft has not computed. (A node is sent after
    its ancestors, so above the first that is known all are.)"""
    missing = [node]
    while (parent := missing[-1].parent) is not None and not parent.in_draft:
        missing.append(parent)
    missing.reverse()
    return missing
