"""Flights: what the stages lack of the committed paths, and the nodes that a method chose."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many
from itertools import count

from fullpipe.events import Launched
from fullpipe.messages import ArenaId, Flight, Landed, Part
from fullpipe.methods.base import Load, Method
from fullpipe.options import EngineOptions
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node

_Parts = dict[int, tuple[Part, Sequence]]  # by request


class Flights:
    """Makes flights and remembers which nodes are on their way.

    launched: by node, until it lands or dies. under_way: flights that have not landed. newest: id of a flight to go on
    from. closes: arenas to be closed by the next flight.
    """

    def __init__(self, options: EngineOptions, newest: int) -> None:
        self._chunk = options.prefill_chunk
        self._ids = count(newest + 1)
        self.launched: dict[int, tuple[Sequence, Node]] = {}
        self.under_way: set[int] = set()
        self.closes: list[ArenaId] = []

    def next(self, method: Method, sequences: Collection[Sequence], load: Load) -> tuple[Flight, Launched] | None:
        """Make the next flight, and what is to be told of it; None where there is nothing to send."""
        flight = Flight(-1, closes=self.closes)
        flight.opens = [one.opening(one.stages, method.needs_draft) for one in sequences
                        if not one.stages.opened]
        parts = self._prompt_parts(method, sequences)
        told = Launched(0.0, -1, [], [], [], [], [], {id: len(part) for id, (part, _) in parts.items()})
        deciding = [one for one in sequences if one.stages.rows >= one.tree.root.position]
        load.prompt_rows = sum(told.prompt_rows.values())
        for sequence, nodes in method.launch(deciding, load):
            part, _ = parts.setdefault(sequence.request.id, (Part(sequence.arena), sequence))
            self._launch(sequence, nodes, part, told)
        flight.parts = [sequence.sealed(part, sequence.stages) for part, sequence in parts.values() if len(part)]
        if not (flight.parts or flight.opens or flight.closes):
            return None
        flight.id, self.closes = next(self._ids), []
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
            sequence.stand(node)
            self.launched[node.id] = (sequence, node)
        sequence.add_nodes(part, sequence.stages, nodes, [True] * len(nodes))
        told.nodes += [node.id for node in nodes]
        told.parents += [node.parent.id if node.parent else -1 for node in nodes]
        told.tokens += [node.token for node in nodes]
        told.positions += [node.position for node in nodes]
        told.requests += [sequence.request.id] * len(nodes)

    def landed(self, event: Landed) -> list[Sequence]:
        """Take in what the last stage says; the sequences of whose nodes it speaks."""
        self.under_way.discard(event.flight)
        touched: dict[int, Sequence] = {}
        stuck = dict(event.stuck)
        others: Many[Many[int]] = event.others or [()] * len(event.nodes)
        for id, token, passing in zip(event.nodes, event.tokens, others):
            if entry := self.launched.pop(id, None):
                sequence, node = entry
                if id in stuck:
                    sequence.tree.strand(node, stuck[id])
                else:
                    sequence.tree.land(node, token, passing)
                touched[sequence.request.id] = sequence
        return list(touched.values())

    def check(self, sequences: Collection[Sequence]) -> None:
        """Raise AssertionError unless what flies here flies in the trees."""
        assert {id for one in sequences for id in one.tree.flying} == set(self.launched), \
            "launched nodes and trees disagree"
