"""Choices: what each method launches on a tree that everybody can draw."""

import math

import pytest

from driving import Alone, expanded, launched
from fullpipe.costs import CostCurve, Machine
from fullpipe.errors import UsageError
from fullpipe.messages import Expansion
from fullpipe.methods import METHODS, WITH_DEPTH, WITH_REFRESH, FullPipe, Load, make_method
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.tree import Node, TokenTree


def answer(tree: TokenTree, node: Node, *pairs: tuple[int, float]) -> None:
    tree.ask(node)
    tree.propose(node, Expansion(node.id, [t for t, _ in pairs], [math.log(p) for _, p in pairs], [-1] * len(pairs)))


def launch(tree: TokenTree, nodes: list[Node]) -> list[int]:
    tree.new_flight()
    for node in nodes:
        tree.launch(node)
    return [node.token for node in nodes]


def second_round() -> TokenTree:
    """A tree after its first token, root token 9 not launched (the prompt's own flight is over)."""
    tree = TokenTree(7, 0, horizon=99)
    tree.launch(tree.root)
    tree.land(tree.root, 9)
    tree.advance()
    return tree


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_root_goes_first_and_only_once(method: str) -> None:
    tree = TokenTree(7, 0, horizon=99)
    method = make_method(method)
    assert launch(tree, launched(method, tree)) == [7]
    assert launched(method, tree) == []


def test_pipedec_sends_whole_layers_and_never_looks_back() -> None:
    tree, method = second_round(), make_method("pipedec", width=2)
    assert launch(tree, launched(method, tree)) == [9]
    assert expanded(method, tree) == [tree.root]
    answer(tree, tree.root, (1, 0.5), (2, 0.3), (3, 0.2))
    assert launch(tree, launched(method, tree)) == [1, 2]
    one, two = expanded(method, tree)
    answer(tree, one, (4, 0.1))
    assert launched(method, tree) == [], "the layer is not complete yet"
    answer(tree, two, (5, 0.9), (6, 0.1))
    assert launch(tree, launched(method, tree)) == [5, 4], "token 3 has missed its layer"


def test_fullpipe_takes_the_best_of_any_depth() -> None:
    tree, method = second_round(), make_method("fullpipe", width=2)
    launch(tree, launched(method, tree))
    assert expanded(method, tree) == [tree.root]
    answer(tree, tree.root, (1, 0.5), (2, 0.3), (3, 0.2))
    assert launch(tree, launched(method, tree)) == [1, 2]
    asked = expanded(method, tree)
    assert [node.token for node in asked] == [1, 2, 3], "the draft runs ahead to token 3"
    for node, token in zip(asked, (4, 5, 6)):
        answer(tree, node, (token, 0.9))
    assert launch(tree, launched(method, tree)) == [4, 5]
    assert launch(tree, launched(method, tree)) == [3, 6], "the late sibling takes its child along"


def test_fullpipe_respects_the_floor_and_the_room() -> None:
    tree, method = second_round(), make_method("fullpipe", width=4, floor=0.01)
    launch(tree, launched(method, tree))
    answer(tree, tree.root, (1, 0.5), (2, 0.3), (3, 0.009))
    assert launched(method, tree, 0) == []
    assert launch(tree, launched(method, tree)) == [1, 2]


def test_a_chain_waits_for_its_tokens_and_enters_at_once() -> None:
    tree, method = second_round(), make_method("chain", depth=2)
    assert launched(method, tree) == []
    assert expanded(method, tree) == [tree.root]
    answer(tree, tree.root, (1, 0.5), (2, 0.4))
    (one,) = expanded(method, tree)
    answer(tree, one, (3, 0.5), (4, 0.4))
    assert expanded(method, tree) == []
    assert launch(tree, launched(method, tree)) == [9, 1, 3]
    assert launched(method, tree) == [], "the pipeline is not empty"


def test_a_chain_that_the_draft_cannot_continue_is_launched_short() -> None:
    tree, method = second_round(), make_method("chain", depth=5)
    answer(tree, tree.root, (1, 0.5))
    answer(tree, tree.root.children.get(1) or expanded(method, tree)[0])
    assert launch(tree, launched(method, tree)) == [9, 1]


def test_a_static_tree_enters_whole() -> None:
    tree, method = second_round(), make_method("static-tree", width=2, depth=2)
    answer(tree, tree.root, (1, 0.5), (2, 0.4), (3, 0.1))
    layer = expanded(method, tree)
    assert [node.token for node in layer] == [1, 2]
    answer(tree, layer[0], (4, 0.5), (5, 0.4))
    answer(tree, layer[1], (6, 0.9))
    assert launch(tree, launched(method, tree)) == [9, 1, 2, 6, 4]


@pytest.mark.parametrize("method", ["spd", "ppsd"])
def test_a_chain_grows_by_one_token_per_flight(method: str) -> None:
    tree, method = second_round(), make_method(method)
    launch(tree, launched(method, tree))
    (root,) = expanded(method, tree)
    assert launched(method, tree) == [], "the draft has not answered"
    answer(tree, root, (1, 1e-3), (2, 1e-4))
    assert launch(tree, launched(method, tree)) == [1]
    (one,) = expanded(method, tree)
    answer(tree, one, (3, 1e-3))
    assert launch(tree, launched(method, tree)) == [3], "however unlikely: its place would stay empty"


@pytest.mark.parametrize("method", ["spd", "ppsd"])
def test_with_a_width_the_best_siblings_follow(method: str) -> None:
    tree, method = second_round(), make_method(method, width=2)
    launch(tree, launched(method, tree))
    answer(tree, tree.root, (1, 0.5), (2, 0.3), (3, 0.2))
    assert launch(tree, launched(method, tree)) == [1, 2]
    one, two = expanded(method, tree)
    answer(tree, one, (4, 0.1))
    assert launched(method, tree) == []
    answer(tree, two, (5, 0.9), (6, 0.1))
    assert launch(tree, launched(method, tree)) == [5, 4]


def test_only_an_early_exit_waits_for_the_launch_of_a_root() -> None:
    methods = ("pipedec", "spd", "ppsd", "fullpipe")
    assert [name for name in methods if not expanded(make_method(name), second_round())] == ["ppsd"]


def test_a_refreshed_answer_sends_a_late_sibling_beside_the_layer_and_the_chain_follows_it() -> None:
    tree, method = second_round(), make_method("spd", refresh=True)
    launch(tree, launched(method, tree))
    root = tree.root
    answer(tree, root, (1, 0.6), (2, 0.3))
    assert launch(tree, launched(method, tree)) == [1]
    one, again = expanded(method, tree)
    assert (one.token, again) == (1, root), "new ones first, what has deepened behind them"
    answer(tree, one, (3, 0.9))
    answer(tree, root, (2, 0.7), (1, 0.2))
    assert launch(tree, launched(method, tree)) == [2, 3], "the late sibling beside the next layer"
    late, three = expanded(method, tree)[:2]
    answer(tree, late, (4, 0.8))
    answer(tree, three, (5, 0.9))
    assert launch(tree, launched(method, tree)) == [4], "below 2, the better chain now"
    tree.land(root, 1)
    tree.advance()
    assert expanded(method, tree) == [], "3 has its answer"
    assert launch(tree, launched(method, tree)) == [5], "2 was wrong after all: on with the first chain"


def test_refreshes_fill_what_new_nodes_leave_of_the_drafts_width() -> None:
    for name, limit in (("spd", 8), ("fullpipe", 16)):
        tree, method = second_round(), make_method(name, width=1, refresh=True)
        for token in range(30):
            launch(tree, launched(method, tree))
            for node in expanded(method, tree):
                answer(tree, node, (token, 0.9))
        launch(tree, launched(method, tree))
        assert len(expanded(method, tree)) == limit, name
        plain = make_method(name, width=1)
        assert len(expanded(plain, tree)) == (1 if name == "spd" else 0), "fullpipe has run ahead"


def test_widths_are_each_methods_own() -> None:
    assert {name: make_method(name).width for name in METHODS} == {
        "pp": 8, "chain": 1, "static-tree": 8, "pipedec": 8, "spd": 1, "ppsd": 1, "fullpipe": 8}
    assert all(make_method(name, width=3).width == 3 for name in set(METHODS) - {"pp", "chain"})


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "spqr"}, "unknown method 'spqr'\nMethods are: pp, chain, static-tree, pipedec, spd, ppsd, fullpipe."),
    ({"name": "pipedec", "width": 0}, "width must be 1 or more"),
    ({"name": "chain", "depth": 0}, "depth must be 1 or more"),
    ({"name": "fullpipe", "depth": 4},
     r"the method fullpipe has no depth \(got 4\)\nLeave it out, or use one of: chain, static-tree."),
    ({"name": "pp", "depth": 4}, "the method pp has no depth"),
    ({"name": "pp", "width": 4}, "the method pp has no width"),
    ({"name": "chain", "width": 4}, "the method chain has no width"),
    ({"name": "pp", "floor": 0.1}, "the method pp has no floor"),
    ({"name": "ppsd", "refresh": True},
     r"the method ppsd has no refresh \(got True\)\nLeave it out, or use one of: spd, fullpipe."),
    ({"name": "spd", "width": 0}, "width must be 1 or more"),
    ({"name": "fullpipe", "floor": 1.5}, r"the probability floor must be in \[0, 1\)"),
])
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_method(**options)


def test_a_depth_is_taken_by_those_that_have_one() -> None:
    assert set(WITH_DEPTH) == {name for name in METHODS if hasattr(make_method(name), "depth")}
    assert [make_method(name, depth=7).depth for name in WITH_DEPTH] == [7] * len(WITH_DEPTH)  # type: ignore[attr-defined]


def test_a_refresh_is_taken_by_those_that_have_one_and_is_off_by_default() -> None:
    assert WITH_REFRESH == ("spd", "fullpipe")
    assert not any(make_method(name).refresh or make_method(name, refresh=False).refresh for name in METHODS)
    assert all(make_method(name, refresh=True).refresh for name in WITH_REFRESH)


@pytest.mark.parametrize("machine", [None, Machine(4, CostCurve.of(lambda rows: 1 + 0.001 * rows))])
def test_a_width_bounds_each_sequence_whatever_rows_cost(machine: Machine | None) -> None:
    method = make_method("fullpipe", width=3, machine=machine)
    trees = [second_round() for _ in range(2)]
    for tree in trees:
        launch(tree, [tree.root])
    answer(trees[0], trees[0].root, *((token, 0.12) for token in range(8)))  # the other one has no guesses yet
    alone = [Alone(tree) for tree in trees]
    alone[1].request = Request(1, (1,), SamplingParams())
    chosen = method.launch(alone, Load(2, under_way=1))  # type: ignore[arg-type]
    assert [len(nodes) for _, nodes in chosen] == [3]


def test_without_a_width_it_is_what_pays() -> None:
    dear = make_method("fullpipe", machine=Machine(4, CostCurve.of(lambda rows: float(rows))))
    cheap = make_method("fullpipe", machine=Machine(4, CostCurve.of(lambda rows: 1 + 1e-4 * rows)))
    found = []
    for method in (dear, cheap):
        tree = second_round()
        launch(tree, [tree.root])
        answer(tree, tree.root, *((token, 0.12) for token in range(8)))
        found.append(len(launched(method, tree)))
    assert found == [0, 8]


CHEAP = CostCurve.of(lambda rows: 1 + 1e-4 * rows)


@pytest.mark.parametrize("machine", [None, Machine(4, CHEAP), Machine(4, CHEAP, CHEAP)],
                         ids=["unknown", "stages known", "all known"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_draft_width_bounds_what_is_asked_of_each_sequence(machine: Machine | None, sequences: int) -> None:
    found = []
    for draft_width in (3, None):
        method = FullPipe(draft_width=draft_width, machine=machine)
        trees = [second_round() for _ in range(sequences)]
        for tree in trees:
            answer(tree, tree.root, *((token, 0.12) for token in range(8)))
            launch(tree, launched(method, tree))
        alone = [Alone(tree) for tree in trees]
        method.launch(alone, Load(sequences, under_way=1))  # type: ignore[arg-type]
        chosen = method.expand(alone, Load(sequences, under_way=1))  # type: ignore[arg-type]
        found.append(max(len(nodes) for _, nodes in chosen))
    assert found[0] == 3 < found[1]


@pytest.mark.parametrize("draft_width", [0, -1])
def test_no_draft_width_below_one(draft_width: int) -> None:
    with pytest.raises(UsageError, match=f"draft_width must be 1 or more .got {draft_width}"):
        FullPipe(draft_width=draft_width)
