"""A plan is written so that it can be edited, and what cannot be is told by file and field."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from imagined import MEGA, host, imagined

from fullpipe.cluster.acceptance import Acceptance
from fullpipe.cluster.layout import Guesser
from fullpipe.cluster.pins import Pins
from fullpipe.cluster.plan import Plan, Promise, StagePlan, check
from fullpipe.cluster.planner import search
from fullpipe.errors import UsageError

MODEL = Guesser(("m",), "model", Acceptance(0.8, 0.9))
SURVEY = imagined({"a": host(), "b": host(), "c": host()}, 0.002)
names = st.text(min_size=1, max_size=8)


def plan(**changes: object) -> Plan:
    values = {"model": "m", "draft": "d,ngram", "method": "fullpipe", "draft_host": "a",
              "stages": (StagePlan(host="a", first=0, last=20), StagePlan(host="b", first=20, last=28))}
    return Plan(**(values | changes))  # type: ignore[arg-type]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    ends = sorted(draw(st.sets(st.integers(1, 80), min_size=1, max_size=5)))
    stages = tuple(StagePlan(host=draw(names), first=first, last=last, threads=draw(st.integers(1, 64)),
                             device=draw(st.sampled_from(["cpu", "cuda", "cuda:1"])))
                   for first, last in zip([0, *ends], ends))
    promise = Promise(plan_ms=draw(st.floats(1e-3, 1e5)), pp_ms=draw(st.floats(1e-3, 1e5)))
    return Plan(model=draw(names), draft=draw(names), method=draw(st.sampled_from(["fullpipe", "pp", "chain", "auto"])),
                width=draw(st.none() | st.integers(1, 64)), draft_host=draw(st.none() | names), stages=stages,
                promise=draw(st.sampled_from([promise, None])))


@given(plans())
def test_what_is_written_is_what_is_read(one: Plan) -> None:
    assert Plan.model_validate(tomllib.loads(one.to_toml())) == one


def test_a_file_is_read_and_written_whole_and_every_line_says_what_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    plan().save(path)
    assert Plan.load(path) == plan()
    text = path.read_text()
    for word in ("may be edited", "first to\n# last - 1", 'draft_host = "a"  #', "# width =", "[[stage]]"):
        assert word in text
    path.write_text(text.replace("last = 20", "last = 9").replace("first = 20", "first = 9"))
    assert Plan.load(path).layout.layers == (9, 19)
    with pytest.raises(UsageError, match="cannot write"):
        plan().save(tmp_path / "nowhere" / "plan.toml")


def test_what_the_planner_found_becomes_a_plan_that_can_be(tmp_path: Path) -> None:
    found = search(SURVEY, MODEL, Pins(order=("a", "c"), draft_host="b")).best
    one = Plan.of(found, SURVEY, "m", "d,ngram")
    check(one, SURVEY.hosts, 28, MODEL)
    assert one.hosts == ("a", "c", "b") and one.layout == found.layout and one.draft == "d,ngram"
    assert one.promise and one.promise.plan_ms == pytest.approx(1e3 * found.seconds, abs=1e-3)
    plain = Plan.of(search(SURVEY, MODEL, Pins(method="pp")).best, SURVEY, "m", "d,ngram")
    assert (plain.method, plain.draft, plain.draft_host) == ("pp", "none", None)


@pytest.mark.parametrize(("before", "after", "says"), [
    ("last = 20", "last = twenty", "is not TOML"), ("last = 20", 'last = "20 layers"', "stage 0.last: "),
    ("first = 0", "first = -1", "stage 0.first: "), ("threads = 1", "cores = 1", "stage 0.cores: "),
    ("device = ", "devise = ", "stage 0.devise: "), ('"cpu"', '"tpu"', "stage 0.device: "),
    ("method = \"fullpipe\"", "method = \"magic\"", "method: "), ('model = "m"', 'model = ""', "model: "),
    ("# width =", "width = 0 #", "width: "), ("draft = ", "draught = ", "draught: ")])
def test_a_field_that_cannot_be_is_told_by_file_and_name(tmp_path: Path, before: str, after: str, says: str) -> None:
    path = tmp_path / "plan.toml"
    text = plan().to_toml()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(UsageError) as told:
        Plan.load(path)
    assert str(path) in told.value.message and says in told.value.message and told.value.hint


def test_an_unknown_field_is_told_with_those_that_are_known(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(plan().to_toml().replace("threads", "cores"))
    with pytest.raises(UsageError) as told:
        Plan.load(path)
    assert told.value.hint == "Known here are host, first, last, threads, device."


def test_a_plan_that_is_not_there_or_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the plan .*gone.toml: No such file"):
        Plan.load(tmp_path / "gone.toml")
    (tmp_path / "plan.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is no text"):
        Plan.load(tmp_path / "plan.toml")
    (tmp_path / "plan.toml").write_text('model = "m"\n')
    with pytest.raises(UsageError, match=r"plan.toml: stage: Field required"):
        Plan.load(tmp_path / "plan.toml")


def stages(*seats: tuple[str, int, int]) -> tuple[StagePlan, ...]:
    return tuple(StagePlan(host=name, first=first, last=last) for name, first, last in seats)


@pytest.mark.parametrize(("changes", "says"), [
    ({"draft_host": "z"}, "a host that is not there: z"),
    ({"stages": stages(("y", 0, 20), ("z", 20, 28))}, "hosts that are not there: y, z"),
    ({"stages": stages(("a", 1, 20), ("b", 20, 28))}, "stage 0 begins with layer 1"),
    ({"stages": stages(("a", 0, 18), ("b", 20, 28))}, "layers 18 to 19 are on no stage"),
    ({"stages": stages(("a", 0, 22), ("b", 20, 28))}, "layers 20 to 21 are on two"),
    ({"stages": stages(("a", 0, 20), ("b", 20, 24))}, "have 24 layers, and the model has 28"),
    ({"stages": stages(("a", 0, 0), ("b", 0, 28))}, "stage 0 has the layers 0 to 0, which is none"),
    ({"draft": "none"}, "the method fullpipe and no draft"), ({"method": "chain"}, "for one process, and 2 stages")])
def test_a_plan_that_cannot_be_is_told_with_the_way_out(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as told:
        check(plan(**changes), SURVEY.hosts, 28)
    assert says in told.value.message and told.value.hint


def test_a_last_stage_may_have_the_head_alone_and_a_host_two_stages() -> None:
    check(plan(stages=stages(("a", 0, 20), ("b", 20, 28), ("c", 28, 28))), SURVEY.hosts, 28)
    check(plan(stages=stages(("a", 0, 10), ("a", 10, 28))), SURVEY.hosts, 28)


def test_more_than_the_memory_of_a_host_allows_is_told_with_both_figures() -> None:
    small = imagined({"a": host(free=800 * MEGA), "b": host(free=400 * MEGA)}, 0.001)
    check(plan(draft_host=None), small.hosts, 28)
    with pytest.raises(UsageError, match=r"wants 1.17 GB of a, which has 0.75 GB to spare"):
        check(plan(), small.hosts, 28, MODEL)
    with pytest.raises(UsageError, match="GB of b"):
        check(plan(stages=stages(("a", 0, 10), ("b", 10, 28))), small.hosts, 28)
