"""One request on its way: its tree, its slots, and what every channel of stations has been sent of it.

There are two channels, the stages and the draft station. A channel has been sent the committed tokens up
to some position, and perhaps some nodes of the tree; `Channel` remembers how far, and a part is made of
what is still missing. So the prompt, a token that the draft never guessed, and a speculative node all
reach a station in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fullpipe.messages import ArenaId, Opening, Part
from fullpipe.request import Request
from fullpipe.sequences.blocks import SlotAllocator
from fullpipe.sequences.stats import RequestStats
from fullpipe.sequences.tree import Advance, Node, State, TokenTree


@dataclass(slots=True)
class Channel:
    """rows: committed positions below this have been computed there. commits: slots of committed
    positions below this are known there as committed. capacity: of the arena there; 0: it does not exist yet.
    copy_from, copied: what the arena begins with, until it is opened (see `Opening`)."""

    rows: int = 0
    commits: int = 0
    capacity: int = 0
    copy_from: int = -1
    copied: list[int] = field(default_factory=list)

    @property
    def opened(self) -> bool:
        return self.capacity > 0


@dataclass(slots=True)
class Track:
    """All the engine knows of one request.

    arena: by which number the stations know it. A request that begins anew there gets a new one.
    judge: looks at each emitted token, see `engine.Judge`. cached: prompt positions taken over from another request.
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
    arena: ArenaId = ArenaId(-1)
    judge: Callable[[int], str | None] | None = None
    cached: int = 0

    @classmethod
    def begin(cls, request: Request, capacity: int, ids: Iterator[int], stats: RequestStats) -> Track:
        tree, slots = TokenTree(request.prompt[-1], 0, horizon=0, ids=ids), SlotAllocator(capacity)
        track = cls(request, tree, slots, list(request.prompt), [], stats, arena=ArenaId(request.id))
        track.rewind(capacity, ids)
        return track

    def rewind(self, capacity: int, ids: Iterator[int]) -> None:
        """Be as if nothing had been sent, with all that was emitted for a prompt: the text goes on from there, for it
        is a function of position, seed and what stands before."""
        last = len(self.tokens) - 1
        horizon = self.num_prompt + self.request.params.max_tokens - 2
        self.tree = TokenTree(self.tokens[-1], last, horizon=horizon, ids=ids)
        self.slots = SlotAllocator(capacity)
        self.path_slots = [slot for _ in range(last) if (slot := self.slots.take()) is not None]
        assert len(self.path_slots) == last, "the arena does not hold what there is already"
        self.stages, self.draft = Channel(), Channel()

    def opening(self, channel: Channel) -> Opening:
        """That makes the arena on a channel as large as it is to be."""
        copy_from, copied = channel.copy_from, channel.copied
        channel.capacity, channel.copy_from, channel.copied = self.slots.capacity, -1, []
        return Opening(self.arena, self.slots.capacity, self.num_prompt, self.request.params, copy_from, copied,
                       self.request.id)

    def take_over(self, channel: Channel, arena: ArenaId, slots: list[int]) -> None:
        """Begin this channel's arena with rows of another's, which stand in these slots there, by position."""
        channel.rows = channel.commits = len(slots)
        channel.copy_from, channel.copied = (arena, slots) if slots else (-1, [])

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self.num_prompt + self.request.params.max_tokens - len(self.tokens)

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
