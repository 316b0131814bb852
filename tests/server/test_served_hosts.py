"""What the page and /metrics are told of several hosts is what the placing knows, and what has happened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from placed import Placed
from prometheus_client.parser import text_string_to_metric_families

from fullpipe.events import Attached, Emitted, Finished
from fullpipe.messages import Event
from fullpipe.server.hosts import Hosts, station_and_host
from fullpipe.server.live import Live
from fullpipe.server.metrics import Metrics
from fullpipe.supervision import Observer, Status

CALM = Status("ready", 0, 0, 0, 0, 0)
SILENT = "stage 1 on h2 failed: no sign of life for 3 s"


class Stand:
    """Hosts with a clock, and who shows them."""

    def __init__(self, placed: Placed | None = None) -> None:
        self.now = 1000.0
        self.placed = placed or Placed()
        self.hosts = Hosts(self.placed, clock=lambda: self.now)
        self.metrics = Metrics("m", hosts=self.hosts)
        self.observers: list[Observer] = [self.hosts, self.metrics]

    def fail(self, station: str = "stage 1 on h2", reason: str = SILENT) -> None:
        for observer in self.observers:
            observer.on_restart(station, reason)

    def recut(self, why: str) -> None:
        for observer in self.observers:
            observer.on_recut(why)

    def tell(self, *events: Event) -> None:
        for event in events:
            self.hosts(event)

    def told(self) -> list[str]:
        return [text for _, _, text in self.hosts.picture()["happened"]]

    def states(self) -> dict[str, str]:
        return {host["name"]: host["state"] for host in self.hosts.picture()["hosts"]}

    def metric(self) -> dict[str, float]:
        return dict(samples(self.metrics))


def samples(metrics: Metrics) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(metrics.render(CALM)[0].decode()):
        for sample in family.samples:
            rest = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if key != "model_name")
            yield sample.name + (f"{{{rest}}}" if rest else ""), sample.value


def token(time: float, request: int) -> Emitted:
    return Emitted(time, request, 1, 1, 1, "hit")


def test_hosts_links_and_the_plan_are_shown_as_they_are_known() -> None:
    picture = Stand().hosts.picture()
    assert picture["hosts"][0] == {"name": "h1", "address": "10.0.0.1", "state": "ready", "why": "",
                                   "stations": ("stage 0", "draft"), "head": True}
    assert ["h1", "h2", 10.0, 940.0, True] in picture["links"]
    assert {(a, b) for a, b, *_, used in picture["links"] if used} == {("h1", "h2"), ("h2", "h3"), ("h3", "h1")}
    assert (picture["planned_ms"], picture["seen_ms"], picture["happened"]) == (23.0, None, [])


def test_a_lost_host_is_told_step_by_step() -> None:
    stand = Stand()
    stand.fail()
    assert stand.states() == {"h1": "ready", "h2": "failed", "h3": "ready"}  # nobody knows yet whether it is lost
    stand.now += 1
    stand.placed.lose("h2")
    assert stand.states() == {"h1": "ready", "h2": "lost", "h3": "ready"}
    stand.now += 2.5
    stand.tell(Attached(0))
    assert stand.hosts.picture()["happened"] == [
        [1000.0, "bad", SILENT], [1001.0, "bad", "lost h2: it does not answer"],
        [1003.5, "good", "going on with h1, h3 after 3.5 s: 31.0 ms a token planned"]]
    assert {(a, b) for a, b, *_ in stand.hosts.picture()["links"]} == {("h1", "h3"), ("h3", "h1")}


def test_a_host_whose_process_died_is_ready_again_with_the_next_pipeline() -> None:
    stand = Stand()
    stand.fail()
    stand.fail("engine", "h3 has not answered within 60 s")
    assert stand.states()["h2"] == "failed"
    stand.now += 4
    stand.tell(Attached(0))
    assert set(stand.states().values()) == {"ready"}
    assert stand.told()[-1] == "going on with h1, h2, h3 after 4.0 s: 23.0 ms a token planned"


def test_a_host_that_comes_back_is_there_and_then_used() -> None:
    stand = Stand()
    stand.placed.lose("h2")
    assert stand.told() == ["lost h2: it does not answer"]
    stand.placed.gain("h2")
    assert stand.told()[1:] == ["h2 is there"]
    stand.recut("h2 can be had: 23.0 ms a token instead of 31.0")
    stand.placed.replan("h1", "h2", "h3", ms=None)
    stand.now += 2
    stand.tell(Attached(0))
    assert stand.told()[2:] == ["going over to another plan: h2 can be had: 23.0 ms a token instead of 31.0",
                                "going on with h1, h2, h3 after 2.0 s"]
    assert stand.hosts.picture()["planned_ms"] is None


def test_hosts_stand_in_the_order_of_their_names_lost_or_not() -> None:
    stand = Stand(Placed(spare=("h10", "h9", "a")))
    stand.placed.lose("h2")
    assert list(stand.states()) == ["a", "h1", "h2", "h3", "h9", "h10"]


def test_only_the_newest_lines_are_shown() -> None:
    stand = Stand()
    for k in range(100):
        stand.fail(reason=f"failure {k}")
    assert stand.told() == [f"failure {k}" for k in range(92, 100)]


def test_the_time_per_token_that_is_seen_is_between_tokens_of_one_request_on_this_pipeline() -> None:
    stand = Stand()
    stand.tell(token(0, 1), token(0.03, 2), token(0.04, 1), token(0.09, 2), token(0.09, 2))
    assert stand.hosts.seen_s == pytest.approx((0.04 + 0.06 + 0) / 3)
    stand.tell(Finished(0.1, 2, "stop"), token(50, 2), token(50.02, 2))
    assert stand.hosts.seen_s == pytest.approx(0.02)  # the others are long ago
    stand.tell(Attached(60))
    assert stand.hosts.seen_s is None
    stand.tell(token(70, 2), token(70.1, 2))
    assert stand.hosts.seen_s == pytest.approx(0.1)  # what the exchange took does not count


@pytest.mark.parametrize(("label", "told"), [
    ("stage 1", ("stage 1", "")), ("engine", ("engine", "")), ("draft on h1", ("draft", "h1")),
    ("stage 0 on h1, stage 2 on h3, draft on h1", ("stage 0, stage 2, draft", "h1, h3")),
])  # fmt: skip
def test_a_label_says_station_and_host(label: str, told: tuple[str, str]) -> None:
    assert station_and_host(label) == told


def test_metrics_of_hosts() -> None:
    stand = Stand()
    stand.placed.lose("h2")
    stand.fail()
    stand.fail("stage 0, stage 1", "not ready")
    stand.recut("h2 can be had")
    stand.tell(token(0, 1), token(0.04, 1))
    told = stand.metric()
    assert {name: value for name, value in told.items() if name.startswith("fullpipe_host_up")} == {
        "fullpipe_host_up{host=h1}": 1, "fullpipe_host_up{host=h2}": 0, "fullpipe_host_up{host=h3}": 1}
    assert told["fullpipe_link_latency_seconds{from=h1,to=h3}"] == 0.01
    assert told["fullpipe_link_bandwidth_bytes_per_second{from=h3,to=h1}"] == 117.5e6
    assert not any("h2" in name for name in told if "link" in name)
    assert told["fullpipe_restarts_total{host=h2,station=stage 1}"] == 1
    assert told["fullpipe_restarts_total{host=,station=stage 0, stage 1}"] == 1
    assert told["fullpipe_recuts_total"] == 1
    assert told["fullpipe_planned_seconds_per_token"] == 0.031
    assert told["fullpipe_seen_seconds_per_token"] == pytest.approx(0.04)


def test_a_link_without_bound_has_no_bandwidth_on_the_page() -> None:
    stand = Stand()
    stand.placed.bandwidth = math.inf
    assert all(mbit is None for _, _, _, mbit, _ in stand.hosts.picture()["links"])
    assert stand.metric()["fullpipe_link_bandwidth_bytes_per_second{from=h3,to=h1}"] == math.inf


def test_on_one_machine_nothing_is_said_of_hosts() -> None:
    told = dict(samples(Metrics("m")))
    assert told["fullpipe_recuts_total"] == 0
    assert not any("host" in name or "link" in name or "planned" in name for name in told)
    assert Live(lambda: 1, lambda: CALM, str).picture()["hosts"] is None


def test_the_picture_follows_a_pipeline_whose_number_of_stages_changes() -> None:
    stand = Stand()
    placed = stand.placed

    def num_stages() -> int:
        assert placed.plan
        return len(placed.plan.stages)

    live = Live(num_stages, lambda: CALM, str, hosts=stand.hosts)
    names: list[Any] = [stage["name"] for stage in live.picture()["stages"]]
    assert names == ["stage 0", "stage 1", "stage 2"]
    placed.lose("h2")
    live(Attached(0))
    picture = live.picture()
    assert [stage["name"] for stage in picture["stages"]] == ["stage 0", "stage 1"]
    assert picture["hosts"]["hosts"][1]["why"] == "it does not answer"
