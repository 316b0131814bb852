"""PipeDec / SpecPipe (arXiv 2504.04104): one tree layer per pipeline step.

Each step the draft expands the newest layer and the `width` best of all its children, by cumulative
probability, follow as the next layer. A hit prunes the tree, a miss flushes it; both are the commit rule.
"""

from __future__ import annotations

from fullpipe.methods.base import PerTree, root_if_new
from fullpipe.sequences.tree import Node, TokenTree


class PipeDec(PerTree):
    name = "pipedec"

    def launch_tree(self, tree: TokenTree, room: int) -> list[Node]:
        if root := root_if_new(tree):
            return root
        layer = tree.newest_layer()
        if not all(node.answered for node in layer):
            return []  # a layer enters whole or not at all
        return tree.best_children(layer, min(self.width, room), self.floor)

    def expand_tree(self, tree: TokenTree, room: int) -> list[Node]:
        layer = tree.newest_layer() or [tree.root]
        return [node for node in layer if not node.asked][:room]
