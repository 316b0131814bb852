"""PPSD (arXiv 2509.19368): the model's own first stage drafts, one token per pipeline step, while the rest verifies.

The draft is a head on what stage 0 has made of a node, so it can answer for nodes that stage 0 has finished and for no
others. The method therefore never asks about a node before it is launched: not about a new root that waits for
its turn, as the other methods do.
"""

from __future__ import annotations

from fullpipe.costs import Machine
from fullpipe.methods.pipedec import PipeDec
from fullpipe.sequences.tree import Node, TokenTree


class Ppsd(PipeDec):
    """width: nodes of a layer at most. No floor by default, as with `spd`."""

    name = "ppsd"

    def __init__(self, *, width: int = 1, floor: float = 0.0, machine: Machine | None = None) -> None:
        super().__init__(width=width, floor=floor, machine=machine)

    def expand_tree(self, tree: TokenTree, room: int) -> list[Node]:
        return [node for node in tree.newest_layer() if not node.asked][:room]
