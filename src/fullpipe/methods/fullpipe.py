"""Ours: whenever stage 0 is about to be free, the most promising nodes that have not been launched.

PipeDec launches a layer and never looks back. Here a sibling that just missed the cut stays a candidate
at any depth: as its rivals are launched or die it becomes the best of the rest and enters late instead of
never, and what then lands on it is a hit that PipeDec would have flushed the pipeline for. The draft runs
ahead by the same order, so that a late node's children are known when it enters and can enter with it.
"""

from __future__ import annotations

from fullpipe.methods.base import PROBABILITY_FLOOR, RefreshingPolicy, root_if_new
from fullpipe.sequences.tree import Node, TokenTree

# The draft looks at nothing whose children come after so many flights' worth of better nodes.
_FLIGHTS_AHEAD = 2


class FullPipe(RefreshingPolicy):
    """draft_width: nodes per draft call at most. Default: twice the width, but 16 to 32: with 64 instead of 32 the
    draft computed 1.8 times as many nodes for 0.7% fewer steps (GSM8K question 1, width 64, docs/log.md).
    refresh: siblings that a refreshed answer brings up enter late like all others."""

    name = "fullpipe"

    def __init__(self, *, width: int = 8, floor: float = PROBABILITY_FLOOR, draft_width: int | None = None,
                 refresh: bool = False) -> None:
        super().__init__(width=width, floor=floor, draft_width=draft_width or min(max(16, 2 * width), 32),
                         refresh=refresh)

    def launch(self, tree: TokenTree, room: int) -> list[Node]:
        # The root never lacks a slot; without it nothing could ever be freed.
        least = len(root_if_new(tree))
        return tree.take_unlaunched(min(self.width, max(room, least)), self.floor)

    def expand(self, tree: TokenTree, room: int) -> list[Node]:
        floor = max(self.floor, tree.launch_cutoff(_FLIGHTS_AHEAD * self.width))
        return self.fill(tree, tree.take_unasked(min(self.draft_width, room), floor))
