"""The token tree against a slow, obvious reading of the design."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.messages import Expansion
from fullpipe.tree.token_tree import Node, State, TokenTree


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
    one, two = t.take_unlaunched(2, -math.inf)
    t.launch(one)
    t.launch(two)
    t.propose(one, guesses(one, (5, 0.9)))
    (five,) = t.take_unlaunched(1, -math.inf)
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
    (one,) = t.take_unlaunched(1, -math.inf)
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
    assert [node.token for node in t.take_unlaunched(5, -math.inf)] == [1, 4]


def test_late_siblings_come_after_their_rivals_and_before_worse_depths() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.7), (2, 0.2), (3, 0.05)))
    taken = t.take_unlaunched(1, -math.inf)
    assert [node.token for node in taken] == [1]
    t.launch(taken[0])
    t.propose(taken[0], guesses(taken[0], (4, 0.9), (5, 0.1)))
    assert [node.token for node in t.take_unlaunched(4, -math.inf)] == [4, 2, 5, 3]


def test_the_floor_is_relative_to_the_root() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.01)))
    assert t.take_unlaunched(4, math.log(0.02)) == []
    (one,) = t.take_unlaunched(4, math.log(0.005))
    t.launch(one)
    t.propose(one, guesses(one, (2, 0.5)))
    assert t.take_unlaunched(4, math.log(0.02)) == [], "0.005 of the root"
    t.land(t.root, 1)
    t.advance()
    assert [node.token for node in t.take_unlaunched(4, math.log(0.02))] == [2], "0.5 of the new root"


def test_nothing_grows_beyond_the_horizon_and_nobody_is_asked_there() -> None:
    t = tree(horizon=4)
    t.propose(t.root, guesses(t.root, (1, 0.9)))
    assert t.take_unasked(5, -math.inf) == [t.root]
    t.launch(t.root)
    (one,) = t.take_unlaunched(5, -math.inf)
    t.propose(one, guesses(one, (2, 0.9)))
    t.launch(one)
    assert t.take_unlaunched(5, -math.inf) == []


def test_what_came_with_a_chain_is_weighed_against_what_its_parent_guesses_later() -> None:
    t = tree()
    t.launch(t.root)
    t.propose(t.root, Expansion(t.root.id, [1, 4, 5], [math.log(0.8), math.log(0.9), math.log(0.9)], [-1, 0, 1]))
    one, four = t.take_unlaunched(2, -math.inf)
    assert [one.token, four.token] == [1, 4]
    t.launch(one)
    t.propose(one, guesses(one, (6, 0.5), (4, 0.3)))
    assert four.cum == pytest.approx(math.log(0.8 * (0.9 + 0.3) / 2))
    assert four.guesses[0][0] == pytest.approx(four.cum + math.log(0.9)), "its subtree moves with it"
    t.propose(four, guesses(four, (7, 0.2)))
    t.check()
    t.launch(four)
    assert [(node.token, round(math.exp(node.cum), 3)) for node in t.take_unlaunched(3, -math.inf)] == [
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


def test_the_horizon_of_launches_is_that_of_the_best_that_wait() -> None:
    t = tree()
    assert t.horizon_of_launches(2) == -math.inf, "only the root waits"
    t.launch(t.root)
    t.propose(t.root, guesses(t.root, (1, 0.5), (2, 0.3)))
    (one,) = t.take_unlaunched(1, -math.inf)
    t.launch(one)
    t.propose(one, guesses(one, (3, 0.5)))
    assert t.horizon_of_launches(1) == pytest.approx(math.log(0.3))
    assert t.horizon_of_launches(2) == pytest.approx(math.log(0.25))
    assert t.horizon_of_launches(3) == -math.inf


def test_dead_and_committed_nodes_take_no_guesses_and_no_landings() -> None:
    t = tree()
    old = t.root
    t.launch(old)
    t.propose(old, guesses(old, (1, 0.9)))
    (one,) = t.take_unlaunched(1, -math.inf)
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
    (one,) = t.take_unlaunched(2, -math.inf)[1:]
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


ACTIONS = st.lists(st.tuples(st.sampled_from(["propose", "chain", "launch", "layer", "ask", "land", "miss"]),
                             st.integers(0, 2**16)), max_size=60)


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
            taken = t.take_unlaunched(1 + number % 4, -9.0)
            expected = [cum for cum in best[: 1 + number % 4] if cum >= t.root.cum - 9.0]
            assert [n.cum for n in taken] == expected, "not the best ones"
            for n in taken:
                t.launch(n)
        elif action == "layer" and t.root.state is not State.PROPOSED:
            children = t.best_children(t.newest_layer(), 3, -9.0)
            assert [n.cum for n in children] == sorted((n.cum for n in children), reverse=True)
            for n in children:
                t.launch(n)
        elif action == "ask":
            for n in t.take_unasked(2, -9.0):
                assert not n.asked
                n.asked = True
        elif action in ("land", "miss") and t.root.state is State.IN_FLIGHT:
            launched = sorted(child.token for child in t.root.children.values() if child.state is not State.PROPOSED)
            truth = launched[number % len(launched)] if launched and action == "land" else number % 5
            t.land(t.root, truth)
            step = t.advance()
            assert step is not None and step.hit == (truth in launched)
            emitted.append(step.token)
        t.check()
        assert t.root.token == emitted[-1] and t.root.position == 3 + len(emitted) - 1
