"""What goes out and what came of it: flights and draft jobs, made of what each channel lacks, and who waits."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many
from itertools import count

from fullpipe.messages import ArenaId, Drafted, Flight, Landed, Launched, Opening, Part
from fullpipe.methods.base import Load, Method
from fullpipe.options import EngineOptions
from fullpipe.sequences.blocks import Kept
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node

_Parts = dict[int, tuple[Part, Sequence]]  # by request


class Flights:
    """Makes flights and jobs and remembers which nodes are on their way.

    launched, asked: by node, until it lands or is answered, or dies. under_way: flights that have not landed.
    newest_flight, newest_job: ids from which to go on.
    """

    def __init__(self, options: EngineOptions, newest_flight: int, newest_job: int) -> None:
        self._chunk, self._fanout = options.prefill_chunk, options.fanout
        self._flight_ids, self._job_ids = count(newest_flight + 1), count(newest_job + 1)
        self.launched: dict[int, tuple[Sequence, Node]] = {}
        self.asked: dict[int, tuple[Sequence, Node]] = {}
        self.under_way: set[int] = set()
        self._closes: dict[str, list[ArenaId]] = {"stages": [], "draft": []}

    @property
    def idle(self) -> bool:
        """Whether no flight is under way and no arena waits to be closed."""
        return not (self.under_way or self._closes["stages"] or self._closes["draft"])

    def close(self, kept: Kept, drafts: bool) -> None:
        """Have the stations close an arena. drafts: the draft has been told that it will be, opened there or not."""
        if kept.in_stages:
            self._closes["stages"].append(kept.arena)
        if kept.in_draft or (drafts and kept.in_stages):
            self._closes["draft"].append(kept.arena)

    # ---- flights -----------------------------------------------------------------------------------------

    def next_flight(self, method: Method, sequences: Collection[Sequence]) -> tuple[Flight, Launched] | None:
        """Make the next flight, and what is to be told of it; None where there is nothing to send."""
        opens = [one.opening(one.stages, method.needs_draft) for one in sequences
                 if one.stages.capacity < one.slots.capacity]
        parts = self._prompt_parts(method, sequences)
        told = Launched(0.0, -1, [], [], [], [], [], {id: len(part) for id, (part, _) in parts.items()})
        deciding = [one for one in sequences if one.stages.rows >= one.tree.root.position]
        load = Load(len(sequences), sum(told.prompt_rows.values()), len(self.under_way))
        for sequence, nodes in method.launch(deciding, load):
            part, _ = parts.setdefault(sequence.request.id, (Part(sequence.arena), sequence))
            self._launch(sequence, nodes, part, told)
        sealed = _sealed(parts, "stages")
        if not (sealed or opens or self._closes["stages"]):
            return None
        flight = Flight(next(self._flight_ids), sealed, opens, self._closings("stages"))
        told.flight = flight.id
        self.under_way.add(flight.id)
        return flight, told

    def _prompt_parts(self, method: Method, sequences: Collection[Sequence]) -> _Parts:
        """Committed tokens that the stages lack: of prompts the next chunk, those first that came first."""
        behind = [one for one in sequences if one.stages.rows < one.tree.root.position]
        left = method.prompt_rows(self._chunk, len(sequences) - len(behind)) if behind else None
        parts: _Parts = {}
        for sequence in behind:
            limit = self._chunk if left is None else min(self._chunk, left)
            if limit > 0:
                part = sequence.committed_rows(sequence.stages, limit)
                parts[sequence.request.id] = part, sequence
                left = None if left is None else left - len(part)
        return parts

    def _launch(self, sequence: Sequence, nodes: list[Node], part: Part, told: Launched) -> None:
        sequence.tree.new_flight()
        for node in nodes:
            sequence.tree.launch(node)
            sequence.add_node(part, sequence.stages, node, wants=True)
            self.launched[node.id] = (sequence, node)
            told.nodes.append(node.id)
            told.parents.append(node.parent.id if node.parent else -1)
            told.tokens.append(node.token)
            told.positions.append(node.position)
        told.requests += [sequence.request.id] * len(nodes)

    def landed(self, event: Landed) -> list[Sequence]:
        """Take in what the last stage says; the sequences of whose nodes it speaks."""
        self.under_way.discard(event.flight)
        touched: dict[int, Sequence] = {}
        others: Many[Many[int]] = event.others or [()] * len(event.nodes)
        for id, token, passing in zip(event.nodes, event.tokens, others):
            if entry := self.launched.pop(id, None):
                sequence, node = entry
                sequence.tree.land(node, token, passing)
                touched[sequence.request.id] = sequence
        return list(touched.values())

    # ---- draft jobs --------------------------------------------------------------------------------------

    def next_job(self, method: Method, sequences: Collection[Sequence]) -> tuple[Flight, dict[int, int]] | None:
        """Make the next draft job, and count its rows by request; None where there is nothing to ask."""
        opens: list[Opening] = []
        parts: _Parts = {}
        if method.needs_draft:
            opens = [one.opening(one.draft, True) for one in sequences if one.draft.capacity < one.slots.capacity]
            parts = self._behind_in_draft(sequences)
            known = [one for one in sequences if one.draft.rows >= one.tree.root.position]
            for sequence, nodes in method.expand(known):
                part, _ = parts.setdefault(sequence.request.id, (Part(sequence.arena), sequence))
                self._ask(sequence, nodes, part)
        sealed = _sealed(parts, "draft")
        if not (sealed or opens or self._closes["draft"]):
            return None
        job = Flight(next(self._job_ids), sealed, opens, self._closings("draft"), self._fanout)
        return job, {id: len(part) for id, (part, _) in parts.items() if len(part)}

    def _behind_in_draft(self, sequences: Collection[Sequence]) -> _Parts:
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

    def drafted(self, event: Drafted) -> None:
        """Take what is answered. A node that the reply leaves out stays asked: its answer may come with a later one."""
        for expansion in event.expansions:
            if entry := self.asked.pop(expansion.node, None):
                sequence, node = entry
                sequence.tree.propose(node, expansion)

    # ---- the dead ----------------------------------------------------------------------------------------

    def forget(self, dead: list[Node]) -> list[int]:
        """Nobody waits for these nodes any more. Returns those to be called back: what is in flight, and what the draft
        was asked about, for it may be waiting for them."""
        if not (self.launched or self.asked):
            return []
        return [node.id for node in dead
                if (self.launched.pop(node.id, None) is not None) | (self.asked.pop(node.id, None) is not None)]

    def _closings(self, channel: str) -> list[ArenaId]:
        closes, self._closes[channel] = self._closes[channel], []
        return closes

    def check(self, sequences: Collection[Sequence]) -> None:
        """Raise AssertionError unless what flies here flies in the trees."""
        assert {id for one in sequences for id in one.tree.flying} == set(self.launched), \
            "launched nodes and trees disagree"
        assert all(node.waiting for _, node in self.asked.values())


def _sealed(parts: _Parts, channel: str) -> list[Part]:
    """The parts that have rows, in the order in which their requests came."""
    for part, sequence in parts.values():
        if len(part):
            sequence.seal(part, sequence.stages if channel == "stages" else sequence.draft)
    return [part for part, _ in parts.values() if len(part)]


def _not_in_draft(node: Node) -> list[Node]:
    """The node, and before it those of its ancestors that the draft has not computed. (A node is sent after
    its ancestors, so above the first that is known all are.)"""
    missing = [node]
    while (parent := missing[-1].parent) is not None and not parent.in_draft:
        missing.append(parent)
    missing.reverse()
    return missing
