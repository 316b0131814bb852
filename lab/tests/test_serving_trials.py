"""The kill test and the soak (studies.serving): how they plan, read answers and judge. Nothing is started here."""

from __future__ import annotations

import json
from itertools import groupby, pairwise
from typing import Any

import pytest

from fullpipe_lab.receipts import study_receipt
from fullpipe_lab.report import render
from fullpipe_lab.studies.serving import host_kills, kills, soak
from fullpipe_lab.studies.serving.kills import Blow, Strike, note_first_texts, plan
from fullpipe_lab.studies.serving.processes import Footprint, Reply, _take, station_names
from fullpipe_lab.studies.serving.soak import (
    bad_requests,
    good_ask,
    leftover_faults,
    log_faults,
    memory_fault,
    status_fault,
)
from fullpipe_lab.studies.serving.under_load import COMMON, asks

NAMES = station_names(2)


def planned(number: int = 100, **more: Any) -> list[Strike]:
    return plan(number, NAMES, **{"hangs": 0.1, "rebuilding": 0.15, "seed": 1} | more)


def test_a_plan_is_drawn_from_its_seed() -> None:
    assert planned() == planned() != planned(seed=2)
    assert planned(5) == planned()[:5]


def test_every_station_is_struck_once_in_each_round() -> None:
    victims = [strike.victim for strike in planned(99)]
    assert NAMES == ["stage 0", "stage 1", "draft"]
    for place in range(0, 99, 3):
        assert sorted(victims[place:place + 3]) == sorted(NAMES)


def test_a_short_plan_has_a_hang_and_a_strike_while_rebuilding() -> None:
    assert [(one.signal, one.when) for one in planned(3)][1:] == [("SIGSTOP", "serving"), ("SIGKILL", "rebuilding")]
    mild = planned(hangs=0.0, rebuilding=0.0)
    assert {(one.signal, one.when) for one in mild} == {("SIGKILL", "serving")}


@pytest.mark.parametrize("seed", range(8))
def test_strikes_leave_time_for_tokens(seed: int) -> None:
    """Never more than two in a row without, but for the third of all; and what is being started is never stopped."""
    strikes = planned(200, seed=seed, rebuilding=0.6, hangs=0.5)
    early = [one.when == "rebuilding" or one.pause_s < kills._REST_S[0] for one in strikes]
    assert max(len(list(run)) for is_early, run in groupby(early) if is_early) <= 3
    assert all(one.signal == "SIGKILL" for one in strikes if one.when == "rebuilding")


def test_what_is_asked_is_the_same_at_any_time_and_of_many_kinds() -> None:
    assert asks(20) == asks(20) and len({one.name for one in asks(20)}) == 20
    bodies = [one.body for one in asks(20)]
    assert {body["temperature"] == 0 for body in bodies} == {True, False}
    assert {bool(body.get("stream")) for body in bodies} == {True, False}
    assert sum(COMMON in json.dumps(body) for body in bodies) > 2


def blow(at_s: float, unready_s: float | None) -> Blow:
    return Blow(0, "draft", "SIGKILL", "serving", "ready", at_s, 6, 3, 0.1, unready_s)


def test_the_first_text_after_a_blow() -> None:
    """What was said before it does not count, even if it came late; nor what came after another blow."""
    blows = [blow(10.0, 3.0), blow(20.0, None), blow(22.0, 3.0), blow(26.0, 1.0), blow(30.0, 2.0)]
    note_first_texts(blows, [9.0, 10.2, 14.0, 15.0, 21.0, 26.5, 28.0])
    assert [one.token_s for one in blows] == [4.0, None, None, 2.0, None]


def chunk(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **choice}]}


def test_streamed_and_whole_answers_read_alike() -> None:
    heard: list[float] = []
    streamed, whole = Reply(), Reply()
    for piece in (chunk(delta={"role": "assistant", "content": ""}),
                  chunk(delta={"content": "He"}, logprobs={"content": [{"token": "H"}, {"token": "e"}]}),
                  chunk(delta={"content": "y"}, logprobs={"content": [{"token": "y"}]}),
                  chunk(delta={}, finish_reason="stop"), {"choices": [], "usage": {"completion_tokens": 3}}):
        _take(streamed, piece, heard.append)
    said = {"content": [{"token": letter} for letter in "Hey"]}
    _take(whole, chunk(message={"content": "Hey"}, logprobs=said, finish_reason="stop")
          | {"usage": {"completion_tokens": 3}}, heard.append)
    assert not streamed.differs(whole) and len(heard) == 3
    assert (streamed.texts, streamed.reasons, streamed.tokens) == ({0: "Hey"}, {0: "stop"}, 3)
    whole.texts[0] = "Hay"
    assert "texts" in streamed.differs(whole)


def test_an_error_in_a_stream_fails_the_reply() -> None:
    reply = Reply()
    _take(reply, {"error": {"message": "the request failed"}}, lambda now: None)
    assert "the request failed" in reply.error


@pytest.mark.parametrize(("status", "retry_after", "right"), [
    (200, None, True), (400, None, True), (429, "1", True), (429, None, False), (503, "1", True), (503, None, False),
    (500, "1", False), (502, None, False)])
def test_which_statuses_are_never_right(status: int, retry_after: str | None, right: bool) -> None:
    assert (status_fault(status, retry_after) == "") is right


def test_memory_may_warm_up_but_not_climb() -> None:
    mib = float(2**20)
    flat = [100 * mib] * 4 + [300 * mib] * 8
    assert memory_fault("server", flat) == ""
    assert memory_fault("server", [*flat[:8], *[330 * mib] * 4]) == ""  # 5% + 16 MB are 31 MB
    assert "332.0 MB" in memory_fault("server", [*flat[:8], *[332 * mib] * 4])
    with pytest.raises(ValueError, match="too few"):
        memory_fault("server", flat[:5])


def test_files_and_threads_come_back() -> None:
    def held(fds: int, threads: int) -> Footprint:
        return Footprint(0, 0, fds, threads)

    before = {"server": held(14, 5), "draft": held(11, 6)}
    assert leftover_faults(before, {"server": held(14, 9), "draft": held(10, 6)}) == []
    faults = leftover_faults(before, {"server": held(15, 10), "draft": held(11, 7)})
    assert [fault.split()[0] for fault in faults] == ["draft", "server", "server"]
    assert leftover_faults(before, {"server": held(14, 5)}) == ["draft is gone"]


def test_errors_in_the_log_are_faults() -> None:
    quiet = "2026 WARNING uvicorn.error: Invalid HTTP request received.\nfinishing what runs\n"
    assert log_faults(quiet) == []
    loud = quiet + "2026 ERROR fullpipe.server: x failed\nTraceback (most recent call last):\n"
    assert "2 errors" in log_faults(loud)[0]


def test_bad_input_is_of_many_sorts_and_good_input_is_good() -> None:
    from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest
    sorts = bad_requests()
    assert len({(one.path, one.content) for one in sorts}) > 45
    draw = soak.random.Random(5)
    for _ in range(60):
        what = good_ask(draw)
        (ChatRequest if what.chat else CompletionRequest).model_validate(what.body)


# ---- hosts that are lost ---------------------------------------------------------------------------------

HOSTS = ["h1", "h2", "h3"]


def test_hosts_are_struck_in_every_way_in_each_round_and_the_head_is_never_lost() -> None:
    strikes = host_kills.plan(60, HOSTS, seed=1)
    assert strikes == host_kills.plan(60, HOSTS, seed=1) != host_kills.plan(60, HOSTS, seed=2)
    for place in range(0, 60, 5):
        assert {one.kind for one in strikes[place:place + 5]} == set(host_kills.KINDS)
    assert {one.where for one in strikes if one.kind == "host"} == {("h2",), ("h3",)}
    assert {one.where for one in strikes if one.kind == "cut"} == {("h1", "h2"), ("h1", "h3"), ("h2", "h3")}


@pytest.mark.parametrize("seed", range(4))
def test_hosts_are_never_struck_early_twice_in_a_row_nor_stopped_while_they_start(seed: int) -> None:
    strikes = host_kills.plan(200, HOSTS, early=0.9, seed=seed)
    early = [one.early for one in strikes]
    assert any(early) and not early[0] and not any(a and b for a, b in pairwise(early))
    assert all(one.kind in host_kills.EARLY for one in strikes if one.early)
    assert not any(one.early for one in host_kills.plan(200, HOSTS, early=0.0, seed=seed))


def test_a_stall_is_the_longest_time_without_text_before_the_next_strike() -> None:
    blows = [host_kills.Blow(0, "kill", "h2", False, "ready", 10.0, 4, 4, noticed_s=0.5, ready_s=4.0),
             host_kills.Blow(1, "loss", "h1-h2", False, "ready", 20.0, 4, 4)]
    host_kills.note_texts(blows, [9.9, 10.1, 15.0, 15.5, 20.5, 21.0, 24.0], end=30.0)
    assert [one.stall_s for one in blows] == pytest.approx([4.9, 3.0])
    assert [one.token_s for one in blows] == [5.0, None]


def test_only_strikes_that_must_be_noticed_are_faults_where_they_are_not() -> None:
    kinds = {kind: host_kills.Blow(0, kind, "h2", False, "ready", 0.0, 1, 1) for kind in host_kills.KINDS}
    assert [kind for kind, blow in kinds.items() if not host_kills._must_be_noticed(blow)] == ["loss"]
    assert not host_kills._must_be_noticed(host_kills.Blow(0, "cut", "h1-h2", True, "rebuilding", 0.0, 1, 1))


def test_the_page_of_lost_hosts_tells_medians_and_worst_cases() -> None:
    blows = [host_kills.Blow(0, "kill", "h2", False, "ready", 0.0, 4, 4, noticed_s=at, ready_s=4.0) for at in (1, 2, 9)]
    found = [host_kills._of_kind(kind, [one for one in blows if one.kind == kind]) for kind in host_kills.KINDS]
    heads, rows = host_kills.table_of({"kinds": found})
    assert rows[0][:4] == ["kill", "3", "3", "2.0 / 9.0"] and len(heads) == len(rows[0])
    results = {"strikes": 3, "early": 0, "requests": 9, "tokens": 99, "struck_requests": 3,
               "most_strikes_of_a_request": 1, "different_or_failed": 0, "faults": []}
    receipt = study_receipt("serving_host_kills", results, [])
    page = render("host_kills.md.j2", receipt=receipt, heads=heads, rows=rows)
    assert "| kill | 3 | 3 | 2.0 / 9.0 |" in page and "No faults" in page
    results["faults"] = ["strike 2 is not noticed"]
    assert "**fault**: strike 2" in render("host_kills.md.j2", receipt=receipt, heads=heads, rows=rows)
