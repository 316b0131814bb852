"""Draft first, then verify: a whole tree enters when the pipeline is empty (the baseline called STPP).

With width 1 the tree is a chain, which is classic speculative decoding on a pipeline.
"""

from __future__ import annotations

from fullpipe.costs import Machine
from fullpipe.errors import UsageError
from fullpipe.methods.base import PROBABILITY_FLOOR, PerTree, root_if_new
from fullpipe.sequences.tree import Node, TokenTree


class StaticTree(PerTree):
    """width: nodes per layer. depth: layers below the root."""

    name = "static-tree"

    def __init__(self, *, width: int = 8, depth: int = 4, floor: float = PROBABILITY_FLOOR,
                 machine: Machine | None = None) -> None:
        super().__init__(width=width, floor=floor, machine=machine)
        if depth < 1:
            raise UsageError(f"depth must be 1 or more (got {depth})",
                             hint="The depth is the number of tokens guessed per traversal of the pipeline.")
        self.depth = depth

    @property
    def least_slots(self) -> int:
        return 2 + self.width * self.depth  # the whole tree stands before any of it is launched

    def launch_tree(self, tree: TokenTree, room: int) -> list[Node]:
        if not root_if_new(tree):
            return []
        if tree.num_advances == 0:
            return [tree.root]  # the prompt need not wait for guesses
        layers = self._layers(tree)
        if any(not node.answered for node in layers[-1]) and len(layers) <= self.depth:
            return []
        return [node for layer in layers for node in layer][:room]

    def expand_tree(self, tree: TokenTree, room: int) -> list[Node]:
        if not root_if_new(tree) or tree.num_advances == 0:
            return []
        layers = self._layers(tree)
        if len(layers) > self.depth:
            return []
        return [node for node in layers[-1] if not node.asked][:room]

    def _layers(self, tree: TokenTree) -> list[list[Node]]:
        """The root and up to `depth` layers of the best known children, stopping at the first layer whose
        nodes the draft has not all answered for."""
        layers = [[tree.root]]
        while len(layers) <= self.depth and all(node.answered for node in layers[-1]):
            layer = tree.best_children(layers[-1], self.width, self.floor)
            if not layer:
                break
            layers.append(layer)
        return layers


class Chain(StaticTree):
    """depth: tokens guessed per traversal."""

    name = "chain"

    def __init__(self, *, width: int = 1, depth: int = 4, floor: float = 0.0, machine: Machine | None = None) -> None:
        super().__init__(width=1, depth=depth, floor=floor, machine=machine)
