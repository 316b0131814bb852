"""The token tree: the committed path's newest token (the root) and the guesses that grow from it.

Knows tokens, log-probabilities and states; does not know slots' owners, requests, pipelines or time.
The commit rule, `TokenTree.advance`, is the only way in which text comes about, whatever the method.

A draft may offer sixteen guesses for every node it looks at, most of which nobody will ever want. So a
guess becomes a `Node` only when it is the best of those left: every node keeps its guesses sorted, and
the frontier holds each node's next one. All orders are by cumulative log-probability since the
request began; differences between live nodes are path probabilities relative to any common ancestor, so
nothing has to be renormalised when the root advances.

What waits stands in lines, sorted lists whose best is at the end: at some hundreds of entries a binary
search costs what a heap's push does, and the best so many can be read without taking them out. Nobody is
taken out of the middle: an entry whose node died, moved or waits no longer is passed over when its turn comes.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
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
_PROPOSED, _IN_FLIGHT, _LANDED, _DEAD = State.PROPOSED, State.IN_FLIGHT, State.LANDED, State.DEAD  # read very often


class Node:
    """One token at one place in the tree.

    id: unique and rising within the engine. slot: cache slot, None until it first enters a station; path:
    slots of its ancestors below the root of that moment, its own last.
    cum: cumulative log-probability of the path. asked: the draft was asked for guesses of what follows;
    answered: it replied; waiting: it still owes an answer, the first or a refreshed one. in_draft: the draft station
    has computed this node. asked_at, launched_at: the tree's `num_flights` when that last happened, -1: never.
    due: when the node should land, in seconds of the pipeline's clock, as far as the method foresees it.
    next_token: what truly follows, once landed (None then: nobody can say). others: what may follow instead, best first
    (lossy requests only).
    said: the draft's answers in its own words; foretold: those about earlier nodes that go on beyond this one, and as
    which of their guesses it stands there (of the root only). The tree does not read them (`calibration`).
    """

    __slots__ = ("answered", "asked", "asked_at", "children", "cum", "due", "foretold", "guesses", "id", "in_draft",
                 "launched_at", "next_token", "others", "parent", "path", "position", "said", "slot", "state", "token",
                 "waiting")

    def __init__(self, id: int, token: int, parent: Node | None, position: int, cum: float) -> None:
        self.id = id
        self.token = token
        self.parent = parent
        self.position = position
        self.cum = cum
        self.slot: int | None = None
        self.path = _NOWHERE
        self.state = _PROPOSED
        self.children = _NO_CHILDREN
        self.guesses = _NO_GUESSES  # (cum, token), worst first: the next one is at the end
        self.asked = self.answered = self.waiting = self.in_draft = False
        self.asked_at = self.launched_at = -1
        self.due = math.inf
        self.next_token: int | None = None
        self.others: Sequence[int] = ()
        self.said: tuple[Expansion, ...] = ()
        self.foretold: tuple[tuple[Expansion, int], ...] = ()

    def __repr__(self) -> str:
        return f"Node({self.id}, token={self.token}, position={self.position}, {self.state.name.lower()})"


# What most nodes have when they are made, and many when they die, is made once: nobody changes these.
_NOWHERE: list[int] = []
_NO_GUESSES: list[tuple[float, int]] = []
_NO_CHILDREN: dict[int, Node] = {}


@dataclass(slots=True)
class Advance:
    """What one application of the commit rule did.

    hit: the token was already in flight. A token that was guessed but not launched is a miss (it still
    has the whole pipeline before it), though its subtree survives. altered: the target would have said
    another token here (lossy requests only).
    """

    token: int
    hit: bool
    dead: list[Node]
    altered: bool = False


_Entry = tuple[float, int, Node]  # (cum, order, node): of equals the older one is the better, so its order is higher
_Offer = tuple[float, int, int, Node]  # (-cum, parent's id, token, parent): a tie is decided alike whenever it is met


class TokenTree:
    """The tree of one request.

    root_token, position: the last prompt token and where it stands.
    horizon: nodes at later positions are of no use (the answer ends before) and are never made.
    ids: where node ids come from (shared by all trees of an engine).
    """

    def __init__(self, root_token: int, position: int, *, horizon: int, ids: Iterator[int] | None = None) -> None:
        self._ids = ids if ids is not None else count()
        self._orders = count(0, -1)
        self.horizon = horizon
        self._frontier: list[_Entry] = []
        self._unlaunched: list[_Entry] = []
        self._unasked: list[_Entry] = []
        self.flying: dict[int, Node] = {}  # live nodes that are launched and have not landed
        self._stranded: dict[int, str] = {}
        self.num_live = 0
        self.num_advances = 0  # tokens committed since the prompt
        self.num_flights = 0  # that carried nodes of this tree; with each, all that flies has moved a stage on
        self.root = self._new(root_token, None, position, 0.0)

    # ---- growing -------------------------------------------------------------------------------------

    def propose(self, node: Node, expansion: Expansion, floor: float = -math.inf) -> None:
        """Take the draft's guesses of what follows `node`. Guesses for a dead or committed node are dropped, and those
        that log-probability `floor` is not reached by: given no root will their path be likelier.

        At the first answer a child that is there already came with a chain, before anybody had looked at `node` itself.
        It gets the mean of both probabilities (0 where it is not among those guessed now), and its subtree moves with
        it. A later answer knows more than the one before and replaces it: see `_revise`.
        """
        if node.state not in LIVE:
            return
        again, node.answered, node.waiting = node.answered, True, False
        if node.position >= self.horizon:
            return
        if again:
            self._revise(node, expansion)
        elif node.children:
            self._weigh(node, expansion)
        if max(expansion.parents, default=-1) < 0:
            self._offer(node, expansion.tokens, expansion.logprobs, floor)
        else:
            self._propose_chains(node, expansion, floor)

    def _propose_chains(self, node: Node, expansion: Expansion, floor: float) -> None:
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
                made[index] = under.children.get(token) or self._named(under, token, cum)
            else:
                self._offer(under, [token], [logprob], floor)

    def _offer(self, node: Node, tokens: list[int], logprobs: list[float], floor: float) -> None:
        cum = node.cum
        guesses = [(cum + (logprob if logprob < 0 else 0.0), token) for token, logprob in zip(tokens, logprobs)
                   if logprob >= floor]
        if node.guesses or node.children:
            known = {token for _, token in node.guesses} | set(node.children)
            guesses = node.guesses + [guess for guess in guesses if guess[1] not in known]
        guesses.sort()
        self._offer_next(node, guesses)

    def _weigh(self, node: Node, expansion: Expansion) -> None:
        """What came with a chain before anybody had looked at `node`, against what is said now."""
        said = _direct(expansion)
        if not said:
            return  # whoever knows nothing does not doubt either
        for token, child in node.children.items():
            first, second = math.exp(child.cum - node.cum), math.exp(said.get(token, -math.inf))
            if first > 0:  # what is too small for a float stays as it is
                self._move(child, math.log((first + second) / 2 / first))
        self._tidy()

    def _revise(self, node: Node, expansion: Expansion) -> None:
        """Make room for a newer answer: the guesses that are left go, and each child, launched or not, moves to its new
        probability with its subtree. One that is not named any more is now at most as likely as the last that is."""
        said = _direct(expansion)
        if not said:
            return
        node.guesses = []
        least = min(said.values())
        for token, child in node.children.items():
            before = child.cum - node.cum
            if shift := said.get(token, min(before, least)) - before:
                self._move(child, shift)
        self._tidy()

    def _move(self, top: Node, shift: float) -> None:
        """Change a node's path probability, and with it those of everything below. Rounding makes none of them likelier
        than its parent."""
        stack = [top]
        while stack:
            node = stack.pop()
            assert node.parent is not None
            node.cum = min(node.cum + shift, node.parent.cum)
            node.guesses = [(min(cum + shift, node.cum), token) for cum, token in node.guesses]
            if node.guesses:
                insort(self._frontier, (node.guesses[-1][0], next(self._orders), node))
            if node.state is _PROPOSED:
                self.return_unlaunched(node)
            if self._is_askable(node):
                self.return_unasked(node)
            stack.extend(node.children.values())

    def _offer_next(self, node: Node, guesses: list[tuple[float, int]]) -> None:
        changed = guesses[-1:] != node.guesses[-1:]
        node.guesses = guesses
        if guesses and changed:
            insort(self._frontier, (guesses[-1][0], next(self._orders), node))

    def take_guess(self) -> None:
        """Make a node of what is named at the end of the frontier, if it is a guess still."""
        cum, order, parent = self._frontier.pop()
        guesses = parent.guesses
        if guesses and guesses[-1][0] == cum and parent.state in LIVE:
            self._new(guesses.pop()[1], parent, parent.position + 1, cum)
            if guesses:
                insort(self._frontier, (guesses[-1][0], next(self._orders), parent))
                if guesses[-1][0] == cum:  # it keeps its place among its equals, and `launch_cutoff` counts it twice
                    insort(self._frontier, (cum, order, parent))

    def _named(self, parent: Node, token: int, cum: float) -> Node:
        """Make a node of any token, which may be among the guesses of its parent."""
        self._offer_next(parent, [guess for guess in parent.guesses if guess[1] != token])
        return self._new(token, parent, parent.position + 1, cum)

    def _new(self, token: int, parent: Node | None, position: int, cum: float) -> Node:
        """A new node, which is no guess of its parent any more."""
        node = Node(next(self._ids), token, parent, position, cum)
        if parent is not None:
            if parent.children:
                parent.children[token] = node
            else:
                parent.children = {token: node}
        self.num_live += 1
        entry = (cum, -node.id, node)  # so no node comes before its parent, however often both move
        insort(self._unlaunched, entry)
        if position < self.horizon:
            insort(self._unasked, entry)
        return node

    # ---- asking --------------------------------------------------------------------------------------

    def ask(self, node: Node) -> None:
        """The draft is asked what follows the node, for the first time or again."""
        node.asked = node.waiting = True
        node.asked_at = self.num_flights

    def deepened(self, limit: int) -> list[Node]:
        """Up to `limit` nodes in flight, likeliest path first, that have moved on since the draft was last asked about
        them: one that reads hidden states would see more of them now."""
        found = [node for node in self.flying.values()
                 if node.answered and not node.waiting and node.position < self.horizon
                 and self.num_flights > max(node.asked_at, node.launched_at)]
        return heapq.nsmallest(limit, found, key=lambda node: (-node.cum, node.position))

    def _is_askable(self, node: Node) -> bool:
        return node.state in LIVE and not node.asked and node.position < self.horizon

    def launch_cutoff(self, count: int) -> float:
        """Log path probability, given the root, of the `count`-th best that could still be launched; -inf where there
        are not as many. Of each node's guesses only the best is counted, but as often as it has become that."""
        if len(self._unlaunched) + len(self._frontier) < count:
            return -math.inf
        nodes, guesses = self._waiting_nodes(), self._waiting_guesses()
        node, guess = next(nodes, -math.inf), next(guesses, -math.inf)
        for _ in range(count - 1):
            if node >= guess:
                node = next(nodes, -math.inf)
            else:
                guess = next(guesses, -math.inf)
        return max(node, guess) - self.root.cum

    def _waiting_nodes(self) -> Iterator[float]:
        """The `cum` of those that have not been launched, best first."""
        return (cum for cum, _, node in reversed(self._unlaunched) if node.state is _PROPOSED and node.cum == cum)

    def _waiting_guesses(self) -> Iterator[float]:
        """The `cum` of each node's best guess, best first."""
        return (cum for cum, _, node in reversed(self._frontier)
                if node.guesses and node.guesses[-1][0] == cum and node.state in LIVE)

    def return_unasked(self, node: Node) -> None:
        """Give back a node of `unasked` that could not be asked for."""
        insort(self._unasked, (node.cum, -node.id, node))

    def return_unlaunched(self, node: Node) -> None:
        """Give back a node of `unlaunched` that does not enter now."""
        insort(self._unlaunched, (node.cum, -node.id, node))

    def best_children(self, nodes: Iterable[Node], limit: int, floor: float) -> list[Node]:
        """The up to `limit` best unlaunched children of `nodes` together, best first."""
        least = self.root.cum + floor
        return self._take_offers([offer for node in nodes for offer in self._offers(node, least)], limit)

    def overtakers(self, limit: int, floor: float) -> list[Node]:
        """Up to `limit` unlaunched nodes that are likelier than all their launched siblings, best first: what a newer
        answer of the draft has brought up. At most one per parent."""
        least = self.root.cum + floor
        offers: list[_Offer] = []
        for node in self.flying.values():
            launched = [child.cum for child in node.children.values() if child.state is not State.PROPOSED]
            if launched and (best := min(self._offers(node, least), default=None)) and -best[0] > max(launched):
                offers.append(best)
        return self._take_offers(offers, limit)

    @staticmethod
    def _offers(node: Node, least: float) -> list[_Offer]:
        """The node's unlaunched children and guesses with a cumulative log-probability of at least `least`."""
        waiting = [(child.cum, token) for token, child in node.children.items() if child.state is State.PROPOSED]
        return [(-cum, node.id, token, node) for cum, token in (*node.guesses, *waiting) if cum >= least]

    def _take_offers(self, offers: list[_Offer], limit: int) -> list[Node]:
        return [self._child(node, token) for _, _, token, node in heapq.nsmallest(limit, offers)]

    def newest_layer(self) -> list[Node]:
        """The launched live nodes at the highest position; empty when the root has not been launched."""
        if self.root.state is State.PROPOSED:
            return []
        newest = max((node.position for node in self.flying.values()), default=self.root.position)
        return [node for node in self.flying.values() if node.position == newest] or [self.root]

    def newest_flight(self) -> list[Node]:
        """The live nodes in flight that were launched last, of whatever depth; empty when nothing flies."""
        newest = max((node.launched_at for node in self.flying.values()), default=-1)
        return [node for node in self.flying.values() if node.launched_at == newest]

    def _child(self, node: Node, token: int) -> Node:
        if token in node.children:
            return node.children[token]
        cum = next(cum for cum, known in node.guesses if known == token)
        return self._named(node, token, cum)

    def unlaunched(self, floor: float) -> Candidates:
        """Nodes that have not been launched, highest path probability first, each one's ancestors launched or before
        it. floor: log of the least path probability given the root. The caller launches what it takes, before anything
        else happens to the tree."""
        return Candidates(self, self._unlaunched, floor)

    def unasked(self, floor: float) -> Candidates:
        """The same of nodes whose children the draft has not been asked for. The caller asks."""
        return Candidates(self, self._unasked, floor)

    def _tidy(self) -> None:
        """Drop what is dead or has moved from a line that mostly holds such: so a long run costs no more than a
        short."""
        most = 64 + 4 * self.num_live
        if len(self._frontier) > most:
            self._frontier[:] = _once(entry for entry in self._frontier if entry[2].state in LIVE
                                      and entry[2].guesses and entry[2].guesses[-1][0] == entry[0])
        if len(self._unlaunched) > most:
            self._unlaunched[:] = _once(entry for entry in self._unlaunched if entry[2].state is _PROPOSED
                                        and entry[2].cum == entry[0])
        if len(self._unasked) > most:
            self._unasked[:] = _once(entry for entry in self._unasked if self._is_askable(entry[2])
                                     and entry[2].cum == entry[0])

    # ---- the life of a node --------------------------------------------------------------------------

    def new_flight(self) -> None:
        """A flight sets off; the nodes that are launched next are in it."""
        self.num_flights += 1

    def launch(self, node: Node) -> None:
        assert node.state is _PROPOSED and (node.parent is None or node.parent.state is not _PROPOSED)
        node.state = _IN_FLIGHT
        node.launched_at = self.num_flights
        self.flying[node.id] = node

    def land(self, node: Node, next_token: int | None, others: Sequence[int] = ()) -> None:
        """The last stage said what truly follows (None: it cannot say), and (lossy requests only) what else it lets
        pass, best first. A dead node's landing changes nothing."""
        if node.state is _IN_FLIGHT:
            node.state = _LANDED
            node.next_token, node.others = next_token, others
            del self.flying[node.id]

    def strand(self, node: Node, why: str) -> None:
        """The last stage said why it cannot say what follows."""
        if node.state is _IN_FLIGHT:
            self.land(node, None)
            self._stranded[node.id] = why

    @property
    def stuck(self) -> str | None:
        """Why nobody can say what follows the root; None: somebody can, or it has not landed."""
        root = self.root
        return self._stranded[root.id] if root.state is _LANDED and root.next_token is None else None

    def advance(self) -> Advance | None:
        """The commit rule, once: None unless the root has landed. It is not asked where the tree is `stuck`.

        Its next token y is committed. If the root has a child carrying y, that child is the root and its
        siblings' subtrees die; else everything but the root dies and a new node y becomes the root.
        """
        root = self.root
        if root.state is not State.LANDED:
            return None
        token = _chosen(root)
        child = root.children.pop(token) if token in root.children else None
        dead = [node for other in root.children.values() for node in self._kill(other)]
        if child is None:
            for line in (self._frontier, self._unlaunched, self._unasked):
                line.clear()  # nobody is left
            cum = next((cum for cum, known in root.guesses if known == token), root.cum)
            child = self._new(token, None, root.position + 1, cum)
        child.parent = None
        root.state = State.COMMITTED
        root.children, root.guesses = _NO_CHILDREN, _NO_GUESSES
        self.num_live -= 1
        self.num_advances += 1
        self.root = child
        self._tidy()
        return Advance(token, child.state is not State.PROPOSED, dead, altered=token != root.next_token)

    def clear(self) -> list[Node]:
        """Kill the whole tree, the root included (the request is over)."""
        return self._kill(self.root)

    def _kill(self, top: Node) -> list[Node]:
        dead, stack = [], [top]
        while stack:
            node = stack.pop()
            if node.state is _IN_FLIGHT:
                del self.flying[node.id]
            node.state = _DEAD
            dead.append(node)
            stack.extend(node.children.values())
            node.children = _NO_CHILDREN  # or each would wait for the garbage collector, which has much to look through
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


class Candidates:
    """The nodes of one of a tree's lines, best first; guesses become nodes as they are reached.

    floor: log of the least path probability given the root.
    """

    __slots__ = ("_frontier", "_launches", "_least", "_line", "_tree")

    def __init__(self, tree: TokenTree, line: list[_Entry], floor: float) -> None:
        self._tree, self._line, self._frontier = tree, line, tree._frontier
        self._launches = line is tree._unlaunched
        self._least = tree.root.cum + floor

    def best(self) -> float | None:
        """Log path probability, given the root, of what `take` would return; None when nothing is left."""
        line, frontier, least, launches = self._line, self._frontier, self._least, self._launches
        best = -math.inf
        while line:
            cum, _, node = line[-1]
            waits = node.state is _PROPOSED if launches else node.state in LIVE and not node.asked
            if waits and node.cum == cum:
                best = cum
                break
            line.pop()
        while frontier and frontier[-1][0] > best and frontier[-1][0] > least:
            self._tree.take_guess()
            best = line[-1][0] if line else -math.inf  # nobody is asked behind the horizon: then it is not there
        return best - self._tree.root.cum if line and best >= least else None

    def has_slot(self) -> bool:
        """Whether what `take` would return has its cache slot already; `best` has just been asked and was not None."""
        return self._line[-1][2].slot is not None

    def take(self) -> Node:
        """The best one; `best` has just been asked and was not None."""
        line = self._line
        node = line.pop()[2]
        while line and line[-1][2] is node:  # it has been moved to and fro
            line.pop()
        return node


def _once(entries: Iterable[_Entry]) -> list[_Entry]:
    """The same, each node once, in the same order."""
    return list({entry[2].id: entry for entry in entries}.values())


def _direct(expansion: Expansion) -> dict[int, float]:
    """The log-probabilities, at most 0, of what is guessed to follow the node itself."""
    return {token: min(logprob, 0.0) for token, logprob, parent in
            zip(expansion.tokens, expansion.logprobs, expansion.parents) if parent < 0}


def _chosen(root: Node) -> int:
    """The y of the commit rule: what the target says, but for a lossy request the first that it lets pass and that is
    in flight, where what it says is not."""
    assert root.next_token is not None
    for token in (root.next_token, *root.others):
        if (child := root.children.get(token)) is not None and child.state is not State.PROPOSED:
            return token
    return root.next_token
