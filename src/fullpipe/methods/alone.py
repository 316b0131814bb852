from __future__ import annotations
import math
from fullpipe.costs import Machine
from fullpipe.methods.base import Load
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node, State

K = dict(V=1.0, E=1.0, H=1.0, F=0.5, Q=0.85, MAX=0, EMAX=64, P=1.0, D=1.0, M=0.01, TV=0.1, L=0.5, LP=0.1, O=1.0, A=1)
K0 = dict(K)

class Alone:
    def __init__(self, machine: Machine, floor: float) -> None:
        self.m, self.floor = machine, floor
        self.k = dict(K)
        n, c = machine.num_stages, machine.stage
        self.T = n * c(1) + machine.link_s
        self.q = self.k['Q']
        self.y = self.q
        self.rows = 1
        self.busy = [0.0] * n
        self.levels = 1.0
        self.sizes = [2,3,4,6,8,12,16,24,32,48,64,96]

    def G(self, k):
        c, d = self.m.stage, self.m.draft
        lv = 1 + self.levels_ahead(None, None, None)[0]
        D = d(1) + self.m.draft_link_s / lv
        return k * D + c(k) if self.m.shared else max(k * D, c(k))

    def most(self):
        c, n = self.m.stage, self.m.num_stages
        cost = lambda r: c(r) * (1 / r + (1 - self.q) * n / 2)
        return min((cost(r), r) for r in self.sizes)[1] if self.k['MAX'] == 0 else self.k['MAX']

    @property
    def V(self):
        g = self.G(self.levels) / self.levels
        g = min(g, self.T)
        return self.k['V'] * g + self.k['TV'] * max(self.T - g, 0)

    def launch(self, one: Sequence, load: Load) -> list[Node]:
        k, m, tree = self.k, self.m, one.tree
        c, n = m.stage, m.num_stages
        pr = load.prompt_rows
        rc = tree.root.cum
        root = tree.root.state is State.PROPOSED
        if m.shared and load.asked_at is not None:
            return self.sent([], load)
        cands = tree.unlaunched(self.floor)
        nodes: list[Node] = []
        first = deep = heads = 0.0
        leaf = {}
        spine = None; levels = 0
        room = one.room
        V = self.V
        used = 0
        skipped: list[Node] = []
        dprice = k['D'] * (m.draft.marginal(1) if m.shared or m.draft(1) > c(1) else 0.0)
        most = self.most()
        while len(nodes) < most:
            best = cands.best()
            if best is None: break
            if used >= room and not cands.has_slot() and not (root and not nodes): break
            p = math.exp(best)
            node = cands._heap[0][3]
            if node.parent is not None and node.parent in skipped:
                skipped.append(cands.take()); continue
            left = node.parent.sent - load.now if node.parent and node.parent.state is not State.PROPOSED and node.parent not in nodes else self.T
            if not nodes:
                first = p
                if not root:
                    over = self.overlap(tree, load, c(1 + pr))
                    miss = self.missing(tree) - (p if node.parent is tree.root else 0.0)
                    cost = k['F'] * c.marginal(1) + k['O'] * over * max(miss, 0.0)
                    if p * V < cost: break
                    if p * min(V, left) < cost:
                        skipped.append(cands.take()); continue
            else:
                r = len(nodes) + pr
                if k['A']:
                    al = min(heads, 1.0); th = min(sum(leaf.values()) * self.q, al)
                    price = (th + (al - th) * n) * c.marginal(r) + al * dprice
                else:
                    price = (deep + max(first - deep, 0.0) * n) * c.marginal(r) + first * dprice
                if p * V < price: break
                if p * min(V, left) < price:
                    skipped.append(cands.take())
                    continue
            used += node.slot is None
            nodes.append(cands.take())
            if node.parent in leaf or any(node.parent is x for x in nodes): leaf.pop(node.parent, None)
            else: heads += p
            leaf[node] = p
            if spine is None or node.parent is spine:
                spine = node; levels += 1; deep = p * self.q
        for x in reversed(skipped): tree.return_unlaunched(x)
        if nodes and k['H'] and self.hold(tree, nodes, first, load, spine, levels):
            for x in reversed(nodes): tree.return_unlaunched(x)
            return self.sent([], load)
        self.rows = len(nodes)
        if nodes: self.levels += 0.1 * (min(levels, 16) - self.levels)
        return self.sent(nodes, load)

    def hold(self, tree, nodes, p1, load, spine, levels):
        c, d, n, m, k = self.m.stage, self.m.draft, self.m.num_stages, self.m, self.k
        if m.shared:
            if spine.asked or spine.position >= tree.horizon: return False
            rest = d(1) + m.draft_link_s
            if not self.pays_asking(math.exp(spine.cum - tree.root.cum), tree, load): return False
            ask = spine
        else:
            if not spine.waiting or load.asked_at is None: return False
            rest = max(load.asked_at + d(load.asked_rows) + m.draft_link_s - load.now, 0.0)
        p2 = math.exp(spine.cum - tree.root.cum)
        p3 = p2 * self.q
        dc = c.marginal(len(nodes) + load.prompt_rows)
        gain = p3 * levels * (self.G(levels) / levels - self.G(levels + 1) / (levels + 1))
        lost = max(p1 - p3, p1 * (1 - (1 - k['M']) ** levels))
        return gain > k['H'] * lost * (rest + n * dc)

    def overlap(self, tree, load, takes):
        root = tree.root
        if root.state is not State.IN_FLIGHT: return 0.0 if root.state is State.PROPOSED else takes
        begin = max(load.now, self.busy[0])
        return min(max(begin + takes - root.sent, 0.0), takes)

    def missing(self, tree):
        rc = tree.root.cum
        return max(1.0 - sum(math.exp(x.cum - rc) for x in tree.root.children.values() if x.state is not State.PROPOSED), 0.0)

    def pays_asking(self, p, tree, load):
        k = self.k
        cost = k['F'] * self.m.stage.marginal(1)
        if self.m.shared:
            cost += k['O'] * self.overlap(tree, load, self.m.draft(1)) * self.missing(tree)
        return p * self.y * self.V >= cost

    def observe(self, drafted):
        for e in drafted.expansions[:1]:
            p1 = 0.0; chain = 0.0
            if e.tokens:
                best = max((lp, i) for i, (lp, par) in enumerate(zip(e.logprobs, e.parents)) if par < 0) if -1 in e.parents else None
                cum = 0.0; at = -1
                while best:
                    cum += min(best[0], 0.0); chain += math.exp(cum)
                    if at == -1: p1 = math.exp(cum)
                    at = best[1]
                    nxt = [(lp, i) for i, (lp, par) in enumerate(zip(e.logprobs, e.parents)) if par == at]
                    best = max(nxt) if nxt else None
            self.q += 0.05 * (p1 - self.q)
            self.y += 0.05 * (chain - self.y)

    def levels_ahead(self, one, node, load):
        L, d = self.m.draft_link_s, self.m.draft(1)
        if L <= 0 or not self.k['L']: return 0, 0.0
        D = int(math.sqrt(2 * L * self.k['L'] / ((1 - self.q) * d)))
        return max(min(D, 24) - 1, 0), math.log(self.k['LP'])

    def sent(self, nodes, load):
        rows = len(nodes) + load.prompt_rows
        if rows:
            c = self.m.stage; s = c(rows); n = self.m.num_stages
            t = load.now
            hop = self.m.link_s / n
            for k in range(n):
                t = max(t, self.busy[k]) + s
                self.busy[k] = t
                t += hop
            for x in nodes: x.sent = t
        return nodes

    def expand(self, one: Sequence, load: Load) -> list[Node]:
        k, m, tree = self.k, self.m, one.tree
        d, c = m.draft, m.stage
        cands = tree.unasked(self.floor)
        nodes: list[Node] = []
        skipped: list[Node] = []
        top = total = 0.0
        V = self.V
        while len(nodes) < k['EMAX']:
            best = cands.best()
            if best is None: break
            p = math.exp(best)
            r = len(nodes)
            node = cands._heap[0][3]
            left = node.sent - load.now - d(r + 1) if node.state is not State.PROPOSED else self.T
            if not nodes:
                top = p
                if not self.pays_asking(p, tree, load): break
            else:
                price = (total if k['A'] else top) * (k['E'] * d.marginal(r) + k['P'] * c.marginal(max(self.rows, 1)))
                if p * self.q * V < price: break
                if p * self.q * min(V, left) < price:
                    skipped.append(cands.take()); continue
            nodes.append(cands.take()); total += p
        for x in reversed(skipped): tree.return_unasked(x)
        return nodes
