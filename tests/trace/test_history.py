"""A stream of events, sorted by station and by node."""

from __future__ import annotations

import itertools

import pytest

import recorded as runs
from fullpipe.errors import UsageError
from fullpipe.events import Died, Emitted, Launched
from fullpipe.messages import Ready
from fullpipe.stations.scripted import hash_token
from fullpipe.trace.history import DRAFT, history, tokens_of
from recorded import recorded, uneven

METHODS = ("pp", "chain", "static-tree", "pipedec", "fullpipe")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("requests", [1, 2])
def test_every_token_of_the_text_is_found_on_its_node(method: str, requests: int) -> None:
    events = recorded(method, requests=requests)
    told = history(events)
    assert len(told.emissions) == 30 * requests == told.hits + told.misses + requests
    for index, one in enumerate(told.emissions):
        assert index in told.child or one.fate == "last"
        if index in told.child:
            life = told.lives[told.child[index]]
            assert (life.request, life.token, life.position) == (one.request, one.token, one.position)
            assert life.parent == one.node and life.committed == one.time
    assert {life.request for life in told.lives.values()} == set(range(requests))


def test_the_path_of_every_node_is_the_one_it_was_computed_on() -> None:
    """What follows a landed node is the truth of its path, so parents were found rightly, missed roots' too."""
    told = history(recorded("fullpipe", accuracy=0.4))
    checked = 0
    for life in told.lives.values():
        path, node = [life.token], life
        while node.parent >= 0:
            node = told.lives[node.parent]
            path.insert(0, node.token)
        if life.landed is not None:
            before = list(runs.PROMPTS[0][:-1])
            assert life.next_token == hash_token(before + path, 50, 3)
            checked += 1
    assert checked >= 30 and told.misses > 5


def test_nodes_know_the_call_that_guessed_them() -> None:
    told = history(recorded("fullpipe", accuracy=0.5))
    guessed = [life for life in told.lives.values() if life.job is not None]
    calls = {stay.number: stay for stay in told.stays[DRAFT]}
    for life in guessed:
        assert calls[life.job].end == life.proposed <= life.launched
    nobody = [life for life in told.lives.values() if life.job is None]
    missed = {(one.node, one.token) for one in told.emissions if not one.hit}
    assert nobody and all(life.parent < 0 or (life.parent, life.token) in missed for life in nobody)
    plain = history(recorded("pp"))
    assert told.speculated and not plain.speculated
    assert all(life.job is None for life in plain.lives.values())


@pytest.mark.parametrize("costs", [None, uneven])
def test_rows_that_died_while_they_were_computed_are_counted(costs: object) -> None:
    told = history(recorded("fullpipe", accuracy=0.4, **({"costs": costs} if costs else {})))
    for stay in told.all_stays():
        dead = [node for node in stay.nodes if node in told.lives and (died := told.lives[node].died) is not None
                and died < stay.end]
        if stay.station != DRAFT:
            assert stay.alive == len(stay.nodes) - len(dead) and stay.nodes
    some = sum(len(stay.nodes) - stay.alive for stay in told.all_stays())
    # On the unit clock stages end when landings kill, and the next stage is not given the dead.
    assert some > 0 if costs else some == 0


def test_stations_stand_in_order_and_their_stays_follow_one_another() -> None:
    told = history(recorded("fullpipe", stages=11))
    assert list(told.stays) == ["draft", *(f"stage {k}" for k in range(11))]
    for stays in told.stays.values():
        assert all(one.end <= other.start for one, other in itertools.pairwise(stays))


def test_a_run_that_was_cut_short_is_told_as_far_as_it_goes() -> None:
    events = recorded("fullpipe", stop_after=30)
    told = history(events)
    assert told.emissions and not told.finishes
    assert told.hits + told.misses == sum(isinstance(event, Emitted) for event in events)
    assert any(life.landed is None and life.died is None for life in told.lives.values())


def test_without_work_there_is_nothing_to_tell() -> None:
    for events in ([], [Ready(0.0)], [Ready(0.0), Launched(0.0, 0, [0], [-1], [7], [1])]):
        with pytest.raises(UsageError, match="the trace shows no work"):
            history(events)


def test_the_tokens_that_need_a_name() -> None:
    events = recorded(tokens=5)
    found = tokens_of(events)
    assert {event.token for event in events if isinstance(event, Emitted)} <= found
    assert {token for event in events if isinstance(event, Launched) for token in event.tokens} <= found
    assert tokens_of([Died(0.0, 0, [3])]) == set()
