"""The token tree against a slow, obvious reading of the design."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import Expansion
from fullpipe.sequences.tree import Candidates, Node, State, TokenTree


def first(limit: int, candidates: Callable[[float], Candidates], floor: float) -> list[Node]:
    """Up to `limit` of a tree's candidates, best first."""
    found, taken = candidates(floor), []
    while len(taken) < limit and found.best() is not None:
        taken.append(found.take())
    return taken


def tree(horizon: int = 50) -> TokenTree:
    return TokenTree(root_token=7, position=3, horizon=horizon)


def guesses(node: Node, *pairs: tuple[int, float]) -> Expansion:
    return Expansion(node.id, [token for token, _ in pairs], [math.log(p) for _, p in pairs], [-1] * len(pairs))


def land_root(tree: TokenTree, token: int) -> None:
    if tree.root.state is State.PROPOSED:
        tree.launch(tree.root)
    tree.land(tree.root, token)


def test_a_hit_keeps_the_childs_subtree_and_kills_its_siblings() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.6), (2, 0.3)))
    one, two = first(2, t.unlaunched, -math.inf)
    t.launch(one)
    t.launch(two)
    t.propose(one, guesses(one, (5, 0.9)))
    (five,) = first(1, t.unlaunched, -math.inf)
    t.launch(five)
    t.land(t.root, 1)
    step = t.advance()
    assert step is not None and (step.token, step.hit, step.dead) == (1, True, [two])
    assert t.root is one and list(t.nodes()) == [one, five]
    assert t.advance() is None, "the new root has not landed"
    t.check()


def test_a_miss_kills_everything_and_makes_a_new_root() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.6)))
    (one,) = first(1, t.unlaunched, -math.inf)
    t.launch(one)
    t.land(t.root, 9)
    step = t.advance()
    assert step is not None and (step.token, step.hit, step.dead) == (9, False, [one])
    assert t.root.token == 9 and t.root.position == 4 and t.root.state is State.PROPOSED
    assert one.state is State.DEAD
    t.check()


def test_a_guess_that_was_never_launched_is_a_miss_but_its_subtree_survives() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, Expansion(t.root.id, [1, 4], [math.log(0.2), math.log(0.9)], [-1, 0]))
    t.land(t.root, 1)
    step = t.advance()
    assert step is not None and not step.hit and step.dead == []
    assert [node.token for node in first(5, t.unlaunched, -math.inf)] == [1, 4]


def test_late_siblings_come_after_their_rivals_and_before_worse_depths() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.7), (2, 0.2), (3, 0.05)))
    taken = first(1, t.unlaunched, -math.inf)
    assert [node.token for node in taken] == [1]
    t.launch(taken[0])
    t.propose(taken[0], guesses(taken[0], (4, 0.9), (5, 0.1)))
    assert [node.token for node in first(4, t.unlaunched, -math.inf)] == [4, 2, 5, 3]


def test_the_floor_is_relative_to_the_root() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.01)))
    assert first(4, t.unlaunched, math.log(0.02)) == []
    (one,) = first(4, t.unlaunched, math.log(0.005))
    t.launch(one)
    t.propose(one, guesses(one, (2, 0.5)))
    assert first(4, t.unlaunched, math.log(0.02)) == [], "0.005 of the root"
    t.land(t.root, 1)
    t.advance()
    assert [node.token for node in first(4, t.unlaunched, math.log(0.02))] == [2], "0.5 of the new root"


def test_nothing_grows_beyond_the_horizon_and_nobody_is_asked_there() -> None:
    t = tree(horizon=4)
    t.propose(t.root, guesses(t.root, (1, 0.9)))
    assert first(5, t.unasked, -math.inf) == [t.root]
    t.launch(t.root)
    (one,) = first(5, t.unlaunched, -math.inf)
    t.propose(one, guesses(one, (2, 0.9)))
    t.launch(one)
    assert first(5, t.unlaunched, -math.inf) == []


def test_what_came_with_a_chain_is_weighed_against_what_its_parent_guesses_later() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, Expansion(t.root.id, [1, 4, 5], [math.log(0.8), math.log(0.9), math.log(0.9)], [-1, 0, 1]))
    one, four = first(2, t.unlaunched, -math.inf)
    assert [one.token, four.token] == [1, 4]
    t.launch(one)
    t.propose(one, guesses(one, (6, 0.5), (4, 0.3)))
    assert four.cum == pytest.approx(math.log(0.8 * (0.9 + 0.3) / 2))
    assert four.guesses[0][0] == pytest.approx(four.cum + math.log(0.9)), "its subtree moves with it"
    t.propose(four, guesses(four, (7, 0.2)))
    t.check()
    t.launch(four)
    assert [(node.token, round(math.exp(node.cum), 3)) for node in first(3, t.unlaunched, -math.inf)] == [
        (5, 0.432), (6, 0.4), (7, 0.096)], "5 was a guess, not yet a node: it keeps its own"


def test_a_chained_child_that_nobody_else_names_loses_half() -> None:
    t = tree()
    t.propose(t.root, Expansion(t.root.id, [1, 4, 5], [math.log(0.8), math.log(0.9), math.log(0.9)], [-1, 0, 1]))
    one = t.root.children[1]
    t.propose(one, guesses(one, (6, 0.5)))
    assert one.children[4].cum == pytest.approx(math.log(0.8 * 0.45))
    t.propose(one.children[4], Expansion(one.children[4].id, [], [], []))
    assert one.children[4].cum == pytest.approx(math.log(0.8 * 0.45)), "who knows nothing does not doubt"
    t.check()


def test_the_launch_cutoff_is_that_of_the_best_that_wait() -> None:
    t = tree()
    assert t.launch_cutoff(2) == -math.inf, "only the root waits"
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.5), (2, 0.3)))
    (one,) = first(1, t.unlaunched, -math.inf)
    t.launch(one)
    t.propose(one, guesses(one, (3, 0.5)))
    assert t.launch_cutoff(1) == pytest.approx(math.log(0.3))
    assert t.launch_cutoff(2) == pytest.approx(math.log(0.25))
    assert t.launch_cutoff(3) == -math.inf


def test_a_newer_answer_replaces_the_older_one() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.5), (2, 0.2), (3, 0.1)))
    one, _ = first(2, t.unlaunched, -math.inf)
    t.launch(one)
    t.propose(one, guesses(one, (5, 0.8), (6, 0.1)))
    (five,) = first(1, t.unlaunched, -math.inf)
    t.launch(five)
    t.propose(t.root, guesses(t.root, (4, 0.6), (1, 0.3), (2, 0.05)))
    worth = {node.token: round(math.exp(node.cum), 4) for node in t.nodes() if node is not t.root}
    assert worth == {1: 0.3, 5: 0.24, 2: 0.05}, "launched or not, with all that is below"
    assert [(round(math.exp(cum), 4), token) for cum, token in t.root.guesses] == [(0.6, 4)], "3 is gone"
    assert [(round(math.exp(cum), 4), token) for cum, token in one.guesses] == [(0.03, 6)]
    assert [node.token for node in first(9, t.unlaunched, -math.inf)] == [4, 2, 6]
    t.check()


def test_a_child_that_a_newer_answer_does_not_name_is_no_likelier_than_its_last() -> None:
    t = tree()
    t.propose(t.root, guesses(t.root, (1, 0.5), (2, 0.01)))
    first(3, t.unlaunched, -math.inf)
    t.propose(t.root, guesses(t.root, (3, 0.4), (4, 0.1)))
    assert {token: round(math.exp(child.cum), 4) for token, child in t.root.children.items()} == {1: 0.1, 2: 0.01}
    t.propose(t.root, Expansion(t.root.id, [], [], []))
    assert math.exp(t.root.children[1].cum) == pytest.approx(0.1), "who knows nothing does not doubt"
    assert [token for _, token in t.root.guesses] == [4, 3]
    t.check()


def flight(t: TokenTree, *nodes: Node) -> None:
    t.new_flight()
    for node in nodes:
        t.launch(node)


def test_nodes_in_flight_are_worth_asking_about_again_once_they_have_moved() -> None:
    t = tree()
    flight(t, t.root)
    t.ask(t.root)
    assert t.deepened(9) == [], "an answer is awaited"
    t.propose(t.root, guesses(t.root, (1, 0.5), (2, 0.2)))
    assert t.deepened(9) == [], "it has not moved"
    one, two = first(2, t.unlaunched, -math.inf)
    t.ask(one)
    t.propose(one, guesses(one, (5, 0.9)))
    flight(t, one)
    assert t.deepened(9) == [t.root], "1 was asked about before it entered, and stands where it did"
    flight(t, two)
    assert t.deepened(9) == [t.root, one], "nobody has asked about 2 at all"
    assert t.deepened(1) == [t.root]
    t.ask(t.root)
    assert t.deepened(9) == [one]
    t.land(t.root, 1)
    t.advance()
    assert t.deepened(9) == [one], "committed nodes are over, the root in flight is not"


def test_an_overtaker_is_likelier_than_every_launched_sibling() -> None:
    t = tree()
    flight(t, t.root)
    t.propose(t.root, guesses(t.root, (1, 0.5), (2, 0.3), (3, 0.1)))
    assert t.overtakers(9, -math.inf) == [], "nothing has been launched there to be overtaken"
    one, _ = t.best_children([t.root], 2, -math.inf)
    flight(t, one)
    assert t.overtakers(9, -math.inf) == []
    t.propose(t.root, guesses(t.root, (3, 0.5), (2, 0.3), (1, 0.1)))
    late = t.overtakers(9, -math.inf)
    assert [node.token for node in late] == [3], "one per parent"
    assert t.overtakers(9, math.log(0.6)) == [] and t.overtakers(0, -math.inf) == []
    flight(t, *late)
    assert t.overtakers(9, -math.inf) == [], "2 is no likelier than 3, which is launched now"
    assert t.newest_flight() == late
    t.land(t.root, 1)
    t.advance()
    assert t.newest_flight() == [one], "of what lives"


def test_of_what_passes_the_targets_own_token_comes_first_and_only_what_flies_counts() -> None:
    def step(next_token: int, others: list[int]) -> tuple[int, bool, bool]:
        t = tree()
        t.launch(t.root)
        t.propose(t.root, guesses(t.root, (1, 0.5), (2, 0.3), (3, 0.1)))
        for node in first(3, t.unlaunched, -math.inf)[:2]:
            t.launch(node)
        t.land(t.root, next_token, others)
        done = t.advance()
        assert done is not None
        t.check()
        return done.token, done.hit, done.altered

    assert step(2, [1]) == (2, True, False)
    assert step(9, [3, 8, 2, 1]) == (2, True, True), "3 is proposed and 8 unknown"
    assert step(3, [2]) == (2, True, True), "3 itself has not been launched"
    assert step(3, [8]) == (3, False, False)
    assert step(9, []) == (9, False, False)


def test_moving_to_and_fro_leaves_lines_small_and_orders_right() -> None:
    t = tree()
    t.propose(t.root, guesses(t.root, (1, 1.0), (2, 0.5)))
    (_, one, *_) = first(3, t.unlaunched, -math.inf)
    t.propose(one, guesses(one, (3, 1.0)))
    first(9, t.unlaunched, -math.inf)
    for number in range(400):
        t.propose(t.root, guesses(t.root, *([(1, 1.0), (2, 0.5)] if number % 2 else [(2, 0.9), (1, 0.1)])))
        t.check()
    assert [node.token for node in first(9, t.unlaunched, -math.inf)] == [1, 3, 2]
    assert max(len(t._unlaunched), len(t._unasked), len(t._frontier)) <= 65 + 4 * t.num_live


def test_dead_and_committed_nodes_take_no_guesses_and_no_landings() -> None:
    t = tree()
    old = t.root
    t.launch(old)
    t.propose(old, guesses(old, (1, 0.9)))
    (one,) = first(1, t.unlaunched, -math.inf)
    t.launch(one)
    land_root(t, 5)
    t.advance()
    for gone in (old, one):
        t.propose(gone, guesses(gone, (8, 0.9)))
        t.land(gone, 8)
    assert [node.token for node in t.nodes()] == [5]
    assert old.state is State.COMMITTED and one.state is State.DEAD


def test_check_complains_when_state_is_corrupted() -> None:
    t = tree()
    t.num_live += 1
    with pytest.raises(AssertionError, match="miscounted"):
        t.check()
    t = tree()
    t.propose(t.root, guesses(t.root, (1, 0.9)))
    (one,) = first(2, t.unlaunched, -math.inf)[1:]
    one.state = State.IN_FLIGHT
    with pytest.raises(AssertionError):
        t.check()


def offered(t: TokenTree) -> list[float]:
    """Every unlaunched node and guess, by cumulative log-probability, the slow way."""
    values = []
    for node in t.nodes():
        values += [cum for cum, _ in node.guesses]
        values += [node.cum] if node.state is State.PROPOSED else []
    return sorted(values, reverse=True)


KINDS = ("propose", "chain", "launch", "layer", "late", "ask", "again", "land", "miss")
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**16)), max_size=60)


@given(ACTIONS)
def test_any_allowed_order_keeps_every_invariant(actions: list[tuple[str, int]]) -> None:
    t = tree(horizon=20)
    emitted = [t.root.token]
    for action, number in actions:
        live = list(t.nodes())
        node = live[number % len(live)]
        if action == "propose":
            weights = [1 + (number >> shift) % 7 for shift in range(4)]
            t.propose(node, guesses(node, *((k, w / (1 + sum(weights))) for k, w in enumerate(weights))))
        elif action == "chain":
            t.propose(node, Expansion(node.id, [number % 5, 1, 2], [-0.1, -0.5, 0.0], [-1, 0, 1]))
        elif action == "launch":
            best = offered(t)
            taken = first(1 + number % 4, t.unlaunched, -9.0)
            expected = [cum for cum in best[: 1 + number % 4] if cum >= t.root.cum - 9.0]
            assert [n.cum for n in taken] == expected, "not the best ones"
            flight(t, *taken)
        elif action == "late":
            late = t.overtakers(2, -9.0)
            for n in late:
                family = n.parent.children.values() if n.parent else ()
                assert all(n.cum > other.cum for other in family if other.state is not State.PROPOSED)
            flight(t, *late)
        elif action == "again":
            for n in t.deepened(3):
                assert n.state is State.IN_FLIGHT and n.answered and not n.waiting
                t.ask(n)
        elif action == "layer" and t.root.state is not State.PROPOSED:
            children = t.best_children(t.newest_layer(), 3, -9.0)
            assert [n.cum for n in children] == sorted((n.cum for n in children), reverse=True)
            for n in children:
                t.launch(n)
        elif action == "ask":
            for n in first(2, t.unasked, -9.0):
                assert not n.asked
                t.ask(n)
        elif action in ("land", "miss") and t.root.state is State.IN_FLIGHT:
            launched = sorted(child.token for child in t.root.children.values() if child.state is not State.PROPOSED)
            truth = launched[number % len(launched)] if launched and action == "land" else number % 5
            t.land(t.root, truth)
            step = t.advance()
            assert step is not None and step.hit == (truth in launched)
            emitted.append(step.token)
        t.check()
        assert t.root.token == emitted[-1] and t.root.position == 3 + len(emitted) - 1
