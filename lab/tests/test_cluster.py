"""Clusters in files: the arithmetic of the presets, costs and links, and refusals that name the line."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fullpipe.cluster.profile import Cost, Curve, Profile, Shape, Surface
from fullpipe.errors import UsageError
from fullpipe.pipeline.links import INSTANT, Link
from fullpipe_lab.clusters import Cluster, presets, unit_cluster
from fullpipe_lab.clusters.checks import line_of
from fullpipe_lab.clusters.file import About, ClusterFile, Device, LinkTable, Pair, Placement
from fullpipe_lab.clusters.file import Shape as Model

GOOD = '''\
[cluster]
name = "three boards"
kind = "modelled"
note = """
A note of several lines. What looks like a table or a setting here is none:
[placement]
latency_ms = 7
"""

[target]
name = "7B"
layers = 12
layer_params = 200_000_000
head_params = 100_000_000
hidden = 4096
kv_size = 8192

[draft]
name = "1B"
layers = 4
layer_params = 40_000_000
head_params = 60_000_000
hidden = 2048
kv_size = 512

[[devices]]
name = "board"
count = 2
memory_gb = 8
bandwidth_gb_s = 100
tflop_s = 5
overhead_ms = 1.0

[[devices]]
name = "curved"
stage_ms = [
    [1, 2.0],
    [4, 3.0]
]
draft_ms = [[1, 4.0]]

[links]
latency_ms = 1.0
bandwidth_mbit_s = 100

[[links.pair]]
ends = ["board0", "curved"]
latency_ms = 30.0

[[links.pair]]
ends = ["board1", "board0"]
latency_ms = 0.5
bandwidth_mbit_s = 1000

[placement]
stages = ["board0", "board1", "curved"]
layers = [4, 5, 3]
draft = "board1"
engine = "curved"
'''


def parse(text: str, folder: Path = Path()) -> Cluster:
    return Cluster.parse(text, "test.toml", folder)


# ---- presets -------------------------------------------------------------------------------------------------


MEASURED = "this-machine"


def test_the_preset_of_this_machine_asks_for_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"profile\.json") as caught:
        Cluster.load(MEASURED)
    assert "fullpipe profile" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in presets() if name != MEASURED])
def test_every_preset_loads_and_says_what_it_imagines(name: str) -> None:
    cluster = Cluster.load(name)
    assert cluster.file.cluster.kind == "modelled" and not cluster.is_measured
    assert sum(cluster.layers) == cluster.file.target.layers  # type: ignore[union-attr]
    assert len(cluster.file.cluster.note) > 200 and "Imagined time" in cluster.text
    cluster.check_draft()


def milliseconds(cluster: Cluster, rows: int = 1) -> list[float]:
    """Of every stage, without context and without what a step costs besides."""
    overhead = cluster.file.devices[0].overhead_ms
    return [1e3 * cluster.stage_seconds(k, rows, 0) - overhead for k in range(cluster.num_stages)]


PRESETS = [  # stages, draft call in ms, and what a full stage takes in ms, as the notes say
    ("gpus-8", 8, 2.45, 17.0, [10] * 6 + [11, 9]),
    ("gpus-14", 14, 2.45, 10.2, [5, 5] + [6] * 11 + [4]),
    ("edge-5", 5, 30.4, 41.7, [4, 7, 7, 7, 7]),
    ("home-6", 6, 6.9, 18.7, [13, 13, 14, 14, 14, 12]),
]


@pytest.mark.parametrize(("name", "stages", "draft_ms", "stage_ms", "layers"), PRESETS)
def test_the_arithmetic_of_a_preset_is_that_of_its_note(name: str, stages: int, draft_ms: float, stage_ms: float,
                                                        layers: list[int]) -> None:
    cluster = Cluster.load(name)
    assert (cluster.num_stages, cluster.layers) == (stages, layers)
    overhead = cluster.file.devices[0].overhead_ms
    assert 1e3 * cluster.draft_seconds(1, 0) - overhead == pytest.approx(draft_ms, abs=0.06)
    assert any(ms == pytest.approx(stage_ms, abs=0.06) for ms in milliseconds(cluster))


@pytest.mark.parametrize(("name", "free"), [("gpus-8", 79), ("gpus-14", 79), ("edge-5", 73), ("home-6", 19)])
def test_rows_are_free_as_far_as_the_note_says(name: str, free: int) -> None:
    cluster = Cluster.load(name)
    assert f"rows are free up to\n{free}" in cluster.text or f"rows are free up to {free}" in cluster.text
    one = cluster.stage_seconds(0, 1, 0)
    assert cluster.stage_seconds(0, free, 0) == one < cluster.stage_seconds(0, free + 1, 0)


def test_the_numbers_of_weights_are_those_of_the_shapes() -> None:
    """As the notes multiply them; the 1B draft: q and o, k and v, gate and up and down."""
    for name in ("gpus-8", "gpus-14", "home-6"):
        target, draft = Cluster.load(name).file.target, Cluster.load(name).file.draft
        assert target and draft
        assert target.layer_params == 8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
        assert (target.head_params, target.kv_size) == (128256 * 8192, 2 * 8 * 128)
        assert draft.layer_params == 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
        assert draft.head_params == 128256 * 2048
    edge = Cluster.load("edge-5").file
    assert edge.target and edge.target.layer_params == 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert edge.draft and edge.draft.layer_params == 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632


@pytest.mark.parametrize(("name", "row_ms"), [("gpus-8", 0.0132), ("edge-5", 0.44), ("home-6", 1.31)])
def test_a_row_takes_its_time_on_the_wire(name: str, row_ms: float) -> None:
    cluster = Cluster.load(name)
    hop, row = cluster.links.stage_hops[-2], cluster.message_bytes(2) - cluster.message_bytes(1)
    assert 1e3 * hop.occupied_s(row) == pytest.approx(row_ms, rel=0.02)


def test_home_machines_have_the_latencies_of_their_pairs() -> None:
    links = Cluster.load("home-6").links
    assert [1e3 * hop.latency_s for hop in links.stage_hops] == [20, 30, 40, 30, 25]
    assert links.to_first == INSTANT and 1e3 * links.landing.latency_s == 30
    assert links.draft.latency_s == pytest.approx(1e-5)


def test_unit_steps() -> None:
    cluster = unit_cluster(14)
    assert {cluster(f"stage {k}", rows, 9.0, 500) for k in range(14) for rows in (1, 64)} == {1e-3}
    assert (cluster("draft", 32, 9.0, 500), cluster("stage 3", 0, 9.0, 500)) == (1e-3, 0.0)
    assert all(hop == INSTANT for hop in cluster.links.stage_hops)
    with pytest.raises(UsageError, match="at least one stage"):
        unit_cluster(0)


# ---- the documentation -----------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")


def test_the_documented_example_is_a_cluster() -> None:
    (text,) = re.findall(r"(?s)```toml\n(.*?)```", DOCUMENT)
    cluster = parse(text)
    assert cluster.layers == [5, 5, 2] and cluster.links.stage_hops == [Link.of(0.4, 1000), Link.of(3.0, 300)]


def test_the_documented_table_of_presets_is_what_they_say() -> None:
    for name, _, _, _, _ in PRESETS:
        (row,) = [line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}`")]
        step, layers, draft = re.findall(r"\| ([\d.]+) ms \((\d+) layers\) \| ([\d.]+) ms", row)[0]
        cluster = Cluster.load(name)
        stage = cluster.layers.index(int(layers))
        assert (float(step), float(draft)) == pytest.approx((1e3 * cluster.stage_seconds(stage, 1, 0),
                                                             1e3 * cluster.draft_seconds(1, 0)), abs=0.05), row
    assert re.findall(r"(?m)^\| `([a-z]+-\d+)`", DOCUMENT) == [name for name, *_ in PRESETS]


@pytest.mark.parametrize("model", [ClusterFile, Device, Model, LinkTable, Pair, Placement, About])
def test_every_setting_is_documented(model: type[BaseModel]) -> None:
    for key in model.model_fields:
        assert re.search(rf"`\[*(links\.)?{key}\b", DOCUMENT), key


# ---- costs ---------------------------------------------------------------------------------------------------


def test_a_roofline_reads_or_computes_whichever_takes_longer() -> None:
    """Five layers of 0.4 GB at 100 GB/s: 20 ms; 50 more GFLOP at 5 TFLOP/s: 0.4 ms a row; and 1 ms besides."""
    cluster = parse(GOOD)
    assert cluster.stage_seconds(1, 1, 0) == pytest.approx(0.021)
    assert cluster.stage_seconds(1, 50, 0) == pytest.approx(0.021)
    assert cluster.stage_seconds(1, 100, 0) == pytest.approx(0.041)
    cache = 5 * 8192 * 1000 * 2 / 100e9  # of a thousand tokens
    assert cluster.stage_seconds(1, 1, 1000) == pytest.approx(0.021 + cache)
    assert cluster.draft_seconds(1, 0) == pytest.approx(2 * 220e6 / 100e9 + 1e-3)


def test_the_last_stage_reads_the_head() -> None:
    text = GOOD.replace('"board1", "curved"]', '"curved", "board1"]')
    assert parse(text).stage_seconds(2, 1, 0) - 1e-3 == pytest.approx((3 * 0.4 + 0.2) / 100)


def test_a_curve_is_straight_between_its_points() -> None:
    cluster = parse(GOOD)
    costs = [1e3 * cluster.stage_seconds(2, rows, 0) for rows in (1, 2, 4, 7)]
    assert costs == pytest.approx([2, 2 + 1 / 3, 3, 4])  # the last slope goes on
    assert not cluster.draft_is_curve and parse(GOOD.replace('draft = "board1"', 'draft = "curved"')).draft_is_curve


def profile(num_layers: int = 12, drafts: bool = True, scale: float = 1.0) -> Profile:
    """A layer takes 2 ms at 1 row and 3 ms at 5, a head 4 ms, a draft call 6 ms; a layer weighs 1 GB, a head 0.5."""
    def surface(*ms: float) -> Surface:
        return Surface(rows=(1, 5), contexts=(1,), costs=tuple((cost(value),) for value in ms))

    def cost(ms: float) -> Cost:
        return Cost(seconds=scale * ms / 1e3, spread=0.0, samples=3)

    shape = Shape(name="m", num_layers=num_layers, layer_bytes=10**9, head_bytes=5 * 10**8, embedding_bytes=5 * 10**8,
                  kv_bytes=2, row_bytes=512)
    one = Curve(sizes=(1,), costs=(cost(4.0),))
    none = Curve(sizes=(1,), costs=(cost(0.0),))
    return Profile(target=shape, draft_model=shape if drafts else None, dtype="bfloat16", threads=1, machine={},
                   commit="unknown", dirty=False, date="2026-11-21T00:00:00Z", layers=surface(2, 3),
                   flights=surface(0, 0), heads=one, lookups=none, drafts=surface(6, 6) if drafts else None,
                   messages=none)


PROFILED = """\
[cluster]
name = "like this machine"
kind = "measured"

[[devices]]
name = "this"
count = 2
memory_gb = 9
profile = "here.json"

[[devices]]
name = "fast"
profile = "here.json"
speed = 2.0

[links]
latency_ms = 1
bandwidth_mbit_s = 8

[placement]
stages = ["this0", "this1"]
draft = "fast"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    profile().save(tmp_path / "here.json")
    return tmp_path


def test_a_profile_gives_costs_cut_and_sizes(folder: Path) -> None:
    """Twelve layers of 2 ms and a head of 4: seven before, five and the head behind. A row has 512 bytes and 64."""
    cluster = parse(PROFILED, folder)
    assert cluster.layers == [7, 5] and not cluster.is_measured
    assert [cluster.stage_seconds(k, 1, 1) for k in range(2)] == pytest.approx([0.014, 0.014])
    assert cluster.stage_seconds(0, 3, 1) == pytest.approx(7 * 0.0025)
    assert cluster.draft_seconds(4, 1) == pytest.approx(0.003)  # on a machine of twice the speed
    assert cluster.message_bytes(3) - cluster.message_bytes(2) == 576


def test_a_speed_alone_divides_what_is_measured() -> None:
    text = unit_cluster(2).text.replace("stage_ms = [[1, 1.0]]", "speed = 4.0")
    cluster = Cluster.parse(text, "here", Path())
    assert cluster.is_measured and cluster("stage 1", 3, 2.0, 0) == 0.5 and cluster("draft", 3, 2.0, 0) == 1e-3
    other = Cluster.parse(unit_cluster(2).text.replace("draft_ms = [[1, 1.0]]", "speed = 4.0"), "here", Path())
    assert other.is_measured and other("draft", 3, 2.0, 0) == 0.5


points = st.lists(st.tuples(st.integers(1, 64), st.floats(0.01, 50)), min_size=1, max_size=6,
                  unique_by=lambda one: one[0])


@given(points=points, rows=st.lists(st.integers(1, 300), min_size=2, max_size=8), context=st.integers(0, 4096))
def test_a_cost_never_falls_with_rows(points: list[tuple[int, float]], rows: list[int], context: int) -> None:
    """Whatever describes the device, if a curve that was given does not fall."""
    sizes, costs = sorted(size for size, _ in points), sorted(cost for _, cost in points)
    curve = [[size, cost] for size, cost in zip(sizes, costs)]
    cluster = parse(re.sub(r"stage_ms = \[\n.*\n.*\n\]", f"stage_ms = {curve}", GOOD))
    for stage in range(3):
        seconds = [cluster.stage_seconds(stage, count, context) for count in sorted(rows)]
        assert all(a <= b + 1e-12 for a, b in pairwise(seconds)) and seconds[0] >= 0
    drafts = [cluster.draft_seconds(count, context) for count in sorted(rows)]
    assert all(a <= b for a, b in pairwise(drafts))


# ---- links and places ----------------------------------------------------------------------------------------


def test_pairs_come_before_the_links_for_all() -> None:
    """A pair is the same both ways, and takes the bandwidth for all where it has none of its own."""
    links = parse(GOOD).links
    assert links.stage_hops == [Link.of(0.5, 1000), Link.of(1.0, 100)]
    assert links.to_first == Link.of(30.0, 100)  # engine on curved, stage 0 on board0
    assert links.landing == INSTANT  # both on curved
    assert links.draft == Link.of(1.0, 100)


def test_who_sits_where() -> None:
    cluster = parse(GOOD)
    assert [cluster.device_of(one) for one in ("stage 0", "stage 1", "stage 2", "draft", "engine")] \
        == ["board0", "board1", "curved", "board1", "curved"]
    plain = parse(GOOD.replace('draft = "board1"\nengine = "curved"\n', ""))
    assert plain.device_of("draft") == plain.device_of("engine") == "board0"
    assert plain.links.draft == plain.links.to_first == INSTANT


def test_a_message_is_its_hidden_states_and_a_little() -> None:
    cluster = parse(GOOD)
    assert cluster.message_bytes(0) == 128 and cluster.message_bytes(3) == 128 + 3 * (64 + 2 * 4096)


# ---- refusals ------------------------------------------------------------------------------------------------

Edit = Callable[[str], str]


def put(old: str, new: str, times: int = 1) -> Edit:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, times)

    return change


def drop(*tables: str) -> Edit:
    """Without these tables."""
    def change(text: str) -> str:
        for table in tables:
            text, count = re.subn(rf"(?m)^\[{table}\]\n(?:(?!\[).*\n)*", "", text)
            assert count == 1, table
        return text

    return change


# What is done to the file; how the line begins on which the fault stands; what is said; what to do.
REFUSALS: list[tuple[Edit, str, str, str]] = [
    (put("latency_ms = 1.0\n", ""), "[links]", "no link between 'board1' and 'curved'", "[[links.pair]]"),
    (put('"board1", "curved"]', '"board7", "curved"]'), "stages =", "no device 'board7'", "board0, board1, curved"),
    (put('draft = "board1"', 'draft = "boar"'), 'draft = "boar"', "no device 'boar'", "board0, board1, curved"),
    (put('engine = "curved"', 'engine = "x"'), 'engine = "x"', "no device 'x'", "board0, board1, curved"),
    (put('ends = ["board1", "board0"]', 'ends = ["board1", "y"]'), 'ends = ["board1", "y"]', "no device 'y'", "board0"),
    (put('ends = ["board1", "board0"]', 'ends = ["curved", "board0"]'), 'ends = ["curved", "board0"]',
     "described twice", "leave one out"),
    (put("[4, 3.0]", "[4, -3.0]"), "stage_ms =", "greater than 0", "clusters.md"),
    (put("overhead_ms = 1.0", "overhead_ms = -1"), "overhead_ms = -1", "greater than or equal to 0", "clusters.md"),
    (put("latency_ms = 30.0", "latency_ms = -30"), "latency_ms = -30", "greater than or equal to 0", "clusters.md"),
    (put("bandwidth_gb_s = 100", "bandwidth_gb_s = 0"), "bandwidth_gb_s = 0", "greater than 0", "clusters.md"),
    (put("bandwidth_mbit_s = 1000", "bandwidth_mbit_s = inf"), "bandwidth_mbit_s = inf", "finite", "clusters.md"),
    (put('name = "curved"', 'name = "board1"'), 'name = "board1"', "two devices are called 'board1'", "of its own"),
    (put("memory_gb = 8", "memory = 8"), "memory = 8", "no such setting", "clusters.md"),
    (put("engine =", "motor ="), "motor =", "no such setting", "clusters.md"),
    (put("draft_ms = [[1, 4.0]]", "draft_ms = [[1, 4.0]]\nspeeed = 2"), "speeed = 2", "no such setting", "clusters.md"),
    (put("[target]", "[taget]"), "[taget]", "no such setting", "clusters.md"),
    (put("[[links.pair]]", "[[links.pairs]]", 2), "[[links.pairs]]", "no such setting", "clusters.md"),
    (put("memory_gb = 8", "memory_gb = 2"), "[[devices]]", "board1 has 2 GB, and the weights placed there take 2.4 GB",
     "more stages"),
    (put("layers = [4, 5, 3]", "layers = [4, 5, 4]"), "layers = [4", "3 numbers of layers, 13 in all", "add up"),
    (put("layers = [4, 5, 3]", "layers = [7, 5]"), "layers = [7", "2 numbers of layers, 12 in all", "leave it out"),
    (put("layers = [4, 5, 3]", "layers = [-1, 10, 3]"), "layers = [-1", "greater than or equal to 0", "clusters.md"),
    (put("[1, 2.0],", "[4, 2.0],"), "[[devices]]#2", "rising numbers of rows", "clusters.md"),
    (put("[1, 2.0],", "[0, 2.0],"), "stage_ms =", "greater than or equal to 1", "clusters.md"),
    (drop("target"), "[[devices]]", "no model is described whose weights it reads", "[target]"),
    (drop("draft"), 'draft = "board1"', "no draft is described", "[draft]"),
    (drop("links"), "", "no link between 'board1' and 'curved'", "links.latency_ms"),
    (put("stage_ms = [\n    [1, 2.0],\n    [4, 3.0]\n]\n", ""), "[[devices]]#2",
     "curved holds a stage but has no stage_ms", "stage_ms = [[rows"),
    (lambda text: put('draft = "board1"', 'draft = "curved"')(put("draft_ms = [[1, 4.0]]\n", "")(text)),
     'draft = "curved"', "curved holds the draft but has no draft_ms", "draft_ms = [[rows"),
    (put("tflop_s = 5\n", ""), "[[devices]]", "belong together", "clusters.md"),
    (put("draft_ms = [[1, 4.0]]", "draft_ms = [[1, 4.0]]\nspeed = 2"), "[[devices]]#2", "in one way", "clusters.md"),
    (put("draft_ms = [[1, 4.0]]", "draft_ms = [[1, 4.0]]\noverhead_ms = 2"), "[[devices]]#2",
     "overhead_ms goes with bandwidth_gb_s", "clusters.md"),
    (put("layers = 12", "layers = 2"), "layers = [4", "for 3 stages and 2 layers", "add up"),
    (lambda text: put("layers = [4, 5, 3]\n", "")(put("layers = 12", "layers = 2")(text)), "stages =",
     "2 layers cannot be cut into 3 stages", "fewer stages"),
    (put("hidden = 4096\n", ""), "[target]", "target.hidden: this setting is missing", "clusters.md"),
    (put('kind = "modelled"', 'kind = "guessed"'), 'kind = "guessed"', "'modelled' or 'measured'", "clusters.md"),
    (put('stages = ["board0", "board1", "curved"]', "stages = []"), "stages = []", "at least 1", "clusters.md"),
]


def line_that_begins(text: str, start: str) -> int:
    """start: how the line begins; "#2" at its end: the second such line. Empty: the first line of all."""
    start, _, number = start.partition("#")
    inside = False
    found = []
    for index, line in enumerate(text.splitlines(), 1):
        if line.startswith(start) and not inside:
            found.append(index)
        inside ^= line.count('"""') % 2 == 1
    return found[int(number or 1) - 1]


@pytest.mark.parametrize(("edit", "line", "says", "way_out"), REFUSALS, ids=[case[2][:40] for case in REFUSALS])
def test_what_cannot_be_is_refused_with_its_line(edit: Edit, line: str, says: str, way_out: str) -> None:
    text = edit(GOOD)
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert f"test.toml, line {line_that_begins(text, line)}: " in caught.value.message
    assert says in caught.value.message and way_out in (caught.value.hint or "")


def test_the_good_one_is_good() -> None:
    assert parse(GOOD).name == "three boards"


@pytest.mark.parametrize("table", ["cluster", "placement"])
def test_a_table_that_is_missing(table: str) -> None:
    with pytest.raises(UsageError, match=rf"test.toml, line 1: {table}: this setting is missing"):
        parse(drop(table)(GOOD.replace("[placement]\nlatency_ms = 7\n", "")))


@pytest.mark.parametrize(("text", "line"), [("[cluster\n", 1), ("\n= 3", 2),
                                            (GOOD + "stages = 5\n", GOOD.count("\n") + 1)])
def test_what_is_not_toml(text: str, line: int) -> None:
    with pytest.raises(UsageError, match=rf"test.toml is not TOML: .*line {line}"):
        parse(text)


def test_no_such_preset_and_no_such_file(tmp_path: Path) -> None:
    for name in ("gpus-9", tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(UsageError) as caught:
            Cluster.load(name)
        assert str(name) in caught.value.message and "edge-5, gpus-14, gpus-8, home-6" in (caught.value.hint or "")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read the cluster"):
        Cluster.load(tmp_path / "bytes.toml")


def test_a_draft_that_nobody_placed_is_refused_when_it_is_asked() -> None:
    """Without it the file is good: pp has no draft, and n-gram needs no model."""
    cluster = parse(put('draft = "board1"\n', "")(drop("draft")(GOOD)))
    with pytest.raises(UsageError, match="no draft is described") as caught:
        cluster.draft_seconds(1, 0)
    assert "[draft]" in str(caught.value)
    curves = unit_cluster(2).text.replace('draft = "drafter"\n', "")
    with pytest.raises(UsageError, match="has no draft_ms"):
        parse(curves).check_draft()


def profiles_refused(folder: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse(text, folder)
    return caught.value


def test_profiles_that_cannot_be_used_are_named_with_the_line(folder: Path) -> None:
    error = profiles_refused(folder, PROFILED.replace('"here.json"\nspeed', '"there.json"\nspeed'))
    line = line_that_begins(PROFILED, 'profile =#2')
    assert f"test.toml, line {line}: cannot read the profile" in error.message and "fullpipe profile" in str(error.hint)
    profile(num_layers=13).save(folder / "there.json")
    error = profiles_refused(folder, PROFILED.replace('"here.json"\nspeed', '"there.json"\nspeed'))
    assert f"test.toml, line {line}: this profile is of a model of 13 layers, the one before of 12" in error.message
    profile(drafts=False).save(folder / "there.json")
    error = profiles_refused(folder, PROFILED.replace('"here.json"\nspeed', '"there.json"\nspeed'))
    assert f"test.toml, line {line}: fast holds the draft, but its profile has none" in error.message
    assert "--draft" in str(error.hint)


def test_what_is_profiled_must_fit_too(folder: Path) -> None:
    """Seven layers of 1 GB and an embedding of 0.5."""
    error = profiles_refused(folder, PROFILED.replace("memory_gb = 9", "memory_gb = 7"))
    assert f"line {line_that_begins(PROFILED, '[[devices]]')}: this0 has 7 GB" in error.message
    assert "take 7.5 GB" in error.message


# ---- line_of -------------------------------------------------------------------------------------------------

PLACES: list[tuple[list[Any], str]] = [
    (["cluster", "kind"], 'kind = "modelled"'), (["target", "hidden"], "hidden = 4096"),
    (["draft", "hidden"], "hidden = 2048"), (["devices", 0, "count"], "count = 2"),
    (["devices", 1, "draft_ms", 0, 1], "draft_ms = [[1, 4.0]]"), (["links", "latency_ms"], "latency_ms = 1.0"),
    (["links", "pair", 1, "latency_ms"], "latency_ms = 0.5"), (["placement", "layers", 2], "layers = [4, 5, 3]"),
]


@given(order=st.permutations(range(7)), inner=st.integers(0, 1000), blanks=st.integers(0, 3))
def test_lines_are_found_wherever_they_stand(order: list[int], inner: int, blanks: int) -> None:
    """Tables in any order that TOML allows, the settings of each in any order."""
    blocks = re.split(r"(?m)^(?=\[(?!placement\]\nlatency))", GOOD)[1:]
    assert len(blocks) == 9
    first, second = (index for index, block in enumerate(blocks) if block.startswith("[[links.pair"))
    assert (first, second) == (6, 7)
    joined = [*blocks[:3], blocks[3] + blocks[4], blocks[5], blocks[6] + blocks[7], blocks[8]]  # blocks of one list
    text = "\n".join("\n" * blanks + shuffled(joined[index], inner) for index in order)
    assert parse(text).links == parse(GOOD).links
    lines = text.splitlines()
    for place, wanted in PLACES:
        assert lines[line_of(text, place) - 1] == wanted


def shuffled(block: str, seed: int) -> str:
    """The settings of a block in another order; only of blocks whose settings have a line each."""
    if '"""' in block or "[\n" in block or block.count("[[") > 1:
        return block
    header, *settings = block.strip().splitlines()
    random.Random(seed).shuffle(settings)
    return "\n".join([header, *settings]) + "\n"
