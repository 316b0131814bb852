"""Two shares that nobody's guesses can change: baselines, and what plain pipelines need."""

from __future__ import annotations

from collections.abc import Sequence

from fullpipe.batching.base import Batching, Chosen, Separate, longest_waiting
from fullpipe.errors import UsageError
from fullpipe.methods.base import Policy
from fullpipe.sequences.sequence import Track


class Balanced(Separate):
    """As many rows in every flight as keep all stages equally busy: with `running` requests on n stages, running / n,
    rounded up, of those that have waited longest. Without it requests that once landed together stay together for
    ever, and the pipeline carries one crowded flight. It is what pipeline-parallel servers do with microbatches.
    """

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages

    def launch(self, policy: Policy, tracks: Sequence[Track], prompt_rows: int, running: int,
               under_way: int) -> Chosen:
        limit, chosen = -(-running // self._num_stages), Chosen()
        for track in longest_waiting(tracks):
            if limit <= 0:
                break
            if nodes := policy.launch(track.tree, min(track.room, limit)):
                chosen.append((track, nodes))
                limit -= len(nodes)
        return chosen


class Equal(Batching):
    """Every request gets the same share of a flight's rows, whatever its guesses are worth.

    rows: of a flight, shared by those that run; at least one each.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise UsageError(f"a flight needs at least one row (got {rows})")
        self._rows = rows

    def launch(self, policy: Policy, tracks: Sequence[Track], prompt_rows: int, running: int,
               under_way: int) -> Chosen:
        share = max(1, self._rows // max(running, 1))
        return [(track, nodes) for track in tracks if (nodes := policy.launch(track.tree, min(track.room, share)))]

    def expand(self, policy: Policy, tracks: Sequence[Track]) -> Chosen:
        share = max(1, self._rows // max(len(tracks), 1))
        return [(track, nodes) for track in tracks if (nodes := policy.expand(track.tree, min(track.room, share)))]
