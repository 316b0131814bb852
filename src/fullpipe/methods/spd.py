"""Speculative Pipeline Decoding (arXiv 2605.30852): one tree layer per pipeline step, a chain by default.

Each step the draft looks at what has just entered stage 0, and the best child follows while stage 0 is busy with its
parent. With a width of k the k best siblings follow, as a tree in one pipeline; the paper's beam is k copies of the
caches and only helps the first verification after a miss.

With `refresh` the draft is asked again about what is in flight. When that makes an unlaunched node likelier than all
its launched siblings, the pipeline holds the wrong chain from there on: the sibling enters late, as an extra row beside
the newest layer, and if the other chain dies the miss costs only the steps by which it was late. What follows then
are the best children of all that entered last, which is the better chain of the two. The other one is not called
back: it may still be right, and is where the chain goes on if the late one dies first.
"""

from __future__ import annotations

from fullpipe.costs import Machine
from fullpipe.methods.base import PerTree, RefreshingMethod, root_if_new
from fullpipe.sequences.tree import Node, TokenTree


class Spd(RefreshingMethod, PerTree):
    """width: nodes of a layer at most; with `refresh` as many late siblings may enter beside it. There is no floor by
    default: a place in the pipeline that the chain does not take stays empty. draft_width: nodes asked about in one
    draft job, while new ones do not need more. Default: twice the width, but at least 8; a chain in 8 stages whole."""

    name = "spd"

    def __init__(self, *, width: int = 1, floor: float = 0.0, draft_width: int | None = None,
                 refresh: bool = False, machine: Machine | None = None) -> None:
        super().__init__(width=width, floor=floor, draft_width=draft_width or max(8, 2 * width), refresh=refresh,
                         machine=machine)

    def launch_tree(self, tree: TokenTree, room: int) -> list[Node]:
        if root := root_if_new(tree):
            return root
        newest = tree.newest_flight()
        if not all(node.answered for node in newest):
            return []  # nor a late sibling alone: it would take the layer's place in stage 0
        late = tree.overtakers(min(self.width, room), self.floor) if self.refresh else []
        return late + tree.best_children(newest, min(self.width, room - len(late)), self.floor)

    def expand_tree(self, tree: TokenTree, room: int) -> list[Node]:
        newest = tree.newest_flight() or [tree.root]
        return self.fill(tree, [node for node in newest if not node.asked][:room])
