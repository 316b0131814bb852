"""The Chrome trace says what the events say, in the form that viewers read."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from fullpipe.errors import UsageError
from fullpipe.events import Died, Emitted, Launched
from fullpipe.messages import Event, Failed, Landed
from fullpipe.trace.chrome import chrome_trace, write_chrome_trace
from recorded import recorded, uneven


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return recorded("fullpipe", accuracy=0.4, costs=uneven)


@pytest.fixture(scope="module")
def records(events: list[Event]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chrome_trace(events)["traceEvents"]
    return found


def of(records: list[dict[str, Any]], *phases: str) -> list[dict[str, Any]]:
    return [record for record in records if record["ph"] in phases]


def threads(records: list[dict[str, Any]]) -> dict[int, str]:
    return {record["tid"]: record["args"]["name"] for record in records if record["name"] == "thread_name"}


def test_a_track_per_station_in_order(records: list[dict[str, Any]]) -> None:
    names = threads(records)
    order = {record["tid"]: record["args"]["sort_index"] for record in records
             if record["name"] == "thread_sort_index"}
    assert [names[thread] for thread in sorted(names, key=order.__getitem__)] == [
        "engine", "draft", "stage 0", "stage 1", "stage 2", "stage 3"]


def test_a_slice_per_leg_that_had_rows(events: list[Event], records: list[dict[str, Any]]) -> None:
    names = threads(records)
    wanted = Counter((leg.station, f"flight {event.flight}", len(leg.nodes)) for event in events
                     if isinstance(event, Landed) for leg in event.legs if leg.nodes)
    stages = [record for record in of(records, "X") if record["cat"] == "stage"]
    assert Counter((names[one["tid"]], one["name"], one["args"]["rows"]) for one in stages) == wanted
    launched = {id: (token, position) for event in events if isinstance(event, Launched)
                for id, token, position in zip(event.nodes, event.tokens, event.positions)}
    for one in stages:
        args = one["args"]
        assert args["live"] + args["dead"] == args["rows"] and one["dur"] > 0
        assert [launched[node] for node in args["nodes"]] == list(zip(args["tokens"], args["positions"]))
    assert sum(one["args"]["dead"] for one in stages) > 0


def test_slices_of_a_track_do_not_overlap(records: list[dict[str, Any]]) -> None:
    tracks = defaultdict(list)
    for one in of(records, "X"):
        tracks[one["tid"]].append((one["ts"], one["ts"] + one["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(end <= start + 0.01 for (_, end), (start, _) in itertools.pairwise(spans))


def test_arrows_follow_a_node_from_its_draft_call_through_the_stages(records: list[dict[str, Any]]) -> None:
    names = threads(records)
    slices = defaultdict(list)
    for one in of(records, "X"):
        slices[one["tid"]].append(one)
    flows = defaultdict(list)
    for record in of(records, "s", "t", "f"):
        # A viewer ties it to the one slice of its track that holds its time: one with this node in it.
        [home] = [one for one in slices[record["tid"]] if one["ts"] < record["ts"] < one["ts"] + one["dur"]]
        if home["cat"] == "stage":
            assert record["id"] in home["args"]["nodes"]
        flows[record["id"]].append(record)
    whole = 0
    for steps in flows.values():
        assert [step["ph"] for step in steps] == ["s", *"t" * (len(steps) - 2), "f"]
        assert [step["ts"] for step in steps] == sorted(step["ts"] for step in steps)
        stations = [names[step["tid"]] for step in steps]
        assert stations == [*(["draft"] if stations[0] == "draft" else []),
                            *(f"stage {k}" for k in range(len(stations) - (stations[0] == "draft")))]
        whole += stations == ["draft", "stage 0", "stage 1", "stage 2", "stage 3"]
    assert whole > 5


def test_marks_of_hits_misses_and_cancellations(events: list[Event], records: list[dict[str, Any]]) -> None:
    marks = of(records, "i")
    assert {threads(records)[mark["tid"]] for mark in marks} == {"engine"}
    emitted = [event for event in events if isinstance(event, Emitted)]
    kinds = [event.fate for event in emitted]
    assert {*kinds} == {"hit", "miss", "last"}
    told = [mark for mark in marks if mark["name"] in ("hit", "miss", "last")]
    assert [mark["name"] for mark in told] == kinds
    assert [mark["args"]["token"] for mark in told] == [event.token for event in emitted]
    landed = {node: event.time for event in events if isinstance(event, Landed) for node in event.nodes}
    launched = {node for event in events if isinstance(event, Launched) for node in event.nodes}
    cancelled = [node for event in events if isinstance(event, Died) for node in event.nodes
                 if node in launched and landed.get(node, math.inf) > event.time]
    assert [node for mark in marks if mark["name"] == "cancel" for node in mark["args"]["nodes"]] == cancelled
    assert cancelled


def test_it_is_strict_json_and_leaves_nothing_else_behind(events: list[Event], tmp_path: Path) -> None:
    odd = [*events, Emitted(999.0, 0, 1, 2, 3, "hit", math.inf), Failed(999.0, "stage 1", 'said "no"\n')]
    write_chrome_trace(odd, tmp_path / "t.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads((tmp_path / "t.json").read_text(), parse_constant=refuse)
    assert told["traceEvents"][-1]["args"] == {"station": "stage 1", "reason": 'said "no"\n'}
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    assert all(record["ts"] >= 0 for record in told["traceEvents"] if record["ph"] != "M")


def test_what_cannot_be_drawn_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("old")
    with pytest.raises(UsageError, match="shows no work"):
        write_chrome_trace([], path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match=r"cannot write the trace .*nowhere"):
        write_chrome_trace(recorded(tokens=3), tmp_path / "nowhere" / "t.json")
