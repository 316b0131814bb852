"""The planner finds what looking at everything finds, and says when fewer hosts or no draft are quicker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagined import MEGA, host, imagined

from fullpipe.cluster import cuts
from fullpipe.cluster.acceptance import Acceptance
from fullpipe.cluster.layout import Ground, Guesser, Skeleton
from fullpipe.cluster.modes import PP, Modes
from fullpipe.cluster.pins import Pins
from fullpipe.cluster.planner import lower_bounds, predict, search
from fullpipe.cluster.survey import Survey
from fullpipe.cluster.verdict import verdict
from fullpipe.errors import UsageError

MODEL = Guesser(("m",), "model", Acceptance(0.8, 0.9))
NGRAM = Guesser(("ngram",), "ngram", Acceptance(0.4, 0.5))

slowness = st.sampled_from([0.3, 0.7, 1.0, 1.1, 2.5])
ways = st.sampled_from([0.0, 0.0005, 0.01, 0.04])


@st.composite
def surveys(draw: st.DrawFn, processors: tuple[str, ...] = ("",)) -> Survey:
    """A few hosts and layers. free: for all layers and the draft, or not."""
    names = "abc"[: draw(st.integers(1, 3))]
    num_layers = draw(st.integers(len(names), 6))
    free = st.sampled_from([1 << 34, 400 * MEGA, 200 * MEGA])
    hosts = {name: host(draw(slowness), num_layers, layer=draw(st.sampled_from([1e-3, 8e-3])),
                        cores=draw(st.integers(1, 2)), free=draw(free), processor=draw(st.sampled_from(processors)))
             for name in names}
    return imagined(hosts, {(a, b): draw(ways) for a in names for b in names if a < b})


def cuts_of(num_layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    least = [1] * (stages - 1) + [int(stages == 1)]
    for layers in product(*(range(low, num_layers + 1) for low in least)):
        if sum(layers) == num_layers:
            yield layers


def everything(survey: Survey, guesser: Guesser | None) -> list[float]:
    """Seconds per token of all there is, one after another."""
    ground, found = Ground(survey, guesser), []

    def look(skeleton: Skeleton, modes: Modes) -> None:
        found.extend(float(skeleton.seconds(np.array([layers]), modes).min())
                     for layers in cuts_of(survey.num_layers, len(skeleton.order))
                     if (np.array(layers) <= skeleton.most).all())

    for size in range(1, len(survey.hosts) + 1):
        for order in permutations(survey.hosts, size):
            look(Skeleton(ground, order), PP)
            for draft_host in survey.hosts if guesser else ():
                assert guesser
                if guesser.memory(survey.hosts[draft_host].profile) <= survey.hosts[draft_host].room:
                    skeleton = Skeleton(ground, order, draft_host)
                    look(skeleton, ground.modes(draft_host, skeleton.alone_in_turn))
            if guesser and order == (survey.head,):
                look(Skeleton(ground, order, survey.head), ground.in_process())
    return found


@settings(max_examples=60, deadline=None)
@given(surveys(), st.sampled_from([MODEL, None]))
def test_it_finds_the_best_of_all(survey: Survey, guesser: Guesser | None) -> None:
    found = everything(survey, guesser)
    if not found:
        with pytest.raises(UsageError, match="no memory for the model"):
            search(survey, guesser)
        return
    best, *others = (searched := search(survey, guesser)).best, *searched.by_hosts
    assert min(one.seconds for one in others) == pytest.approx(min(found), rel=1e-9)
    assert best.seconds <= min(found) * 1.01 * (1 + 1e-9), "of those as good the one with fewest hosts"
    assert predict(survey, best.layout, guesser if best.layout.draft_host else None,
                   method=best.method).seconds == pytest.approx(best.seconds)


@settings(max_examples=40, deadline=None)
@given(surveys(("", "one")))
def test_where_hosts_share_cores_it_is_near_the_best(survey: Survey) -> None:
    if found := everything(survey, MODEL):
        assert min(found) <= search(survey, MODEL).best.seconds * (1 + 1e-9) <= min(found) * 1.06


@settings(max_examples=40, deadline=None)
@given(surveys(), st.integers(0, 5))
def test_no_cut_is_below_its_bound(survey: Survey, pick: int) -> None:
    orders = list(permutations(survey.hosts))
    ground, order = Ground(survey, MODEL), orders[pick % len(orders)]
    skeleton = Skeleton(ground, order, survey.head)
    modes = ground.modes(survey.head, skeleton.alone_in_turn)
    for layers in cuts_of(survey.num_layers, len(order)):
        assert (skeleton.seconds(np.array([layers]), modes) >= lower_bounds(skeleton, modes) * (1 - 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(surveys())
def test_the_balanced_cut_has_the_shortest_longest_stage(survey: Survey) -> None:
    skeleton = Skeleton(Ground(survey), tuple(survey.hosts))
    if skeleton.fits:
        def longest(layers: tuple[int, ...] | cuts.Ints) -> float:
            return float((skeleton.beside[0] + np.array(layers) * skeleton.layer[0]).max())

        fitting = [layers for layers in cuts_of(survey.num_layers, len(survey.hosts))
                   if (np.array(layers) <= skeleton.most).all()]
        assert longest(cuts.balanced(skeleton)) == pytest.approx(min(map(longest, fitting)))


# ---- what it says ------------------------------------------------------------------------------------------


def test_one_host_is_best_where_the_others_are_far_and_slow() -> None:
    survey = imagined({"a": host(cores=2), "b": host(3.0), "c": host(3.0)}, 0.2)
    found = search(survey, MODEL)
    assert found.best.layout.order == ("a",) and found.best.layout.draft_host in ("a", None)
    assert verdict(found, survey, MODEL)[0].startswith("use one host: a alone")
    assert [len(one.layout.order) for one in found.by_hosts] == [1, 2, 3]


def test_where_guesses_are_never_right_it_says_so() -> None:
    useless = Guesser(("m",), "model", Acceptance(0.02, 0.03))
    survey = imagined({"a": host(), "b": host()}, 0.001)
    found = search(survey, useless)
    assert found.best.method == "pp" and found.guessing and found.guessing.seconds > found.best.seconds
    assert any(line.startswith("do not speculate") for line in verdict(found, survey, useless))


def test_what_does_not_fit_one_host_is_cut_over_several() -> None:
    survey = imagined({name: host(free=600 * MEGA) for name in "abc"}, 0.01)
    found = search(survey, NGRAM)
    assert found.here is None and len(found.best.layout.order) == 2
    assert max(found.best.layout.layers) <= 16


def test_a_slow_host_gets_fewer_layers_and_the_cuts_are_compared_by_name() -> None:
    survey = imagined({"a": host(), "b": host(3.0)}, 0.002)
    found = search(survey, MODEL, Pins(order=("a", "b")))
    a, b = found.best.layout.layers
    assert a > b
    by_cut = {one.cut: one.seconds for one in found.by_cut}
    assert set(by_cut) == set(cuts.CUTS)
    assert by_cut[cuts.BEST] <= min(by_cut.values()) and by_cut[cuts.UNIFORM] > by_cut[cuts.BEST]


def test_links_decide_the_order() -> None:
    survey = imagined({name: host() for name in "abcd"},
                      {("a", "b"): 0.05, ("a", "c"): 0.001, ("a", "d"): 0.001, ("b", "c"): 0.001, ("b", "d"): 0.001,
                       ("c", "d"): 0.05})
    best = search(survey, NGRAM, Pins(hosts=tuple("abcd"))).best
    assert best.layout.order[0] == "a" and best.layout.order[2] == "b", "around the slow links"


def test_what_is_pinned_stays() -> None:
    survey = imagined({"a": host(), "b": host(), "c": host()}, 0.005)
    found = search(survey, MODEL, Pins(order=("c", "a"), layers=(3, 25), draft_host="b", width=4, method="fullpipe"))
    best = found.best
    assert (best.layout.order, best.layout.layers, best.layout.draft_host) == (("c", "a"), (3, 25), "b")
    assert best.mode.width <= 4 and best.method == "fullpipe" and best.cut == "pinned"
    assert set(search(survey, MODEL, Pins(hosts=("c", "b"))).best.layout.order) == {"b", "c"}
    assert search(survey, MODEL, Pins(cut=cuts.UNIFORM, hosts=("a", "b"))).best.layout.layers == (14, 14)
    assert search(survey, MODEL, Pins(method="pp")).best.method == "pp"
    assert search(survey, MODEL, Pins(order=("b",))).here is None
    two = search(survey, MODEL, Pins(stages=2))
    assert len(two.best.layout.order) == 2 and two.here is None
    assert search(survey, MODEL, Pins(method="chain")).best.layout.order == ("a",)


@pytest.mark.parametrize(("pins", "says"), [
    (Pins(hosts=("a", "x")), "there is no host x"), (Pins(draft_host="x"), "there is no host x"),
    (Pins(order=("a", "a")), "named twice"), (Pins(hosts=("a",), order=("b",)), "names other hosts"),
    (Pins(cut="nice"), "no cut 'nice'"), (Pins(method="spd"), "no plan is made for the method 'spd'"),
    (Pins(width=0), "1 row or more"), (Pins(stages=3), "3 stages are pinned"),
    (Pins(layers=(28,)), "whose order is not"),
    (Pins(order=("a", "b"), layers=(9, 9)), "28 layers, and 9\\+9 are pinned"),
    (Pins(method="chain", order=("a", "b")), "the method chain has no place")])
def test_pins_that_cannot_be_are_told(pins: Pins, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        search(imagined({"a": host(), "b": host()}, 0.001), MODEL, pins)


def test_a_model_that_fits_nowhere_is_told_with_what_it_needs() -> None:
    with pytest.raises(UsageError, match="no memory for the model") as told:
        search(imagined({"a": host(free=100 * MEGA), "b": host(free=100 * MEGA)}), MODEL)
    assert told.value.hint and "0.94 GB" in told.value.hint and "a 0.09, b 0.09" in told.value.hint


def test_more_stages_than_memory_allows_are_told_to_be_too_many() -> None:
    hosts = imagined({"a": host(), "b": host(free=MEGA)})
    with pytest.raises(UsageError, match="2 stages have no room on these hosts; another number has") as told:
        search(hosts, MODEL, Pins(stages=2))
    assert told.value.hint and "b 0.00" in told.value.hint
    with pytest.raises(UsageError, match="the model has no room on b"):
        search(hosts, MODEL, Pins(order=("b",)))


# ---- many hosts --------------------------------------------------------------------------------------------


def many(number: int, num_layers: int) -> Survey:
    names = [f"h{k}" for k in range(number)]
    return imagined({name: host(1 + 0.13 * (k * 5 % 7), num_layers) for k, name in enumerate(names)},
                    {(a, b): 0.001 * (1 + abs(i - j)) for i, a in enumerate(names) for j, b in enumerate(names)})


def test_six_hosts_take_less_than_a_second() -> None:
    survey = many(6, 32)
    begun = time.process_time()
    found = search(survey, MODEL)
    assert time.process_time() - begun < 2.0, "a second on a quiet machine"
    assert len(found.by_hosts) == 6


def test_of_eight_hosts_it_finds_what_is_no_worse_than_any_six_of_them() -> None:
    survey = many(8, 30)
    found = search(survey, NGRAM)
    assert len(found.by_hosts) == 8
    for left_out in (("h6", "h7"), ("h0", "h5"), ("h2", "h3")):
        if survey.head not in left_out:
            six = {name: one for name, one in survey.hosts.items() if name not in left_out}
            assert found.best.seconds <= search(Survey(six, survey.head, survey.pairs), NGRAM).best.seconds * 1.03


def test_a_model_that_needs_all_eight_gets_all_eight() -> None:
    survey = imagined({f"h{k}": host(free=200 * MEGA) for k in range(8)}, 0.002)
    found = search(survey, NGRAM)
    assert len(found.best.layout.order) >= 6 and sum(found.best.layout.layers) == 28
