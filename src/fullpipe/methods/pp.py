"""Plain pipeline parallelism: the root travels alone. The reference for text and for speed."""

from __future__ import annotations

from fullpipe.methods.base import Policy, root_if_new
from fullpipe.sequences.tree import Node, TokenTree


class PlainPipeline(Policy):
    name = "pp"
    needs_draft = False

    def launch(self, tree: TokenTree, room: int) -> list[Node]:
        return root_if_new(tree)

    def expand(self, tree: TokenTree, room: int) -> list[Node]:
        return []
