"""One request on its way: its tree, its slots, and what every channel of stations has been sent of it.

There are two channels, the stages and the draft station. A channel has been sent the committed tokens up
to some position, and perhaps some nodes of the tree; `Channel` remembers how far, and a part is made of
what is still missing. So the prompt, a token that the draft never guessed, and a speculative node all
reach a station in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fullpipe.kvcache.slots import SlotAllocator
from fullpipe.messages import Opening, Part
from fullpipe.request import Request
from fullpipe.stats import RequestStats
from fullpipe.tree.token_tree import Advance, Node, State, TokenTree


@dataclass(slots=True)
class Channel:
    """rows: committed positions below this have been computed there. commits: slots of committed
    positions below this are known there as committed. opened: the arena exists."""

    rows: int = 0
    commits: int = 0
    opened: bool = False


@dataclass(slots=True)
class Track:
    """All the engine knows of one request.

    tokens, path_slots: the committed path by position, prompt and root included (the root's slot joins
    when it gets one).
    """

    request: Request
    tree: TokenTree
    slots: SlotAllocator
    tokens: list[int]
    path_slots: list[int]
    stats: RequestStats
    stages: Channel = field(default_factory=Channel)
    draft: Channel = field(default_factory=Channel)
    finished: str | None = None

    @classmethod
    def begin(cls, request: Request, capacity: int, ids: Iterator[int], now: float) -> Track:
        prompt = list(request.prompt)
        last = len(prompt) - 1
        tree = TokenTree(prompt[-1], last, horizon=last + request.params.max_tokens - 1, ids=ids)
        slots = SlotAllocator(capacity)
        taken = [slots.take() for _ in range(last)]
        return cls(request, tree, slots, prompt, [slot for slot in taken if slot is not None],
                   RequestStats(started=now))

    def opening(self) -> Opening:
        return Opening(self.request.id, self.slots.capacity, len(self.request.prompt), self.request.params)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def room(self) -> int:
        """Slots that speculation may take; one stays free for the next root."""
        return self.slots.num_free - (self.tree.root.slot is not None)

    # ---- what a channel is still missing ---------------------------------------------------------------

    def committed_rows(self, channel: Channel, limit: int) -> Part:
        """A part with up to `limit` committed tokens before the root that the channel has not computed."""
        part = Part(self.request.id)
        first, end = channel.rows, min(self.tree.root.position, channel.rows + limit)
        if end > first:
            part.nodes = [-1] * (end - first)
            part.tokens = self.tokens[first:end]
            part.positions = list(range(first, end))
            part.slots = self.path_slots[first:end]
            part.paths = [[] for _ in range(first, end)]
            part.wants = [False] * (end - first)
            channel.rows = end
        return part

    def add_node(self, part: Part, channel: Channel, node: Node, wants: bool) -> None:
        """Append a node's row. Its ancestors were sent before, or stand in the part already."""
        if node.slot is None:
            node.slot = self.slots.take()
            assert node.slot is not None, "the policy took more nodes than there was room for"
            if node is self.tree.root:
                self.path_slots.append(node.slot)
        if node is self.tree.root:
            channel.rows = node.position + 1
            node.path = []
        else:
            assert node.parent is not None
            # The parent's path may begin above today's root: what has been committed since is cut off.
            depth = node.position - self.tree.root.position
            node.path = [*(node.parent.path[1 - depth :] if depth > 1 else ()), node.slot]
        part.nodes.append(node.id)
        part.tokens.append(node.token)
        part.positions.append(node.position)
        part.slots.append(node.slot)
        part.paths.append(node.path)
        part.wants.append(wants)

    def seal(self, part: Part, channel: Channel) -> None:
        """The part will be sent: let it carry what was committed since the last one."""
        part.commits = self.path_slots[channel.commits : channel.rows]
        channel.commits = channel.rows

    # ---- the commit rule -------------------------------------------------------------------------------

    def advance(self) -> Advance | None:
        """Apply the commit rule once and give the dead nodes' slots back."""
        step = self.tree.advance()
        if step is None:
            return None
        root = self.tree.root
        self.tokens.append(step.token)
        if root.slot is not None:
            self.path_slots.append(root.slot)
        if root.state is not State.PROPOSED:
            self.stages.rows = root.position + 1
        if root.in_draft:
            self.draft.rows = root.position + 1
        self.release(step.dead)
        return step

    def release(self, dead: list[Node]) -> None:
        for node in dead:
            if node.slot is not None:
                self.slots.give(node.slot)

    def check(self) -> None:
        """Raise AssertionError unless tree and slots are as they must be."""
        self.tree.check()
        live = [node.slot for node in self.tree.nodes() if node is not self.tree.root and node.slot is not None]
        self.slots.check(self.path_slots + live)
        assert len(self.path_slots) == self.tree.root.position + (self.tree.root.slot is not None)
        assert len(self.tokens) == self.tree.root.position + 1
        assert all(node.slot is not None for node in self.tree.nodes() if node.state is not State.PROPOSED)
