"""The token tree: the committed path's newest token (the root) and the guesses that grow from it.

Knows tokens, log-probabilities and states; does not know slots' owners, requests, pipelines or time.
The commit rule, `TokenTree.advance`, is the only way in which text comes about, whatever the method.

A source may offer sixteen guesses for every node it looks at, most of which nobody will ever want. So a
guess becomes a `Node` only when it is the best of those left: every node keeps its guesses sorted, and
the frontier heap holds each node's next one. All orders are by cumulative log-probability since the
request began; differences between live nodes are path probabilities relative to any common ancestor, so
nothing has to be renormalised when the root advances.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import count

from fullpipe.messages import Expansion


class State(IntEnum):
    PROPOSED = 0
    IN_FLIGHT = 1
    LANDED = 2
    COMMITTED = 3
    DEAD = 4


LIVE = (State.PROPOSED, State.IN_FLIGHT, State.LANDED)


class Node:
    """One token at one place in the tree.

    id: unique and rising within the engine. slot: cache slot, None until it first enters a station; path:
    slots of its ancestors below the root of that moment, its own last.
    cum: cumulative log-probability of the path. asked: the draft was asked for guesses of what follows;
    answered: it replied. in_draft: the draft station has computed this node. next_token: what truly
    follows, once landed.
    """

    __slots__ = ("answered", "asked", "children", "cum", "died_at", "guesses", "id", "in_draft", "next_token",
                 "parent", "path", "position", "slot", "state", "token")

    def __init__(self, id: int, token: int, parent: Node | None, position: int, cum: float) -> None:
        self.id = id
        self.token = token
        self.parent = parent
        self.position = position
        self.cum = cum
        self.slot: int | None = None
        self.path: list[int] = []
        self.state = State.PROPOSED
        self.children: dict[int, Node] = {}
        self.guesses: list[tuple[float, int]] = []  # (cum, token), worst first: the next one is at the end
        self.asked = self.answered = self.in_draft = False
        self.next_token: int | None = None
        self.died_at: float | None = None

    def __repr__(self) -> str:
        return f"Node({self.id}, token={self.token}, position={self.position}, {self.state.name.lower()})"


@dataclass(slots=True)
class Advance:
    """What one application of the commit rule did.

    hit: the token was already in flight. A token that was guessed but not launched is a miss (it still
    has the whole pipeline before it), though its subtree survives.
    """

    token: int
    hit: bool
    dead: list[Node]


_Entry = tuple[float, int, Node]  # (-cum, serial, node): best first, parents before children of equal worth


class TokenTree:
    """The tree of one request.

    root_token, position: the last prompt token and where it stands.
    horizon: nodes at later positions are of no use (the answer ends before) and are never made.
    ids: where node ids come from (shared by all trees of an engine).
    """

    def __init__(self, root_token: int, position: int, *, horizon: int, ids: Iterator[int] | None = None) -> None:
        self._ids = ids if ids is not None else count()
        self._serial = count()
        self.horizon = horizon
        self._frontier: list[_Entry] = []
        self._unlaunched: list[_Entry] = []
        self._unasked: list[_Entry] = []
        self.flying: dict[int, Node] = {}  # live nodes that are launched and have not landed
        self.num_live = 0
        self.num_advances = 0  # tokens committed since the prompt
        self.root = self._new(root_token, None, position, 0.0)

    # ---- growing -------------------------------------------------------------------------------------

    def propose(self, node: Node, expansion: Expansion) -> None:
        """Take the draft's guesses of what follows `node`. Guesses for a dead or committed node are dropped.

        A child that is there already came with a chain, before anybody had looked at `node` itself. It gets the mean of
        both probabilities (0 where it is not among those guessed now), and its subtree moves with it.
        """
        if node.state not in LIVE:
            return
        node.answered = True
        if node.position >= self.horizon:
            return
        if node.children:
            self._weigh(node, expansion)
        if max(expansion.parents, default=-1) < 0:
            self._offer(node, expansion.tokens, expansion.logprobs)
        else:
            self._propose_chains(node, expansion)

    def _propose_chains(self, node: Node, expansion: Expansion) -> None:
        """Guesses that follow guesses: those that something follows become nodes at once."""
        chained = set(expansion.parents)
        made: dict[int, Node] = {}
        for index, (token, logprob, parent) in enumerate(
                zip(expansion.tokens, expansion.logprobs, expansion.parents)):
            under = node if parent < 0 else made.get(parent)
            if under is None or under.position >= self.horizon:
                continue
            if index in chained:
                cum = under.cum + min(logprob, 0.0)
                made[index] = under.children.get(token) or self._new(token, under, under.position + 1, cum)
            else:
                self._offer(under, [token], [logprob])

    def _offer(self, node: Node, tokens: list[int], logprobs: list[float]) -> None:
        cum = node.cum
        guesses = [(cum + (logprob if logprob < 0 else 0.0), token) for token, logprob in zip(tokens, logprobs)]
        if node.guesses or node.children:
            known = {token for _, token in node.guesses} | set(node.children)
            guesses = node.guesses + [guess for guess in guesses if guess[1] not in known]
        guesses.sort()
        self._offer_next(node, guesses)

    def _weigh(self, node: Node, expansion: Expansion) -> None:
        """What came with a chain before anybody had looked at `node`, against what is said now."""
        said = {token: logprob for token, logprob, parent in
                zip(expansion.tokens, expansion.logprobs, expansion.parents) if parent < 0}
        if not said:
            return  # whoever knows nothing does not doubt either
        for token, child in node.children.items():
            first, second = math.exp(child.cum - node.cum), math.exp(min(said.get(token, -math.inf), 0.0))
            self._move(child, math.log((first + second) / 2 / first))

    def _move(self, top: Node, shift: float) -> None:
        """Change a node's path probability, and with it those of everything below."""
        stack = [top]
        while stack:
            node = stack.pop()
            node.cum += shift
            node.guesses = [(cum + shift, token) for cum, token in node.guesses]
            if node.guesses:
                self._push(self._frontier, node, node.guesses[-1][0])
            self._push(self._unlaunched, node, node.cum)
            self._push(self._unasked, node, node.cum)
            stack.extend(node.children.values())

    def _offer_next(self, node: Node, guesses: list[tuple[float, int]]) -> None:
        changed = guesses[-1:] != node.guesses[-1:]
        node.guesses = guesses
        if guesses and changed:
            self._push(self._frontier, node, guesses[-1][0])

    def _new(self, token: int, parent: Node | None, position: int, cum: float) -> Node:
        node = Node(next(self._ids), token, parent, position, cum)
        if parent is not None:
            parent.children[token] = node
            self._offer_next(parent, [guess for guess in parent.guesses if guess[1] != token])
        self.num_live += 1
        self._push(self._unlaunched, node, cum)
        self._push(self._unasked, node, cum)
        return node

    # ---- asking --------------------------------------------------------------------------------------

    def take_unlaunched(self, limit: int, floor: float) -> list[Node]:
        """Up to `limit` nodes with the highest path probability that have not been launched, best first,
        each one's ancestors launched or before it in the list. `floor`: log of the least path probability
        given the root. The caller launches what it gets."""
        return self._take(self._unlaunched, lambda node: node.state is State.PROPOSED, limit, floor)

    def take_unasked(self, limit: int, floor: float) -> list[Node]:
        """The same for nodes whose children the draft has not been asked for. The caller asks."""
        return self._take(self._unasked, self._is_askable, limit, floor)

    def _is_askable(self, node: Node) -> bool:
        return node.state in LIVE and not node.asked and node.position < self.horizon

    def horizon_of_launches(self, count: int) -> float:
        """Log path probability, given the root, of the `count`-th best that could still be launched; -inf where there
        are not as many. Of each node's guesses only the best is counted."""
        waiting = [-key for key, _, node in self._unlaunched if node.state is State.PROPOSED and node.cum == -key]
        if len(waiting) + len(self._frontier) < count:
            return -math.inf
        waiting += [node.guesses[-1][0] for key, _, node in self._frontier
                    if node.state in LIVE and node.guesses and node.guesses[-1][0] == -key]
        if len(waiting) < count:
            return -math.inf
        waiting.sort(reverse=True)
        return waiting[count - 1] - self.root.cum

    def return_unasked(self, node: Node) -> None:
        """Give back a node of `take_unasked` that could not be asked for."""
        self._push(self._unasked, node, node.cum)

    def best_children(self, nodes: Iterable[Node], limit: int, floor: float) -> list[Node]:
        """The up to `limit` best unlaunched children of `nodes` together, best first."""
        least = self.root.cum + floor
        offers: list[tuple[float, int, int, Node]] = []  # ties go by node and token: asked again, the same answer
        for node in nodes:
            offers += [(-cum, node.id, token, node) for cum, token in node.guesses if cum >= least]
            offers += [(-child.cum, node.id, token, node) for token, child in node.children.items()
                       if child.state is State.PROPOSED and child.cum >= least]
        best = heapq.nsmallest(limit, offers, key=lambda offer: offer[:3])
        return [self._child(node, token) for _, _, token, node in best]

    def newest_layer(self) -> list[Node]:
        """The launched live nodes at the highest position; empty when the root has not been launched."""
        if self.root.state is State.PROPOSED:
            return []
        newest = max((node.position for node in self.flying.values()), default=self.root.position)
        return [node for node in self.flying.values() if node.position == newest] or [self.root]

    def _child(self, node: Node, token: int) -> Node:
        if token in node.children:
            return node.children[token]
        cum = next(cum for cum, known in node.guesses if known == token)
        return self._new(token, node, node.position + 1, cum)

    def _take(self, heap: list[_Entry], usable: Callable[[Node], bool], limit: int, floor: float) -> list[Node]:
        least = self.root.cum + floor
        taken: list[Node] = []
        ids: set[int] = set()
        frontier = self._best_frontier()
        while len(taken) < limit:
            # A node that moved has several entries: those of other places are stale, one of this place is enough.
            while heap and not (usable(heap[0][2]) and heap[0][2].cum == -heap[0][0] and heap[0][2].id not in ids):
                heapq.heappop(heap)
            best = -heap[0][0] if heap else -math.inf
            if frontier is not None and frontier.guesses[-1][0] > max(best, least):
                self._child(frontier, frontier.guesses[-1][1])
                frontier = self._best_frontier()
            elif heap and best >= least:
                taken.append(heapq.heappop(heap)[2])
                ids.add(taken[-1].id)
            else:
                break
        return taken

    def _best_frontier(self) -> Node | None:
        """The live node with the best guess left. Entries whose node died, or whose best guess has
        become another one (there is a newer entry then), are dropped on the way."""
        heap = self._frontier
        while heap:
            key, _, node = heap[0]
            if node.state in LIVE and node.guesses and node.guesses[-1][0] == -key:
                return node
            heapq.heappop(heap)
        return None

    def _push(self, heap: list[_Entry], node: Node, cum: float) -> None:
        heapq.heappush(heap, (-cum, next(self._serial), node))
        if len(heap) > 64 + 4 * self.num_live:  # mostly dead: drop those, so that a long run costs no more
            heap[:] = [entry for entry in heap if entry[2].state in LIVE]
            heapq.heapify(heap)

    # ---- the life of a node --------------------------------------------------------------------------

    def launch(self, node: Node) -> None:
        assert node.state is State.PROPOSED and (node.parent is None or node.parent.state is not State.PROPOSED)
        node.state = State.IN_FLIGHT
        self.flying[node.id] = node

    def land(self, node: Node, next_token: int) -> None:
        """The last stage said what truly follows. A dead node's landing changes nothing."""
        if node.state is State.IN_FLIGHT:
            node.state = State.LANDED
            node.next_token = next_token
            del self.flying[node.id]

    def advance(self) -> Advance | None:
        """The commit rule, once: None unless the root has landed.

        Its next token y is committed. If the root has a child carrying y, that child is the root and its
        siblings' subtrees die; else everything but the root dies and a new node y becomes the root.
        """
        root = self.root
        if root.state is not State.LANDED:
            return None
        token = root.next_token
        assert token is not None
        child = root.children.pop(token, None)
        dead = [node for other in root.children.values() for node in self._kill(other)]
        if child is None:
            cum = next((cum for cum, known in root.guesses if known == token), root.cum)
            child = self._new(token, None, root.position + 1, cum)
        child.parent = None
        root.state = State.COMMITTED
        root.children, root.guesses = {}, []
        self.num_live -= 1
        self.num_advances += 1
        self.root = child
        return Advance(token, child.state is not State.PROPOSED, dead)

    def clear(self) -> list[Node]:
        """Kill the whole tree, the root included (the request is over)."""
        return self._kill(self.root)

    def _kill(self, top: Node) -> list[Node]:
        dead, stack = [], [top]
        while stack:
            node = stack.pop()
            if node.state is State.IN_FLIGHT:
                del self.flying[node.id]
            node.state = State.DEAD
            dead.append(node)
            stack.extend(node.children.values())
        self.num_live -= len(dead)
        return dead

    # ---- invariants ----------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """All live nodes, parents before children."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Raise AssertionError unless the tree is as it must be."""
        live = list(self.nodes())
        assert self.root.parent is None
        assert len(live) == self.num_live, "live nodes are miscounted"
        assert len({node.id for node in live}) == len(live), "a node stands in two places"
        assert {node.id for node in live if node.state is State.IN_FLIGHT} == set(self.flying)
        for node in live:
            assert node.state in LIVE, f"{node} is in the tree"
            assert node.guesses == sorted(node.guesses), f"{node}: guesses out of order"
            assert not {token for _, token in node.guesses} & set(node.children), f"{node}: a guess twice"
            for token, child in node.children.items():
                assert child.parent is node and child.token == token
                assert child.position == node.position + 1 <= max(self.horizon, self.root.position)
                assert child.cum <= node.cum, f"{child} is likelier than its parent"
                assert child.state is State.PROPOSED or node.state is not State.PROPOSED, \
                    f"{child} was launched before its parent"
                assert child.state is not State.LANDED or node.state is State.LANDED
