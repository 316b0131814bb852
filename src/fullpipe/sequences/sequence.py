"""One request on its way: its tokens, its tree, its slots, and what every channel of stations has been sent of it.

There are two channels, the stages and the draft station. A channel has been sent the committed tokens up
to some position, and perhaps some nodes of the tree; `Channel` remembers how far, and a part is made of
what is still missing. So the prompt, a token that the draft never guessed, and a speculative node all
reach a station in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fullpipe.messages import ArenaId, Opening, Part, Scored
from fullpipe.request import Request
from fullpipe.sequences.blocks import Kept, Room, SlotAllocator
from fullpipe.sequences.tree import Advance, Node, State, TokenTree


@dataclass(slots=True)
class Channel:
    """rows: committed positions below this have been computed there. commits: slots of committed
    positions below this are known there as committed. opened: it has been told of the sequence."""

    rows: int = 0
    commits: int = 0
    opened: bool = False


@dataclass(slots=True)
class Sequence:
    """All that the engine knows of one request. Tree, slots and arena exist while it runs (`enter`).

    arrived: when it came; waiting_since: when its newest token came, or it did. Seconds of the pipeline's clock.
    tokens, path_slots: the committed path by position, prompt and root included (the root's slot joins
    when it gets one). cached: prompt positions taken over from another request. finished: why it ended, once it has.
    lent: slots that the draft may fill on its own, until its answer comes or a node has no other left.
    scores: what the stages have said of the prompt, by position, until all of it has been told.
    """

    request: Request
    arrived: float
    tokens: list[int] = field(init=False)
    waiting_since: float = field(init=False)
    finished: str | None = None
    cached: int = 0
    arena: ArenaId = field(init=False)
    tree: TokenTree = field(init=False)
    slots: SlotAllocator = field(init=False)
    path_slots: list[int] = field(init=False)
    lent: list[int] = field(default_factory=list)
    stages: Channel = field(default_factory=Channel)
    draft: Channel = field(default_factory=Channel)
    scores: dict[int, Scored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens, self.waiting_since = list(self.request.prompt), self.arrived

    def enter(self, arena: ArenaId, room: Room, ids: Iterator[int]) -> None:
        """Begin on the stations, as if all that has been emitted were prompt: the text goes on from there, for it is a
        function of position, seed and what stands before."""
        last = len(self.tokens) - 1
        horizon = self.num_prompt + self.request.params.max_tokens - 2
        self.arena, self.tree = arena, TokenTree(self.tokens[-1], last, horizon=horizon, ids=ids)
        self.slots, self.lent = room.slots, []
        self.path_slots = list(room.slots.shared)
        self.path_slots += [slot for _ in range(last - len(self.path_slots)) if (slot := self.slots.take()) is not None]
        assert len(self.path_slots) == last, "there is no room for what there is already"
        self.stages, self.draft = Channel(room.stages, room.stages), Channel(room.draft, room.draft)
        self.cached = min(room.stages, self.num_prompt)

    def leave(self) -> None:
        """No channel knows the sequence any more."""
        self.stages, self.draft = Channel(), Channel()

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def output(self) -> list[int]:
        """What has been emitted."""
        return self.tokens[self.num_prompt :]

    @property
    def scored(self) -> bool:
        """Whether somebody still waits to be told how likely its prompt is."""
        return self.request.params.prompt_logprobs is not None and len(self.tokens) == self.num_prompt

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self.num_prompt + self.request.params.max_tokens - len(self.tokens)

    @property
    def room(self) -> int:
        """Slots that speculation may take; one stays free for the next root."""
        return self.slots.num_free - (self.tree.root.slot is not None)

    @property
    def kept(self) -> Kept:
        """What others may share: what the stations have been told is committed, and have computed before rows come to
        them that read it. Of a root in flight that is not sure, for its row may still be cancelled."""
        sure = min(len(self.path_slots), self.tree.root.position + (self.tree.root.state is State.LANDED))
        stages, draft = (min(one.commits, sure) if one.opened else 0 for one in (self.stages, self.draft))
        return Kept(self.tokens, self.path_slots, stages, draft, self.slots.blocks)

    # ---- what a channel is still missing ---------------------------------------------------------------

    def opening(self, channel: Channel, drafts: bool) -> Opening:
        """Make the opening that tells a channel of the sequence."""
        channel.opened = True
        scored = list(self.request.prompt) if self.scored and channel is self.stages else []
        return Opening(self.arena, self.num_prompt, self.request.params, self.path_slots[: channel.commits],
                       self.request.id, drafts, self.request.told_ends, scored)

    def committed_rows(self, channel: Channel, limit: int) -> Part:
        """Make a part of up to `limit` committed tokens before the root that the channel has not computed."""
        part = Part(self.arena)
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

    def add_nodes(self, part: Part, channel: Channel, nodes: list[Node], wants: list[bool]) -> None:
        """Append the rows of nodes that stand in a slot (`stand`)."""
        if self.tree.root in nodes:
            channel.rows = self.tree.root.position + 1
        part.nodes += [node.id for node in nodes]
        part.tokens += [node.token for node in nodes]
        part.positions += [node.position for node in nodes]
        part.slots += [node.slot for node in nodes if node.slot is not None]
        part.paths += [node.path for node in nodes]
        part.wants += wants

    def stand(self, node: Node) -> None:
        """Give a node a slot, unless it has one, and the path to it as it is now. Its ancestors stand already."""
        if (slot := node.slot) is None:
            slot = self.lent.pop() if self.lent and not self.slots.num_free else self.slots.take()
            assert slot is not None, "the method took more nodes than there was room for"
            if node is self.tree.root:
                self.path_slots.append(slot)
        elif len(node.path) == node.position - self.tree.root.position:  # no text has come since it got its path
            return
        self.place(node, slot)

    def place(self, node: Node, slot: int) -> None:
        """Let a node stand in a slot. What of its parent's path has been committed since is cut off from its own."""
        depth = node.position - self.tree.root.position
        above = node.parent.path[1 - depth :] if node.parent and depth > 1 else ()
        node.slot, node.path = slot, [*above, slot] if depth else []

    def sealed(self, part: Part, channel: Channel) -> Part:
        """Let a part that will be sent carry what was committed since the last one."""
        part.commits = self.path_slots[channel.commits : channel.rows]
        channel.commits = channel.rows
        return part

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
        root.in_draft &= self.draft.rows == root.position  # known there, and with all that is committed
        if root.in_draft:
            self.draft.rows = root.position + 1
        for node in step.dead:
            if node.slot is not None:
                self.slots.give(node.slot)
        return step

    def check(self) -> None:
        """Raise AssertionError unless tree and slots are as they must be."""
        self.tree.check()
        live = [node.slot for node in self.tree.nodes() if node is not self.tree.root and node.slot is not None]
        self.slots.check(self.path_slots + live + self.lent)
        assert len(self.path_slots) == self.tree.root.position + (self.tree.root.slot is not None)
        assert len(self.tokens) == self.tree.root.position + 1
        assert all(node.slot is not None for node in self.tree.nodes() if node.state is not State.PROPOSED)
